//! What the shim promised of a pod, for whoever compares it with the kernel's
//! word (crate `posture`).

use std::sync::{Mutex, PoisonError};

use casemate_cgroup::Cgroup;
use casemate_posture as posture;
use casemate_spec::{MountSpec, Tightened};

use super::{Container, Sandbox, learner};
use crate::host::lockdown;
use crate::plan;

/// As in `sandbox-agent/src/confine.rs`: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH,
/// FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, SYS_CHROOT, SYS_ADMIN.
const AGENT: u64 = 0x1ff | 1 << 18 | 1 << 21;
/// What a forker has beside its container's: SETGID, SETUID.
const FORKER: u64 = 1 << 6 | 1 << 7;
/// What a filter takes without no_new_privs.
const SYS_ADMIN: u64 = 1 << 21;

fn filters(names: &[&str]) -> Vec<String> {
    let programs = names.iter().filter_map(|name| plan::program(name).ok());
    programs.map(|program| posture::hash(&program)).collect()
}

impl Sandbox {
    /// The pod's part, containers left out.
    pub fn promise(&self) -> posture::Promise {
        posture::Promise {
            shim: posture::Process {
                pid: std::process::id(),
                uid: 0,
                capabilities: lockdown::kept(&self.cgroup),
                no_new_privs: true,
                filters: filters(&["shim"]),
            },
            agent: posture::Process {
                pid: self.agent.pid,
                uid: self.range.base(),
                capabilities: AGENT,
                no_new_privs: false,
                filters: filters(&["agent"]),
            },
            pause: self.pause.get().map(|pause| posture::Process {
                pid: pause.pid(),
                // Its memory is the agent's, and so is its id.
                uid: self.range.base(),
                capabilities: 0,
                no_new_privs: true,
                filters: filters(&["agent", "pause"]),
            }),
            containers: Vec::new(),
            forkers: Vec::new(),
            learners: Vec::new(),
        }
    }
}

/// Limits as they were set last.
pub type Kept = Mutex<posture::Limits>;

fn limits(cgroup: &Cgroup) -> posture::Limits {
    posture::Limits::read(cgroup.leaf_dirs())
}

/// As they are once they were set.
pub fn kept(cgroup: &Cgroup) -> Kept {
    Mutex::new(limits(cgroup))
}

impl Container {
    /// The agent's; the one that asks, where the container is learned from; and the
    /// profile's in the form that was installed.
    fn filters(&self) -> Vec<String> {
        let effective = &self.spec.effective;
        let mut all = match effective.learn {
            true => filters(&["agent", "learn"]),
            false => filters(&["agent"]),
        };
        match self.filters.asks.as_slice() {
            [] => all.extend(filters(&[&effective.profile_name])),
            asks => all.push(posture::hash(asks)),
        }
        all
    }

    /// The process that writes its calls down, where there is one.
    pub fn learner_promise(&self, pod: &Sandbox) -> Option<posture::Process> {
        let learner = self.learner()?;
        Some(posture::Process {
            pid: learner.pid,
            // Its memory is the agent's, and so is its id.
            uid: pod.range.base(),
            capabilities: learner::CAPS,
            no_new_privs: true,
            filters: filters(&["agent", "learner"]),
        })
    }

    /// Limits were changed by leave.
    pub fn limits_changed(&self) {
        let mut kept = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = limits(&self.cgroup);
    }

    /// The container's part.
    pub fn promise(&self) -> posture::Container {
        let process = &self.spec.process;
        let own = !process.no_new_privs && !self.filters.own.0.is_empty();
        let kept = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        posture::Container {
            id: self.id.clone(),
            init: self.init_pid,
            forker: self.forker_pid,
            root: self.container_root,
            capabilities: process.caps.bounding,
            forker_capabilities: FORKER | if own { SYS_ADMIN } else { 0 },
            no_new_privs: process.no_new_privs,
            filters: self.filters(),
            mounts: mounts(&self.spec),
            masked: self.spec.masked_paths.clone(),
            cgroups: self
                .cgroup
                .leaf_dirs()
                .map(|dir| dir.display().to_string())
                .collect(),
            limits: kept.clone(),
        }
    }
}

fn mounts(spec: &Tightened) -> Vec<posture::Mount> {
    let flags = |mount: &MountSpec| {
        let (own, all) = (&mount.flags.attrs, &mount.flags.recursive);
        [
            ("ro", own.ro || all.ro),
            ("nosuid", own.nosuid || all.nosuid),
            ("nodev", own.nodev || all.nodev),
            ("noexec", own.noexec || all.noexec),
        ]
        .into_iter()
        .filter(|(_, set)| *set)
        .map(|(name, _)| name.to_owned())
        .collect()
    };
    let mut all: Vec<_> = spec
        .mounts
        .iter()
        .map(|mount| posture::Mount {
            target: mount.destination.clone(),
            flags: flags(mount),
        })
        .collect();
    let root = if spec.readonly_rootfs {
        vec!["ro".to_owned()]
    } else {
        Vec::new()
    };
    all.push(posture::Mount {
        target: "/".to_owned(),
        flags: root,
    });
    all
}

//! What the shim promised of a pod, for whoever compares it with the kernel's
//! word (crate `posture`). All of it is what was set, and nothing is looked at for it.

use std::path::{Path, PathBuf};

use casemate_cgroup::Cgroup;
use casemate_posture as posture;
use casemate_protocol::capabilities::{AGENT, FORKER, LEARNER, SYS_ADMIN};
use casemate_spec::{MountKind, MountSpec};

use super::{Container, Sandbox, shared};
use crate::host::{ids, lockdown};
use crate::plan;

/// Of the runtime's own, beside bundles: locks, sockets, the pods' entries.
const RUN: &str = "/run/casemate";

fn filters(names: &[&str]) -> Vec<String> {
    let programs = names.iter().filter_map(|name| plan::program(name).ok());
    programs.map(|program| posture::hash(&program)).collect()
}

fn directories(cgroup: &Cgroup) -> Vec<String> {
    let shown = |dir: &Path| dir.display().to_string();
    cgroup.leaf_dirs().map(shown).collect()
}

impl Sandbox {
    /// The pod's part, containers left out. `files` are those that the shim may have
    /// open for them, and for their streams.
    pub fn promise(&self, files: impl Iterator<Item = PathBuf>) -> posture::Promise {
        let roots = self.hierarchy.roots().map(Path::to_owned);
        let files = files.chain(roots).map(|path| path.display().to_string());
        // A pod that is learned from has the directory of recordings open.
        let recordings = self.config.learn.directory.display().to_string();
        let own = [RUN.to_owned(), recordings].into_iter().chain(files);
        posture::Promise {
            shim: posture::Process {
                pid: std::process::id(),
                uid: 0,
                capabilities: lockdown::kept(),
                no_new_privs: true,
                filters: filters(&["shim"]),
                files: Some(own.collect()),
                ..posture::Process::default()
            },
            agent: posture::Process {
                pid: self.agent.pid,
                uid: self.range.base(),
                capabilities: AGENT,
                no_new_privs: false,
                filters: filters(&["agent"]),
                cgroups: directories(&self.cgroup),
                no_core: true,
                // It holds the ids for as long as it lives.
                files: Some(vec![ids::DIRECTORY.to_owned()]),
            },
            pause: self.pause.get().map(|pause| posture::Process {
                pid: pause.pid(),
                // Its memory is the agent's, and so is its id.
                uid: self.range.base(),
                capabilities: 0,
                no_new_privs: true,
                filters: filters(&["agent", "pause"]),
                cgroups: directories(&self.cgroup),
                no_core: true,
                files: Some(Vec::new()),
            }),
            users: rustix::fs::fstat(&self.userns).ok().map(|stat| stat.st_ino),
            root: Some(self.range.container_root()),
            network: posture::Network {
                namespace: self.network.identity(),
                guard: self
                    .network
                    .guard()
                    .map(|lines| lines.into_iter().map(posture::Rule::from).collect()),
            },
            containers: Vec::new(),
            forkers: Vec::new(),
            learners: Vec::new(),
        }
    }
}

impl Container {
    /// The agent's; the one that asks, where the container is learned from; and the
    /// profile's in the form that was installed.
    fn filters(&self) -> Vec<String> {
        let own = &self.filters;
        let binding = match own.asks.as_slice() {
            [] => &own.enforce,
            _ => &own.asks,
        };
        let mut all = filters(&["agent"]);
        let installed = [&own.learns, binding].into_iter();
        all.extend(
            installed
                .filter(|p| !p.is_empty())
                .map(|p| posture::hash(p)),
        );
        all
    }

    /// The process that writes its calls down, where there is one.
    pub fn learner_promise(&self, pod: &Sandbox) -> Option<posture::Process> {
        let learner = self.learner()?;
        Some(posture::Process {
            pid: learner.pid,
            // Its memory is the agent's, and so is its id.
            uid: pod.range.base(),
            capabilities: LEARNER,
            no_new_privs: true,
            filters: filters(&["agent", "learner"]),
            cgroups: directories(&pod.cgroup),
            no_core: true,
            // Of its callers: memory, for as long as it is read.
            files: Some(vec!["/proc".to_owned()]),
        })
    }

    /// The container's part.
    pub fn promise(&self, pod: &Sandbox) -> posture::Container {
        let process = &self.spec.process;
        let own = !process.no_new_privs && !self.filters.own.0.is_empty();
        let limits = self.cgroup.limits().into_iter();
        posture::Container {
            id: self.id.clone(),
            init: self.init_pid,
            forker: self.forker_pid,
            root: self.container_root,
            capabilities: process.caps.bounding,
            forker_capabilities: FORKER | if own { SYS_ADMIN } else { 0 },
            no_new_privs: process.no_new_privs,
            filters: self.filters(),
            last_filter: match self.filters.own.0.as_slice() {
                [] => None,
                own => Some(posture::hash(own)),
            },
            no_core: !self.config.secrets.core_dumps,
            landlock: pod.landlock,
            mounts: self.mounts(pod.shared.is_some()),
            no_other_mounts: true,
            masked: self.spec.masked_paths.clone(),
            readonly: self.spec.readonly_paths.clone(),
            cgroups: directories(&self.cgroup),
            limits: posture::Limits(
                limits
                    .map(|(file, value)| (file.display().to_string(), value))
                    .collect(),
            ),
        }
    }

    /// Those of the specification, and those that every container has.
    fn mounts(&self, shared: bool) -> Vec<posture::Mount> {
        let spec = &self.spec;
        let mut all: Vec<_> = spec.mounts.iter().map(|m| one(m, shared)).collect();
        let plain = |target: &str, flags: &[&str]| posture::Mount {
            target: target.to_owned(),
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            ..posture::Mount::default()
        };
        let has = |target: &str| spec.mounts.iter().any(|m| m.destination == target);
        if !has("/dev") {
            all.push(plain("/dev", &[]));
        }
        for (_, place) in shared::PLACES {
            if shared && !has(place) {
                all.push(plain(place, &[]));
            }
        }
        if spec.process.terminal {
            all.push(plain("/dev/console", &[]));
        }
        let root: &[(&str, bool)] = &[
            ("ro", spec.readonly_rootfs),
            ("nosuid", spec.process.no_new_privs),
            ("nodev", true),
        ];
        all.push(posture::Mount {
            target: "/".to_owned(),
            flags: set(root),
            ..posture::Mount::default()
        });
        all
    }
}

fn set(flags: &[(&str, bool)]) -> Vec<String> {
    let set = flags.iter().filter(|(_, set)| *set);
    set.map(|(name, _)| (*name).to_owned()).collect()
}

fn one(mount: &MountSpec, shared: bool) -> posture::Mount {
    let (own, all) = (&mount.flags.attrs, &mount.flags.recursive);
    let bind = mount.kind == MountKind::Bind;
    let fstype = match mount.kind {
        MountKind::Proc => "proc",
        MountKind::Sysfs => "sysfs",
        MountKind::Mqueue => "mqueue",
        MountKind::Devpts => "devpts",
        MountKind::Tmpfs => "tmpfs",
        // Of either version; a bind is of what its source is.
        MountKind::Cgroup | MountKind::Bind => "",
    };
    // The pod's memory takes the place of a tmpfs there, with its own flags.
    let given = shared && mount.kind == MountKind::Tmpfs && mount.destination == "/dev/shm";
    posture::Mount {
        target: mount.destination.clone(),
        flags: match given {
            true => Vec::new(),
            false => set(&[
                ("ro", own.ro || all.ro),
                ("nosuid", own.nosuid || all.nosuid),
                ("nodev", own.nodev || all.nodev),
                ("noexec", own.noexec || all.noexec),
            ]),
        },
        fstype: fstype.to_owned(),
        with_below: mount.flags.rbind || mount.kind == MountKind::Cgroup,
        receives: bind && mount.receives(),
    }
}

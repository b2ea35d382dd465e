//! The process of a container or an exec.

use std::fmt;

use oci_spec::runtime::{PosixRlimit, PosixRlimitType, Process};

use crate::caps::{self, Caps};
use crate::config::{Config, POD_IDS};
use crate::coverage::How;
use crate::error::{Refusal, one_line};
use crate::exec;
use crate::journal::Journal;
use crate::label;
use crate::load::LoadedProcess;
use crate::paths::plain_absolute;
use crate::rules::{APPARMOR, ID, PROCESS, SELINUX};
use crate::schedule::{self, Schedule};
use crate::secrets;
use crate::tighten::Tightened;
use crate::tightenings;

/// A resource limit, see getrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rlimit {
    /// `RLIMIT_*` number of the generic ABI (`asm-generic/resource.h`).
    pub resource: u32,
    /// Soft limit; `u64::MAX` is none.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is none.
    pub hard: u64,
}

/// What to execute, as whom and with what.
#[derive(Clone, PartialEq, Eq)]
pub struct ProcessSpec {
    /// Program and arguments; never empty.
    pub args: Vec<String>,
    /// `NAME=value` entries.
    pub env: Vec<String>,
    /// Absolute working directory in the container.
    pub cwd: String,
    /// User id in the container, below 65536.
    pub uid: u32,
    /// Group id in the container, below 65536.
    pub gid: u32,
    /// Supplementary groups, each below 65536.
    pub additional_gids: Vec<u32>,
    /// `process.user.umask`, at most 0o777.
    pub umask: Option<u32>,
    /// Capability sets, within the policy.
    pub caps: Caps,
    /// prctl(PR_SET_NO_NEW_PRIVS) before execve.
    pub no_new_privs: bool,
    /// Limits to set, at most one for each resource.
    pub rlimits: Vec<Rlimit>,
    /// `/proc/self/oom_score_adj`, -1000..=1000.
    pub oom_score_adj: Option<i32>,
    /// A terminal is wanted.
    pub terminal: bool,
    /// Rows and columns of the terminal.
    pub console_size: Option<(u16, u16)>,
    /// Profile to change to at execve, where the node can.
    pub apparmor_profile: Option<String>,
    /// Label of the process, where the node can.
    pub selinux_label: Option<String>,
    /// How it is scheduled.
    pub schedule: Schedule,
    /// What was changed or dropped, one line each.
    pub warnings: Vec<String>,
}

// Arguments and environments hold secrets: `{:?}` must not print them.
impl fmt::Debug for ProcessSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessSpec")
            .field("cwd", &self.cwd)
            .field("uid", &self.uid)
            .field("gid", &self.gid)
            .field("caps", &self.caps)
            .field("no_new_privs", &self.no_new_privs)
            .field("rlimits", &self.rlimits)
            .field("terminal", &self.terminal)
            .finish_non_exhaustive()
    }
}

/// Checks the process of an exec. It gets no more than its container has:
/// capabilities within the container's bounding set, its no_new_privs, its
/// limits and its labels. `terminal` is what the request says, which overrules
/// the document.
///
/// # Errors
/// The first rule that refuses it.
pub fn tighten_process(
    loaded: LoadedProcess,
    container: &Tightened,
    config: &Config,
    terminal: bool,
) -> Result<ProcessSpec, Refusal> {
    exec::admit(container, &config.exec, terminal)?;
    let LoadedProcess {
        process,
        warnings,
        fields,
    } = loaded;
    let mut journal = Journal::new(&fields, warnings)?;
    let own = &container.process;
    let profile = container.effective.profile;
    let limit = own.caps.bounding & container.effective.capabilities;
    let mut exec = check(
        &process,
        limit,
        own.no_new_privs || profile.forces_no_new_privs(),
        &mut journal,
    )?;
    exec::contain(&process, &exec, container, &config.exec)?;
    secrets::no_core_dumps(&mut exec, &config.secrets, &mut journal);
    exec.terminal = terminal;

    if process.capabilities().is_none() {
        exec.caps = own.caps.limited_to(limit);
    }
    for theirs in &own.rlimits {
        match exec
            .rlimits
            .iter_mut()
            .find(|r| r.resource == theirs.resource)
        {
            None => exec.rlimits.push(*theirs),
            Some(r) if r.hard > theirs.hard => {
                r.hard = theirs.hard;
                r.soft = r.soft.min(theirs.hard);
                journal.tighten(
                    tightenings::EXEC_LIMIT,
                    "a limit is beyond the container's; lowered to it",
                );
            }
            Some(_) => {}
        }
    }
    exec.schedule = schedule::check(&process, profile)?.within(&own.schedule, &mut journal);
    exec.oom_score_adj = match (exec.oom_score_adj, own.oom_score_adj) {
        (Some(asked), Some(has)) => Some(asked.max(has)),
        (asked, has) => asked.or(has),
    };
    // `check` takes labels as they are; the container's are known to work.
    if exec.apparmor_profile.is_some() && exec.apparmor_profile != own.apparmor_profile {
        let asked = exec.apparmor_profile.as_deref().unwrap_or_default();
        return Err(Refusal::new(
            &APPARMOR,
            "process.apparmorProfile",
            format!("{asked}, which the container doesn't have"),
        ));
    }
    if exec.selinux_label.is_some() && exec.selinux_label != own.selinux_label {
        let asked = exec.selinux_label.as_deref().unwrap_or_default();
        return Err(Refusal::new(
            &SELINUX,
            "process.selinuxLabel",
            format!("{asked}, which the container doesn't have"),
        ));
    }
    exec.apparmor_profile.clone_from(&own.apparmor_profile);
    exec.selinux_label.clone_from(&own.selinux_label);
    exec.warnings = journal.warnings;
    Ok(exec)
}

/// Checks what containers and execs have in common.
pub(crate) fn check(
    process: &Process,
    limit: u64,
    force_no_new_privs: bool,
    journal: &mut Journal,
) -> Result<ProcessSpec, Refusal> {
    let no = |field: &str, detail: String| -> Result<_, Refusal> {
        Err(Refusal::new(&PROCESS, format!("process.{field}"), detail))
    };
    let args = process.args().clone().unwrap_or_default();
    if args.is_empty() {
        return no("args", "empty, so there is nothing to run".into());
    }
    if let Some(i) = args.iter().position(|a| a.contains('\0')) {
        return no(&format!("args[{i}]"), "has a NUL in it".into());
    }
    let env = process.env().clone().unwrap_or_default();
    for (i, entry) in env.iter().enumerate() {
        // The value may be a secret; the name is enough.
        match entry.split_once('=') {
            _ if entry.contains('\0') => return no(&format!("env[{i}]"), "has a NUL in it".into()),
            None => return no(&format!("env[{i}]"), "has no =".into()),
            Some(("", _)) => return no(&format!("env[{i}]"), "has no name before its =".into()),
            Some(_) => {}
        }
    }
    let cwd = match plain_absolute(&process.cwd().to_string_lossy()) {
        Ok(cwd) => cwd,
        Err(why) => {
            return no(
                "cwd",
                format!("{} is {why}", one_line(&process.cwd().to_string_lossy())),
            );
        }
    };

    let user = process.user();
    let id = |field: &str, id: u32| {
        if id < POD_IDS {
            Ok(id)
        } else {
            Err(Refusal::new(
                &ID,
                format!("process.user.{field}"),
                id.to_string(),
            ))
        }
    };
    let uid = id("uid", user.uid())?;
    let gid = id("gid", user.gid())?;
    let additional_gids = user.additional_gids().clone().unwrap_or_default();
    for (i, gid) in additional_gids.iter().enumerate() {
        id(&format!("additionalGids[{i}]"), *gid)?;
    }
    // NGROUPS_MAX of linux/limits.h.
    if additional_gids.len() > 65536 {
        return no(
            "user.additionalGids",
            format!("{} groups, more than 65536", additional_gids.len()),
        );
    }
    let umask = user.umask();
    if let Some(umask) = umask.filter(|u| *u > 0o777) {
        return no("user.umask", format!("{umask:#o} is more than 0o777"));
    }
    let oom_score_adj = process.oom_score_adj();
    if let Some(adj) = oom_score_adj.filter(|a| !(-1000..=1000).contains(a)) {
        return no("oomScoreAdj", format!("{adj} is not within -1000 and 1000"));
    }

    let asked = process
        .capabilities()
        .as_ref()
        .map(Caps::from)
        .unwrap_or_default();
    let caps = asked.limited_to(limit);
    let dropped = asked.union() & !limit;
    if dropped != 0 {
        let note = format!(
            "beyond the policy, dropped: {}",
            caps::names(dropped).join(", ")
        );
        journal.tighten(tightenings::CAPABILITIES, &note);
        for set in [
            "bounding",
            "effective",
            "inheritable",
            "permitted",
            "ambient",
        ] {
            journal.mark(&format!("process.capabilities.{set}"), How::Stricter, &note);
        }
    }
    let asked = process.no_new_privileges().unwrap_or(false);
    if force_no_new_privs && !asked {
        journal.tighten(
            tightenings::NO_NEW_PRIVS,
            "set in spite of false: the profile demands it",
        );
    }

    Ok(ProcessSpec {
        args,
        env,
        cwd,
        uid,
        gid,
        additional_gids,
        umask,
        caps,
        no_new_privs: asked || force_no_new_privs,
        rlimits: rlimits(process.rlimits().as_deref().unwrap_or_default())?,
        oom_score_adj,
        terminal: process.terminal().unwrap_or(false),
        console_size: process
            .console_size()
            .map(|b| (rows(b.height()), rows(b.width()))),
        apparmor_profile: label::profile(process.apparmor_profile().as_deref()),
        selinux_label: label::label(process.selinux_label().as_deref()),
        schedule: Schedule::default(),
        warnings: Vec::new(),
    })
}

/// `struct winsize` of ioctl_tty(2) has 16 bits.
fn rows(n: u64) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

fn rlimits(list: &[PosixRlimit]) -> Result<Vec<Rlimit>, Refusal> {
    let mut limits: Vec<Rlimit> = Vec::new();
    for (i, limit) in list.iter().enumerate() {
        let resource = resource(limit.typ());
        if limit.soft() > limit.hard() {
            let detail = format!(
                "{:?}: soft {} is more than hard {}",
                limit.typ(),
                limit.soft(),
                limit.hard()
            );
            return Err(Refusal::new(
                &PROCESS,
                format!("process.rlimits[{i}]"),
                detail,
            ));
        }
        if limits.iter().any(|l| l.resource == resource) {
            let detail = format!("{:?} is there twice", limit.typ());
            return Err(Refusal::new(
                &PROCESS,
                format!("process.rlimits[{i}]"),
                detail,
            ));
        }
        limits.push(Rlimit {
            resource,
            soft: limit.soft(),
            hard: limit.hard(),
        });
    }
    Ok(limits)
}

/// Numbers of `asm-generic/resource.h`, which x86-64, arm64 and riscv64 share.
fn resource(typ: PosixRlimitType) -> u32 {
    match typ {
        PosixRlimitType::RlimitCpu => 0,
        PosixRlimitType::RlimitFsize => 1,
        PosixRlimitType::RlimitData => 2,
        PosixRlimitType::RlimitStack => 3,
        PosixRlimitType::RlimitCore => 4,
        PosixRlimitType::RlimitRss => 5,
        PosixRlimitType::RlimitNproc => 6,
        PosixRlimitType::RlimitNofile => 7,
        PosixRlimitType::RlimitMemlock => 8,
        PosixRlimitType::RlimitAs => 9,
        PosixRlimitType::RlimitLocks => 10,
        PosixRlimitType::RlimitSigpending => 11,
        PosixRlimitType::RlimitMsgqueue => 12,
        PosixRlimitType::RlimitNice => 13,
        PosixRlimitType::RlimitRtprio => 14,
        PosixRlimitType::RlimitRttime => 15,
    }
}

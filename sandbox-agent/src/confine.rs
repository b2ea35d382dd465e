//! Locks: capabilities, no_new_privs, Landlock, system-call filter.

use std::os::fd::OwnedFd;

use casemate_protocol::capabilities::{AGENT, FORKER, SYS_ADMIN};
use casemate_protocol::plan::{LaunchPlan, PodPlan, ProcessPlan};
use casemate_sys::ident::{self, CapSets};
use casemate_sys::landlock::{self, Handled, Ruleset, fs, net, scope};
use casemate_sys::{process, seccomp};
use rustix::fs::{CWD, Mode, OFlags};

use crate::error::{At, StepError};

const RLIMIT_CORE: u32 = 4;

/// The agent's own lock-down. no_new_privs isn't set here: it is inherited,
/// and a profile may leave it to a container.
pub fn agent(plan: &PodPlan) -> Result<(), StepError> {
    // For it and for all that it starts. Not 0: with that, the kernel still runs a
    // handler (`core_pattern` with a pipe) on the host, with all of the memory; 1
    // is its word for neither file nor handler (core(5), `do_coredump`).
    process::set_limit(0, RLIMIT_CORE, 1, 1)
        // Where the node's own hard limit is 0 already.
        .or_else(|_| process::set_limit(0, RLIMIT_CORE, 0, 0))
        .at("limit", "core size")?;
    keep(AGENT)?;
    if !plan.filter.is_empty() {
        seccomp::install_filter(&plan.filter, 0).at("install filter", "agent")?;
    }
    Ok(())
}

/// Leaves the calling process these capabilities, and none that an execve could add.
pub fn keep(capabilities: u64) -> Result<(), StepError> {
    ident::limit_bounding(capabilities).at("limit", "bounding set")?;
    ident::set_caps(CapSets {
        effective: capabilities,
        permitted: capabilities,
        inheritable: 0,
    })
    .at("set", "capabilities")
}

/// Whom [`container`] locks.
pub enum Who<'a> {
    /// The forker, and so every process of the container.
    Forker,
    /// A hook, this program, before the change of root: it gets at the tree at
    /// [`NEW_ROOT`] alone, and not at others of the pod beside it.
    Hook(&'a OwnedFd),
}

/// Where a container is assembled, seen from the agent's root.
pub const NEW_ROOT: &str = "/new";

/// What is left of [`container`]'s work.
#[derive(Default)]
pub struct Locked {
    /// The listener of the filter, where that asks one: from here on a call that it
    /// asks about waits for who has it.
    pub listener: Option<OwnedFd>,
    /// Shows whoever looks from outside that there is a Landlock domain.
    pub witness: Option<OwnedFd>,
}

/// The container's lock-down.
pub fn container(plan: &LaunchPlan, who: &Who<'_>) -> Result<Locked, StepError> {
    ident::limit_bounding(plan.bounding).at("limit", "bounding set")?;
    if plan.no_new_privs {
        ident::set_no_new_privs().at("set", "no_new_privs")?;
    }
    if plan.landlock {
        landlock_container(plan, who).at("restrict with Landlock", "container")?;
    }
    // Of the domain, so not before it, and not after a filter that may ask
    // somebody about each open: nobody answers yet.
    let witness = match who {
        Who::Forker if plan.landlock => plan.masked.iter().find_map(|path| masking_device(path)),
        Who::Forker | Who::Hook(_) => None,
    };
    // Without no_new_privs the filter needs CAP_SYS_ADMIN, so it comes before
    // the capabilities go.
    // Signals don't interrupt a question that is being answered, so none
    // is asked (and counted) twice.
    let asking = seccomp::FLAG_NEW_LISTENER | seccomp::FLAG_WAIT_KILLABLE_RECV;
    let (filter, flags, learns) = match who {
        Who::Forker if !plan.learns.is_empty() => (&plan.filter, 0, true),
        Who::Forker if !plan.asks.is_empty() => (&plan.asks, asking, false),
        Who::Forker | Who::Hook(_) => (&plan.filter, 0, false),
    };
    let mut listener = None;
    if learns {
        // Whoever answers it lets every call run. So it is never alone: what may not
        // run has its error from the next one, which itself lets no listener be made.
        listener =
            seccomp::install_filter(&plan.learns, asking).at("install filter", "learning")?;
    }
    let own = seccomp::install_filter(filter, flags).at("install filter", "container")?;
    let listener = listener.or(own);
    let keep = match who {
        Who::Forker if plan.own_filters => plan.bounding | FORKER | SYS_ADMIN,
        Who::Forker => plan.bounding | FORKER,
        // Its execve takes it, as that of any process.
        Who::Hook(_) if plan.own_filters => plan.bounding | SYS_ADMIN,
        Who::Hook(_) => plan.bounding,
    };
    ident::set_caps(CapSets {
        effective: keep,
        permitted: keep,
        inheritable: plan.bounding,
    })
    .at("set", "capabilities")?;
    Ok(Locked { listener, witness })
}

/// The null device that masks this path, if one does. With a file of a device the
/// kernel remembers whether its opener's Landlock domain let it do ioctls, and asks
/// that of whoever has a copy (Linux 6.10); outside of /dev it doesn't. It is the one
/// trace of a domain that can be seen from outside.
fn masking_device(path: &str) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    crate::launch::is_null(&file).ok()?.then_some(file)
}

/// Everything below the root as the mounts and modes allow it, but: devices
/// can't be made, and can be driven (ioctl) only below /dev; nothing outside
/// the root (through a leaked descriptor, say) can be written, listed,
/// executed or changed. And, as with any domain that handles files: no mounts
/// at all (landlock(7)).
///
/// Truncation is among what each open is asked for, so handling it, or plain
/// reads, makes every open walk its path again. Without `reads` those two are left to the mounts and modes.
///
/// TCP's ports, where the plan has a lock on them. A port that the kernel chooses
/// can always be bound: clients do, and what listens there is nftables' to keep.
///
/// All of it is one domain, the only one that a process is in: any other, also one
/// without file system rights (the agent's, say), would forbid all links and
/// renames from one directory to another (LANDLOCK_ACCESS_FS_REFER is denied by
/// each domain that has no rule for it), and programs don't expect that.
fn landlock_container(plan: &LaunchPlan, who: &Who<'_>) -> std::io::Result<()> {
    let (root, program) = match who {
        Who::Forker => ("/", None),
        Who::Hook(program) => (NEW_ROOT, Some(program)),
    };
    let abi = landlock::abi();
    let mut all = landlock::all_fs_rights(abi);
    if !plan.landlock_reads && program.is_none() {
        all &= !(fs::READ_FILE | fs::TRUNCATE);
    }
    let scopes = match plan.shares_network && abi >= 6 {
        true => scope::ABSTRACT_UNIX_SOCKET,
        false => 0,
    };
    let ports = [
        (&plan.connect_ports, net::CONNECT_TCP),
        (&plan.listen_ports, net::BIND_TCP),
    ];
    let locked = ports.iter().filter(|(ports, _)| ports.is_some());
    let handled = Handled {
        fs: all,
        net: locked.fold(0, |all, (_, right)| all | right),
        scoped: scopes,
    };
    let rules = Ruleset::new(abi, handled)?;
    if abi >= net::SINCE {
        for (ports, right) in ports {
            let Some(ports) = ports else { continue };
            if right == net::BIND_TCP {
                rules.allow_port(0, right)?;
            }
            for port in ports.iter().flat_map(|(first, last)| *first..=*last) {
                rules.allow_port(port, right)?;
            }
        }
    }
    let open =
        |path: &str| rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let everyday = all & !(fs::IOCTL_DEV | fs::MAKE_CHAR | fs::MAKE_BLOCK);
    rules.allow_beneath(open(root)?, everyday)?;
    // mq_open(2) walks a mount that is the kernel's own, so never below the root;
    // what it has in common with the one that is seen is the file system.
    if program.is_none()
        && let Ok(queues) = open("/dev/mqueue")
    {
        rules.allow_beneath(queues, everyday)?;
    }
    if abi >= 5
        && let Ok(dev) = open("/dev")
    {
        rules.allow_beneath(dev, fs::IOCTL_DEV)?;
    }
    if let Some(program) = program {
        rules.allow_beneath(program, fs::READ_FILE | fs::EXECUTE)?;
    }
    rules.restrict_self()
}

/// Installs the filter of one process, the last lock before it executes: that of the
/// specification, and what takes back the calls that only have the forker's mark. So
/// nothing but write(2) and execve(2) may come after it. A capability that was kept for
/// this goes with the execve: it is neither in the bounding set nor inheritable.
pub fn own_filter(plan: &ProcessPlan) -> Result<(), StepError> {
    if plan.filter.is_empty() {
        return Ok(());
    }
    seccomp::install_filter(&plan.filter, plan.filter_flags)
        .at("install filter of", "linux.seccomp")
        .map(drop)
}

/// The identity of one process: ids, then exactly its capability sets.
pub fn identity(plan: &ProcessPlan) -> Result<(), StepError> {
    let object = || format!("{}:{}", plan.uid, plan.gid);
    if plan.no_new_privs {
        ident::set_no_new_privs().at("set", "no_new_privs")?;
    }
    let dropped = ident::drop_bounding(plan.drop_bounding).at(
        "limit to process.capabilities.bounding (for which the container needs CAP_SETPCAP)",
        "",
    );
    if !plan.no_new_privs {
        // With it no execve gives what the permitted set lacks.
        dropped?;
    }
    ident::keep_capabilities(true).at("keep", "capabilities")?;
    ident::set_groups(&plan.groups).at("set additional groups of user", object())?;
    ident::set_gid(plan.gid).at("set group of user", object())?;
    ident::set_uid(plan.uid).at("set user", object())?;
    let more = if plan.keep_for_filter { SYS_ADMIN } else { 0 };
    ident::set_caps(CapSets {
        effective: plan.effective | more,
        permitted: plan.permitted | more,
        inheritable: plan.inheritable,
    })
    .at("set", "capabilities")?;
    ident::set_ambient(plan.ambient).at("set", "ambient capabilities")
}

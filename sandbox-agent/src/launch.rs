//! Assembles a container's tree and namespaces in the process that becomes its
//! forker. Runs as root of the pod's namespace A, with file ids of the
//! container's root, in a mount namespace of its own; ends inside B, locked.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use casemate_protocol::plan::{LaunchPlan, Mount, MountSource};
use casemate_protocol::{Channel, FromForker, ToForker};
use casemate_sys::mount::{self, Change, NewFs, attr, clone_tree, propagation};
use casemate_sys::namespace::{self, kind};
use casemate_sys::{ident, process};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev};

use crate::confine::{self, Locked, NEW_ROOT, Who};
use crate::early::{self, EarlyInit};
use crate::error::{At, StepError};
use crate::hook::Runner;
use crate::root::{self, Links};
use crate::spawn::Terminal;

/// What the forker needs of the assembled container.
pub struct Container {
    /// The terminal bound at /dev/console, for init.
    pub console: Option<Terminal>,
    /// The container's first process, where the kernel wants it this early.
    pub early: Option<EarlyInit>,
    /// The forker itself, until the shim has it.
    pub me: Option<OwnedFd>,
    /// Becomes readable when a child ends; made before the container's filter, which
    /// then need not allow it.
    pub signals: OwnedFd,
    /// Of the filters of forker and first process, for the shim.
    pub listeners: Vec<OwnedFd>,
    /// Shows whoever looks from outside that the forker is in a Landlock domain.
    pub _witness: Option<OwnedFd>,
}

/// How proc of the container's pid namespace can be mounted.
enum Proc<'a> {
    /// From outside: the namespace.
    PidNamespace(OwnedFd),
    /// Only by the namespace's own init, which enters B later.
    ByInit(&'a OwnedFd),
    /// The namespace has its init already: by a short-lived process in it.
    ByVisitor,
}

/// Host ids of the container's root as seen from A: A is `0` the agent, `1…`
/// the container's `0…`.
const ROOT_IN_A: u32 = 1;

/// Whether it is the null device (devices.txt).
pub fn is_null(file: &OwnedFd) -> std::io::Result<bool> {
    let stat = rustix::fs::fstat(file)?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    Ok(is_device && stat.st_rdev == makedev(1, 3))
}

/// Does everything up to the forker's lock-down, in the order that the
/// kernel's rules dictate: cgroup, then its namespace; pid namespace, then
/// proc; all mounts, then Landlock; the user namespace last.
///
/// `more` is what came with the plan: files of the cgroup, and the pid
/// namespace if one is joined.
pub fn assemble(
    plan: &LaunchPlan,
    mut more: Vec<OwnedFd>,
    namespace_b: OwnedFd,
    channel: &Channel,
) -> Result<Container, StepError> {
    let joined = match plan.joins_pids {
        true => Some(
            more.pop()
                .ok_or_else(|| StepError::invalid("join", "pid namespace", "no descriptor"))?,
        ),
        false => None,
    };
    for file in &more {
        // "0" is the writer itself. The permission is the opener's, the shim's:
        // nobody in here could open these files (cgroups(7), "Delegation").
        rustix::io::write(file, b"0").at("join cgroup", "")?;
    }
    drop(more);
    namespace::unshare(kind::CGROUP).at("unshare", "cgroup namespace")?;
    // Forks from here on are born in the container's pid namespace, the first
    // of them as its init (unless it joins others').
    let hooks = match plan.hooks.is_empty() {
        true => None,
        false => Some(Runner::fork(plan, &namespace_b)?),
    };
    // Either way only children will live there: nobody in it sees the forker.
    match &joined {
        Some(namespace) => namespace::enter(namespace, kind::PID).at("join", "pid namespace")?,
        None => namespace::unshare(kind::PID).at("unshare", "pid namespace")?,
    }
    if plan.time_namespace {
        namespace::unshare(kind::TIME).at("unshare", "time namespace")?;
        // The clocks are the shim's to set: nobody in here has CAP_SYS_TIME.
        wait_for_shim(channel)?;
    }
    ident::set_securebits(ident::securebits::NO_SETUID_FIXUP).at("set", "securebits")?;
    ident::set_fs_ids(ROOT_IN_A, ROOT_IN_A).at("set", "file ids")?;

    let mut container = assemble_root(plan, &namespace_b, channel, hooks, joined)?;
    let of_init = match &container.early {
        Some(early) => early.lock()?,
        None => None,
    };
    let own = enter_locked(plan, &namespace_b, &Who::Forker)?;
    container.listeners = own.listener.into_iter().chain(of_init).collect();
    container._witness = own.witness;
    Ok(container)
}

/// Tells the shim that this is the moment that the plan speaks of; what it
/// sends for going on.
fn wait_for_shim(channel: &Channel) -> Result<Vec<OwnedFd>, StepError> {
    let me = process::open_pidfd(process::own_pid()).at("open", "own pidfd")?;
    channel
        .send(&FromForker::Waiting, &[me.as_fd()])
        .map_err(std::io::Error::other)
        .at("answer", "shim")?;
    match channel
        .receive::<ToForker>(true)
        .map_err(std::io::Error::other)
        .at("hear from", "shim")?
    {
        Some((ToForker::Proceed, fds)) => Ok(fds),
        // Without a shim, or one that says something else, there is no container.
        _ => process::exit_now(1),
    }
}

/// Enters the container's user namespace and takes the container's locks: the
/// last step of whoever is to run, or to fork, what a tenant brought.
pub fn enter_locked(
    plan: &LaunchPlan,
    namespace_b: &OwnedFd,
    who: &Who<'_>,
) -> Result<Locked, StepError> {
    namespace::enter(namespace_b, kind::USER).at("enter", "the container's user namespace")?;
    ident::set_groups(&[]).at("set", "groups")?;
    ident::set_gid(0).at("set", "gid")?;
    ident::set_uid(0).at("set", "uid")?;
    // A changed uid makes a process dumpable or not by a sysctl; be sure.
    ident::set_dumpable(false).at("set", "dumpable")?;
    namespace::join_new_session_keyring().at("join", "session keyring")?;
    confine::container(plan, who)
}

fn assemble_root(
    plan: &LaunchPlan,
    namespace_b: &OwnedFd,
    channel: &Channel,
    hooks: Option<Runner>,
    joined: Option<OwnedFd>,
) -> Result<Container, StepError> {
    let staging = rustix::fs::open(
        format!("/staging/{}", plan.staging),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .at("open", "the container's staging directory")?;
    let mut receiving = receiving(plan, &staging)?;
    // Nothing of later containers may arrive here.
    let whole =
        rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).at("open", "/")?;
    mount::set_attributes(
        &whole,
        Change {
            propagation: propagation::PRIVATE,
            recursive: true,
            ..Change::default()
        },
    )
    .at("make private", "/")?;

    let rootfs = clone_tree(&staging, Path::new("rootfs"), true, false).at("clone", "rootfs")?;
    mount::attach(&rootfs, CWD, NEW_ROOT).at("attach", "rootfs")?;

    let proc = proc_of_children(plan, namespace_b, joined);
    let mut early = None;
    for entry in &plan.mounts {
        let cloned = if entry.receives {
            receiving.pop_front()
        } else {
            None
        };
        match cloned {
            Some(tree) => attach_at(&rootfs, &tree, entry)?,
            None => attach_one(&rootfs, &staging, entry, plan, &proc, &mut early)?,
        }
    }
    if !plan.cwd.is_empty() && plan.cwd != "/" {
        make_cwd(&rootfs, &plan.cwd)?;
    }
    let console = match plan.console {
        Some(uid) => Some(bind_console(&rootfs, uid)?),
        None => None,
    };
    mask(&rootfs, &staging, plan)?;
    if plan.wait_before_root {
        let fds = wait_for_shim(channel)?;
        if let Some(hooks) = hooks {
            hooks.run(&fds)?;
        }
    }
    if plan.readonly_root {
        mount::set_attributes(
            &rootfs,
            Change {
                set: attr::RDONLY,
                ..Change::default()
            },
        )
        .at("make read-only", "/")?;
    }
    mount::change_root(&rootfs).at("change root", "")?;
    let me = process::open_pidfd(process::own_pid()).at("open", "own pidfd")?;
    Ok(Container {
        console,
        early,
        me: Some(me),
        signals: process::child_signals().at("watch", "children")?,
        listeners: Vec::new(),
        _witness: None,
    })
}

/// Clones of the mounts that go on receiving what the host mounts below their
/// sources, in order: taken while they still do.
fn receiving(plan: &LaunchPlan, staging: &OwnedFd) -> Result<VecDeque<OwnedFd>, StepError> {
    let clone = |entry: &Mount| match &entry.source {
        MountSource::Staged {
            name, recursive, ..
        } => clone_tree(staging, Path::new(name), *recursive, false)
            .at("clone the mount for", &entry.target),
        MountSource::New { .. } => Err(StepError::invalid(
            "clone the mount for",
            &entry.target,
            "it is no bind",
        )),
    };
    let wanted = plan.mounts.iter().filter(|entry| entry.receives);
    wanted.map(clone).collect()
}

/// Attaches a staged mount at its target.
fn attach_at(rootfs: &OwnedFd, tree: &OwnedFd, entry: &Mount) -> Result<(), StepError> {
    let directory = match &entry.source {
        MountSource::Staged { directory, .. } => *directory,
        MountSource::New { .. } => true,
    };
    let target = root::target(rootfs, &entry.target, directory, links_for(entry))?;
    mount::attach(tree, &target, "").at("mount", &entry.target)
}

/// By what way proc can be mounted here.
fn proc_of_children<'a>(
    plan: &LaunchPlan,
    namespace_b: &'a OwnedFd,
    joined: Option<OwnedFd>,
) -> Proc<'a> {
    let otherwise = match joined {
        Some(_) => Proc::ByVisitor,
        None => Proc::ByInit(namespace_b),
    };
    if plan.older_kernel {
        return otherwise;
    }
    let of_children = || -> std::io::Result<OwnedFd> {
        let namespace = match joined {
            Some(namespace) => namespace,
            None => namespace::pid_for_children(&process::open_pidfd(process::own_pid())?)?,
        };
        // Known to the kernel only since 6.17, later than the ioctl.
        NewFs::open("proc")?.fd("pidns", &namespace)?;
        Ok(namespace)
    };
    of_children().map_or(otherwise, Proc::PidNamespace)
}

/// Mounts that the sandbox itself stands on: a link there is an attack.
fn links_for(entry: &Mount) -> Links {
    let own = ["/proc", "/sys", "/dev"];
    if own
        .iter()
        .any(|p| entry.target == *p || entry.target.starts_with(&format!("{p}/")))
    {
        Links::Refused
    } else {
        Links::InRoot
    }
}

fn attach_one(
    rootfs: &OwnedFd,
    staging: &OwnedFd,
    entry: &Mount,
    plan: &LaunchPlan,
    proc: &Proc<'_>,
    early: &mut Option<EarlyInit>,
) -> Result<(), StepError> {
    let tree = match &entry.source {
        MountSource::Staged {
            name, recursive, ..
        } => clone_tree(staging, Path::new(name), *recursive, false)
            .at("clone the mount for", &entry.target)?,
        MountSource::New { fstype, options } if fstype == "proc" => {
            match proc {
                Proc::PidNamespace(namespace) => {
                    new_mount(fstype, options, entry, Some(namespace))?
                }
                Proc::ByVisitor => early::visit(|| new_mount(fstype, options, entry, None))?,
                Proc::ByInit(namespace_b) => match early {
                    // A second proc is a second view of the first.
                    Some(_) => {
                        return Err(StepError::invalid(
                            "mount",
                            format!("proc on {}", entry.target),
                            "this kernel lets a container have one proc (two need Linux 6.17)",
                        ));
                    }
                    None => {
                        let make = || new_mount(fstype, options, entry, None);
                        let (init, tree) = EarlyInit::fork(plan, namespace_b, make)?;
                        *early = Some(init);
                        tree
                    }
                },
            }
        }
        MountSource::New { fstype, options } => new_mount(fstype, options, entry, None)?,
    };
    attach_at(rootfs, &tree, entry)
}

fn new_mount(
    fstype: &str,
    options: &[(String, Option<String>)],
    entry: &Mount,
    pid_namespace: Option<&OwnedFd>,
) -> Result<OwnedFd, StepError> {
    let object = format!("{fstype} on {}", entry.target);
    let fs = NewFs::open(fstype).at("mount", &object)?;
    if let Some(namespace) = pid_namespace {
        fs.fd("pidns", namespace)
            .at("choose the pid namespace of", &object)?;
    }
    for (key, value) in options {
        match value {
            Some(value) => fs.string(key, value),
            None => fs.flag(key),
        }
        .at("mount option of", &object)
        .map_err(StepError::blame_request)?;
    }
    fs.mount(entry.attributes).at("mount", &object)
}

fn make_cwd(rootfs: &OwnedFd, cwd: &str) -> Result<(), StepError> {
    match root::open_path(rootfs, cwd, Links::InRoot) {
        Ok(_) => Ok(()),
        // Not ours to judge here: the process' own chdir says it best.
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Ok(()),
        Err(_) => root::target(rootfs, cwd, true, Links::InRoot).map(drop),
    }
}

fn bind_console(rootfs: &OwnedFd, uid: u32) -> Result<Terminal, StepError> {
    let pts = root::open_path(rootfs, "/dev/pts", Links::Refused).at("open", "/dev/pts")?;
    ident::set_fs_ids(ROOT_IN_A + uid, ROOT_IN_A).at("set", "file ids")?;
    let terminal = Terminal::open(&pts);
    ident::set_fs_ids(ROOT_IN_A, ROOT_IN_A).at("set", "file ids")?;
    let terminal = terminal?;
    let tree = clone_tree(&pts, Path::new(&terminal.number.to_string()), false, false)
        .at("clone", "/dev/pts")?;
    let target = root::target(rootfs, "/dev/console", false, Links::Refused)?;
    mount::attach(&tree, &target, "").at("mount", "/dev/console")?;
    Ok(terminal)
}

fn mask(rootfs: &OwnedFd, staging: &OwnedFd, plan: &LaunchPlan) -> Result<(), StepError> {
    for path in &plan.readonly {
        let Some(target) = existing(rootfs, path)? else {
            continue;
        };
        let tree = clone_tree(&target, Path::new(""), true, false).at("clone", path)?;
        mount::set_attributes(
            &tree,
            Change {
                set: attr::RDONLY,
                recursive: true,
                ..Change::default()
            },
        )
        .at("make read-only", path)?;
        mount::attach(&tree, &target, "").at("mount read-only", path)?;
    }
    let mut empty = Empty {
        first: None,
        one_each: plan.older_kernel,
    };
    for path in &plan.masked {
        let Some(target) = existing(rootfs, path)? else {
            continue;
        };
        let tree = if root::is_directory(&target).at("look at", path)? {
            empty.mount().at("mask", path)?
        } else {
            null_device(staging)?
        };
        mount::attach(&tree, &target, "").at("mask", path)?;
    }
    Ok(())
}

/// Empty directories to cover others with: mounts of one tmpfs, or of one each
/// where the kernel can't clone a mount that is attached nowhere (Linux 6.15).
struct Empty {
    first: Option<OwnedFd>,
    one_each: bool,
}

impl Empty {
    fn mount(&mut self) -> std::io::Result<OwnedFd> {
        if let (Some(first), false) = (&self.first, self.one_each) {
            match clone_tree(first, Path::new(""), false, false) {
                Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => self.one_each = true,
                done => return done,
            }
        }
        let fs = NewFs::open("tmpfs")?;
        fs.string("nr_inodes", "2")?;
        let tmpfs = fs.mount(attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC)?;
        if self.one_each {
            return Ok(tmpfs);
        }
        self.first = Some(tmpfs);
        self.mount()
    }
}

fn existing(rootfs: &OwnedFd, path: &str) -> Result<Option<OwnedFd>, StepError> {
    match root::open_path(rootfs, path, Links::InRoot) {
        Ok(fd) => Ok(Some(fd)),
        Err(e)
            if matches!(
                e.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(e) => Err(e).at("open", path),
    }
}

/// A mount of the real null device, out of the shim's own /dev: never a file
/// of that name in the image.
fn null_device(staging: &OwnedFd) -> Result<OwnedFd, StepError> {
    let tree = clone_tree(staging, Path::new("dev/null"), false, false).at("clone", "/dev/null")?;
    if !is_null(&tree).at("look at", "/dev/null")? {
        return Err(StepError::invalid(
            "mask with",
            "/dev/null",
            "not the null device",
        ));
    }
    Ok(tree)
}

//! Who one is and what one has: ids, capabilities, descriptors, processes, limits
//! (T01–T03, T15, T17, T26, T27), and the making of the control's surroundings.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;

use casemate_sys::namespace::{self, kind};
use casemate_sys::{attempt, ident, mount, process};
use rustix::io::Errno;

use crate::{Arg, Check, Done, No, only_if, skip};

/// Where probes may write: the only place that is sure to be writable.
pub const SCRATCH: &str = "/tmp";

/// A file of one's own in [`SCRATCH`].
pub fn scratch(name: &str) -> String {
    format!("{SCRATCH}/checks-{}-{name}", process::own_pid())
}

/// Surroundings for the control: root of the host in mount, network, ipc and uts
/// namespaces of its own, so that what succeeds reaches nobody, with the same
/// read-only volumes that containers get.
pub fn as_control() -> io::Result<()> {
    namespace::unshare(kind::MOUNT | kind::NET | kind::IPC | kind::UTS)?;
    let root = mount::Change {
        propagation: mount::propagation::PRIVATE,
        recursive: true,
        ..Default::default()
    };
    let slash = rustix::fs::open(
        "/",
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    mount::set_attributes(&slash, root)?;
    let none = rustix::mount::MountFlags::empty();
    // A tmpfs over /tmp hides the host's, and holds all that probes write.
    rustix::mount::mount("tmpfs", SCRATCH, "tmpfs", none, None)?;
    for dir in ["vol", "vol-below"] {
        fs::create_dir(format!("{SCRATCH}/{dir}"))?;
        fs::write(format!("{SCRATCH}/{dir}/file"), "content")?;
    }
    fs::create_dir(format!("{SCRATCH}/vol/below"))?;
    let below = format!("{SCRATCH}/vol-below");
    rustix::mount::mount_bind(below.as_str(), format!("{SCRATCH}/vol/below").as_str())?;
    fs::create_dir(format!("{SCRATCH}/smuggled"))?;
    for (name, kind, major, minor) in SMUGGLED {
        let kind = match kind {
            'b' => rustix::fs::FileType::BlockDevice,
            _ => rustix::fs::FileType::CharacterDevice,
        };
        let path = format!("{SCRATCH}/smuggled/{name}");
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(rustix::fs::CWD, path, kind, 0o666.into(), device)?;
    }
    // Where containers have them.
    let base = format!("{SCRATCH}/root");
    fs::create_dir(&base)?;
    for (what, at) in [("vol", "vol"), ("smuggled", "smuggled")] {
        let at = format!("{base}/{at}");
        fs::create_dir(&at)?;
        rustix::mount::mount_bind_recursive(format!("{SCRATCH}/{what}").as_str(), at.as_str())?;
    }
    let only = mount::Change {
        set: mount::attr::RDONLY,
        recursive: true,
        ..Default::default()
    };
    let volume = rustix::fs::open(
        format!("{base}/vol"),
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    mount::set_attributes(&volume, only)?;
    Ok(())
}

/// A path of the fixture: `/vol` in containers.
pub fn fixture(path: &str) -> String {
    let control = format!("{SCRATCH}/root/{path}");
    if Path::new(&control).exists() {
        control
    } else {
        format!("/{path}")
    }
}

/// Device nodes that a hostile image brings along: name, kind, major, minor.
pub const SMUGGLED: [(&str, char, u32, u32); 5] = [
    ("mem", 'c', 1, 1),
    ("kmsg", 'c', 1, 11),
    ("zero", 'c', 1, 5),
    ("fuse", 'c', 10, 229),
    ("loop0", 'b', 7, 0),
];

fn status(name: &str) -> io::Result<String> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.unwrap_or_default().trim().to_owned())
}

fn map_is_hosts(file: &str) -> Done {
    let text = fs::read_to_string(file)?;
    let hosts = text.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(1) == Some(&"0")
    });
    only_if(hosts, text)
}

/// In a child that is user 1000 without groups: whether executing `path` gives
/// it more than it has.
fn exec_gains(path: &str) -> Done {
    let status = Command::new(path)
        .arg("euid")
        .uid(1000)
        .gid(1000)
        .status()?;
    only_if(status.code() == Some(42), "more privilege after execve")
}

/// 42 if this process can do more than user 1000 without capabilities.
pub fn privileged_now() -> u8 {
    let root = rustix::process::geteuid().is_root() || rustix::process::getegid().is_root();
    let caps = ident::get_caps().is_ok_and(|sets| sets.effective != 0);
    if root || caps { 42 } else { 0 }
}

fn copy_of_self(name: &str) -> Result<String, No> {
    let path = scratch(name);
    fs::copy("/proc/self/exe", &path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn set_uid_file() -> Done {
    if !rustix::process::geteuid().is_root() {
        return skip("needs a file of root's");
    }
    let path = copy_of_self("suid")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755))?;
    let gained = exec_gains(&path);
    let _ = fs::remove_file(&path);
    gained
}

fn file_capability() -> Done {
    if !rustix::process::geteuid().is_root() {
        return skip("needs a file of root's");
    }
    let path = copy_of_self("filecap")?;
    // VFS_CAP_REVISION_2, effective: CAP_CHOWN.
    let mut value = 0x0200_0001u32.to_le_bytes().to_vec();
    value.extend(1u32.to_le_bytes());
    value.extend([0; 12]);
    let set = rustix::fs::setxattr(
        path.as_str(),
        "security.capability",
        &value,
        rustix::fs::XattrFlags::empty(),
    );
    let gained = set.map_err(No::from).and_then(|()| exec_gains(&path));
    let _ = fs::remove_file(&path);
    gained
}

fn own_and_above() -> Vec<u32> {
    let mut pids = vec![process::own_pid()];
    while let Some(pid) = pids.last() {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let parent = text.lines().find_map(|l| l.strip_prefix("PPid:"));
        match parent.and_then(|p| p.trim().parse().ok()) {
            Some(0) | None => return pids,
            Some(parent) => pids.push(parent),
        }
    }
    pids
}

/// Pids in /proc that are neither this process nor its ancestors.
fn strangers() -> Vec<u32> {
    let known = own_and_above();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid| !known.contains(pid))
        .collect()
}

/// What of a stranger's can be opened; on the host, as control, any of them.
fn of_strangers(file: &'static str) -> Done {
    let all = strangers();
    if all.is_empty() {
        return Err(Errno::SRCH.into());
    }
    let mut last = No::Errno(Errno::ACCESS);
    for pid in all {
        let path = format!("/proc/{pid}/{file}");
        let opened = match file {
            "root" | "cwd" | "exe" | "ns/mnt" => fs::read_link(&path).map(drop),
            "fd" => fs::read_dir(&path).map(drop),
            _ => fs::File::open(&path).map(drop),
        };
        match opened {
            Ok(()) => return Ok(path),
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

fn signal_strangers() -> Done {
    for pid in strangers() {
        let reached = process::open_pidfd(pid).and_then(|fd| process::signal(&fd, 0));
        if reached.is_ok() {
            return Ok(format!("signal 0 reached {pid}"));
        }
    }
    Err(Errno::SRCH.into())
}

fn descriptors() -> Done {
    let mut extra = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")?.flatten() {
        let number: i32 = entry.file_name().to_string_lossy().parse().unwrap_or(-1);
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let target = target.display().to_string();
        // The listing's own, and the pipe to the process that forked this one.
        let ours = target.starts_with("/proc/") || (target.starts_with("pipe:") && number < 8);
        if number > 2 && !ours {
            extra.push(format!("{number} {target}"));
        }
    }
    only_if(!extra.is_empty(), extra.join(", "))
}

/// A limit's number, a soft and a hard value, as `struct rlimit64`.
fn raise(resource: usize, value: u64) -> Done {
    let (_, hard) = process::get_limit(resource as u32)?;
    if hard >= value {
        return Ok(format!("the hard limit is {hard}"));
    }
    process::set_limit(0, resource as u32, value, value)?;
    // What is said to have been done may not have been.
    let (_, hard) = process::get_limit(resource as u32)?;
    only_if(hard >= value, "")
}

const RLIMIT_CORE: u32 = 4;

/// A limit for core files with which the kernel calls a handler (`core_pattern` with
/// a pipe): any but 1, and so 0 too.
fn core_limit(set: impl FnOnce() -> io::Result<()>) -> Done {
    // On a host that is at 1 already.
    let _ = process::set_limit(0, RLIMIT_CORE, 1, process::get_limit(RLIMIT_CORE)?.1);
    set()?;
    let (soft, _) = process::get_limit(RLIMIT_CORE)?;
    only_if(soft != 1, format!("the limit is {soft}"))
}

fn raw_core_limit(name: &'static str, args: &[Arg<'static>]) -> Done {
    core_limit(|| attempt::raw(name, args).map(drop))
}

/// Of a child, by who is its parent: found again in what that has of itself.
fn core_limit_of_child() -> Done {
    let mut child = Command::new("/proc/self/exe")
        .arg("wait")
        .stdin(std::process::Stdio::piped())
        .spawn()?;
    let set = process::set_limit(child.id(), RLIMIT_CORE, 0, 1);
    let limits = fs::read_to_string(format!("/proc/{}/limits", child.id()));
    let _ = child.kill();
    let _ = child.wait();
    set?;
    let limits = limits?;
    let line = limits.lines().find(|line| line.starts_with("Max core"));
    let soft = line.and_then(|line| line.split_whitespace().nth(4));
    only_if(soft == Some("0"), "the limit is 0")
}

fn lower_oom_score() -> Done {
    let now: i32 = fs::read_to_string("/proc/self/oom_score_adj")?
        .trim()
        .parse()
        .map_err(|_| No::Errno(Errno::INVAL))?;
    fs::write(
        "/proc/self/oom_score_adj",
        (now - 100).max(-1000).to_string(),
    )?;
    Ok(String::new())
}

fn core_dump() -> Done {
    // As large as can be; where that is the word for no handler, as small.
    let (_, hard) = process::get_limit(RLIMIT_CORE)?;
    let soft = if hard == 1 { 0 } else { hard };
    let _ = process::set_limit(0, RLIMIT_CORE, soft, hard);
    let dir = scratch("core");
    fs::create_dir(&dir)?;
    let ended = Command::new("/proc/self/exe")
        .arg("abort")
        .current_dir(&dir)
        .status();
    let dumped = ended.as_ref().is_ok_and(|s| s.core_dumped());
    let handler = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    let _ = fs::remove_dir_all(&dir);
    let _ = ended?;
    // A file in its own tree is its own affair, a program of the host isn't.
    only_if(dumped && handler.starts_with('|'), handler)
}

/// The checks of this file.
pub fn checks() -> Vec<Check> {
    let mut all = vec![
        Check::new("T01.uid-map", "root inside is the host's root", || {
            map_is_hosts("/proc/self/uid_map")
        }),
        Check::new("T01.gid-map", "group 0 inside is the host's", || {
            map_is_hosts("/proc/self/gid_map")
        }),
        Check::new(
            "T01.unmapped-uid",
            "a user id outside of the pod's range",
            || Ok(ident::set_uid(70_000).map(|()| String::new())?),
        ),
        Check::new("T03.no-new-privs", "no_new_privs is off", || {
            only_if(status("NoNewPrivs")? == "0", "NoNewPrivs: 0")
        }),
        Check::new(
            "T03.set-uid-file",
            "a set-user-id file raises privilege",
            set_uid_file,
        ),
        Check::new(
            "T03.file-capability",
            "a file's capabilities are given",
            file_capability,
        ),
        Check::new(
            "T04.no-filter",
            "the process has no system-call filter",
            || only_if(status("Seccomp")? == "0", "Seccomp: 0"),
        ),
        Check::new(
            "T15.descriptors",
            "descriptors beside 0, 1 and 2",
            descriptors,
        ),
        Check::new(
            "T17.strangers",
            "processes outside of the container are seen",
            || {
                let all = strangers();
                only_if(!all.is_empty(), format!("{} of them", all.len()))
            },
        ),
        Check::new(
            "T17.signal",
            "a process outside of the container is signalled",
            signal_strangers,
        ),
    ];
    for file in [
        "root", "cwd", "exe", "fd", "environ", "mem", "maps", "ns/mnt",
    ] {
        let id = format!("T17.proc-{}", file.replace('/', "-"));
        all.push(Check::new(
            &id,
            "that part of a process outside of the container is opened",
            move || of_strangers(file),
        ));
    }
    for (name, number, value) in [
        ("nofile", 7, 1 << 20),
        ("core", 4, u64::MAX),
        ("memlock", 8, u64::MAX),
        ("nproc", 6, u64::MAX),
        ("rtprio", 14, 99),
        ("nice", 13, 40),
    ] {
        // A soft limit is raised by anyone; what is asked is the hard one.
        all.push(Check::new(
            &format!("T26.rlimit-{name}"),
            "the hard limit is raised, or was never set",
            move || raise(number, value),
        ));
    }
    all.extend([
        Check::call(
            "T26.nice",
            "a priority above that of other pods",
            "setpriority",
            &[Arg::Int(0), Arg::Int(0), Arg::Int(-10isize as usize)],
        ),
        Check::call(
            "T26.realtime",
            "a realtime scheduling policy",
            "sched_setscheduler",
            &[Arg::Int(0), Arg::Int(1), Arg::Bytes(&[1, 0, 0, 0])],
        ),
        Check::call(
            "T26.io-realtime",
            "a realtime class for disks",
            "ioprio_set",
            &[Arg::Int(1), Arg::Int(0), Arg::Int(1 << 13)],
        ),
        Check::new(
            "T26.oom-score",
            "a lower OOM score than was given",
            lower_oom_score,
        ),
        Check::new(
            "T27.core-handler",
            "a core dump reaches a program of the host",
            core_dump,
        ),
        Check::new(
            "T27.limit-zero",
            "a limit of core files with which the kernel calls the node's handler",
            || core_limit(|| process::set_limit(0, RLIMIT_CORE, 0, 1)),
        ),
        Check::new("T27.limit-setrlimit", "the same by the older call", || {
            raw_core_limit("setrlimit", &[Arg::Int(4), Arg::Bytes(&[0; 16])])
        })
        .absent(&[]),
        Check::new(
            "T27.limit-with-old",
            "the same, with a place for the old limit",
            || {
                raw_core_limit(
                    "prlimit64",
                    &[
                        Arg::Int(0),
                        Arg::Int(4),
                        Arg::Bytes(&[0; 16]),
                        Arg::Bytes(&[0; 16]),
                    ],
                )
            },
        ),
        Check::new(
            "T27.limit-high-word",
            "the same, with bits above the resource's number that the kernel ignores",
            || {
                raw_core_limit(
                    "prlimit64",
                    &[
                        Arg::Int(0),
                        Arg::Int(1 << 32 | 4),
                        Arg::Bytes(&[0; 16]),
                        Arg::Null,
                    ],
                )
            },
        ),
        Check::new(
            "T27.limit-of-child",
            "the same for a child",
            core_limit_of_child,
        ),
    ]);
    all
}

//! Entering a sandbox from the host as no workload can: with all capabilities
//! of its user namespace, without filter and without Landlock. What fails here
//! fails by the kernel's own rules.

use std::io;
use std::process::ExitCode;

use casemate_sys::ident;
use casemate_sys::namespace::{enter, kind};
use casemate_sys::process::{self, Fork};
use rustix::fs::{CWD, Mode, OFlags};

/// The order matters: the user namespace last, or the rights for the others
/// are gone.
const KINDS: [(&str, u64, &str); 7] = [
    ("mnt", kind::MOUNT, "mnt"),
    ("pid", kind::PID, "pid"),
    ("net", kind::NET, "net"),
    ("ipc", kind::IPC, "ipc"),
    ("uts", kind::UTS, "uts"),
    ("cgroup", kind::CGROUP, "cgroup"),
    ("user", kind::USER, "user"),
];

/// Joins the namespaces `kinds` (names separated by commas) of process `pid`
/// and runs `then` there.
pub fn run(kinds: &str, pid: &str, then: impl FnOnce() -> ExitCode) -> io::Result<ExitCode> {
    let wanted: Vec<&str> = kinds.split(',').collect();
    if let Some(unknown) = wanted.iter().find(|w| !KINDS.iter().any(|k| k.0 == **w)) {
        return Err(io::Error::other(format!("no kind of namespace {unknown}")));
    }
    let mut open = Vec::new();
    for (name, kind, file) in KINDS.iter().filter(|k| wanted.contains(&k.0)) {
        let path = format!("/proc/{pid}/ns/{file}");
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, path.as_str(), flags, Mode::empty())
            .map_err(|e| io::Error::other(format!("open {path}: {e}")))?;
        open.push((*name, *kind, fd));
    }
    for (name, kind, fd) in open {
        enter(&fd, kind).map_err(|e| io::Error::other(format!("enter {name} of {pid}: {e}")))?;
    }
    if wanted.contains(&"user") {
        ident::set_groups(&[])?;
        ident::set_gid(0)?;
        ident::set_uid(0)?;
        ident::set_dumpable(true)?;
    }
    if !wanted.contains(&"pid") {
        return Ok(then());
    }
    match process::fork()? {
        Fork::Child => Ok(then()),
        Fork::Parent(_, pidfd) => {
            let ended = process::wait(&pidfd)?;
            Ok(ExitCode::from(u8::try_from(ended.status).unwrap_or(1)))
        }
    }
}

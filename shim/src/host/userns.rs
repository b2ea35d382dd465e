//! User namespace B: where containers live, a child of the agent's A whose ids
//! exclude the agent's.
//!
//! The kernel lets only a process inside A (or B) write B's maps, so a
//! throw-away child of the shim enters A and does it, before any code of a
//! tenant exists. All eight limits of namespaces are 0 in B: a lock on nested
//! namespaces that needs no filter (namespaces(7), /proc/sys/user).

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use casemate_sys::ident;
use casemate_sys::message;
use casemate_sys::namespace::{self, kind};
use casemate_sys::process::{self, Fork};
use rustix::fs::{Mode, OFlags};

use super::Step;
use super::ids::CONTAINER_IDS;
use crate::bootstrap::proc;
use crate::sandbox::SandboxError;

/// For a few system calls of a helper.
const HELPER_WITHIN: Duration = Duration::from_secs(5);

const LIMITS: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// Makes B below the user namespace of the process behind `agent`.
pub fn make(agent: &OwnedFd) -> Result<OwnedFd, SandboxError> {
    let (ours, theirs) = message::pair().step("make", "socket pair")?;
    match process::fork_into(0, None).step("fork", "user namespace helper")? {
        Fork::Child => {
            drop(ours);
            if let Err(e) = in_a(agent, &theirs) {
                let _ = message::send(&theirs, format!("F{e}").as_bytes(), &[]);
            }
            process::exit_now(0)
        }
        Fork::Parent(_, pidfd) => {
            drop(theirs);
            let mut buffer = [0u8; 512];
            let told = match proc::poll_in(&ours, HELPER_WITHIN) {
                Ok(false) => Err(io::ErrorKind::TimedOut.into()),
                _ => message::receive(&ours, &mut buffer, false),
            };
            if !proc::wait(&pidfd, HELPER_WITHIN) {
                proc::kill(&pidfd, HELPER_WITHIN);
            }
            let _ = process::try_wait(&pidfd);
            match told.step("hear from", "user namespace helper")? {
                Some((1, mut fds)) if fds.len() == 1 => fds
                    .pop()
                    .ok_or_else(|| SandboxError::Failed("user namespace helper: no fd".into())),
                Some((n, _)) => Err(SandboxError::Failed(format!(
                    "make the containers' user namespace: {}",
                    String::from_utf8_lossy(buffer.get(1..n).unwrap_or_default())
                ))),
                None => Err(SandboxError::Failed(
                    "make the containers' user namespace: the helper died".into(),
                )),
            }
        }
    }
}

fn in_a(agent: &OwnedFd, result: &OwnedFd) -> io::Result<()> {
    namespace::enter(agent, kind::USER)?;
    // The maker of a user namespace needs ids that its parent knows. The change
    // makes this process undumpable and so its child's map files root's; no
    // process that could look into it exists yet.
    ident::set_gid(0)?;
    ident::set_uid(0)?;
    ident::set_dumpable(true)?;
    let (ours, theirs) = message::pair()?;
    match process::fork_into(kind::USER, None)? {
        Fork::Child => {
            drop(ours);
            if let Err(e) = in_b(&theirs, result) {
                let _ = message::send(result, format!("F{e}").as_bytes(), &[]);
            }
            process::exit_now(0)
        }
        Fork::Parent(pid, pidfd) => {
            drop(theirs);
            let line = format!("0 1 {CONTAINER_IDS}\n");
            fs::write(format!("/proc/{pid}/uid_map"), &line)?;
            fs::write(format!("/proc/{pid}/gid_map"), &line)?;
            message::send(&ours, b"m", &[])?;
            process::wait(&pidfd)?;
            Ok(())
        }
    }
}

fn in_b(mapped: &OwnedFd, result: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0u8; 8];
    if message::receive(mapped, &mut buffer, true)?.is_none() {
        return Err(io::Error::other("maps refused"));
    }
    ident::set_gid(0)?;
    ident::set_uid(0)?;
    for name in LIMITS {
        fs::write(format!("/proc/sys/user/max_{name}_namespaces"), "0")?;
    }
    let fd = rustix::fs::open(
        "/proc/self/ns/user",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    message::send(result, b"B", &[fd.as_fd()])
}

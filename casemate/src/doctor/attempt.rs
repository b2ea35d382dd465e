//! What the kernel can do, seen by having a child do it: nothing outlives that.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use casemate_sys::ident;
use casemate_sys::namespace::{self, kind};
use casemate_sys::process::{self, Fork};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};

/// How long a child may take.
const LIMIT: Duration = Duration::from_secs(5);
/// The longest complaint of a child that is read.
const LONGEST: u64 = 1024;

/// A child that has been started.
struct Child {
    pid: u32,
    pidfd: OwnedFd,
    said: File,
}

fn spawn(namespaces: u64, act: impl FnOnce() -> Result<(), String>) -> io::Result<Child> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    match process::fork_into(namespaces, None)? {
        Fork::Child => {
            drop(read);
            let code = match act() {
                Ok(()) => 0,
                Err(text) => {
                    // Without its words the status alone must do.
                    let _lost = File::from(write).write_all(text.as_bytes());
                    1
                }
            };
            process::exit_now(code)
        }
        Fork::Parent(pid, pidfd) => Ok(Child {
            pid,
            pidfd,
            said: File::from(read),
        }),
    }
}

impl Child {
    /// What it has come to.
    fn end(self) -> Result<(), String> {
        let shown = |error: io::Error| error.to_string();
        let limit = rustix::time::Timespec::try_from(LIMIT).map_err(|e| e.to_string())?;
        let mut wait = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let ready = poll(&mut wait, Some(&limit)).map_err(|e| e.to_string())?;
        if ready == 0 {
            process::signal(self.pidfd.as_fd(), 9).map_err(shown)?;
        }
        let ended = process::wait(self.pidfd.as_fd()).map_err(shown)?;
        if ready == 0 {
            return Err(format!("no answer within {} s", LIMIT.as_secs()));
        }
        if ended.status == 0 {
            return Ok(());
        }
        let mut text = String::new();
        let _partial = self.said.take(LONGEST).read_to_string(&mut text);
        if text.is_empty() {
            text = format!("the attempt ended with status {}", ended.status);
        }
        Err(text)
    }
}

/// Has a child do it, in new namespaces. The caller must have one thread.
pub fn attempt(namespaces: u64, act: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    spawn(namespaces, act)
        .map_err(|error| error.to_string())?
        .end()
}

/// A user namespace like a pod's, and what came of making all that a pod needs
/// in it.
pub struct Sandbox {
    /// Its ids are those from the given one on.
    pub userns: OwnedFd,
    /// What couldn't be made inside.
    pub inside: Result<(), String>,
}

/// What the child is told once it has ids.
const MAPPED: &[u8; 1] = b"y";
/// Kinds of namespaces that a pod has beside its two of users.
const KINDS: [(&str, u64); 6] = [
    ("mount", kind::MOUNT),
    ("network", kind::NET),
    ("ipc", kind::IPC),
    ("uts", kind::UTS),
    ("cgroup", kind::CGROUP),
    ("pid", kind::PID),
];

/// Makes one with 65536 ids from `base` on. The caller must have one thread.
pub fn sandbox(base: u32) -> Result<Sandbox, String> {
    let (wait, go) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| e.to_string())?;
    let child = spawn(kind::USER, || {
        // It has a copy of `go`, and would wait for itself without its parent.
        process::set_parent_death_signal(9).map_err(|e| e.to_string())?;
        let mut word = [0];
        if rustix::io::read(&wait, &mut word) != Ok(1) || word != *MAPPED {
            return Err("it was given up".to_owned());
        }
        // The maker of a user namespace needs ids that its parent knows.
        ident::set_gid(0).map_err(|e| format!("be a group in it: {e}"))?;
        ident::set_uid(0).map_err(|e| format!("be a user in it: {e}"))?;
        for (name, bits) in KINDS {
            namespace::unshare(bits).map_err(|e| format!("a {name} namespace in it: {e}"))?;
        }
        namespace::unshare(kind::USER).map_err(|e| format!("a user namespace in it: {e}"))
    });
    let child = child.map_err(|e| format!("a user namespace: {e}"))?;
    let mapped = map(child.pid, base);
    let word = if mapped.is_ok() { MAPPED } else { b"n" };
    let told = rustix::io::write(&go, word);
    let inside = child.end();
    told.map_err(|e| e.to_string())?;
    Ok(Sandbox {
        userns: mapped?,
        inside,
    })
}

/// The user namespace of a process, with ids from `base` on.
fn map(pid: u32, base: u32) -> Result<OwnedFd, String> {
    let path = format!("/proc/{pid}/ns/user");
    let userns = File::open(&path).map_err(|e| format!("open {path}: {e}"))?;
    for file in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{pid}/{file}"), format!("0 {base} 65536"))
            .map_err(|e| format!("map ids from {base} on: {e}"))?;
    }
    Ok(userns.into())
}

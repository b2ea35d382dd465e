//! systemd's part in a cgroup, asked for from a child: the calls block, and the
//! shim, which has one thread, goes on with its other containers meanwhile.
//!
//! A scope needs a process from the first moment, and ends with its last one.
//! The forked child is that process: it asks for the scope with itself inside,
//! and stays until something else of ours was born in there.

use std::os::fd::OwnedFd;
use std::time::Duration;

use casemate_cgroup::{CgroupError, Scope, systemd};
use casemate_protocol::{MAX_TEXT, clip};
use casemate_sys::process::{self, Fork};
use casemate_sys::{exec, message};
use oci_spec::runtime::LinuxResources;
use tokio::io::Interest;

use super::Step;
use crate::bootstrap::proc;
use crate::sandbox::SandboxError;

/// For systemd to make a scope or take a limit. It answers nobody while it
/// reloads its configuration, which may take a second on a full node.
const PATIENCE: Duration = Duration::from_secs(3);
/// For systemd to forget a scope that is empty: it does so by itself, later.
pub const STOP_WITHIN: Duration = Duration::from_millis(700);
/// What the child itself may take beyond that.
const SPARE: Duration = Duration::from_millis(500);

/// A child that asks systemd, and keeps its scope alive until this is dropped.
pub struct Holder {
    report: OwnedFd,
    pidfd: OwnedFd,
}

/// Asks for a scope that is limited by `r` from the start.
pub fn start(scope: &Scope, r: &LinuxResources, v2: bool) -> Result<Holder, SandboxError> {
    ask(|| systemd::start(scope, r, v2, PATIENCE))
}

/// Tells systemd of new limits.
pub async fn set(scope: &Scope, r: &LinuxResources, v2: bool) -> Result<(), SandboxError> {
    ask(|| systemd::set(scope, r, v2, PATIENCE))?.done().await
}

/// Has systemd forget a scope whose processes have ended. It is no error if it
/// doesn't: it forgets empty scopes by itself.
pub async fn stop(scope: &Scope) {
    let stopped = match ask(|| systemd::stop(scope, STOP_WITHIN)) {
        Ok(child) => child.done().await,
        Err(e) => Err(e),
    };
    if let Err(e) = stopped {
        log::warn!("{e}");
    }
}

fn ask(work: impl FnOnce() -> Result<(), CgroupError>) -> Result<Holder, SandboxError> {
    let (report, theirs) = message::pair().step("make", "socket pair")?;
    match process::fork_into(0, None).step("fork", "a child to ask systemd")? {
        Fork::Parent(_, pidfd) => Ok(Holder { report, pidfd }),
        Fork::Child => {
            // The log's descriptor is closed next, and its number given away.
            log::set_max_level(log::LevelFilter::Off);
            let text = match exec::close_all_except(&[std::os::fd::AsFd::as_fd(&theirs)]) {
                Ok(()) => work().err().map(|e| e.to_string()).unwrap_or_default(),
                Err(e) => format!("close descriptors: {e}"),
            };
            // An empty packet would be the end of the stream.
            let text = format!(".{}", clip(&text));
            if message::send(&theirs, text.as_bytes(), &[]).is_ok() {
                // Until the shim has closed its end, or has ended.
                let _over = message::receive(&theirs, &mut [0; 4], true);
            }
            process::exit_now(0)
        }
    }
}

impl Holder {
    /// Waits for systemd's answer.
    pub async fn done(&self) -> Result<(), SandboxError> {
        let copy = self.report.try_clone().step("copy", "a descriptor")?;
        let fd = crate::io::watch(copy, Interest::READABLE).step("watch", "systemd's answer")?;
        match tokio::time::timeout(PATIENCE + SPARE, fd.readable()).await {
            Ok(Ok(_)) => self.answer(),
            _ => Err(silent()),
        }
    }

    /// As [`Holder::done`], for where nothing else is going on.
    pub fn done_now(&self) -> Result<(), SandboxError> {
        match proc::poll_in(&self.report, PATIENCE + SPARE) {
            Ok(true) => self.answer(),
            _ => Err(silent()),
        }
    }

    fn answer(&self) -> Result<(), SandboxError> {
        let mut buffer = [0; MAX_TEXT + 1];
        let received = message::receive(&self.report, &mut buffer, false);
        let (size, _) = received
            .step("read", "systemd's answer")?
            .ok_or_else(silent)?;
        match buffer.get(1..size) {
            None | Some([]) => Ok(()),
            Some(text) => Err(SandboxError::Failed(
                String::from_utf8_lossy(text).into_owned(),
            )),
        }
    }
}

fn silent() -> SandboxError {
    SandboxError::Failed(
        "ask systemd for a scope: the child that asks doesn't answer: is the slice frozen?".into(),
    )
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Waits only for a process that is on its way out. One in a frozen
        // cgroup goes when that is thawed or removed.
        if proc::kill(&self.pidfd, Duration::from_millis(200)) {
            let _reaped = process::wait(&self.pidfd);
        }
    }
}

//! Ends that the forker doesn't tell of, because it is stopped, wedged or lies.
//!
//! The kernel is asked instead: the process' own descriptor says that it has
//! ended, and `/proc` with what. Nothing is taken for wedged by this, so that a
//! forker that is merely late loses nothing; only after a SIGKILL for the whole
//! container is a forker that keeps the end back ended with it.

use std::sync::Arc;
use std::time::Duration;

use casemate_sys::process;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::process::{Exited, Process};
use super::task::{KILLED, Task};
use crate::bootstrap::proc;
use crate::io::watch;

/// How long the forker may take to tell of an end that is there to see.
const PROMPT: Duration = Duration::from_millis(300);
/// How often it is given that time when it has reaped and still says nothing.
const TRIES: u32 = 10;
/// How long a container may take to be recorded as ended after SIGKILL.
const INSIST: Duration = Duration::from_millis(300);
/// For the last exits, once the forker is dead too.
const LAST_EXITS: Duration = Duration::from_millis(100);

impl Task {
    /// Records the end of `process` also when the forker doesn't tell of it.
    pub fn watch_end(self: &Arc<Task>, process: &Arc<Process>) {
        let Some(pidfd) = process.pidfd() else { return };
        match watch(pidfd, Interest::READABLE) {
            Ok(pidfd) => {
                let (task, process) = (self.clone(), process.clone());
                tokio::spawn(async move { task.tell_of_end(&process, pidfd).await });
            }
            Err(error) => log::warn!("container {}: watch a process: {error}", self.id),
        }
    }

    async fn tell_of_end(&self, process: &Arc<Process>, pidfd: AsyncFd<Arc<std::os::fd::OwnedFd>>) {
        tokio::select! {
            _ = process.wait() => return,
            () = ended(&pidfd) => {}
        }
        for _ in 0..TRIES {
            if timeout(PROMPT, process.wait()).await.is_ok() || self.knows_end(process) {
                return;
            }
            let status = process::pid_of(pidfd.get_ref()).ok().and_then(proc::ended);
            if let Some(status) = status {
                log::warn!(
                    "container {}: its forker is silent about the end of a process",
                    self.id
                );
                self.end_known(process, Exited::now(status));
                return;
            }
        }
        self.end_known(process, Exited::now(KILLED));
    }

    /// Init has been sent SIGKILL: sees to it that its end is recorded soon, by
    /// whatever the pod is wedged. A process that the kernel can't end (one in
    /// uninterruptible sleep) is not recorded as ended: it is not.
    pub fn insist(self: &Arc<Task>) {
        if self.container().is_none() || self.is_insisting() {
            return;
        }
        let task = self.clone();
        tokio::spawn(async move {
            let Some(container) = task.container() else {
                return;
            };
            while timeout(INSIST, task.init.wait()).await.is_err() {
                if !task.init_is_leaving() {
                    continue;
                }
                log::warn!(
                    "container {}: killed, but its forker says nothing: it is cut off",
                    task.id
                );
                container.cut_off();
                if timeout(LAST_EXITS, task.init.wait()).await.is_err() {
                    task.abandon();
                }
                return;
            }
        });
    }

    fn init_is_leaving(&self) -> bool {
        let Some(pidfd) = self.init.pidfd() else {
            return true;
        };
        // No pid: it has been reaped.
        process::pid_of(&*pidfd).map_or(true, proc::is_leaving)
    }
}

async fn ended(pidfd: &AsyncFd<Arc<std::os::fd::OwnedFd>>) {
    loop {
        let Ok(mut guard) = pidfd.readable().await else {
            return;
        };
        if proc::poll_in(&**pidfd.get_ref(), Duration::ZERO).unwrap_or(true) {
            return;
        }
        guard.clear_ready();
    }
}

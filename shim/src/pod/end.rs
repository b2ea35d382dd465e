//! How a pod ends: stopped, shut down, or lost with its agent.

use std::sync::Arc;
use std::time::Duration;

use super::life::Step;
use super::process::Exited;
use super::state::Phase;
use super::task::{KILLED, Task};
use super::{Pod, Slot};
use crate::bootstrap::journal::Entry;
use crate::sandbox::Sandbox;

/// How long exits may still arrive after the agent has gone.
const LAST_EXITS: Duration = Duration::from_millis(300);
/// How long exits of killed containers may take.
const KILLED_WITHIN: Duration = Duration::from_secs(1);

impl Pod {
    /// Waits for the agent's end; then every container ends with it.
    pub(super) async fn watch_agent(self: Arc<Pod>, sandbox: Arc<Sandbox>) {
        sandbox.lost().await;
        drop(sandbox);
        let stopped = {
            let mut book = self.book();
            book.lost = true;
            matches!(book.slot, Slot::Stopped)
        };
        let tasks = self.tasks();
        if !stopped && !tasks.is_empty() {
            log::error!("the agent has ended: so have {} containers", tasks.len());
        }
        for task in tasks {
            task.abandon_within(LAST_EXITS).await;
        }
        let status = if stopped { 0 } else { KILLED };
        // Awaited: nobody has asked for it by the sandbox API.
        let _other = self.step(Step::End(Exited::now(status)));
    }

    /// Ends every container and then the sandbox. With `grace` they are asked
    /// by SIGTERM first. Records stay until they are deleted.
    pub async fn stop(&self, grace: Duration) {
        let tasks = self.tasks();
        if !grace.is_zero() {
            for task in tasks.iter().filter(|task| is_running(task)) {
                // One that has ended meanwhile needs no signal.
                let _gone = task.init.signal(libc::SIGTERM);
            }
            let running = tasks.iter().filter(|task| is_running(task));
            let ends = futures::future::join_all(running.map(|task| task.init.wait()));
            let _rest = tokio::time::timeout(grace, ends).await;
        }
        kill(&tasks).await;
        self.stop_sandbox().await;
        // What was made between is lost with its agent (`watch_agent`).
        let _other = self.step(Step::End(Exited::now(0)));
    }

    /// Ends everything, and then the shim.
    pub async fn end_now(&self) {
        self.end_all().await;
        self.stop_sandbox().await;
        let _other = self.step(Step::End(Exited::now(0)));
        self.leave.send_replace(true);
    }

    /// Kills every container and records their ends (SIGTERM).
    pub async fn end_all(&self) {
        let tasks = self.close();
        kill(&tasks).await;
        for task in &tasks {
            if let Some(container) = task.container() {
                container.destroy().await;
            }
            if let Err(error) = self.journal.record(Entry::Removed(task.id.clone())) {
                log::warn!(
                    "container {}: write its removal to the journal: {error}",
                    task.id
                );
            }
        }
        // All containers are gone: so are the writers that loggers read from.
        let streams: Vec<_> = tasks
            .iter()
            .flat_map(|task| task.execs().into_iter().chain([task.init.clone()]))
            .filter_map(|process| process.streams())
            .collect();
        futures::future::join_all(streams.iter().map(|streams| streams.end_logger())).await;
    }

    /// Ends the sandbox, if there is one.
    pub async fn stop_sandbox(&self) {
        // Whoever comes second waits for the first to be done.
        let _turn = self.ending.lock().await;
        let made = {
            let mut book = self.book();
            match std::mem::replace(&mut book.slot, Slot::Stopped) {
                Slot::Made(sandbox) => Some(sandbox),
                other => {
                    book.slot = other;
                    None
                }
            }
        };
        if let Some(sandbox) = made {
            sandbox.stop().await;
        }
    }
}

fn is_running(task: &Task) -> bool {
    task.container().is_some() && task.init.facts().phase == Phase::Running
}

/// Kills all of each container and waits until their ends are recorded.
async fn kill(tasks: &[Arc<Task>]) {
    for task in tasks {
        if let Some(container) = task.container()
            && let Err(error) = container.kill_all(libc::SIGKILL)
        {
            log::warn!("container {}: kill: {error}", task.id);
        }
    }
    for task in tasks {
        let limit = if task.container().is_some() {
            KILLED_WITHIN
        } else {
            Duration::ZERO
        };
        if tokio::time::timeout(limit, task.init.wait()).await.is_err() {
            task.abandon();
        }
    }
}

//! How a pod ends: stopped, shut down, or lost with its agent.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::life::Step;
use super::process::Exited;
use super::state::Phase;
use super::task::{KILLED, Task};
use super::{Pod, Slot};
use crate::record::Record;
use crate::sandbox::Sandbox;

/// How long exits may still arrive after the agent has gone.
const LAST_EXITS: Duration = Duration::from_millis(300);
/// For containers that were being made meanwhile to be undone.
const UNDONE_WITHIN: Duration = Duration::from_secs(2);
/// How long the exits of killed containers may take, of all together.
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
            self.records.push(&Record::AgentLoss {
                // As many as fit into a record.
                containers: tasks.iter().take(32).map(|task| task.id.clone()).collect(),
            });
        }
        let (containers, pauses): (Vec<_>, Vec<_>) =
            tasks.iter().partition(|task| task.container().is_some());
        let ends = containers
            .iter()
            .map(|task| task.abandon_within(LAST_EXITS));
        futures::future::join_all(ends).await;
        for task in pauses {
            task.abandon();
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
        let mut tasks = self.close();
        self.end(&tasks).await;
        let made = match &self.book().slot {
            Slot::Made(sandbox) => Some(sandbox.clone()),
            _ => None,
        };
        if let Some(sandbox) = made {
            // What is being made fails without the agent, and undoes itself.
            sandbox.kill().await;
            let until = Instant::now() + UNDONE_WITHIN;
            while !self.book().creating.is_empty() && Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let known: BTreeSet<String> = tasks.iter().map(|task| task.id.clone()).collect();
            let mut late = self.tasks();
            late.retain(|task| !known.contains(&task.id));
            self.end(&late).await;
            tasks.extend(late);
        }
        // All containers are gone: so are the writers that loggers read from.
        let streams: Vec<_> = tasks
            .iter()
            .flat_map(|task| task.execs().into_iter().chain([task.init.clone()]))
            .filter_map(|process| process.streams())
            .collect();
        futures::future::join_all(streams.iter().map(|streams| streams.end_logger())).await;
    }

    async fn end(&self, tasks: &[Arc<Task>]) {
        kill(tasks).await;
        let containers = tasks.iter().filter_map(|task| task.container());
        let ends = containers.map(|container| container.destroy());
        futures::future::join_all(ends).await;
        for task in tasks {
            self.write_off(task);
        }
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
        let Some(container) = task.container() else {
            continue;
        };
        if let Err(error) = container.kill_all(libc::SIGKILL) {
            log::warn!("container {}: kill: {error}", task.id);
        }
        task.insist();
    }
    let until = Instant::now() + KILLED_WITHIN;
    for task in tasks {
        let limit = match task.container() {
            Some(_) => until,
            None => Instant::now(),
        };
        if timeout_at(limit, task.init.wait()).await.is_err() {
            task.abandon();
        }
    }
}

//! The pod: its containers, its sandbox, and when the shim may go.

mod oom;
pub mod process;
pub mod state;
pub mod task;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::bootstrap::journal::{Entry, Journal};
use crate::error::{ShimError, again};
use crate::events::Events;
use crate::sandbox::{Sandbox, SandboxError};
use task::Task;

/// How long exits may still arrive after the agent has gone.
const LAST_EXITS: Duration = Duration::from_millis(300);

/// Everything the shim knows.
pub struct Pod {
    /// Bundle of the pod.
    pub bundle: PathBuf,
    /// The event queue.
    pub events: Events,
    /// What was made on the host.
    pub journal: Arc<Journal>,
    sandbox: Result<Arc<Sandbox>, SandboxError>,
    book: Mutex<Book>,
    leave: watch::Sender<bool>,
}

#[derive(Default)]
struct Book {
    tasks: BTreeMap<String, Arc<Task>>,
    /// Ids whose Create is under way.
    creating: BTreeSet<String>,
    /// Shutdown was asked for while there were containers.
    shutdown: bool,
    /// The agent has gone.
    lost: bool,
    /// No new containers: the shim is going.
    closed: bool,
}

/// An id that is being created; gives it back unless a task takes it.
pub struct Reservation {
    pod: Arc<Pod>,
    id: String,
}

impl Pod {
    /// A pod without containers. A sandbox that could not be made is told at
    /// every Create.
    pub fn new(
        bundle: PathBuf,
        events: Events,
        journal: Arc<Journal>,
        sandbox: Result<Arc<Sandbox>, SandboxError>,
    ) -> Arc<Pod> {
        Arc::new(Pod {
            bundle,
            events,
            journal,
            sandbox,
            book: Mutex::new(Book::default()),
            leave: watch::Sender::new(false),
        })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sandbox, or why there is none.
    pub fn sandbox(&self) -> Result<&Arc<Sandbox>, ShimError> {
        if self.book().lost {
            return Err(ShimError::Unavailable(
                "the pod's agent has ended: the pod must be made again".to_owned(),
            ));
        }
        self.sandbox
            .as_ref()
            .map_err(|error| ShimError::from(again(error)))
    }

    /// The container with this id.
    pub fn task(&self, id: &str) -> Result<Arc<Task>, ShimError> {
        let found = self.find(id);
        found.ok_or_else(|| ShimError::NotFound(format!("container {id:?} not found")))
    }

    /// The container with this id, if there is one.
    pub fn find(&self, id: &str) -> Option<Arc<Task>> {
        self.book().tasks.get(id).cloned()
    }

    /// Takes an id for a container that is about to be made.
    pub fn reserve(self: &Arc<Pod>, id: &str) -> Result<Reservation, ShimError> {
        let mut book = self.book();
        if book.closed {
            return Err(ShimError::Unavailable(format!(
                "create container {id:?}: the shim is shutting down"
            )));
        }
        if book.tasks.contains_key(id) || !book.creating.insert(id.to_owned()) {
            return Err(ShimError::AlreadyExists(format!("container {id:?} exists")));
        }
        Ok(Reservation {
            pod: self.clone(),
            id: id.to_owned(),
        })
    }

    /// Drops the record of a container of which nothing is left.
    pub fn remove(&self, id: &str) {
        if let Err(error) = self.journal.record(Entry::Removed(id.to_owned())) {
            log::warn!("container {id}: write its removal to the journal: {error}");
        }
        self.book().tasks.remove(id);
        self.leave_if_idle();
    }

    /// Shutdown: at once without containers, else after the last one.
    pub fn shutdown(&self) {
        self.book().shutdown = true;
        self.leave_if_idle();
    }

    fn leave_if_idle(&self) {
        let mut book = self.book();
        if book.shutdown && book.tasks.is_empty() && book.creating.is_empty() {
            book.closed = true;
            drop(book);
            self.leave.send_replace(true);
        }
    }

    /// Resolves when the shim may go.
    pub async fn may_leave(&self) {
        let mut leave = self.leave.subscribe();
        // Its sender lives in `self`.
        let _never = leave.wait_for(|leave| *leave).await;
    }

    /// Refuses new containers and returns those there are, CRI's sandbox
    /// container last.
    pub fn close(&self) -> Vec<Arc<Task>> {
        self.book().closed = true;
        self.tasks()
    }

    fn tasks(&self) -> Vec<Arc<Task>> {
        let mut tasks: Vec<_> = self.book().tasks.values().cloned().collect();
        tasks.sort_by_key(|task| task.container().is_none());
        tasks
    }

    /// Waits for the agent's end; then every container ends with it.
    pub async fn watch_agent(self: Arc<Pod>) {
        let Ok(sandbox) = &self.sandbox else { return };
        sandbox.lost().await;
        self.book().lost = true;
        let tasks = self.tasks();
        if !tasks.is_empty() {
            log::error!("the agent has ended: so have {} containers", tasks.len());
        }
        for task in tasks {
            task.abandon_within(LAST_EXITS).await;
        }
    }

    /// Kills every container and records their ends (SIGTERM).
    pub async fn end_all(&self) {
        let tasks = self.close();
        for task in &tasks {
            if let Some(container) = task.container()
                && let Err(error) = container.kill_all(libc::SIGKILL)
            {
                log::warn!("container {}: kill: {error}", task.id);
            }
        }
        for task in &tasks {
            let limit = if task.container().is_some() {
                Duration::from_secs(1)
            } else {
                Duration::ZERO
            };
            if tokio::time::timeout(limit, task.init.wait()).await.is_err() {
                task.abandon();
            }
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

    /// Ends the sandbox, if there ever was one.
    pub async fn stop_sandbox(&self) {
        if let Ok(sandbox) = &self.sandbox {
            sandbox.stop().await;
        }
    }
}

impl Reservation {
    /// The container is made. Enters it, unless the agent was lost meanwhile.
    pub fn enter(self, task: Arc<Task>) {
        self.pod.book().tasks.insert(self.id.clone(), task);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.pod.book().creating.remove(&self.id);
        self.pod.leave_if_idle();
    }
}

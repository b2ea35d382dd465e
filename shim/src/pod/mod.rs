//! The pod: its containers, its sandbox, and when the shim may go.

mod end;
mod late;
pub mod life;
mod oom;
pub mod process;
pub mod state;
pub mod task;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use crate::bootstrap::journal::{Entry, Journal};
use crate::error::{ShimError, again};
use crate::events::Events;
use crate::host::lockdown;
use crate::record::{Record, Records, spool};
use crate::sandbox::{Origin, PodRequest, Sandbox, SandboxError};
use life::{Life, Step};
use task::Task;

/// Everything the shim knows.
pub struct Pod {
    /// The pod's id: CRI's sandbox id, or that of the only container.
    pub id: String,
    /// Bundle of the pod.
    pub bundle: PathBuf,
    /// The event queue.
    pub events: Events,
    /// What was made on the host.
    pub journal: Arc<Journal>,
    /// What happened in it that an operator wants to know.
    pub records: Records,
    /// Since when there is a shim for it.
    pub since: SystemTime,
    book: Mutex<Book>,
    life: watch::Sender<Life>,
    /// Changes whenever a Create has ended, either way.
    created: watch::Sender<()>,
    /// Held by whoever ends the sandbox.
    ending: tokio::sync::Mutex<()>,
    leave: watch::Sender<bool>,
    /// Whether there is, or is being made, anything that a daemon would miss.
    used: watch::Sender<bool>,
}

/// How long Kill and Delete wait for a Create that is under way: more than it takes on a
/// busy node, and less than the second that they may take themselves.
const MADE_WITHIN: Duration = Duration::from_millis(500);

/// What stands behind the pod.
#[derive(Default)]
enum Slot {
    /// Not made yet: CreateSandbox is to come.
    #[default]
    Awaited,
    /// There.
    Made(Arc<Sandbox>),
    /// It could not be made.
    Failed(SandboxError),
    /// Stopped: nothing of it is left on the host.
    Stopped,
}

#[derive(Default)]
struct Book {
    slot: Slot,
    tasks: BTreeMap<String, Arc<Task>>,
    /// Ids whose Create is under way, and whether they were deleted meanwhile.
    creating: BTreeMap<String, bool>,
    /// Shutdown was asked for while there were containers.
    shutdown: bool,
    /// The agent has gone.
    lost: bool,
    /// No new containers: the shim is going.
    closed: bool,
    /// Shutdown came with no container but those that are being made: whoever
    /// asked for them is gone.
    deserted: bool,
}

/// An id that is being created; gives it back unless a task takes it.
pub struct Reservation {
    pod: Arc<Pod>,
    id: String,
}

impl Pod {
    /// A pod without sandbox and containers.
    pub fn new(id: String, bundle: PathBuf, events: Events, journal: Arc<Journal>) -> Arc<Pod> {
        Arc::new(Pod {
            records: Records::new(events.namespace(), &id),
            since: SystemTime::now(),
            id,
            bundle,
            events,
            journal,
            book: Mutex::new(Book::default()),
            life: watch::Sender::new(Life::Awaited),
            created: watch::Sender::new(()),
            ending: tokio::sync::Mutex::new(()),
            leave: watch::Sender::new(false),
            used: watch::Sender::new(false),
        })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the sandbox; then the shim locks itself. Once in its life.
    pub fn make_sandbox(self: &Arc<Pod>, origin: Origin) -> Result<(), SandboxError> {
        let sandbox = Sandbox::start(PodRequest {
            pod_id: self.id.clone(),
            bundle: self.bundle.clone(),
            origin,
            records: self.records.clone(),
        })?;
        lockdown::lock(sandbox.cgroup())?;
        self.book().slot = Slot::Made(sandbox.clone());
        tokio::spawn(self.clone().watch_agent(sandbox));
        Ok(())
    }

    /// Keeps a policy refusal, here and where it outlives this shim: a pod that
    /// is refused goes with it.
    pub fn refused(&self, container: &str, rule: Option<&str>, text: &str) {
        self.records.push(&Record::PolicyRefusal {
            container: container.to_owned(),
            rule: rule.map(str::to_owned),
            text: text.chars().take(1024).collect(),
        });
        let whose = spool::Whose {
            namespace: self.events.namespace(),
            pod: &self.id,
            container,
        };
        if let Err(error) = spool::append(Path::new(spool::DIRECTORY), whose, rule, text) {
            log::warn!("keep a refusal in {}: {error}", spool::DIRECTORY);
        }
    }

    /// There will be no sandbox.
    pub fn give_up(&self, error: SandboxError) {
        self.book().slot = Slot::Failed(error);
    }

    /// The sandbox, or why there is none.
    pub fn sandbox(&self) -> Result<Arc<Sandbox>, ShimError> {
        let book = self.book();
        match &book.slot {
            Slot::Awaited => Err(ShimError::FailedPrecondition(
                "the pod has no sandbox yet: call CreateSandbox first".to_owned(),
            )),
            Slot::Failed(error) => Err(ShimError::from(again(error))),
            Slot::Stopped => Err(ShimError::Unavailable(
                "the pod's sandbox has been stopped: the pod must be made again".to_owned(),
            )),
            Slot::Made(_) if book.lost => Err(ShimError::Unavailable(
                "the pod's agent has ended: the pod must be made again".to_owned(),
            )),
            Slot::Made(sandbox) => Ok(sandbox.clone()),
        }
    }

    /// Where the sandbox is, as the sandbox API tells it.
    pub fn life(&self) -> Life {
        *self.life.borrow()
    }

    /// Takes a step of its life; what it is now, and whether that follows.
    pub fn step(&self, step: Step) -> Result<Life, Life> {
        let mut answer = Err(Life::Awaited);
        self.life.send_if_modified(|life| match life.on(step) {
            Some(next) => {
                *life = next;
                answer = Ok(next);
                true
            }
            None => {
                answer = Err(*life);
                false
            }
        });
        self.note_use();
        answer
    }

    /// Waits for the sandbox' end.
    pub async fn wait_ended(&self) -> process::Exited {
        let mut life = self.life.subscribe();
        // Its sender lives in `self`.
        let ended = life.wait_for(|life| life.exited().is_some()).await;
        ended
            .ok()
            .and_then(|life| life.exited())
            .unwrap_or_else(|| process::Exited::now(task::KILLED))
    }

    /// The container with this id.
    pub fn task(&self, id: &str) -> Result<Arc<Task>, ShimError> {
        let found = self.find(id);
        found.ok_or_else(|| ShimError::NotFound(format!("container {id:?} not found")))
    }

    /// As [`Pod::task`], but waits for the end of a Create of it that is under way: who
    /// closes a stream as soon as Create has opened it may ask for the container first, and
    /// who gives Create up wants it gone.
    pub async fn task_made(&self, id: &str) -> Result<Arc<Task>, ShimError> {
        let mut created = self.created.subscribe();
        while self.book().creating.contains_key(id) {
            // Its sender lives in `self`.
            if created.changed().await.is_err() {
                break;
            }
        }
        self.task(id)
    }

    /// As [`Pod::task_made`], but not for longer than a healthy Create takes: Kill and
    /// Delete answer within a second, whatever is stuck in the pod.
    pub async fn task_soon(&self, id: &str) -> Result<Arc<Task>, ShimError> {
        let made = tokio::time::timeout(MADE_WITHIN, self.task_made(id)).await;
        made.unwrap_or_else(|_| self.task(id))
    }

    /// As [`Pod::task_soon`], for who deletes the container: one that isn't made by then is
    /// undone by its Create.
    pub async fn task_to_delete(&self, id: &str) -> Result<Arc<Task>, ShimError> {
        let found = self.task_soon(id).await;
        if let Some(deleted) = self.book().creating.get_mut(id) {
            *deleted = true;
        }
        found
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
        if book.tasks.contains_key(id) || book.creating.contains_key(id) {
            return Err(ShimError::AlreadyExists(format!("container {id:?} exists")));
        }
        book.creating.insert(id.to_owned(), false);
        drop(book);
        self.note_use();
        Ok(Reservation {
            pod: self.clone(),
            id: id.to_owned(),
        })
    }

    /// Drops the record of a container that has been destroyed.
    pub fn remove(&self, task: &Task) {
        self.write_off(task);
        self.book().tasks.remove(&task.id);
        self.note_use();
        self.leave_if_idle();
    }

    /// Of a stand-in for pause nothing can be left; a container's own removal is
    /// written when the kernel has let go of it.
    fn write_off(&self, task: &Task) {
        if task.container().is_none()
            && let Err(error) = self.journal.record(Entry::Removed(task.id.clone()))
        {
            log::warn!(
                "container {}: write its removal to the journal: {error}",
                task.id
            );
        }
    }

    /// Shutdown: at once without containers, else after the last one. A pod of
    /// the sandbox API outlives its containers: ShutdownSandbox ends it, and
    /// this comes when a container could not be made.
    pub fn shutdown(&self) {
        if self.life() != Life::Awaited {
            log::debug!("pod {}: kept for its sandbox", self.id);
            return;
        }
        {
            let mut book = self.book();
            book.shutdown = true;
            if book.tasks.is_empty() {
                // As for a Create that comes a moment later.
                book.closed = true;
                book.deserted = true;
            }
        }
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

    /// Why a container that has just been made is to be undone, if it is.
    pub fn unwanted(&self, id: &str) -> Option<&'static str> {
        let book = self.book();
        match book.creating.get(id) {
            _ if book.deserted => Some("the shim is shutting down"),
            Some(true) => Some("it was deleted meanwhile"),
            _ => None,
        }
    }

    fn note_use(&self) {
        self.used.send_if_modified(|used| {
            let book = self.book();
            let now =
                self.life() != Life::Awaited || !book.tasks.is_empty() || !book.creating.is_empty();
            std::mem::replace(used, now) != now
        });
    }

    /// Resolves when the pod has been without containers for that long, or has none and
    /// its bundle is gone, which containerd removes where it has given the pod up: then
    /// it takes none any more.
    pub async fn unused_for(&self, time: Duration) {
        let mut used = self.used.subscribe();
        // Its sender lives in `self`.
        while used.wait_for(|used| !*used).await.is_ok() {
            tokio::select! {
                _ = used.wait_for(|used| *used) => continue,
                () = tokio::time::sleep(time) => {}
                () = bundle_is_gone() => {}
            }
            let mut book = self.book();
            if book.tasks.is_empty() && book.creating.is_empty() {
                book.closed = true;
                return;
            }
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

    /// Ids of the containers.
    pub fn ids(&self) -> Vec<String> {
        self.book().tasks.keys().cloned().collect()
    }

    /// The containers, CRI's sandbox container last.
    pub fn tasks(&self) -> Vec<Arc<Task>> {
        let mut tasks: Vec<_> = self.book().tasks.values().cloned().collect();
        tasks.sort_by_key(|task| task.container().is_none());
        tasks
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
        self.pod.created.send_replace(());
        self.pod.note_use();
        self.pod.leave_if_idle();
    }
}

/// How often a pod without containers looks for its bundle.
const LOOK_FOR_BUNDLE: Duration = Duration::from_secs(1);

/// Resolves when the bundle is gone, which is the working directory of this process: one
/// that has been removed has no name left. One that can't be looked at is there.
async fn bundle_is_gone() {
    while rustix::fs::stat(".").map_or(true, |seen| seen.st_nlink != 0) {
        tokio::time::sleep(LOOK_FOR_BUNDLE).await;
    }
}

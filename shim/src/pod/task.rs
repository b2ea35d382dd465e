//! One container of the pod: its init, its execs, and the order of their ends.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit, TaskStart};
use containerd_shim_protos::topics;
use protobuf::MessageField;
use tokio::sync::watch;

use super::Pod;
use super::oom::Oom;
use super::process::{Exited, Process};
use super::state::{Event, Next, Phase};
use crate::bootstrap::journal::{Entry, Journal};
use crate::error::ShimError;
use crate::events::{Events, timestamp};
use crate::io::Streams;
use crate::record::Records;
use crate::sandbox::{ChildStdio, Container, Exit};

/// Exits of processes that nobody has told us of yet; more is a broken forker.
const EARLY_MAX: usize = 1024;
/// What a failed start leaves as its status.
const NOT_STARTED: u32 = 255;
/// 128 + SIGKILL.
pub const KILLED: u32 = 137;

/// What stands behind a record.
pub enum Kind {
    /// CRI's sandbox container: nothing of its image runs, the pod's pause
    /// stands for it.
    Pause,
    /// A container.
    Real(Arc<Container>),
}

/// The record of one container; lives until Delete.
pub struct Task {
    /// Container id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// What stands behind it.
    pub kind: Kind,
    /// Its first process.
    pub init: Arc<Process>,
    /// One mutating request at a time. Never held by State, Wait, Connect, Kill.
    pub turn: tokio::sync::Mutex<()>,
    private_pids: bool,
    book: Mutex<Book>,
    /// True when no more exits will come from the forker.
    drained: watch::Sender<bool>,
    events: Events,
    journal: Arc<Journal>,
    /// The pod's.
    pub records: Records,
}

#[derive(Default)]
struct Book {
    execs: BTreeMap<String, Arc<Process>>,
    early: HashMap<u32, Exit>,
    paused: bool,
    /// Init was reaped; it is recorded after the last exec.
    init_exit: Option<Exited>,
    /// Somebody sees to it that init's end is recorded.
    insisting: bool,
}

impl Task {
    /// A record around a made container.
    pub fn new(
        id: &str,
        bundle: PathBuf,
        kind: Kind,
        init: Process,
        private_pids: bool,
        pod: &Pod,
    ) -> Task {
        Task {
            id: id.to_owned(),
            bundle,
            kind,
            init: Arc::new(init),
            turn: tokio::sync::Mutex::new(()),
            private_pids,
            book: Mutex::new(Book::default()),
            drained: watch::Sender::new(false),
            events: pod.events.clone(),
            journal: pod.journal.clone(),
            records: pod.records.clone(),
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container, if the record is one.
    pub fn container(&self) -> Option<&Arc<Container>> {
        match &self.kind {
            Kind::Pause => None,
            Kind::Real(container) => Some(container),
        }
    }

    /// The process that an exec id names; init's is empty.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, ShimError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let found = self.book().execs.get(exec_id).cloned();
        found.ok_or_else(|| {
            ShimError::NotFound(format!(
                "exec {exec_id:?} of container {:?} not found",
                self.id
            ))
        })
    }

    /// Every exec, by id.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        self.book().execs.values().cloned().collect()
    }

    /// Whether the container is frozen.
    pub fn is_paused(&self) -> bool {
        self.book().paused
    }

    /// Notes that the container is frozen or thawed.
    pub fn set_paused(&self, paused: bool) {
        self.book().paused = paused;
    }

    /// Registers an exec.
    pub fn add_exec(&self, process: Process) -> Result<(), ShimError> {
        let mut book = self.book();
        self.refuse_unless_usable(&book, &process.exec_id)?;
        if book.execs.contains_key(&process.exec_id) {
            return Err(ShimError::AlreadyExists(format!(
                "exec {:?} of container {:?} exists",
                process.exec_id, self.id
            )));
        }
        book.execs
            .insert(process.exec_id.clone(), Arc::new(process));
        Ok(())
    }

    /// Drops the record of an exec.
    pub fn remove_exec(&self, exec_id: &str) {
        self.book().execs.remove(exec_id);
    }

    fn refuse_unless_usable(&self, book: &Book, exec_id: &str) -> Result<(), ShimError> {
        let phase = self.init.facts().phase;
        let why = if phase == Phase::Stopped || book.init_exit.is_some() {
            "stopped"
        } else if book.paused {
            "paused"
        } else {
            return Ok(());
        };
        Err(ShimError::FailedPrecondition(format!(
            "exec {exec_id:?}: container {:?} is {why}",
            self.id
        )))
    }

    /// Starts init.
    pub async fn start_init(&self) -> Result<u32, ShimError> {
        self.step(&self.init, Event::Start)?;
        let answer = match self.container() {
            Some(container) => container.go().await,
            None => Ok(()),
        };
        let mut book = self.book();
        if let Err(error) = answer {
            // Where the answer is only late, nothing may come to run by it.
            let _gone = self.init.signal(libc::SIGKILL);
            self.not_started(&self.init);
            return Err(error.into());
        }
        let pid = self.init.facts().pid;
        self.events.push(
            topics::TASK_START_EVENT_TOPIC,
            &TaskStart {
                container_id: self.id.clone(),
                pid,
                ..TaskStart::default()
            },
        );
        self.started(&mut book, &self.init);
        Ok(pid)
    }

    /// Claims a registered exec for the one Start that it may have. What
    /// follows is [`Task::start_exec`], or [`Task::exec_failed`].
    pub fn claim_exec(&self, process: &Process) -> Result<(), ShimError> {
        let book = self.book();
        self.refuse_unless_usable(&book, &process.exec_id)?;
        if self.init.facts().phase != Phase::Running {
            return Err(ShimError::FailedPrecondition(format!(
                "exec {:?}: container {:?} is not running",
                process.exec_id, self.id
            )));
        }
        self.step(process, Event::Start)
    }

    /// A claimed exec could not be started: whoever waits for it is told.
    pub fn exec_failed(&self, process: &Process) {
        let mut book = self.book();
        self.not_started(process);
        self.finish_init(&mut book);
    }

    /// Starts a claimed exec.
    pub async fn start_exec(
        self: &Arc<Task>,
        process: &Arc<Process>,
        stdio: ChildStdio,
        streams: Arc<Streams>,
    ) -> Result<u32, ShimError> {
        let begun = {
            // Opening the streams may have taken a while.
            let book = self.book();
            self.refuse_unless_usable(&book, &process.exec_id)
                .and_then(|()| self.step(process, Event::Opened))
        };
        let container = match (begun, self.container()) {
            (Ok(()), Some(container)) => container,
            (Ok(()), None) => return Err(self.nothing_runs(process)),
            (Err(error), _) => {
                self.exec_failed(process);
                return Err(error);
            }
        };
        let terminal = process.paths.terminal;
        let answer = container.exec(process.spec(), terminal, stdio).await;
        let mut book = self.book();
        let mut spawned = match answer {
            Ok(spawned) => spawned,
            Err(error) => {
                self.not_started(process);
                self.finish_init(&mut book);
                return Err(error.into());
            }
        };
        let pid = spawned.pid;
        let key = spawned.key;
        let master = spawned.pty.take();
        process.spawned(spawned);
        self.watch_end(process);
        let attached = streams.attach(master);
        {
            let mut facts = process.facts();
            if facts.stdin_closed {
                streams.close_stdin();
            }
            if let Some((width, height)) = facts.size.take()
                && let Err(error) = streams.resize(width, height)
            {
                log::warn!("exec {:?}: {error}", process.exec_id);
            }
            facts.streams = Some(streams);
        }
        self.events.push(
            topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            &TaskExecStarted {
                container_id: self.id.clone(),
                exec_id: process.exec_id.clone(),
                pid,
                ..TaskExecStarted::default()
            },
        );
        self.started(&mut book, process);
        if let Some(exit) = book.early.remove(&key) {
            self.settle(&mut book, process, exited(exit));
        } else if book.init_exit.is_some() {
            // Born after init's end, in a pid namespace that goes on.
            self.kill_rest();
        }
        if let Err(error) = attached {
            // It runs without its streams: end it, the exit tells the rest.
            let _gone = process.signal(libc::SIGKILL);
            return Err(error);
        }
        Ok(pid)
    }

    fn nothing_runs(&self, process: &Process) -> ShimError {
        self.exec_failed(process);
        ShimError::FailedPrecondition(format!(
            "exec {:?}: nothing runs in the sandbox container {:?}",
            process.exec_id, self.id
        ))
    }

    fn step(&self, process: &Process, event: Event) -> Result<(), ShimError> {
        let mut facts = process.facts();
        match facts.phase.on(event) {
            Next::To(phase) => {
                facts.phase = phase;
                Ok(())
            }
            Next::Park | Next::Refuse => Err(ShimError::FailedPrecondition(format!(
                "start {:?} of container {:?}: it is {}",
                process.exec_id,
                self.id,
                facts.phase.name()
            ))),
        }
    }

    /// There is no process: no event, but a Wait that has its answer.
    fn not_started(&self, process: &Process) {
        let (next, parked) = {
            let mut facts = process.facts();
            (facts.phase.on(Event::Failed), facts.parked.take())
        };
        if next == Next::To(Phase::Stopped) {
            process.finish(parked.unwrap_or_else(|| Exited::now(NOT_STARTED)));
        }
    }

    /// The start event is in the queue: an exit that came before may follow.
    fn started(&self, book: &mut Book, process: &Arc<Process>) {
        let parked = {
            let mut facts = process.facts();
            if let Next::To(phase) = facts.phase.on(Event::Started) {
                facts.phase = phase;
            }
            facts.parked.take()
        };
        if let Some(exited) = parked {
            self.settle(book, process, exited);
        }
    }

    /// Takes exits from the forker until there are no more.
    pub async fn reap(self: Arc<Self>) {
        let Some(container) = self.container().cloned() else {
            return;
        };
        let oom = Oom::arm(&self, &self.events, &self.records).map(Arc::new);
        let watching = oom.clone().map(|oom| tokio::spawn(oom.run()));
        while let Some(exit) = container.next_exit().await {
            if let Some(oom) = &oom {
                oom.check();
            }
            let mut book = self.book();
            match self.by_key(&book, exit.key) {
                Some(process) => self.settle(&mut book, &process, exited(exit)),
                None if book.early.len() < EARLY_MAX => {
                    book.early.insert(exit.key, exit);
                }
                None => log::error!(
                    "container {}: exit of unknown process {} dropped",
                    self.id,
                    exit.key
                ),
            }
        }
        // A kill of the whole group takes the forker along, and no exit comes.
        if let Some(oom) = &oom {
            oom.check();
        }
        if self.anything_lives() {
            // The forker is dead, or was cut off for what it said: what it
            // would have reaped must not go on unseen.
            container.cut_off();
        }
        self.abandon();
        self.drained.send_replace(true);
        if let Some(watching) = watching {
            watching.abort();
        }
    }

    fn anything_lives(&self) -> bool {
        let book = self.book();
        self.init.exited().is_none() || book.execs.values().any(is_alive)
    }

    /// Whether the end of a process has been told, be it recorded or not.
    pub(super) fn knows_end(&self, process: &Process) -> bool {
        let book = self.book();
        let facts = process.facts();
        let known = facts.phase == Phase::Stopped || facts.parked.is_some();
        known
            || (process.exec_id.is_empty() && book.init_exit.is_some())
            || facts.key.is_some_and(|key| book.early.contains_key(&key))
    }

    /// Records an end that was seen otherwise than through the forker.
    pub(super) fn end_known(&self, process: &Arc<Process>, exited: Exited) {
        self.settle(&mut self.book(), process, exited);
    }

    /// True for all but the first who ask.
    pub(super) fn is_insisting(&self) -> bool {
        std::mem::replace(&mut self.book().insisting, true)
    }

    /// Nothing more will be heard of this container: whatever still ran ends
    /// with 137, init last.
    pub fn abandon(&self) {
        let mut book = self.book();
        let execs: Vec<_> = book.execs.values().cloned().collect();
        for process in execs {
            self.settle(&mut book, &process, Exited::now(KILLED));
        }
        let init = self.init.clone();
        self.settle(&mut book, &init, Exited::now(KILLED));
    }

    /// Lets exits that are on their way arrive, then [`Task::abandon`]s.
    pub async fn abandon_within(&self, limit: Duration) {
        if self.container().is_some() {
            let mut drained = self.drained.subscribe();
            let done = drained.wait_for(|done| *done);
            // Late or not: what is left now is given up.
            let _late = tokio::time::timeout(limit, done).await;
        }
        self.abandon();
    }

    /// Ends the stand-in for pause.
    pub fn end_pause(&self, status: u32) {
        let mut book = self.book();
        let init = self.init.clone();
        self.settle(&mut book, &init, Exited::now(status));
    }

    fn by_key(&self, book: &Book, key: u32) -> Option<Arc<Process>> {
        let has_key = |process: &&Arc<Process>| process.facts().key == Some(key);
        if has_key(&&self.init) {
            return Some(self.init.clone());
        }
        book.execs.values().find(has_key).cloned()
    }

    fn settle(&self, book: &mut Book, process: &Arc<Process>, exited: Exited) {
        let is_init = process.exec_id.is_empty();
        {
            let mut facts = process.facts();
            match facts.phase.on(Event::Exit) {
                Next::Park => {
                    facts.parked.get_or_insert(exited);
                    return;
                }
                Next::Refuse => return,
                // Init's own phase changes when its exit is recorded.
                Next::To(_) if is_init => {}
                Next::To(phase) => facts.phase = phase,
            }
        }
        if is_init {
            book.init_exit.get_or_insert(exited);
            if book.execs.values().any(is_alive) || !self.private_pids {
                self.kill_rest();
            }
        } else {
            self.record(process, exited);
        }
        self.finish_init(book);
    }

    /// Whatever outlives init goes with it.
    fn kill_rest(&self) {
        if let Some(container) = self.container()
            && let Err(error) = container.kill_all(libc::SIGKILL)
        {
            log::warn!("container {}: kill what init left: {error}", self.id);
        }
    }

    /// Init's exit is the container's last.
    fn finish_init(&self, book: &mut Book) {
        if let Some(exited) = book.init_exit
            && self.init.exited().is_none()
            && !book.execs.values().any(is_alive)
        {
            book.paused = false;
            let pid = self.init.facts().pid;
            let entry = Entry::exit(&self.id, exited.status, exited.at, pid);
            if let Err(error) = self.journal.record(entry) {
                log::warn!(
                    "container {}: write its exit to the journal: {error}",
                    self.id
                );
            }
            self.record(&self.init, exited);
            // Nor can what was never started start any more.
            for process in book.execs.values() {
                let never = process.facts().phase == Phase::Added;
                if never {
                    process.finish(Exited::now(NOT_STARTED));
                }
            }
        }
    }

    fn record(&self, process: &Process, exited: Exited) {
        let pid = process.facts().pid;
        let id = match process.exec_id.as_str() {
            "" => &self.id,
            exec_id => exec_id,
        };
        self.events.push(
            topics::TASK_EXIT_EVENT_TOPIC,
            &TaskExit {
                container_id: self.id.clone(),
                id: id.to_owned(),
                pid,
                exit_status: exited.status,
                exited_at: MessageField::some(timestamp(exited.at)),
                ..TaskExit::default()
            },
        );
        process.finish(exited);
    }
}

fn is_alive(process: &Arc<Process>) -> bool {
    matches!(process.facts().phase, Phase::Starting | Phase::Running)
}

fn exited(exit: Exit) -> Exited {
    Exited {
        status: exit.status,
        at: exit.at,
    }
}

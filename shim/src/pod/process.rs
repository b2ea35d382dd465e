//! One process: a container's init, an exec, or the pod's stand-in for pause.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use super::state::Phase;
use crate::error::ShimError;
use crate::io::{Owner, Paths, Streams};
use crate::sandbox::Spawned;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exited {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

impl Exited {
    /// An end that happens now.
    pub fn now(status: u32) -> Exited {
        Exited {
            status,
            at: SystemTime::now(),
        }
    }
}

/// The record of a process; lives until Delete.
pub struct Process {
    /// Empty for init.
    pub exec_id: String,
    /// Streams as requested.
    pub paths: Paths,
    /// The OCI process document of an exec.
    spec: Vec<u8>,
    /// Who owns its pipes.
    pub owner: Option<Owner>,
    facts: Mutex<Facts>,
    /// Set once, when the exit is recorded; Wait watches it.
    exit: watch::Sender<Option<Exited>>,
}

/// What changes in a process's life. Held only for a few instructions.
pub struct Facts {
    /// Where it is.
    pub phase: Phase,
    /// Host pid; 0 before there is one.
    pub pid: u32,
    /// Its name on the container's channel.
    pub key: Option<u32>,
    /// An exit that came before the start event.
    pub parked: Option<Exited>,
    /// Its streams, once opened.
    pub streams: Option<Arc<Streams>>,
    /// CloseIO came before the streams were opened.
    pub stdin_closed: bool,
    /// Columns and rows that were asked for before there was a terminal.
    pub size: Option<(u32, u32)>,
    pidfd: Option<Arc<OwnedFd>>,
}

impl Process {
    /// A registered exec.
    pub fn exec(exec_id: &str, paths: Paths, spec: Vec<u8>, owner: Option<Owner>) -> Process {
        Process {
            spec,
            owner,
            ..Process::new(exec_id, paths, Phase::Added)
        }
    }

    /// A parked init.
    pub fn init(
        paths: Paths,
        owner: Option<Owner>,
        spawned: Spawned,
        streams: Arc<Streams>,
    ) -> Process {
        let process = Process {
            owner,
            ..Process::new("", paths, Phase::Created)
        };
        process.facts().streams = Some(streams);
        process.spawned(spawned);
        process
    }

    /// The pod's stand-in for CRI's sandbox container.
    pub fn pause(paths: Paths, pid: u32) -> Process {
        let process = Process::new("", paths, Phase::Created);
        process.facts().pid = pid;
        process
    }

    fn new(exec_id: &str, paths: Paths, phase: Phase) -> Process {
        Process {
            exec_id: exec_id.to_owned(),
            paths,
            spec: Vec::new(),
            owner: None,
            facts: Mutex::new(Facts {
                phase,
                pid: 0,
                key: None,
                parked: None,
                streams: None,
                stdin_closed: false,
                size: None,
                pidfd: None,
            }),
            exit: watch::Sender::new(None),
        }
    }

    /// The changing part.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what the effects layer made; the terminal's master is not
    /// kept here.
    pub fn spawned(&self, spawned: Spawned) {
        let mut facts = self.facts();
        facts.pid = spawned.pid;
        facts.key = Some(spawned.key);
        facts.pidfd = Some(Arc::new(spawned.pidfd));
    }

    /// Records the end; whoever waits is woken.
    pub fn finish(&self, exited: Exited) {
        self.facts().phase = Phase::Stopped;
        self.exit.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert(exited);
            first
        });
    }

    /// The recorded end.
    pub fn exited(&self) -> Option<Exited> {
        *self.exit.borrow()
    }

    /// Waits for the end to be recorded. Holds no lock.
    pub async fn wait(&self) -> Exited {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await {
            Ok(exited) => exited.unwrap_or_else(|| Exited::now(137)),
            // The sender lives in `self`.
            Err(_) => Exited::now(137),
        }
    }

    /// Signals this process alone.
    pub fn signal(&self, signal: i32) -> Result<(), ShimError> {
        let pidfd = self.facts().pidfd.clone();
        let Some(pidfd) = pidfd else {
            return Err(ShimError::FailedPrecondition(
                "signal: the process has not been started".to_owned(),
            ));
        };
        casemate_sys::signal::pidfd_send_signal(pidfd.as_fd(), signal).map_err(|error| match error
            .raw_os_error()
        {
            Some(libc::ESRCH) => finished(),
            Some(libc::EINVAL) => {
                ShimError::InvalidArgument(format!("signal {signal} is none of this kernel's"))
            }
            _ => ShimError::Unknown(format!("send signal {signal}: {error}")),
        })
    }

    /// The process for certain, once there is one.
    pub fn pidfd(&self) -> Option<Arc<OwnedFd>> {
        self.facts().pidfd.clone()
    }

    /// The OCI process document of an exec.
    pub fn spec(&self) -> &[u8] {
        &self.spec
    }

    /// Its streams, once they are open.
    pub fn streams(&self) -> Option<Arc<Streams>> {
        self.facts().streams.clone()
    }
}

/// What Kill says of a process that has ended; containerd counts on the code.
pub fn finished() -> ShimError {
    ShimError::NotFound("process already finished".to_owned())
}

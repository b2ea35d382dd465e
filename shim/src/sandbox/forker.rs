//! The shim's side of a container's channel: one request at a time, every
//! byte from the other side is hostile.

use std::collections::HashSet;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use casemate_protocol::{Channel, FromForker, ToForker, TransportError};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use super::{Exit, SandboxError};

/// How long a request may take, its turn included. Nothing but the caller of
/// this one request waits for it: what ends a container never asks the forker.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers to requests.
#[derive(Debug)]
pub enum Reply {
    /// The forker is ready; its pidfd, and what else it has to give.
    Ready(OwnedFd, Vec<OwnedFd>),
    /// A process exists: pidfd, and master of its terminal.
    Spawned(OwnedFd, Option<OwnedFd>),
    /// A parked process has passed exec.
    Started,
    /// On the way to `Ready` it waits for [`Forker::proceed`]: its pidfd.
    Waiting(OwnedFd),
}

impl Reply {
    /// The pidfd of whoever waits for [`Forker::proceed`].
    pub fn waiting(self) -> Result<OwnedFd, SandboxError> {
        match self {
            Reply::Waiting(pidfd) => Ok(pidfd),
            _ => Err(out_of_turn()),
        }
    }
}

/// An answer to something else.
pub fn out_of_turn() -> SandboxError {
    SandboxError::Unavailable("the forker answers out of turn".into())
}

/// Stands for the forker itself among keys.
const ITSELF: u32 = u32::MAX;

type Waiting = Option<oneshot::Sender<Result<Reply, SandboxError>>>;

#[derive(Default)]
struct State {
    waiting: Waiting,
    /// Keys of processes whose exit is still to come.
    alive: HashSet<u32>,
    /// Keys of requests that were given up: their answers may yet come.
    late: HashSet<u32>,
    /// Keys of processes whose exit interests nobody.
    unwanted: HashSet<u32>,
    /// Key of the request under way.
    current: u32,
    /// Nothing more comes from there.
    closed: bool,
}

/// The channel to one forker.
pub struct Forker {
    channel: Arc<AsyncFd<Channel>>,
    state: Arc<Mutex<State>>,
    /// Serialises requests.
    turn: tokio::sync::Mutex<()>,
    listening: tokio::task::JoinHandle<()>,
    exits: tokio::sync::Mutex<mpsc::UnboundedReceiver<Exit>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Forker {
    /// Takes our end of the channel and listens.
    pub fn new(channel: Channel) -> io::Result<Forker> {
        let channel = Arc::new(crate::io::watch(channel, tokio::io::Interest::READABLE)?);
        let state = Arc::new(Mutex::new(State::default()));
        let (sender, receiver) = mpsc::unbounded_channel();
        let listening = tokio::spawn(listen(channel.clone(), state.clone(), sender));
        Ok(Forker {
            channel,
            state,
            turn: tokio::sync::Mutex::new(()),
            listening,
            exits: tokio::sync::Mutex::new(receiver),
        })
    }

    /// Waits for the first word of the forker, after the agent was asked for it.
    pub async fn ready(
        &self,
        ask: impl FnOnce() -> Result<(), SandboxError>,
    ) -> Result<Reply, SandboxError> {
        self.transact(ITSELF, PATIENCE, ask).await
    }

    /// Sends a request about process `key` and waits for its answer.
    pub async fn request(
        &self,
        key: u32,
        message: &ToForker,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, SandboxError> {
        self.transact(key, PATIENCE, || self.send(message, fds))
            .await
    }

    /// Lets it go on after [`Reply::Waiting`]; it may take `more` than usual.
    pub async fn proceed(
        &self,
        fds: &[BorrowedFd<'_>],
        more: Duration,
    ) -> Result<Reply, SandboxError> {
        self.transact(ITSELF, PATIENCE + more, || {
            self.send(&ToForker::Proceed, fds)
        })
        .await
    }

    fn send(&self, message: &ToForker, fds: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
        self.channel
            .get_ref()
            .send_now(message, fds)
            .map_err(|e| SandboxError::Unavailable(format!("ask the forker: {e}")))
    }

    async fn transact(
        &self,
        key: u32,
        patience: Duration,
        ask: impl FnOnce() -> Result<(), SandboxError>,
    ) -> Result<Reply, SandboxError> {
        let until = tokio::time::Instant::now() + patience;
        let turn = tokio::time::timeout_at(until, self.turn.lock()).await;
        let Ok(_turn) = turn else {
            return Err(no_answer(patience));
        };
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = lock(&self.state);
            if state.closed {
                return Err(gone());
            }
            state.waiting = Some(sender);
            state.current = key;
        }
        if let Err(error) = ask() {
            lock(&self.state).waiting = None;
            return Err(error);
        }
        match tokio::time::timeout_at(until, receiver).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(_)) => Err(gone()),
            Err(_) => {
                let mut state = lock(&self.state);
                state.waiting = None;
                state.late.insert(key);
                Err(no_answer(patience))
            }
        }
    }

    /// The next exit; `None` when the forker is gone.
    pub async fn next_exit(&self) -> Option<Exit> {
        self.exits.lock().await.recv().await
    }
}

impl Drop for Forker {
    fn drop(&mut self) {
        // A forker that is made only now (by an agent that was stopped) finds
        // its channel closed, and ends.
        self.listening.abort();
    }
}

fn no_answer(patience: Duration) -> SandboxError {
    SandboxError::Unavailable(format!(
        "the container's forker gave no answer within {} s",
        patience.as_secs()
    ))
}

fn gone() -> SandboxError {
    SandboxError::Unavailable(
        "the container's forker is gone: killed, most likely for want of memory; raise the limit \
         (linux.resources.memory.limit), and see the kernel's log for whom it killed"
            .into(),
    )
}

async fn listen(
    channel: Arc<AsyncFd<Channel>>,
    state: Arc<Mutex<State>>,
    exits: mpsc::UnboundedSender<Exit>,
) {
    loop {
        let Ok(mut guard) = channel.readable().await else {
            break;
        };
        match channel.get_ref().receive::<FromForker>(false) {
            Ok(Some((message, fds))) => {
                if let Err(what) = handle(&state, &exits, message, fds) {
                    log::error!(
                        "the container's forker breaks the protocol ({what}); it is cut off"
                    );
                    break;
                }
            }
            Ok(None) => break,
            Err(TransportError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                guard.clear_ready();
            }
            Err(e) => {
                log::error!("the container's forker sends what it must not ({e}); it is cut off");
                break;
            }
        }
    }
    let mut state = lock(&state);
    state.closed = true;
    if let Some(waiting) = state.waiting.take() {
        let _ = waiting.send(Err(gone()));
    }
    // Dropping the sender ends next_exit(), after what is queued.
}

/// The request that a message answers.
fn answered(message: &FromForker) -> Option<u32> {
    match message {
        FromForker::Ready | FromForker::Waiting | FromForker::LaunchFailed { .. } => Some(ITSELF),
        FromForker::Spawned { key }
        | FromForker::Started { key }
        | FromForker::SpawnFailed { key, .. } => Some(*key),
        FromForker::Exited { .. } => None,
    }
}

/// An answer that nobody waits for any more: the process it speaks of ends.
fn take_back(
    state: &mut State,
    key: u32,
    message: &FromForker,
    pidfd: Option<OwnedFd>,
) -> Result<(), &'static str> {
    match message {
        FromForker::Spawned { .. } => {
            let pidfd = pidfd.ok_or("no pidfd")?;
            let _gone = casemate_sys::process::signal(&pidfd, super::KILL);
            state.unwanted.insert(key);
        }
        FromForker::SpawnFailed { .. } => {
            state.alive.remove(&key);
        }
        FromForker::Ready
        | FromForker::Waiting
        | FromForker::LaunchFailed { .. }
        | FromForker::Started { .. }
        | FromForker::Exited { .. } => {}
    }
    Ok(())
}

fn handle(
    state: &Mutex<State>,
    exits: &mpsc::UnboundedSender<Exit>,
    message: FromForker,
    fds: Vec<OwnedFd>,
) -> Result<(), &'static str> {
    let mut state = lock(state);
    let mut fds = fds.into_iter();
    if let Some(key) = answered(&message)
        && state.late.remove(&key)
    {
        return take_back(&mut state, key, &message, fds.next());
    }
    let reply = match message {
        FromForker::Exited { key, .. } if state.unwanted.remove(&key) => return Ok(()),
        FromForker::Exited { key, status } => {
            if !state.alive.remove(&key) {
                return Err("exit of an unknown process");
            }
            let _ = exits.send(Exit {
                key,
                status: status.min(255),
                at: SystemTime::now(),
            });
            return Ok(());
        }
        FromForker::Ready => {
            if state.current != ITSELF {
                return Err("unsolicited answer");
            }
            let forker = fds.next().ok_or("no pidfd")?;
            Ok(Reply::Ready(forker, fds.collect()))
        }
        FromForker::Waiting => {
            if state.current != ITSELF {
                return Err("unsolicited answer");
            }
            Ok(Reply::Waiting(fds.next().ok_or("no pidfd")?))
        }
        FromForker::Spawned { key } => {
            if key != state.current {
                return Err("answer for another process");
            }
            let pidfd = fds.next().ok_or("no pidfd")?;
            if state.waiting.is_some() {
                state.alive.insert(key);
            }
            Ok(Reply::Spawned(pidfd, fds.next()))
        }
        FromForker::Started { key } => {
            if key != state.current {
                return Err("answer for another process");
            }
            Ok(Reply::Started)
        }
        FromForker::SpawnFailed { key, text, invalid } => {
            if key != state.current {
                return Err("answer for another process");
            }
            state.alive.remove(&key);
            let text = casemate_protocol::clip(&text);
            Err(if invalid {
                SandboxError::Invalid(text)
            } else {
                SandboxError::Failed(text)
            })
        }
        FromForker::LaunchFailed { text } => {
            Err(SandboxError::Invalid(casemate_protocol::clip(&text)))
        }
    };
    let waiting = state.waiting.take().ok_or("unsolicited answer")?;
    let _ = waiting.send(reply);
    Ok(())
}

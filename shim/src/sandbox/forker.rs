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

/// How long the other side may take for one answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers to requests.
#[derive(Debug)]
pub enum Reply {
    /// The forker is ready; its pidfd, and init's where it exists already.
    Ready(OwnedFd, Option<OwnedFd>),
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
    /// Key of the request under way.
    current: u32,
}

/// The channel to one forker.
pub struct Forker {
    channel: Arc<AsyncFd<Channel>>,
    state: Arc<Mutex<State>>,
    /// Serialises requests.
    turn: tokio::sync::Mutex<()>,
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
        tokio::spawn(listen(channel.clone(), state.clone(), sender));
        Ok(Forker {
            channel,
            state,
            turn: tokio::sync::Mutex::new(()),
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
            .send(message, fds)
            .map_err(|e| SandboxError::Unavailable(format!("ask the forker: {e}")))
    }

    async fn transact(
        &self,
        key: u32,
        patience: Duration,
        ask: impl FnOnce() -> Result<(), SandboxError>,
    ) -> Result<Reply, SandboxError> {
        let _turn = self.turn.lock().await;
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = lock(&self.state);
            state.waiting = Some(sender);
            state.current = key;
        }
        ask()?;
        match tokio::time::timeout(patience, receiver).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(_)) => Err(gone()),
            Err(_) => {
                lock(&self.state).waiting = None;
                Err(SandboxError::Unavailable(format!(
                    "the container's forker gave no answer within {} s",
                    patience.as_secs()
                )))
            }
        }
    }

    /// The next exit; `None` when the forker is gone.
    pub async fn next_exit(&self) -> Option<Exit> {
        self.exits.lock().await.recv().await
    }
}

fn gone() -> SandboxError {
    SandboxError::Unavailable("the container's forker is gone".into())
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
    if let Some(waiting) = lock(&state).waiting.take() {
        let _ = waiting.send(Err(gone()));
    }
    // Dropping the sender ends next_exit(), after what is queued.
}

fn handle(
    state: &Mutex<State>,
    exits: &mpsc::UnboundedSender<Exit>,
    message: FromForker,
    fds: Vec<OwnedFd>,
) -> Result<(), &'static str> {
    let mut state = lock(state);
    let mut fds = fds.into_iter();
    let reply = match message {
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
            Ok(Reply::Ready(forker, fds.next()))
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

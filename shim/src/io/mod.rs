//! Standard streams of a process: containerd's fifos, files or logging binary
//! on one side, the container's pipes or terminal on the other, and the copies
//! between.

mod copy;
mod logger;
mod target;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pipe::PipeFlags;
use rustix::termios::Winsize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::{JoinHandle, JoinSet};

use crate::error::{ShimError, one_line};
use crate::sandbox::ChildStdio;
use logger::Logger;
pub use logger::Source;
use target::{Fifo, Output, Stdin, Target};

/// Between two looks at whether output has been read.
const LOOK: Duration = Duration::from_millis(1);

/// The stream fields of Create and Exec requests, as they came.
#[derive(Debug, Clone, Default)]
pub struct Paths {
    /// Fifo that the client writes.
    pub stdin: String,
    /// Where output goes; its scheme decides for stderr too.
    pub stdout: String,
    /// Where error output goes; empty with a terminal.
    pub stderr: String,
    /// Whether the process gets a terminal.
    pub terminal: bool,
}

impl Paths {
    /// Regular files that output goes to.
    pub fn logs(&self) -> Vec<PathBuf> {
        let targets = [&self.stdout, &self.stderr].map(|field| Target::parse(field));
        let file = |target| match target {
            Ok(Target::File(path)) => Some(path),
            _ => None,
        };
        targets.into_iter().filter_map(file).collect()
    }
}

/// Host ids that own the pipes, so that the container can reopen
/// `/dev/stdout` (`io_uid`, `io_gid` of runc's options).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Host user id.
    pub uid: u32,
    /// Host group id.
    pub gid: u32,
}

/// The shim's side of one process's streams.
pub struct Streams {
    /// Present until [`Streams::attach`].
    pending: Mutex<Option<Pending>>,
    /// Our own writer of the stdin fifo: while it is open a client that
    /// detaches is not an end of file.
    stdin_hold: Mutex<Option<OwnedFd>>,
    master: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    outputs: Mutex<Vec<JoinHandle<()>>>,
    input: Mutex<Option<JoinHandle<()>>>,
    /// Fifos whose copy has ended but that nobody has read to the end yet.
    held: Arc<Mutex<JoinSet<()>>>,
    /// The logging binary, until [`Streams::drain`].
    logger: Mutex<Option<Logger>>,
    /// Of each output that goes into a fifo: the pipe that it comes by, and the fifo.
    ways: Mutex<Vec<[Weak<AsyncFd<OwnedFd>>; 2]>>,
}

/// Ends whose copies haven't begun.
struct Pending {
    stdin: Option<Stdin>,
    stdin_pipe: Option<OwnedFd>,
    stdout: Option<(Option<OwnedFd>, Output)>,
    stderr: Option<(Option<OwnedFd>, Output)>,
}

/// What becomes of one output.
enum Sink {
    /// Nobody asked for it.
    None,
    /// The shim copies it.
    Copied(Output),
    /// The process writes into this pipe itself.
    Direct(OwnedFd),
}

impl Sink {
    fn copied(output: Option<Output>) -> Sink {
        output.map_or(Sink::None, Sink::Copied)
    }
}

impl Streams {
    /// Opens everything that `paths` names. Never blocks: a fifo without a
    /// reader or writer is opened at both its ends, and a logging binary is
    /// awaited. `source` says whose streams they are.
    pub async fn open(
        paths: &Paths,
        source: Source<'_>,
        owner: Option<Owner>,
        stdin_closed: bool,
    ) -> Result<(ChildStdio, Streams), ShimError> {
        let mut hold = None;
        let stdin = Target::parse(&paths.stdin)?.open_input()?;
        let stdin = stdin.map(|(stdin, writer)| {
            hold = (!stdin_closed).then_some(writer);
            stdin
        });
        let target = Target::parse(&paths.stdout)?;
        let mut logger = None;
        // A file or logger is for both, whatever stderr says.
        let (stdout, stderr) = match &target {
            Target::File(_) => {
                let file = target.open_output()?;
                let second = file.as_ref().map(Output::share).transpose()?;
                (Sink::copied(file), Sink::copied(second))
            }
            Target::Logger(binary) => {
                let (started, [stdout, stderr]) = logger::start(binary, source, owner).await?;
                logger = Some(started);
                (Sink::Direct(stdout), Sink::Direct(stderr))
            }
            Target::Null | Target::Fifo(_) => {
                // A terminal has none, and nerdctl names a fifo that nobody made.
                let stderr = Target::parse(if paths.terminal { "" } else { &paths.stderr })?;
                (
                    Sink::copied(target.open_output()?),
                    Sink::copied(stderr.open_output()?),
                )
            }
        };
        let mut pending = Pending {
            stdin,
            stdin_pipe: None,
            stdout: None,
            stderr: None,
        };
        let child = if paths.terminal {
            let output = match stdout {
                Sink::None => Output::Null,
                Sink::Copied(output) => output,
                // What a terminal shows is copied to a logger too.
                Sink::Direct(pipe) => {
                    let pipe = nonblocking(pipe, Interest::WRITABLE)?;
                    Output::Fifo(Fifo::to_known_reader(pipe))
                }
            };
            pending.stdout = Some((None, output));
            ChildStdio::Terminal
        } else {
            let input = match &pending.stdin {
                Some(_) => {
                    let (read, write) = pipe(owner)?;
                    pending.stdin_pipe = Some(write);
                    read
                }
                None => null()?,
            };
            let output = |sink: Sink| -> Result<_, ShimError> {
                match sink {
                    Sink::Copied(sink) => {
                        let (read, write) = pipe(owner)?;
                        Ok((write, Some((Some(read), sink))))
                    }
                    Sink::Direct(pipe) => Ok((pipe, None)),
                    Sink::None => Ok((null()?, None)),
                }
            };
            let (stdout, copy_out) = output(stdout)?;
            let (stderr, copy_err) = output(stderr)?;
            pending.stdout = copy_out;
            pending.stderr = copy_err;
            ChildStdio::Files {
                stdin: input,
                stdout,
                stderr,
            }
        };
        let streams = Streams {
            pending: Mutex::new(Some(pending)),
            stdin_hold: Mutex::new(hold),
            master: Mutex::new(None),
            outputs: Mutex::new(Vec::new()),
            input: Mutex::new(None),
            held: Arc::default(),
            logger: Mutex::new(logger),
            ways: Mutex::new(Vec::new()),
        };
        Ok((child, streams))
    }

    /// Begins the copies. `master` is the terminal's, if there is one.
    pub fn attach(&self, master: Option<OwnedFd>) -> Result<(), ShimError> {
        let Some(pending) = lock(&self.pending).take() else {
            return Ok(());
        };
        if let Some(master) = master {
            return self.attach_terminal(pending, master);
        }
        for (source, sink) in [pending.stdout, pending.stderr].into_iter().flatten() {
            let Some(source) = source else { continue };
            let source = Arc::new(nonblocking(source, Interest::READABLE)?);
            let held = self.held.clone();
            let mut sink = sink;
            if let Output::Fifo(fifo) = &sink {
                let ends = [Arc::downgrade(&source), Arc::downgrade(&fifo.write)];
                lock(&self.ways).push(ends);
            }
            let copied = tokio::spawn(async move {
                report("output", copy::pipe_to(&source, &mut sink).await);
                drop(source);
                lock(&held).spawn(copy::linger(sink));
            });
            lock(&self.outputs).push(copied);
        }
        if let (Some(stdin), Some(pipe)) = (pending.stdin, pending.stdin_pipe) {
            let pipe = nonblocking(pipe, Interest::WRITABLE)?;
            let copied = tokio::spawn(async move {
                report("stdin", copy::splice_all(&stdin, &pipe).await);
            });
            *lock(&self.input) = Some(copied);
        }
        Ok(())
    }

    fn attach_terminal(&self, pending: Pending, master: OwnedFd) -> Result<(), ShimError> {
        let master = nonblocking(master, Interest::READABLE | Interest::WRITABLE)?;
        let master = Arc::new(master);
        *lock(&self.master) = Some(master.clone());
        if let Some((_, mut sink)) = pending.stdout {
            let source = master.clone();
            if let Output::Fifo(fifo) = &sink {
                let ends = [Arc::downgrade(&source), Arc::downgrade(&fifo.write)];
                lock(&self.ways).push(ends);
            }
            let held = self.held.clone();
            let copied = tokio::spawn(async move {
                report("terminal", copy::terminal_to(&source, &mut sink).await);
                lock(&held).spawn(copy::linger(sink));
            });
            lock(&self.outputs).push(copied);
        }
        if let Some(stdin) = pending.stdin {
            let copied = tokio::spawn(async move {
                report("stdin", copy::to_terminal(&stdin, &master).await);
            });
            *lock(&self.input) = Some(copied);
        }
        Ok(())
    }

    /// Lets go of stdin: its end of file comes once the client's writer has
    /// gone too.
    pub fn close_stdin(&self) {
        lock(&self.stdin_hold).take();
    }

    /// Sets the terminal's size; nothing to do without one.
    pub fn resize(&self, width: u32, height: u32) -> Result<(), ShimError> {
        let Some(master) = lock(&self.master).clone() else {
            return Ok(());
        };
        let cells = |count| u16::try_from(count).unwrap_or(u16::MAX);
        let size = Winsize {
            ws_row: cells(height),
            ws_col: cells(width),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(master.get_ref(), size).map_err(|error| {
            ShimError::Unknown(format!("resize terminal to {width}x{height}: {error}"))
        })
    }

    /// Waits until what has been written was read from the fifos: as long as somebody
    /// reads, but at most `limit`, and for the next byte to be read at most `stalled`.
    pub async fn read_out(&self, stalled: Duration, limit: Duration) {
        let unread = |end: &Weak<AsyncFd<OwnedFd>>| {
            let count = |end: Arc<AsyncFd<OwnedFd>>| rustix::io::ioctl_fionread(&*end).ok();
            // One that is closed has nothing.
            end.upgrade().and_then(count).unwrap_or(0)
        };
        let ways = lock(&self.ways).clone();
        // In the order that bytes go, so that none can pass by between two looks.
        let left = || -> Vec<u64> { ways.iter().flatten().map(unread).collect() };
        let until = Instant::now() + limit;
        let (mut before, mut moved) = (Vec::new(), Instant::now());
        loop {
            let now = Instant::now();
            let left = left();
            if left.iter().all(|n| *n == 0) || now >= until {
                return;
            }
            if left != before {
                (before, moved) = (left, now);
            } else if now >= moved + stalled {
                // Whoever reads later than that has had its time.
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until all output has been handed on, at most `limit`, then ends
    /// every copy; a logging binary is then given its own time to end.
    pub async fn drain(&self, limit: Duration) {
        let until = tokio::time::Instant::now() + limit;
        let outputs = std::mem::take(&mut *lock(&self.outputs));
        for mut copy in outputs {
            if tokio::time::timeout_at(until, &mut copy).await.is_err() {
                copy.abort();
                log::warn!(
                    "output not drained within {limit:?}: somebody holds it open or doesn't read"
                );
            }
        }
        self.abandon();
        self.end_logger().await;
    }

    /// Gives the logging binary its time to end; nothing to do without one.
    pub async fn end_logger(&self) {
        let logger = lock(&self.logger).take();
        if let Some(logger) = logger {
            logger.finish().await;
        }
    }

    /// Ends every copy now.
    pub fn abandon(&self) {
        self.close_stdin();
        lock(&self.pending).take();
        if let Some(copy) = lock(&self.input).take() {
            copy.abort();
        }
        for copy in lock(&self.outputs).drain(..) {
            copy.abort();
        }
        lock(&self.held).abort_all();
        lock(&self.master).take();
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.abandon();
    }
}

fn report(what: &str, result: std::io::Result<()>) {
    if let Err(error) = result {
        // A process that closes its stdin early is its own affair.
        if error.raw_os_error() != Some(libc::EPIPE) {
            log::warn!("copy {what}: {}", one_line(&error.to_string()));
        }
    }
}

fn nonblocking(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, ShimError> {
    rustix::io::ioctl_fionbio(&fd, true)
        .map_err(std::io::Error::from)
        .and_then(|()| watch(fd, interest))
        .map_err(|error| ShimError::Unknown(format!("watch a stream: {error}")))
}

/// Registers a non-blocking descriptor with the event loop. Only for types
/// whose descriptor stays the same for their whole life.
#[allow(
    deprecated,
    reason = "the successor is unsafe, for types whose descriptor changes; ours never does"
)]
pub fn watch<T: AsRawFd>(object: T, interest: Interest) -> std::io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(object, interest)
}

fn pipe(owner: Option<Owner>) -> Result<(OwnedFd, OwnedFd), ShimError> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(|error| ShimError::Unknown(format!("make a pipe for a stream: {error}")))?;
    if let Some(Owner { uid, gid }) = owner {
        for end in [&read, &write] {
            rustix::fs::fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(
                |error| ShimError::Unknown(format!("give a stream to {uid}:{gid}: {error}")),
            )?;
        }
    }
    Ok((read, write))
}

fn null() -> Result<OwnedFd, ShimError> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| ShimError::Unknown(format!("open /dev/null: {error}")))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens one more descriptor of the same file.
fn share(file: &File) -> std::io::Result<File> {
    file.as_fd().try_clone_to_owned().map(File::from)
}

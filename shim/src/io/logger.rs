//! Logging binaries: a program of the host that reads a container's output.
//!
//! `binary://` and `binary-v2://` are containerd's (its `docs/` call them
//! logging URIs): the program gets the read ends of the output pipes as
//! descriptors 3 and 4, says on descriptor 5 that it is ready, and is told
//! with SIGTERM that the container has been deleted.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use casemate_sys::process::Fork;
use casemate_sys::{exec, process};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Owner, pipe, watch};
use crate::bootstrap::journal::{Entry, Journal};
use crate::bootstrap::proc;
use crate::error::{ShimError, one_line};

/// How long a logger may take until it is ready.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// At the end of its input a logger has this long to finish by itself, so that
/// one without a handler for SIGTERM loses nothing.
const FINISH_WITHIN: Duration = Duration::from_secs(1);
/// From SIGTERM to SIGKILL (containerd's own time).
const END_WITHIN: Duration = Duration::from_secs(12);
/// For a killed logger and its children to leave the process table.
const GONE_WITHIN: Duration = Duration::from_secs(1);
/// What the child says of a failed exec, at most.
const REPORT_MAX: usize = 512;
/// Descriptors from here up are out of the way of those the logger expects.
const HIGH: i32 = 16;
/// For a shim without PATH (environ(7)).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A `binary://` or `binary-v2://` field, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binary {
    /// The field as it came, for messages.
    uri: String,
    path: CString,
    /// Keys and values of the query, in its order.
    args: Vec<CString>,
    /// v2: ready is a byte, an end of file without one is a failure.
    must_speak: bool,
}

/// Whose output it is.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The container.
    pub container: &'a str,
    /// What the logger is told as `CONTAINER_ID`: the container's id, or the
    /// exec's, as containerd's own shim does.
    pub id: &'a str,
    /// containerd namespace.
    pub namespace: &'a str,
    /// Where the logger is written down.
    pub journal: &'a Journal,
}

impl Binary {
    /// Parses what follows the scheme of `uri`: an absolute path and an
    /// optional query.
    pub fn parse(uri: &str, rest: &str, must_speak: bool) -> Result<Binary, ShimError> {
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        if !path.starts_with('/') {
            return Err(ShimError::InvalidArgument(format!(
                "logging binary {uri:?}: the path {path:?} isn't absolute: write binary:///PATH"
            )));
        }
        let text = |part: &str, plus_is_space| {
            decode(part, plus_is_space).ok_or_else(|| {
                ShimError::InvalidArgument(format!(
                    "logging binary {uri:?}: {part:?} holds a broken escape or a zero byte: \
                     write %25 for a percent sign"
                ))
            })
        };
        let mut args = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            args.push(text(key, true)?);
            args.push(text(value, true)?);
        }
        Ok(Binary {
            uri: uri.to_owned(),
            path: text(path, false)?,
            args,
            must_speak,
        })
    }

    fn failed(&self, what: impl std::fmt::Display) -> ShimError {
        ShimError::Unknown(one_line(&format!(
            "start logging binary {}: {what}",
            self.uri
        )))
    }
}

/// Undoes percent-encoding (RFC 3986, 2.1; `+` as in HTML forms).
fn decode(text: &str, plus_is_space: bool) -> Option<CString> {
    let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let value = digit(bytes.next())? << 4 | digit(bytes.next())?;
                u8::try_from(value).ok()?
            }
            b'+' if plus_is_space => b' ',
            other => other,
        });
    }
    CString::new(out).ok()
}

/// A running logger; killed in the background when dropped before its end.
///
/// It is a child of the shim and lives under the shim's locks: the same
/// seccomp filter, `no_new_privs` (a set-user-ID program gains nothing), and no
/// capability that the shim has dropped.
pub struct Logger {
    uri: String,
    pid: Option<Pid>,
    /// None once it has been reaped.
    pidfd: Option<AsyncFd<OwnedFd>>,
}

/// Write ends for the process: stdout, stderr.
pub type Ends = [OwnedFd; 2];

/// Starts the logger and waits until it is ready. On an error it is gone.
pub async fn start(
    binary: &Binary,
    source: Source<'_>,
    owner: Option<Owner>,
) -> Result<(Logger, Ends), ShimError> {
    let (stdout_read, stdout) = pipe(owner)?;
    let (stderr_read, stderr) = pipe(owner)?;
    let make = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| binary.failed(e));
    let (wait_read, wait_write) = make()?;
    let (report_read, low) = make()?;
    let report_write = rustix::io::fcntl_dupfd_cloexec(&low, HIGH).map_err(|e| binary.failed(e))?;
    // A second writer would keep the end of file from us.
    drop(low);
    let null = || {
        rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| binary.failed(format!("open /dev/null: {e}")))
    };
    let files = vec![
        null()?,
        null()?,
        null()?,
        stdout_read,
        stderr_read,
        wait_write,
    ];
    let mut args = vec![binary.path.clone()];
    args.extend(binary.args.iter().cloned());
    let env = environment(binary, source)?;

    match process::fork_into(0, None).map_err(|e| binary.failed(format!("fork: {e}")))? {
        Fork::Child => {
            let error = become_logger(&binary.path, &args, &env, files);
            // Without a reader there is nobody to tell.
            let _lost = rustix::io::write(&report_write, error.as_bytes());
            process::exit_now(127)
        }
        Fork::Parent(pid, pidfd) => {
            drop((files, report_write));
            let logger = Logger::watch(binary, pid, pidfd)?;
            logger
                .write_down(source, pid)
                .map_err(|e| binary.failed(e))?;
            let until = Instant::now() + READY_WITHIN;
            let ready = async {
                is_running(binary, report_read).await?;
                is_ready(binary, wait_read).await
            };
            let ready = timeout_at(until, ready).await.unwrap_or_else(|_| {
                Err(binary.failed(format!(
                    "not ready within {} s: it must {} descriptor 5",
                    READY_WITHIN.as_secs(),
                    if binary.must_speak {
                        "write a byte to"
                    } else {
                        "close, or write a byte to,"
                    }
                )))
            });
            match ready {
                Ok(()) => Ok((logger, [stdout, stderr])),
                Err(error) => {
                    logger.kill().await;
                    Err(error)
                }
            }
        }
    }
}

fn environment(binary: &Binary, source: Source<'_>) -> Result<Vec<CString>, ShimError> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    [
        ("CONTAINER_ID", source.id.as_bytes()),
        ("CONTAINER_NAMESPACE", source.namespace.as_bytes()),
        ("PATH", path.as_bytes()),
    ]
    .into_iter()
    .map(|(name, value)| {
        let entry = [name.as_bytes(), b"=", value].concat();
        CString::new(entry).map_err(|_| binary.failed(format!("{name} holds a zero byte")))
    })
    .collect()
}

/// Runs in the child. Returns only on failure, with the reason.
fn become_logger(path: &CString, args: &[CString], env: &[CString], files: Vec<OwnedFd>) -> String {
    process::reset_signals();
    // A group of its own, so that its children can be ended with it.
    if let Err(error) = rustix::process::setsid() {
        return format!("make a session: {error}");
    }
    if let Err(error) = crate::host::descriptors::restore_limit() {
        return format!("restore its limit of open files: {error}");
    }
    if let Err(error) = exec::install_descriptors(files) {
        return format!("set up its descriptors: {error}");
    }
    let error = exec::exec(path, args, env);
    format!(
        "execute {}: {error}: it must be an executable file of the host",
        path.to_string_lossy()
    )
}

/// The report pipe ends without a word when the exec succeeds.
async fn is_running(binary: &Binary, report: OwnedFd) -> Result<(), ShimError> {
    let report = watched(report).map_err(|e| binary.failed(e))?;
    let mut text = vec![0; REPORT_MAX];
    let count = read_some(&report, &mut text)
        .await
        .map_err(|e| binary.failed(e))?;
    if count == 0 {
        return Ok(());
    }
    Err(binary.failed(String::from_utf8_lossy(&text[..count])))
}

async fn is_ready(binary: &Binary, wait: OwnedFd) -> Result<(), ShimError> {
    let wait = watched(wait).map_err(|e| binary.failed(e))?;
    let count = read_some(&wait, &mut [0])
        .await
        .map_err(|e| binary.failed(e))?;
    if count == 0 && binary.must_speak {
        return Err(binary.failed(
            "it closed descriptor 5 without a word: a binary-v2 logger writes a byte when it is \
             ready; for one that doesn't, use binary://",
        ));
    }
    Ok(())
}

fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    watch(fd, Interest::READABLE)
}

async fn read_some(fd: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut readable = fd.readable().await?;
        match rustix::io::read(fd, &mut *buffer) {
            Ok(count) => return Ok(count),
            Err(Errno::AGAIN) => readable.clear_ready(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl Logger {
    fn watch(binary: &Binary, pid: u32, pidfd: OwnedFd) -> Result<Logger, ShimError> {
        // A second descriptor, to end it by if the first can't be watched.
        let spare = pidfd.try_clone();
        match watch(pidfd, Interest::READABLE) {
            Ok(pidfd) => Ok(Logger {
                uri: binary.uri.clone(),
                pid: i32::try_from(pid).ok().and_then(Pid::from_raw),
                pidfd: Some(pidfd),
            }),
            Err(error) => {
                if let Ok(spare) = spare {
                    let _gone = process::signal(&spare, libc::SIGKILL);
                    let _reaped = process::wait(&spare);
                }
                Err(binary.failed(format!("watch it: {error}")))
            }
        }
    }

    /// For `delete`, should the shim die first.
    fn write_down(&self, source: Source<'_>, pid: u32) -> io::Result<()> {
        // One that has ended already is nobody's to end.
        let Some(start_time) = proc::start_time(pid) else {
            return Ok(());
        };
        source.journal.record(Entry::Logger {
            container: source.container.to_owned(),
            pid,
            start_time,
        })
    }

    /// Ends it, once whatever it reads has come to its end: by itself, with
    /// SIGTERM, at last with SIGKILL.
    pub async fn finish(self) {
        if timeout(FINISH_WITHIN, self.ended()).await.is_err() {
            self.signal(libc::SIGTERM);
            if timeout(END_WITHIN, self.ended()).await.is_err() {
                log::warn!(
                    "logging binary {}: killed, it was still there {} s after SIGTERM",
                    self.uri,
                    END_WITHIN.as_secs()
                );
            }
        }
        self.kill().await;
    }

    /// Kills it with its children, and reaps them.
    async fn kill(mut self) {
        self.kill_group();
        if timeout(GONE_WITHIN, self.ended()).await.is_err() {
            log::warn!(
                "logging binary {}: killed, but not gone after {} s",
                self.uri,
                GONE_WITHIN.as_secs()
            );
            // Drop goes on waiting.
            return;
        }
        if let Some(pidfd) = self.pidfd.take() {
            reap(&pidfd, self.pid).await;
        }
    }

    /// Resolves when it has ended; it isn't reaped by that.
    async fn ended(&self) {
        if let Some(pidfd) = &self.pidfd {
            ended(pidfd).await;
        }
    }

    fn signal(&self, signal: i32) {
        if let Some(pidfd) = &self.pidfd {
            // Gone already is as good.
            let _gone = process::signal(pidfd.get_ref(), signal);
        }
    }

    /// Unreaped, it keeps the number of its group from being used again.
    fn kill_group(&self) {
        self.signal(libc::SIGKILL);
        if self.pidfd.is_some()
            && let Some(group) = self.pid
        {
            // Before its setsid(2) there is no such group.
            let _none = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        self.kill_group();
        let Some(pidfd) = self.pidfd.take() else {
            return;
        };
        let pid = self.pid;
        // Without an event loop the shim is ending, and init reaps.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                ended(&pidfd).await;
                reap(&pidfd, pid).await;
            });
        }
    }
}

async fn ended(pidfd: &AsyncFd<OwnedFd>) {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    loop {
        let Ok(mut readable) = pidfd.readable().await else {
            return;
        };
        // None: still running. An error: somebody else has reaped it.
        match rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), options) {
            Ok(None) => readable.clear_ready(),
            _ => return,
        }
    }
}

/// Takes an ended logger off the process table, and what it left of its group:
/// as the subreaper the shim is parent to all of it.
async fn reap(pidfd: &AsyncFd<OwnedFd>, group: Option<Pid>) {
    let _ended = process::wait(pidfd.get_ref());
    let until = Instant::now() + GONE_WITHIN;
    while group.is_some() && Instant::now() < until {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::Pgid(group), options) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(binary: &Binary) -> Vec<String> {
        std::iter::once(&binary.path)
            .chain(&binary.args)
            .map(|s| s.to_string_lossy().into_owned())
            .collect()
    }

    fn parse(rest: &str) -> Result<Binary, ShimError> {
        Binary::parse(&format!("binary://{rest}"), rest, false)
    }

    #[test]
    fn the_query_becomes_arguments_in_its_order() {
        let parsed = |rest| strings(&parse(rest).unwrap());
        assert_eq!(parsed("/bin/l"), ["/bin/l"]);
        assert_eq!(
            parsed("/bin/l?z=1&a=b&z=2"),
            ["/bin/l", "z", "1", "a", "b", "z", "2"]
        );
        assert_eq!(parsed("/l?flag&&x="), ["/l", "flag", "", "x", ""]);
        assert_eq!(parsed("/a+b%20c?d+e=%3f%26"), ["/a+b c", "d e", "?&"]);
    }

    #[test]
    fn a_bad_uri_is_refused_and_named() {
        for rest in [
            "",
            "bin/l",
            "host/bin/l",
            "/l%",
            "/l%2",
            "/l%zz",
            "/l?a=%00",
        ] {
            let error = parse(rest).unwrap_err();
            assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT, "{rest}");
            let text = error.to_string();
            assert!(text.contains(&format!("binary://{rest}")), "{text}");
        }
    }
}

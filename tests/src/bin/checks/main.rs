//! The probes: what an attacker inside a container tries, one thing at a time.
//!
//! `checks run` makes every attempt, each in a process of its own, and writes a
//! line for each: `ID TAB ANSWER TAB DETAIL`. Answers are `ok` (the attacker has
//! what the probe is after), `entered E` (the call went past what should have
//! stopped it, and failed later for reasons of its own), `refused E`, `absent E`
//! (what is attacked isn't in this kernel, or so it says), `died SIGNAL` and
//! `n/a WHY`. `checks list` says what each is after, `checks reach` counts arguments. Nothing here changes a
//! host that it is run on as control: calls get arguments that fail once they
//! are past the lock, or act on what was made for the purpose.

mod calls;
mod devices;
mod ids;
mod mounts;
mod net;
mod netlink;
mod paths;
mod plant;
mod reach;

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use casemate_sys::attempt;
pub use casemate_sys::attempt::Arg;
use casemate_sys::namespace::{self, kind};
use casemate_sys::process::{self, Fork};
use rustix::io::Errno;

/// Set where attempts are made as root of the host, for comparison.
static CONTROL: AtomicBool = AtomicBool::new(false);

/// Why an attempt came to nothing.
pub enum No {
    /// The kernel's answer.
    Errno(Errno),
    /// The same, at a step before the one that counts: no sign of being let through.
    Before(Errno),
    /// It makes no sense here.
    NotApplicable(String),
}

impl From<io::Error> for No {
    fn from(error: io::Error) -> Self {
        match Errno::from_io_error(&error) {
            Some(errno) => Self::Errno(errno),
            None => Self::NotApplicable(error.to_string()),
        }
    }
}

impl From<Errno> for No {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

/// How an attempt ended; a success may say what was gained.
pub type Done = Result<String, No>;

/// One way in.
pub struct Check {
    /// Topic and name: `T08.mount-tmpfs`.
    pub id: String,
    /// What the attacker has if it succeeds.
    pub means: String,
    /// Errors that come from behind the lock.
    entered: &'static [Errno],
    /// Errors that say that the kernel has no such thing.
    absent: &'static [Errno],
    run: Box<dyn Fn() -> Done>,
}

impl Check {
    /// A check whose only success is that `run` succeeds.
    pub fn new(id: &str, means: &str, run: impl Fn() -> Done + 'static) -> Self {
        Self {
            id: id.to_owned(),
            means: means.to_owned(),
            entered: &[],
            absent: &[Errno::NOSYS],
            run: Box::new(run),
        }
    }

    /// A system call, by [`casemate_sys::attempt::raw`].
    pub fn call(id: &str, means: &str, name: &'static str, args: &[Arg<'static>]) -> Self {
        let args = args.to_vec();
        Self::new(id, means, move || gained(attempt::raw(name, &args)))
    }

    /// These errors show that the lock was passed.
    pub fn entered(mut self, errors: &'static [Errno]) -> Self {
        self.entered = errors;
        self
    }

    /// These errors show that this kernel has no such thing.
    pub fn absent(mut self, errors: &'static [Errno]) -> Self {
        self.absent = errors;
        self
    }

    fn answer(&self) -> String {
        match (self.run)() {
            Ok(detail) => format!("ok\t{}", one_line(&detail)),
            Err(No::NotApplicable(why)) => format!("n/a\t{}", one_line(&why)),
            Err(No::Before(errno)) if !self.absent.contains(&errno) => {
                format!("refused {}\t", name_of(errno))
            }
            Err(No::Errno(errno) | No::Before(errno)) => {
                let name = name_of(errno);
                if self.entered.contains(&errno) {
                    format!("entered {name}\t")
                } else if self.absent.contains(&errno) {
                    format!("absent {name}\t")
                } else {
                    format!("refused {name}\t")
                }
            }
        }
    }
}

/// A result without anything to say about it.
pub fn gained<T, E: Into<No>>(result: Result<T, E>) -> Done {
    result.map(|_| String::new()).map_err(Into::into)
}

/// Succeeds if `gained`; EACCES otherwise, where the kernel gives no error.
pub fn only_if(gained: bool, detail: impl Into<String>) -> Done {
    if gained {
        Ok(detail.into())
    } else {
        Err(No::Errno(Errno::ACCESS))
    }
}

/// It makes no sense here.
pub fn skip<T>(why: &str) -> Result<T, No> {
    Err(No::NotApplicable(why.to_owned()))
}

fn one_line(text: &str) -> String {
    let text: String = text.chars().take(120).collect();
    text.replace(|c: char| c.is_control(), " ")
}

/// The usual name; `Debug` of [`Errno`] has the number only.
fn name_of(errno: Errno) -> String {
    const NAMES: [(Errno, &str); 28] = [
        (Errno::PERM, "EPERM"),
        (Errno::NOENT, "ENOENT"),
        (Errno::SRCH, "ESRCH"),
        (Errno::IO, "EIO"),
        (Errno::NXIO, "ENXIO"),
        (Errno::BADF, "EBADF"),
        (Errno::CHILD, "ECHILD"),
        (Errno::ACCESS, "EACCES"),
        (Errno::FAULT, "EFAULT"),
        (Errno::NOTBLK, "ENOTBLK"),
        (Errno::BUSY, "EBUSY"),
        (Errno::EXIST, "EEXIST"),
        (Errno::NODEV, "ENODEV"),
        (Errno::NOTDIR, "ENOTDIR"),
        (Errno::INVAL, "EINVAL"),
        (Errno::NOTTY, "ENOTTY"),
        (Errno::NOSPC, "ENOSPC"),
        (Errno::ROFS, "EROFS"),
        (Errno::NOSYS, "ENOSYS"),
        (Errno::NOPROTOOPT, "ENOPROTOOPT"),
        (Errno::PROTONOSUPPORT, "EPROTONOSUPPORT"),
        (Errno::SOCKTNOSUPPORT, "ESOCKTNOSUPPORT"),
        (Errno::OPNOTSUPP, "EOPNOTSUPP"),
        (Errno::AFNOSUPPORT, "EAFNOSUPPORT"),
        (Errno::TIMEDOUT, "ETIMEDOUT"),
        (Errno::CONNREFUSED, "ECONNREFUSED"),
        (Errno::NOTCONN, "ENOTCONN"),
        (Errno::XDEV, "EXDEV"),
    ];
    NAMES.iter().find(|(known, _)| *known == errno).map_or_else(
        || format!("E{}", errno.raw_os_error()),
        |(_, n)| (*n).to_owned(),
    )
}

/// All of them. Some depend on what this kernel has (file system types).
fn all() -> Vec<Check> {
    let mut checks = ids::checks();
    checks.extend(mounts::checks());
    checks.extend(paths::checks());
    checks.extend(devices::checks());
    checks.extend(net::checks());
    checks.extend(netlink::checks());
    checks.extend(calls::checks());
    checks
}

/// How long one attempt may take.
const PATIENCE: i64 = 15;

/// Makes the attempt in a child, for what it may do to its process.
fn apart(check: &Check) -> io::Result<String> {
    let (mut ours, theirs) = io::pipe()?;
    match process::fork()? {
        Fork::Child => {
            drop(ours);
            // As control, what succeeds is gone with the child, and the next one
            // finds everything as it was.
            let apart = match CONTROL.load(Ordering::Relaxed) {
                true => namespace::unshare(kind::MOUNT | kind::NET | kind::IPC | kind::UTS),
                false => Ok(()),
            };
            let answer = match apart {
                Ok(()) => check.answer(),
                Err(error) => format!("n/a\t{error}"),
            };
            let _ = (&theirs).write_all(answer.as_bytes());
            process::exit_now(0)
        }
        Fork::Parent(_, child) => {
            drop(theirs);
            if !ends(&child)? {
                process::signal(&child, 9)?;
            }
            let ended = process::wait(&child)?;
            if ended.status > 128 {
                let name = match ended.status - 128 {
                    31 => "SIGSYS".to_owned(),
                    9 => "SIGKILL".to_owned(),
                    11 => "SIGSEGV".to_owned(),
                    other => other.to_string(),
                };
                return Ok(format!("died {name}\t"));
            }
            // Whoever it left behind may hold the pipe open: one packet is all.
            let mut bytes = vec![0; 4096];
            let n = ours.read(&mut bytes)?;
            bytes.truncate(n);
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
    }
}

fn ends(child: &OwnedFd) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec {
        tv_sec: PATIENCE,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(child, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&limit))? > 0)
}

fn run(only: Option<&str>) -> io::Result<()> {
    for check in all() {
        if only.is_some_and(|part| !check.id.contains(part)) {
            continue;
        }
        let answer = apart(&check)?;
        writeln!(io::stdout(), "{}\t{answer}", check.id)?;
    }
    Ok(())
}

fn control(only: Option<&str>) -> io::Result<()> {
    ids::as_control()?;
    CONTROL.store(true, Ordering::Relaxed);
    run(only)
}

fn list() -> io::Result<()> {
    for check in all() {
        writeln!(io::stdout(), "{}\t{}", check.id, check.means)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["run"] => run(None),
        ["run", part] => run(Some(part)),
        ["control"] => control(None),
        ["control", part] => control(Some(part)),
        ["list"] => list(),
        ["reach"] => reach::run(),
        ["plant", name] => plant::plant(name),
        ["look", name] => plant::look(name),
        ["abort"] => std::process::abort(),
        ["wait"] => io::stdin().read_to_end(&mut Vec::new()).map(drop),
        // What probes execute to see what it has gained.
        ["euid"] => return ExitCode::from(ids::privileged_now()),
        _ => Err(io::Error::other(format!("unknown words {words:?}"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("checks: {error}");
            ExitCode::from(1)
        }
    }
}

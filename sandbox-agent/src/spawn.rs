//! One process of a container: fork, identity, descriptors, exec.
//!
//! Between forker and child there is a socket pair that closes on exec. The
//! child says "prepared" (with its terminal's master), waits for one packet,
//! and execs; what it can't do it says as text. End of stream means exec
//! succeeded.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use casemate_protocol::capabilities::FILES;
use casemate_protocol::plan::{ProcessPlan, TerminalSize};
use casemate_sys::process::{self, Fork};
use casemate_sys::{exec, marked, message, schedule};
use rustix::fs::{CWD, FileType, Mode, OFlags};

use crate::confine;
use crate::error::{At, StepError};
use crate::label;
use crate::passwd;

/// What a new process gets as 0, 1, 2.
pub enum Stdio {
    /// Three open files.
    Files(Vec<OwnedFd>),
    /// The terminal that is bound at /dev/console.
    Terminal(Terminal),
    /// A terminal yet to be made.
    NewTerminal,
}

/// A pseudo terminal of the container's devpts.
pub struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
    /// Its name in /dev/pts.
    pub number: u32,
}

impl Terminal {
    /// A new terminal of the devpts at `pts`, owned by the file ids in force.
    pub fn open(pts: impl AsFd) -> Result<Terminal, StepError> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let master =
            rustix::fs::openat(&pts, "ptmx", flags, Mode::empty()).at("open", "/dev/pts/ptmx")?;
        marked::unlock_terminal(&master).at("unlock", "terminal")?;
        let slave = marked::terminal_peer(&master).at("open", "terminal")?;
        let minor = rustix::fs::minor(rustix::fs::fstat(&slave).at("look at", "terminal")?.st_rdev);
        Ok(Terminal {
            master,
            slave,
            number: minor,
        })
    }
}

/// A child that waits for its Go.
pub struct Parked(Option<OwnedFd>);

/// What fork_process returns beside pid and pidfd.
pub struct Prepared {
    /// To let it go.
    pub parked: Parked,
    /// Master of its terminal.
    pub master: Option<OwnedFd>,
}

impl Terminal {
    /// Both ends, for [`Terminal::from_ends`] in another process.
    pub fn ends(&self) -> [BorrowedFd<'_>; 2] {
        [self.master.as_fd(), self.slave.as_fd()]
    }

    /// A terminal whose ends came from another process.
    pub fn from_ends(ends: Vec<OwnedFd>, number: u32) -> Result<Terminal, StepError> {
        let [master, slave] = <[OwnedFd; 2]>::try_from(ends)
            .map_err(|_| StepError::invalid("spawn", "", "not two ends of a terminal"))?;
        Ok(Terminal {
            master,
            slave,
            number,
        })
    }
}

const PREPARED: u8 = b'P';
const FAILED: u8 = b'F';
const INVALID: u8 = b'I';

impl Prepared {
    /// A process that said it is prepared.
    pub fn new(parked: Parked, master: Option<OwnedFd>) -> Prepared {
        Prepared { parked, master }
    }
}

impl Parked {
    /// A child waits at the other end of `socket`.
    pub fn waiting(socket: OwnedFd) -> Parked {
        Parked(Some(socket))
    }

    /// Nothing waits.
    pub fn gone() -> Parked {
        Parked(None)
    }

    /// Lets the child exec and waits until it has. On error the child is reaped.
    pub fn go(self, pidfd: &OwnedFd) -> Result<(), StepError> {
        let Some(socket) = self.0 else { return Ok(()) };
        if message::send(&socket, b"G", &[]).is_err() {
            let _ = process::wait(pidfd);
            return Err(StepError::invalid(
                "start",
                "",
                "the process ended before exec",
            ));
        }
        match told(&socket) {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Ok(()),
            Err(error) => {
                let _ = process::wait(pidfd);
                Err(error)
            }
        }
    }
}

/// What the child says next: `None` is the end of the stream.
pub fn told(socket: &OwnedFd) -> Result<Option<Option<OwnedFd>>, StepError> {
    let mut buffer = [0u8; 4096];
    match message::receive(socket, &mut buffer, true).at("hear from", "the new process")? {
        None => Ok(None),
        Some((n, mut fds)) => match buffer[..n].split_first() {
            Some((&PREPARED, _)) => Ok(Some(fds.pop())),
            Some((kind, text)) => {
                let text = String::from_utf8_lossy(text);
                let error = StepError::invalid("start process", "", &text);
                Err(if *kind == INVALID {
                    error
                } else {
                    StepError {
                        invalid: false,
                        ..error
                    }
                })
            }
            None => Ok(None),
        },
    }
}

/// Forks a child of the container, ready to exec.
pub fn fork_process(
    plan: &ProcessPlan,
    stdio: Stdio,
) -> Result<(u32, OwnedFd, Prepared), StepError> {
    let (ours, theirs) = message::pair().at("make", "socket pair")?;
    match process::fork().map_err(exhausted)? {
        Fork::Child => {
            drop(ours);
            let error = become_process(plan, stdio, &theirs);
            report(&theirs, &error);
            process::exit_now(127)
        }
        Fork::Parent(pid, pidfd) => {
            drop(theirs);
            let said = told(&ours).and_then(|said| {
                said.ok_or_else(|| StepError::invalid("start process", "", "it died at once"))
            });
            match said {
                Ok(master) => Ok((
                    pid,
                    pidfd,
                    Prepared {
                        parked: Parked(Some(ours)),
                        master,
                    },
                )),
                Err(error) => {
                    let _ = process::wait(&pidfd);
                    Err(error)
                }
            }
        }
    }
}

/// In the child: tells the forker what went wrong. By write(2), which is left when
/// the last filter has taken back what has the mark.
pub fn report(socket: &OwnedFd, error: &StepError) {
    let kind = if error.invalid { INVALID } else { FAILED };
    let mut text = vec![kind];
    text.extend_from_slice(casemate_protocol::clip(&error.to_string()).as_bytes());
    let _ = rustix::io::write(socket, &text);
}

/// In the child: tells the forker that a step is done.
pub fn prepared(socket: &OwnedFd, fds: &[BorrowedFd<'_>]) -> Result<(), StepError> {
    message::send(socket, &[PREPARED], fds).at("tell", "forker")
}

/// fork fails in ways that say little; what they mean here.
pub fn exhausted(error: io::Error) -> StepError {
    let reason = match error.raw_os_error() {
        Some(libc_eagain) if libc_eagain == rustix::io::Errno::AGAIN.raw_os_error() => {
            "the pids limit of the container is used up (linux.resources.pids.limit)".to_owned()
        }
        Some(nomem) if nomem == rustix::io::Errno::NOMEM.raw_os_error() => {
            "the init of its pid namespace has ended, or its memory is used up".to_owned()
        }
        _ => error.to_string(),
    };
    StepError {
        invalid: false,
        ..StepError::invalid("fork process", "", &reason)
    }
}

/// In the child: everything up to exec. Returns only what went wrong.
pub fn become_process(plan: &ProcessPlan, stdio: Stdio, status: &OwnedFd) -> StepError {
    match prepare_and_exec(plan, stdio, status) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn prepare_and_exec(
    plan: &ProcessPlan,
    stdio: Stdio,
    status: &OwnedFd,
) -> Result<std::convert::Infallible, StepError> {
    process::reset_signals();
    marked::start_session().at("start", "session")?;
    let (files, master) = descriptors(plan, stdio)?;
    for limit in &plan.limits {
        process::set_limit(0, limit.resource, limit.soft, limit.hard)
            .at("set process.rlimits: resource", limit.resource.to_string())?;
    }
    scheduling(plan)?;
    if let Some(mask) = plan.umask {
        marked::set_umask(mask);
    }
    // As root first (a directory that only root may enter is a fair place to
    // start), as the user below if that fails.
    let early = marked::change_directory(&plan.cwd);
    confine::identity(plan)?;
    if early.is_err() {
        marked::change_directory(&plan.cwd)
            .at("change to process.cwd", &plan.cwd)
            .map_err(StepError::blame_request)?;
    }
    // A directory outside the root (through a leaked descriptor, say) shows
    // as "(unreachable)…".
    let cwd = marked::current_directory().at("look at process.cwd", &plan.cwd)?;
    if cwd.first() != Some(&b'/') {
        return Err(StepError::invalid(
            "change to process.cwd",
            &plan.cwd,
            "outside the root",
        ));
    }
    let mut env = plan.env.clone();
    if plan.path.is_empty() && !env.iter().any(|e| e.starts_with("HOME=")) {
        env.push(format!("HOME={}", passwd::home(plan.uid)));
    }
    let binary = match plan.path.as_str() {
        "" => find_binary(plan, &plan.args, &env)?,
        path => find_binary(plan, &[path.to_owned()], &env)?,
    };
    let (path, args, env) = (c_string(&binary)?, c_strings(&plan.args)?, c_strings(&env)?);

    label::set(plan)?;

    let ready: Vec<_> = master.iter().map(AsFd::as_fd).collect();
    prepared(status, &ready)?;
    drop(master);
    let mut go = [0u8; 1];
    if message::receive(status, &mut go, true)
        .at("wait for", "start")?
        .is_none()
    {
        process::exit_now(0);
    }
    exec::install_descriptors(files).at("install", "descriptors")?;
    confine::own_filter(plan)?;
    Err(exec::exec(&path, &args, &env))
        .at("execute", &binary)
        .map_err(StepError::blame_request)
}

/// A process may always rank itself lower.
fn scheduling(plan: &ProcessPlan) -> Result<(), StepError> {
    if let Some((policy, nice)) = plan.scheduler {
        schedule::set_policy(policy, nice).at("set", "process.scheduler")?;
    }
    if let Some(value) = plan.io_priority {
        schedule::set_io_priority(value).at("set", "process.ioPriority")?;
    }
    if !plan.cpus.is_empty() {
        // EINVAL: none of them is the cgroup's.
        schedule::set_affinity(&plan.cpus)
            .at(
                "set process.execCPUAffinity.final, which must share a processor with the container's cpuset:",
                format!("{:?}", plan.cpus),
            )
            .map_err(StepError::blame_request)?;
    }
    Ok(())
}

type Descriptors = (Vec<OwnedFd>, Option<OwnedFd>);

fn descriptors(plan: &ProcessPlan, stdio: Stdio) -> Result<Descriptors, StepError> {
    let terminal = match stdio {
        Stdio::Files(files) if files.len() == 3 => return Ok((files, None)),
        Stdio::Files(_) => return Err(StepError::invalid("spawn", "", "not three descriptors")),
        Stdio::Terminal(terminal) => terminal,
        Stdio::NewTerminal => {
            let pts = rustix::fs::openat(
                CWD,
                "/dev/pts",
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .at("open", "/dev/pts")?;
            // The terminal belongs to whom the process will be.
            casemate_sys::ident::as_effective(plan.uid, plan.gid, || Terminal::open(pts))
                .at("set", "ids of the terminal")??
        }
    };
    marked::set_controlling_terminal(&terminal.slave).at("control", "terminal")?;
    if let Some(TerminalSize { rows, columns }) = plan.terminal
        && (rows, columns) != (0, 0)
    {
        marked::set_terminal_size(&terminal.slave, rows, columns).at("size", "terminal")?;
    }
    let copy = || marked::copy(&terminal.slave).at("copy", "terminal");
    Ok((vec![copy()?, copy()?, copy()?], Some(terminal.master)))
}

/// The file that `args[0]` names, as execvp(3) would find it.
fn find_binary(plan: &ProcessPlan, args: &[String], env: &[String]) -> Result<String, StepError> {
    let Some(name) = args.first().filter(|n| !n.is_empty()) else {
        return Err(StepError::invalid("execute", "process.args", "empty"));
    };
    if name.contains('/') {
        return executable(plan, name)
            .map(|()| name.clone())
            .at("execute", name)
            .map_err(StepError::blame_request);
    }
    let path = env
        .iter()
        .find_map(|e| e.strip_prefix("PATH="))
        .unwrap_or("/bin:/usr/bin");
    let mut denied = false;
    for dir in path.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        let candidate = format!("{dir}/{name}");
        match executable(plan, &candidate) {
            Ok(()) => return Ok(candidate),
            Err(e) => denied |= e.kind() == io::ErrorKind::PermissionDenied,
        }
    }
    let reason = if denied {
        "permission denied"
    } else {
        "executable file not found in $PATH"
    };
    Err(StepError::invalid("execute", name, reason))
}

/// Whether the process may execute it, by faccessat(2), which the forker always has. It
/// asks as the real ids, which are the effective ones by now; but, of a user other than
/// root, without capabilities. What those open, only execve can say.
fn executable(plan: &ProcessPlan, path: &str) -> io::Result<()> {
    const ANYBODY: u32 = 0o111;
    let by_capability = match marked::may_execute(path) {
        Err(e)
            if e.kind() == io::ErrorKind::PermissionDenied
                && plan.uid != 0
                && plan.effective & FILES != 0 =>
        {
            true
        }
        answer => answer.map(|()| false)?,
    };
    let mode = rustix::fs::stat(path)?.st_mode;
    let is_file = FileType::from_raw_mode(mode) == FileType::RegularFile;
    if is_file && (!by_capability || mode & ANYBODY != 0) {
        Ok(())
    } else {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

fn c_string(text: &str) -> Result<CString, StepError> {
    CString::new(text).map_err(|_| StepError::invalid("execute", text, "a NUL byte inside"))
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>, StepError> {
    texts.iter().map(|t| c_string(t)).collect()
}

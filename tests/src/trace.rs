//! Stops a shim at each of its effects on the host, with ptrace(2): the
//! deterministic way to have something happen between two of its steps, without
//! a hook in it.
//!
//! `start` is stepped from its first instruction, the server that it leaves
//! behind from its birth. What those two fork is let go at once.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::error::{Failure, Result};
use crate::run::until;
use crate::shim::Invocation;

/// An effect that has just been made; its maker waits.
#[derive(Debug, Clone)]
pub struct Step {
    /// Its number, from 0.
    pub number: usize,
    /// Who made it.
    pub pid: u32,
    /// `start` or `serve`.
    pub action: &'static str,
    /// The call and what it was about.
    pub what: String,
    /// A line was written to the journal: that line.
    pub journal: Option<String>,
}

/// What is to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// On to the next effect.
    Go,
    /// SIGKILL for the maker; everything else runs on by itself.
    Kill,
    /// SIGSTOP for the maker; everything else runs on by itself.
    Stop,
    /// All run on by themselves.
    Release,
}

/// A `start` under the stepper.
pub struct Traced {
    /// Yields what `start` printed, both streams.
    output: JoinHandle<Vec<u8>>,
    tracer: JoinHandle<Result<usize>>,
}

impl Traced {
    /// What `start` printed, at its end.
    pub fn answer(self) -> (Vec<u8>, JoinHandle<Result<usize>>) {
        (self.output.join().unwrap_or_default(), self.tracer)
    }
}

/// Runs `start`, asking `decide` after each effect.
pub fn start(
    invocation: &Invocation,
    mut decide: impl FnMut(&Step) -> Then + Send + 'static,
) -> Result<Traced> {
    let inner = invocation.command("start");
    let mut command = Command::new("/bin/sh");
    // Stopped until it is traced.
    command
        .args(["-c", "kill -STOP $$; exec \"$@\"", "sh"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(dir) = inner.get_current_dir() {
        command.current_dir(dir);
    }
    for (key, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    let (told, tell) = std::sync::mpsc::channel();
    let tracer = std::thread::spawn(move || {
        let spawned = command.spawn().map_err(|source| Failure::Spawn {
            program: "sh".to_owned(),
            source,
        });
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => return Err(error),
        };
        let _ = told.send((child.stdout.take(), child.stderr.take()));
        let pid = child.id();
        follow(pid, &mut decide)
    });
    let pipes = tell
        .recv()
        .map_err(|_| Failure::Unexpected("the traced start was not spawned".to_owned()))?;
    let output = std::thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(mut pipe) = pipes.0 {
            let _ = pipe.read_to_end(&mut all);
        }
        if let Some(mut pipe) = pipes.1 {
            let _ = pipe.read_to_end(&mut all);
        }
        all
    });
    Ok(Traced { output, tracer })
}

/// Steps through a `start` that somebody else runs, once its shell has stopped
/// itself; the number of steps seen.
pub fn follow(shell: u32, decide: &mut dyn FnMut(&Step) -> Then) -> Result<usize> {
    let stopped = || state(shell) == Some('T');
    until("a shell to stop", Duration::from_secs(10), stopped)?;
    Tracer::new(shell).run(decide)
}

fn state(pid: u32) -> Option<char> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.get(text.rfind(')')? + 2..)?.chars().next()
}

struct Tracee {
    /// Number and first four arguments of the call it is in.
    call: Option<(i64, [u64; 4])>,
}

struct Tracer {
    start: i32,
    tracees: HashMap<i32, Tracee>,
    steps: usize,
    loose: bool,
}

fn failed(what: &str) -> impl FnOnce(nix::Error) -> Failure + '_ {
    move |error| Failure::Unexpected(format!("ptrace: {what}: {error}"))
}

impl Tracer {
    fn new(pid: u32) -> Self {
        Self {
            start: i32::try_from(pid).unwrap_or(0),
            tracees: HashMap::new(),
            steps: 0,
            loose: false,
        }
    }

    /// Until none is traced any more; the number of steps seen.
    fn run(mut self, decide: &mut dyn FnMut(&Step) -> Then) -> Result<usize> {
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACECLONE;
        let start = Pid::from_raw(self.start);
        ptrace::seize(start, options).map_err(failed("seize"))?;
        self.tracees.insert(self.start, Tracee { call: None });
        kill(start, Signal::SIGCONT).map_err(failed("continue"))?;
        // Only of this thread: others wait for children of their own.
        let mut flags = WaitPidFlag::__WALL;
        flags |= WaitPidFlag::__WNOTHREAD;
        while !self.tracees.is_empty() {
            let status = match waitpid(Pid::from_raw(-1), Some(flags)) {
                Ok(status) => status,
                Err(nix::Error::ECHILD) => break,
                Err(nix::Error::EINTR) => continue,
                Err(error) => return Err(failed("wait")(error)),
            };
            self.handle(status, decide);
        }
        Ok(self.steps)
    }

    fn handle(&mut self, status: WaitStatus, decide: &mut dyn FnMut(&Step) -> Then) {
        match status {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _) => {
                self.tracees.remove(&pid.as_raw());
            }
            WaitStatus::PtraceSyscall(pid) => self.syscall(pid, decide),
            WaitStatus::PtraceEvent(pid, _, event) => {
                // A new one's first stop, or a group's.
                if event == 128 && !self.tracees.contains_key(&pid.as_raw()) {
                    if self.loose || !self.is_server(pid) {
                        let _ = ptrace::detach(pid, None);
                        return;
                    }
                    // What the server forks is nobody's to step through.
                    let _ = ptrace::setoptions(pid, Options::PTRACE_O_TRACESYSGOOD);
                    self.tracees.insert(pid.as_raw(), Tracee { call: None });
                }
                self.go_on(pid, None);
            }
            WaitStatus::Stopped(pid, signal) => self.go_on(pid, Some(signal)),
            _ => {}
        }
    }

    fn go_on(&mut self, pid: Pid, signal: Option<Signal>) {
        if self.loose {
            let _ = ptrace::detach(pid, signal);
            self.tracees.remove(&pid.as_raw());
        } else {
            // An error: it was killed meanwhile, and the next wait says so.
            let _ = ptrace::syscall(pid, signal);
        }
    }

    /// The one child of `start` is the server.
    fn is_server(&self, pid: Pid) -> bool {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let parent = status
            .lines()
            .find_map(|line| line.strip_prefix("PPid:"))
            .and_then(|value| value.trim().parse::<i32>().ok());
        parent == Some(self.start)
    }

    fn syscall(&mut self, pid: Pid, decide: &mut dyn FnMut(&Step) -> Then) {
        let Ok(registers) = ptrace::getregs(pid) else {
            return;
        };
        let is_start = pid.as_raw() == self.start;
        let Some(tracee) = self.tracees.get_mut(&pid.as_raw()) else {
            return;
        };
        let Some((number, arguments)) = tracee.call.take() else {
            tracee.call = Some((
                registers.orig_rax.cast_signed(),
                [registers.rdi, registers.rsi, registers.rdx, registers.r10],
            ));
            self.go_on(pid, None);
            return;
        };
        let result = registers.rax.cast_signed();
        let what = (result >= 0 && !self.loose)
            .then(|| effect(pid, number, arguments))
            .flatten();
        let Some((what, is_journal)) = what else {
            self.go_on(pid, None);
            return;
        };
        let step = Step {
            number: self.steps,
            pid: pid.as_raw().cast_unsigned(),
            action: if is_start { "start" } else { "serve" },
            journal: is_journal.then(|| last_line(pid, arguments[0])).flatten(),
            what,
        };
        self.steps += 1;
        match decide(&step) {
            Then::Go => {}
            Then::Kill => {
                let _ = kill(pid, Signal::SIGKILL);
                self.let_go(pid);
                return;
            }
            Then::Stop => {
                // Acted on when it returns from the call, that is at once.
                let _ = kill(pid, Signal::SIGSTOP);
                self.let_go(pid);
            }
            Then::Release => self.let_go(pid),
        }
        self.go_on(pid, None);
    }

    /// Everybody runs on alone: `pid` waits for its detachment, others are
    /// called to stop for theirs.
    fn let_go(&mut self, pid: Pid) {
        self.loose = true;
        for other in self.tracees.keys().filter(|other| **other != pid.as_raw()) {
            let _ = ptrace::interrupt(Pid::from_raw(*other));
        }
    }
}

fn link(pid: Pid, fd: u64) -> String {
    fs::read_link(format!("/proc/{pid}/fd/{fd}"))
        .map(|path| path.display().to_string())
        .unwrap_or_default()
}

fn last_line(pid: Pid, fd: u64) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/fd/{fd}")).ok()?;
    text.lines().last().map(str::to_owned)
}

/// What a call that succeeded has changed outside of its process: its name, and
/// whether it was a write to the journal. Numbers are those of x86-64.
fn effect(pid: Pid, number: i64, arguments: [u64; 4]) -> Option<(String, bool)> {
    let plain = [
        (libc::SYS_mkdir, "mkdir"),
        (libc::SYS_mkdirat, "mkdirat"),
        (libc::SYS_rmdir, "rmdir"),
        (libc::SYS_unlink, "unlink"),
        (libc::SYS_unlinkat, "unlinkat"),
        (libc::SYS_symlink, "symlink"),
        (libc::SYS_symlinkat, "symlinkat"),
        (libc::SYS_rename, "rename"),
        (libc::SYS_renameat, "renameat"),
        (libc::SYS_bind, "bind"),
        (libc::SYS_listen, "listen"),
        (libc::SYS_flock, "flock"),
        (libc::SYS_clone, "clone"),
        (libc::SYS_clone3, "clone3"),
        (libc::SYS_vfork, "vfork"),
        (libc::SYS_unshare, "unshare"),
        (libc::SYS_move_mount, "move_mount"),
        (libc::SYS_fsmount, "fsmount"),
        (libc::SYS_umount2, "umount2"),
        (libc::SYS_sendmsg, "sendmsg"),
        (libc::SYS_pidfd_send_signal, "pidfd_send_signal"),
        (libc::SYS_fchown, "fchown"),
    ];
    if let Some((_, name)) = plain.iter().find(|(known, _)| *known == number) {
        return Some(((*name).to_owned(), false));
    }
    if number == libc::SYS_openat {
        let creates = arguments[2] & u64::from(libc::O_CREAT.cast_unsigned()) != 0;
        return creates.then(|| ("openat, making a file".to_owned(), false));
    }
    if number != libc::SYS_write {
        return None;
    }
    let path = link(pid, arguments[0]);
    if path.ends_with("/casemate.journal") {
        return Some(("write to the journal".to_owned(), true));
    }
    let seen = path.starts_with("/sys/fs/cgroup/") || path.starts_with("/proc/");
    seen.then(|| (format!("write to {path}"), false))
}

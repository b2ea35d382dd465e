//! Strikes a process at one of its own steps, from its birth to its exec: with
//! ptrace(2), through the fork of its parent.

use std::sync::mpsc;
use std::thread::JoinHandle;

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::error::{Failure, Result};

/// Where it was struck: the pid, and what the kernel calls the place.
pub type Struck = Option<u32>;

fn failed(what: &str) -> impl FnOnce(nix::Error) -> Failure + '_ {
    move |error| Failure::Unexpected(format!("ptrace: {what}: {error}"))
}

/// Sends `signal` to the next child of `parent` at its stop `number`: each entry
/// to and return from a system call is one. `None`: it got to its exec, or to its
/// end, before. Returns once `parent` is watched.
pub fn next_child(
    parent: u32,
    number: usize,
    signal: Signal,
) -> Result<JoinHandle<Result<Struck>>> {
    let (ready, watched) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let parent = Pid::from_raw(parent.cast_signed());
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACECLONE;
        ptrace::seize(parent, options).map_err(failed("seize"))?;
        let _ = ready.send(());
        let struck = follow(parent, number, signal)?;
        let_go(parent);
        Ok(struck)
    });
    watched
        .recv()
        .map_err(|_| Failure::Unexpected("the parent can't be watched".to_owned()))?;
    Ok(thread)
}

fn wait() -> Result<WaitStatus> {
    let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    loop {
        match waitpid(Pid::from_raw(-1), Some(flags)) {
            Err(nix::Error::EINTR) => {}
            other => return other.map_err(failed("wait")),
        }
    }
}

fn follow(parent: Pid, number: usize, signal: Signal) -> Result<Struck> {
    let mut stops = 0;
    loop {
        match wait()? {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _) if pid != parent => {
                return Ok(None);
            }
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                return Err(Failure::Unexpected("the parent has ended".to_owned()));
            }
            WaitStatus::PtraceEvent(pid, _, event)
                if pid != parent && event == nix::libc::PTRACE_EVENT_EXEC =>
            {
                let _ = ptrace::detach(pid, None);
                return Ok(None);
            }
            WaitStatus::PtraceSyscall(pid) if pid != parent => {
                if stops == number {
                    // A stop takes effect on the way back from the kernel.
                    let _ = kill(pid, signal);
                    let _ = ptrace::detach(pid, None);
                    return Ok(Some(pid.as_raw().cast_unsigned()));
                }
                stops += 1;
                let _ = ptrace::syscall(pid, None);
            }
            WaitStatus::Stopped(pid, signal) if pid == parent => {
                let _ = ptrace::cont(pid, Some(signal));
            }
            WaitStatus::Stopped(pid, signal) => {
                let _ = ptrace::syscall(pid, Some(signal));
            }
            WaitStatus::PtraceEvent(pid, ..) if pid == parent => {
                let _ = ptrace::cont(pid, None);
            }
            WaitStatus::PtraceEvent(pid, ..) => {
                let _ = ptrace::syscall(pid, None);
            }
            _ => {}
        }
    }
}

/// A tracee can be detached only where it has stopped.
fn let_go(parent: Pid) {
    if ptrace::interrupt(parent).is_err() {
        return;
    }
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) if pid == parent => {
                return;
            }
            Ok(WaitStatus::Stopped(pid, signal)) if pid == parent => {
                let _ = ptrace::detach(pid, Some(signal));
                return;
            }
            Ok(WaitStatus::PtraceEvent(pid, _, _)) if pid == parent => {
                let _ = ptrace::detach(pid, None);
                return;
            }
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

//! A call that another process makes without having meant to, for root of the host
//! has it do so with ptrace(2): the way to change about a process what only itself
//! can change. x86-64, as the processes are.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::libc::user_regs_struct;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::error::{Failure, Result};
use crate::run::until;

/// Bytes of `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// What the call may read of ours: so far below the stack that nothing is there.
const ROOM: u64 = 16 << 10;

fn failed<E: std::fmt::Display>(what: &str) -> impl FnOnce(E) -> Failure + '_ {
    move |error| Failure::Unexpected(format!("ptrace: {what}: {error}"))
}

/// A process that waits in a call and is held there; it goes on with that when
/// this is dropped.
struct Held {
    pid: Pid,
    saved: user_regs_struct,
    pending: Option<Signal>,
}

impl Held {
    /// Takes it where it waits.
    fn take(pid: u32) -> Result<Self> {
        let pid = Pid::from_raw(pid.cast_signed());
        ptrace::seize(pid, Options::empty()).map_err(failed("seize"))?;
        ptrace::interrupt(pid).map_err(failed("interrupt"))?;
        wait(pid)?;
        let saved = ptrace::getregs(pid).map_err(failed("read registers"))?;
        Ok(Self {
            pid,
            saved,
            pending: None,
        })
    }

    /// Whether it is right behind a `syscall`.
    fn is_in_call(&self, memory: &File) -> bool {
        let mut code = [0; 2];
        let at = self.saved.rip.wrapping_sub(2);
        memory.read_exact_at(&mut code, at).is_ok() && code == SYSCALL
    }

    fn make(&mut self, number: i64, arguments: [u64; 6]) -> Result<i64> {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let registers = user_regs_struct {
            rip: self.saved.rip.wrapping_sub(2),
            rax: number.cast_unsigned(),
            // Not in a call: nothing is to be begun again.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.saved
        };
        ptrace::setregs(self.pid, registers).map_err(failed("write registers"))?;
        loop {
            ptrace::step(self.pid, None).map_err(failed("step"))?;
            match wait(self.pid)? {
                Signal::SIGTRAP => break,
                signal => self.pending = Some(signal),
            }
        }
        let after = ptrace::getregs(self.pid).map_err(failed("read registers"))?;
        Ok(after.rax.cast_signed())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Errors: it was killed meanwhile.
        let _ = ptrace::setregs(self.pid, self.saved);
        let _ = ptrace::detach(self.pid, self.pending);
    }
}

/// The signal, or SIGTRAP, that it has stopped with.
fn wait(pid: Pid) -> Result<Signal> {
    match waitpid(pid, Some(WaitPidFlag::__WALL)).map_err(failed("wait"))? {
        WaitStatus::Stopped(_, signal) | WaitStatus::PtraceEvent(_, signal, _) => Ok(signal),
        other => Err(Failure::Unexpected(format!("ptrace: {other:?}"))),
    }
}

/// Has the main thread of a process make a call; what the call answers, an errno as a
/// negative number. `arguments` are told where `bytes` are in its memory.
pub fn call(
    pid: u32,
    bytes: &[u8],
    number: i64,
    arguments: impl Fn(u64) -> [u64; 6],
) -> Result<i64> {
    let memory = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .map_err(failed("open its memory"))?;
    let mut answer = Err(Failure::Unexpected(format!("{pid} waits in no call")));
    let _ = until("it to wait in a call", Duration::from_secs(5), || {
        answer = (|| {
            let mut held = Held::take(pid)?;
            if !held.is_in_call(&memory) {
                return Err(Failure::Unexpected(format!("{pid} waits in no call")));
            }
            let at = (held.saved.rsp - ROOM) & !0xf;
            memory
                .write_all_at(bytes, at)
                .map_err(failed("write to its memory"))?;
            held.make(number, arguments(at))
        })();
        answer.is_ok()
    });
    answer
}

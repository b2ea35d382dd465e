//! Installing system-call filters with seccomp(2).
//!
//! The call is made directly rather than through a library so that
//! `no_new_privs` stays the caller's decision: a container that asks for
//! privilege escalation gets its filter while `CAP_SYS_ADMIN` is still held.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::marked;

/// Size of one `struct sock_filter` (linux/filter.h): u16 code, u8 jt, u8 jf, u32 k.
pub const INSTRUCTION_SIZE: usize = 8;

/// `SECCOMP_FILTER_FLAG_TSYNC`, see seccomp(2).
pub const FLAG_TSYNC: u32 = 1;
/// `SECCOMP_FILTER_FLAG_LOG`, see seccomp(2).
pub const FLAG_LOG: u32 = 1 << 1;
/// `SECCOMP_FILTER_FLAG_SPEC_ALLOW`, see seccomp(2).
pub const FLAG_SPEC_ALLOW: u32 = 1 << 2;
/// `SECCOMP_FILTER_FLAG_NEW_LISTENER`, see seccomp_unotify(2).
pub const FLAG_NEW_LISTENER: u32 = 1 << 3;
/// `SECCOMP_FILTER_FLAG_TSYNC_ESRCH`, see seccomp(2).
pub const FLAG_TSYNC_ESRCH: u32 = 1 << 4;
/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`, see linux/seccomp.h (5.19).
pub const FLAG_WAIT_KILLABLE_RECV: u32 = 1 << 5;

/// Installs a filter on the calling thread: seccomp(2), `SECCOMP_SET_MODE_FILTER`.
///
/// `program` is an array of `struct sock_filter` in native layout. `flags` are
/// the `FLAG_*` bits; with [`FLAG_NEW_LISTENER`] the notification descriptor is
/// returned (the kernel makes it close-on-exec), otherwise `None`. The caller
/// holds `CAP_SYS_ADMIN` in its user namespace or has set `no_new_privs`.
///
/// Makes no allocation, so it may be used between fork and exec.
///
/// # Errors
/// `EINVAL` for a program that is empty, longer than 65535 instructions or not a
/// whole number of instructions; else what the kernel answers. `ESRCH` when
/// [`FLAG_TSYNC`] found a thread that could not be synchronised.
pub fn install_filter(program: &[u8], flags: u32) -> io::Result<Option<OwnedFd>> {
    let count = u16::try_from(program.len() / INSTRUCTION_SIZE).unwrap_or(0);
    if count == 0 || !program.len().is_multiple_of(INSTRUCTION_SIZE) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let prog = libc::sock_fprog {
        len: count,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `prog` points at `count` whole instructions inside `program`, both
    // alive for the whole call. The kernel only copies them, with
    // copy_from_user, which asks for no alignment.
    let ret = unsafe {
        marked::call(
            libc::SYS_seccomp,
            [
                libc::SECCOMP_SET_MODE_FILTER.into(),
                flags.into(),
                &raw const prog as u64,
                0,
                0,
            ],
        )
    }?;
    if flags & FLAG_NEW_LISTENER != 0 {
        let fd = RawFd::try_from(ret).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }));
    }
    if ret > 0 {
        // TSYNC reports the id of the first thread it could not synchronise.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(None)
}

/// The filters of another process, the one that was installed first in front.
/// It is stopped for that moment (ptrace(2), `PTRACE_SECCOMP_GET_FILTER`).
///
/// # Errors
/// What the kernel answers: `EPERM` or `EACCES` without CAP_SYS_ADMIN or under a
/// filter oneself, `EIO` without checkpointing in the kernel, `EBUSY` where it is
/// traced already (as `EPERM`); `ETIMEDOUT` if it doesn't stop, as in a frozen cgroup of
/// version 1.
pub fn filters_of(pid: u32) -> io::Result<Vec<Vec<u8>>> {
    // By a thread that ends: one that couldn't let go lets go then.
    std::thread::scope(|scope| scope.spawn(|| traced_filters(pid)).join())
        .map_err(|_| io::Error::other("the thread that reads filters has failed"))?
}

fn traced_filters(pid: u32) -> io::Result<Vec<Vec<u8>>> {
    const SEIZE: usize = 0x4206;
    const INTERRUPT: usize = 0x4207;
    const GET_FILTER: usize = 0x420c;
    const DETACH: usize = 17;
    const TRIES: u32 = 5000;
    let trace = |request: usize, address: usize, data: usize| {
        // SAFETY: the one address of ours that is passed (GET_FILTER) is null, to
        // be told the length, or of a buffer of that length.
        match unsafe { libc::syscall(libc::SYS_ptrace, request, pid as usize, address, data) } {
            r if r >= 0 => Ok(r as usize),
            _ => Err(io::Error::last_os_error()),
        }
    };
    trace(SEIZE, 0, 0)?;
    let mut signal = 0;
    let mut read = || {
        trace(INTERRUPT, 0, 0)?;
        let mut status = 0;
        let mut tries = 0;
        let r = loop {
            let flags = libc::__WALL | libc::WNOHANG;
            // SAFETY: the kernel writes one int to the live local.
            let r = unsafe { libc::waitpid(pid as i32, &raw mut status, flags) };
            if r != 0 {
                break r;
            }
            if tries == TRIES {
                return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
            }
            tries += 1;
            std::thread::sleep(std::time::Duration::from_micros(50));
        };
        if r < 0 || !libc::WIFSTOPPED(status) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // It has stopped for a signal of its own, which it gets when it is let go; the
        // stop that was asked for is an event.
        if status >> 16 == 0 {
            signal = libc::WSTOPSIG(status) as usize;
        }
        let mut all = Vec::new();
        loop {
            let count = match trace(GET_FILTER, all.len(), 0) {
                Ok(count) => count,
                // No such filter: that was the last one. EINVAL: none at all.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => break,
                Err(e) => return Err(e),
            };
            let mut program = vec![0u8; count * INSTRUCTION_SIZE];
            trace(GET_FILTER, all.len(), program.as_mut_ptr() as usize)?;
            all.push(program);
        }
        Ok(all)
    };
    let all = read();
    // A process that has ended meanwhile can't be let go.
    let _gone = trace(DETACH, 0, signal);
    all
}

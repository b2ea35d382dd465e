//! Making, watching and ending processes (clone(2), pidfd_open(2), waitid(2)).
//! All casemate processes have one thread; forking them is as plain as it was
//! in the seventies.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::marked;

/// On which side of a fork one is.
pub enum Fork {
    /// In the child.
    Child,
    /// In the parent: the child's pid (in the parent's pid namespace) and pidfd.
    Parent(u32, OwnedFd),
}

#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// fork(2) with new namespaces (`namespaces`: bits of [`crate::namespace::kind`])
/// and, on cgroup v2, straight into the cgroup whose directory is `cgroup`
/// (clone3(2), `CLONE_INTO_CGROUP`).
///
/// The caller must be single-threaded: the child gets a copy of this one thread.
pub fn fork_into(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Fork> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: i32 = -1;
    let mut args = CloneArgs {
        flags: namespaces | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if let Some(dir) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = dir.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child has its own copy of all memory and of
    // this stack, so this is fork(2); `args` and `pidfd` live through the call.
    let r = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    forked(r, pidfd)
}

/// fork(2) by clone(2) rather than clone3(2): for callers under a filter that
/// refuses the latter.
pub fn fork() -> io::Result<Fork> {
    let mut pidfd: i32 = -1;
    // SAFETY: as in `fork_into`: no memory is shared; the kernel writes one
    // int to `pidfd` (CLONE_PIDFD uses the parent_tid argument).
    let r = unsafe {
        marked::call(
            libc::SYS_clone,
            [
                (libc::CLONE_PIDFD | libc::SIGCHLD).cast_unsigned().into(),
                0,
                &raw mut pidfd as u64,
                0,
                0,
            ],
        )
    };
    forked(r?, pidfd)
}

fn forked(r: libc::c_long, pidfd: i32) -> io::Result<Fork> {
    match r {
        0 => Ok(Fork::Child),
        pid if pid > 0 => {
            // SAFETY: the kernel stored a new descriptor that nobody else owns.
            Ok(Fork::Parent(pid as u32, unsafe {
                OwnedFd::from_raw_fd(pidfd)
            }))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends this process at once: no destructors, no exit handlers of the parent's
/// copied state (\_exit(2)).
pub fn exit_now(code: i32) -> ! {
    // SAFETY: never returns; the kernel cleans up.
    unsafe { libc::_exit(code) }
}

/// This process' pid in its own pid namespace.
pub fn own_pid() -> u32 {
    rustix::process::getpid().as_raw_nonzero().get() as u32
}

/// A pidfd of process `pid` (pidfd_open(2)).
pub fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    Ok(rustix::process::pidfd_open(
        pid,
        rustix::process::PidfdFlags::empty(),
    )?)
}

/// Signals the process behind `pidfd`.
pub fn signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo means the defaults of kill(2).
    let r = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<u8>(),
            0u32,
        )
    };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The pid of the process behind `pidfd` in *our* pid namespace, as the kernel
/// says it (`Pid:` of fdinfo): the way to learn a pid from an untrusted sender.
pub fn pid_of(pidfd: impl AsFd) -> io::Result<u32> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_fd().as_raw_fd());
    let text = std::fs::read_to_string(path)?;
    text.lines()
        .find_map(|l| l.strip_prefix("Pid:"))
        .and_then(|v| v.trim().parse::<u32>().ok())
        .filter(|pid| *pid > 0)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "not a pidfd of a living process"))
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Its pid.
    pub pid: u32,
    /// Exit code, or 128 + signal.
    pub status: u32,
}

/// Reaps one ended child; `None` when none has ended (or there are none).
pub fn reap_any() -> io::Result<Option<Ended>> {
    reap(libc::P_ALL, 0, libc::WNOHANG)
}

/// Waits for the child behind `pidfd`.
pub fn wait(pidfd: impl AsFd) -> io::Result<Ended> {
    loop {
        match reap(libc::P_PIDFD, pidfd.as_fd().as_raw_fd() as u32, 0) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(Some(ended)) => return Ok(ended),
            Ok(None) => return Err(io::Error::from_raw_os_error(libc::ECHILD)),
            Err(e) => return Err(e),
        }
    }
}

/// As [`wait`], without waiting: `None` while the child runs, or when it isn't
/// ours to reap (any more).
pub fn try_wait(pidfd: impl AsFd) -> io::Result<Option<Ended>> {
    reap(
        libc::P_PIDFD,
        pidfd.as_fd().as_raw_fd() as u32,
        libc::WNOHANG,
    )
}

fn reap(which: libc::idtype_t, id: u32, flags: i32) -> io::Result<Option<Ended>> {
    // SAFETY: an all-zero siginfo is valid, and says "nothing reaped" (si_pid 0).
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let arguments = [
        which.into(),
        id.into(),
        &raw mut info as u64,
        (libc::WEXITED | flags).cast_unsigned().into(),
        0,
    ];
    // SAFETY: the kernel writes one siginfo to the live local.
    match unsafe { marked::call(libc::SYS_waitid, arguments) } {
        Err(e) if e.raw_os_error() == Some(libc::ECHILD) => return Ok(None),
        other => other?,
    };
    // SAFETY: for a SIGCHLD siginfo (or a zeroed one) these members are set.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let status = if info.si_code == libc::CLD_EXITED {
        status
    } else {
        128 + status
    };
    Ok(Some(Ended {
        pid: pid as u32,
        status: status as u32,
    }))
}

/// Blocks SIGCHLD and returns a descriptor that becomes readable with it.
pub fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sigset is then initialised by sigemptyset; both live
    // on this stack; signalfd copies the mask.
    let fd = unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut mask);
        libc::sigaddset(&raw mut mask, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const mask, std::ptr::null_mut());
        libc::signalfd(-1, &raw const mask, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor from the kernel.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Default dispositions for all signals and an empty mask: what a workload
/// expects to inherit.
pub fn reset_signals() {
    /// `struct sigaction` of the system call: handler, flags, restorer, mask.
    /// All zero is SIG_DFL. glibc's own wrapper refuses signals 32 and 33.
    static DEFAULT: [u64; 4] = [0; 4];
    for signal in 1..=64 {
        // SAFETY: the struct is static and only read; a default disposition is
        // always valid; the two errors (SIGKILL, SIGSTOP) are harmless.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                std::ptr::null_mut::<u8>(),
                8usize,
            )
        };
    }
    // SAFETY: the set lives on this stack and is initialised before use.
    unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut mask);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut());
    }
}

/// Ignores SIGCHLD: the kernel then reaps children by itself, adopted ones too
/// (waitpid(2), "Linux notes").
pub fn ignore_children() -> io::Result<()> {
    // SAFETY: SIG_IGN is a valid disposition and no handler is replaced that
    // anything here counts on.
    if unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A resource limit of process `pid` (0: this one), prlimit(2).
pub fn set_limit(pid: u32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let new = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    let arguments = [pid.into(), resource.into(), &raw const new as u64, 0, 0];
    // SAFETY: the struct lives through the call; no old value is asked for.
    unsafe { marked::call(libc::SYS_prlimit64, arguments) }.map(drop)
}

/// A resource limit of this process: soft and hard value.
pub fn get_limit(resource: u32) -> io::Result<(u64, u64)> {
    let mut old = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel writes one rlimit64 to the live local.
    let r = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            std::ptr::null::<u8>(),
            &raw mut old,
        )
    };
    if r == 0 {
        Ok((old.rlim_cur, old.rlim_max))
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Ask for `signal` when the parent thread dies (`PR_SET_PDEATHSIG`).
pub fn set_parent_death_signal(signal: i32) -> io::Result<()> {
    // SAFETY: integers only.
    let r = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong, 0, 0, 0) };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Adopts orphaned descendants (`PR_SET_CHILD_SUBREAPER`).
pub fn become_subreaper() -> io::Result<()> {
    // SAFETY: integers only.
    let r = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

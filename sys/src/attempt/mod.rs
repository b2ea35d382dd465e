//! System calls made to see whether a filter refuses them. Each has fixed
//! arguments with which it does nothing if it is let through, or nothing that
//! outlives a process made for it (the addresses are all null).

pub mod forkers;
mod raw;

use std::io;

pub use raw::{Arg, raw};

/// Name, number, arguments.
type Call = (&'static str, libc::c_long, [usize; 5]);

/// Bits above the 32 that the kernel looks at in an int argument.
const HIGH: usize = 1 << 32;
const TIOCSTI: usize = 0x5412;
const ANY_FD: usize = usize::MAX;
const X32: libc::c_long = 0x4000_0000;

const CALLS: &[Call] = &[
    // KEYCTL_GET_KEYRING_ID of the session's.
    ("keyctl", libc::SYS_keyctl, [0, -3isize as usize, 0, 0, 0]),
    ("add_key", libc::SYS_add_key, [0, 0, 0, 0, 0]),
    ("request_key", libc::SYS_request_key, [0, 0, 0, 0, 0]),
    ("bpf", libc::SYS_bpf, [9999, 0, 0, 0, 0]),
    ("perf_event_open", libc::SYS_perf_event_open, [0; 5]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [0; 5]),
    (
        "io_uring_enter",
        libc::SYS_io_uring_enter,
        [ANY_FD, 0, 0, 0, 0],
    ),
    (
        "io_uring_register",
        libc::SYS_io_uring_register,
        [ANY_FD, 0, 0, 0, 0],
    ),
    // PTRACE_DETACH of nobody.
    ("ptrace", libc::SYS_ptrace, [17, 0, 0, 0, 0]),
    ("process_vm_readv", libc::SYS_process_vm_readv, [0; 5]),
    ("process_vm_writev", libc::SYS_process_vm_writev, [0; 5]),
    // UFFD_USER_MODE_ONLY.
    ("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0, 0, 0]),
    (
        "unshare",
        libc::SYS_unshare,
        [libc::CLONE_NEWUSER as usize, 0, 0, 0, 0],
    ),
    (
        "unshare-mount",
        libc::SYS_unshare,
        [libc::CLONE_NEWNS as usize, 0, 0, 0, 0],
    ),
    (
        "clone-user",
        libc::SYS_clone,
        [
            libc::CLONE_NEWUSER as usize | libc::SIGCHLD as usize,
            0,
            0,
            0,
            0,
        ],
    ),
    (
        "clone-pid",
        libc::SYS_clone,
        [
            libc::CLONE_NEWPID as usize | libc::SIGCHLD as usize,
            0,
            0,
            0,
            0,
        ],
    ),
    ("clone3", libc::SYS_clone3, [0; 5]),
    ("setns", libc::SYS_setns, [ANY_FD, 0, 0, 0, 0]),
    ("mount", libc::SYS_mount, [0; 5]),
    ("umount2", libc::SYS_umount2, [0; 5]),
    ("pivot_root", libc::SYS_pivot_root, [0; 5]),
    ("open_tree", libc::SYS_open_tree, [ANY_FD, 0, 0, 0, 0]),
    (
        "move_mount",
        libc::SYS_move_mount,
        [ANY_FD, 0, ANY_FD, 0, 0],
    ),
    ("fsopen", libc::SYS_fsopen, [0; 5]),
    ("fsmount", libc::SYS_fsmount, [ANY_FD, 0, 0, 0, 0]),
    (
        "mount_setattr",
        libc::SYS_mount_setattr,
        [ANY_FD, 0, 0, 0, 0],
    ),
    (
        "open_by_handle_at",
        libc::SYS_open_by_handle_at,
        [ANY_FD, 0, 0, 0, 0],
    ),
    (
        "fanotify_init",
        libc::SYS_fanotify_init,
        [usize::MAX, 0, 0, 0, 0],
    ),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, [ANY_FD, 0, 0, 0, 0]),
    ("init_module", libc::SYS_init_module, [0; 5]),
    ("kexec_load", libc::SYS_kexec_load, [0, 0, 0, 1, 0]),
    ("swapon", libc::SYS_swapon, [0; 5]),
    ("quotactl", libc::SYS_quotactl, [0, 0, 0, 0, 0]),
    ("mknod-device", libc::SYS_mknod, [0, 0x2000, 0, 0, 0]),
    ("ioctl-sti", libc::SYS_ioctl, [0, TIOCSTI, 0, 0, 0]),
    (
        "ioctl-sti-high",
        libc::SYS_ioctl,
        [0, HIGH | TIOCSTI, 0, 0, 0],
    ),
    (
        "socket-vsock",
        libc::SYS_socket,
        [libc::AF_VSOCK as usize, 1, 0, 0, 0],
    ),
    (
        "socket-packet",
        libc::SYS_socket,
        [libc::AF_PACKET as usize, 3, 0, 0, 0],
    ),
    (
        "socket-alg",
        libc::SYS_socket,
        [libc::AF_ALG as usize, 5, 0, 0, 0],
    ),
    (
        "socket-alg-high",
        libc::SYS_socket,
        [HIGH | libc::AF_ALG as usize, 5, 0, 0, 0],
    ),
    // NETLINK_NETFILTER.
    (
        "socket-netfilter",
        libc::SYS_socket,
        [libc::AF_NETLINK as usize, 3, 12, 0, 0],
    ),
    ("x32-getpid", libc::SYS_getpid | X32, [0; 5]),
];

/// The names that [`call`] knows.
pub fn names() -> impl Iterator<Item = &'static str> {
    CALLS.iter().map(|(name, ..)| *name)
}

/// Makes the call of that name. To be called in a process forked for it: some
/// change the process, and `clone-…` return in two processes if let through.
pub fn call(name: &str) -> io::Result<()> {
    let Some((_, number, a)) = CALLS.iter().find(|(known, ..)| *known == name) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: every pointer argument of the table is null, so no memory of ours
    // is read or written; `clone` without CLONE_VM and with a null stack is fork(2).
    let r = unsafe { libc::syscall(*number, a[0], a[1], a[2], a[3], a[4], 0usize) };
    if r >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Calls that end, double or redirect the process that makes them, whatever their
/// arguments are: rt_sigreturn, clone, fork, vfork, exit, exit_group, clone3.
const OF_THE_PROCESS: [libc::c_long; 7] = [15, 56, 57, 58, 60, 231, 435];

/// Makes the call of that number, for numbers that are refused. The integers are no
/// addresses of this process.
pub fn number(number: libc::c_long, integers: [usize; 3]) -> io::Result<()> {
    const SMALL: usize = 1 << 16;
    if OF_THE_PROCESS.contains(&number) || integers.iter().any(|n| *n >= SMALL) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let [a, b, c] = integers;
    // SAFETY: as addresses, the arguments are null or in the pages at the bottom,
    // where nothing is mapped: the kernel neither reads nor writes memory of ours. Nor
    // does a call that isn't in the list above return elsewhere, or twice.
    let r = unsafe { libc::syscall(number, a, b, c, 0usize, 0usize, 0usize) };
    if r >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// getpid(2) by the gate of 32-bit programs, `int 0x80`.
#[cfg(target_arch = "x86_64")]
pub fn legacy_gate() -> i64 {
    let mut result: i64 = 20;
    // SAFETY: call 20 of that table is getpid, which takes no argument and
    // touches no memory; the registers that the gate may clear are declared.
    unsafe {
        core::arch::asm!(
            "int 0x80",
            inout("rax") result,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    result
}

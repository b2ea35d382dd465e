//! The calls that a container's forker makes with a mark (`crate::marked`), made by
//! somebody else.

use std::io;

/// Name, number, and arguments of which none is an address but null and the first
/// page's: let through, they do little or nothing.
const CALLS: [(&str, libc::c_long, [u64; 3]); 43] = [
    ("faccessat", libc::SYS_faccessat, [0, 0, 0]),
    ("fcntl", libc::SYS_fcntl, [0, 1030, 0]),
    ("dup2", libc::SYS_dup2, [0, 0, 0]),
    ("close_range", libc::SYS_close_range, [900, 901, 0]),
    ("getcwd", libc::SYS_getcwd, [0, 0, 0]),
    ("chdir", libc::SYS_chdir, [0, 0, 0]),
    ("umask", libc::SYS_umask, [0o22, 0, 0]),
    ("ppoll", libc::SYS_ppoll, [0, 1, 0]),
    ("recvmsg", libc::SYS_recvmsg, [0, 0, 0]),
    ("sendmsg", libc::SYS_sendmsg, [0, 0, 0]),
    ("socketpair", libc::SYS_socketpair, [1, 0x8_0005, 0]),
    // There is no place for the descriptor, so it makes no process.
    ("clone", libc::SYS_clone, [0x1011, 0, 0]),
    ("waitid", libc::SYS_waitid, [0, 0, 0]),
    ("prctl", libc::SYS_prctl, [8, 0, 0]),
    ("prctl", libc::SYS_prctl, [24, 0, 0]),
    ("prctl", libc::SYS_prctl, [38, 0, 0]),
    ("prctl", libc::SYS_prctl, [47, 0, 0]),
    ("ioctl", libc::SYS_ioctl, [0, 0x540e, 0]),
    ("ioctl", libc::SYS_ioctl, [0, 0x5414, 0]),
    ("ioctl", libc::SYS_ioctl, [0, 0x4004_5431, 0]),
    ("ioctl", libc::SYS_ioctl, [0, 0x5441, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 0, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 1, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 2, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 3, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 5, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 6, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 7, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 8, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 9, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 10, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 11, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 12, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 13, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 14, 0]),
    ("prlimit64", libc::SYS_prlimit64, [0, 15, 0]),
    ("setsid", libc::SYS_setsid, [0, 0, 0]),
    ("setgroups", libc::SYS_setgroups, [0, 0, 0]),
    ("setresuid", libc::SYS_setresuid, [0, 0, 0]),
    ("setresgid", libc::SYS_setresgid, [0, 0, 0]),
    ("capset", libc::SYS_capset, [0, 0, 0]),
    ("seccomp", libc::SYS_seccomp, [1, 0, 0]),
    // Not one of them: of its kind, which is looked at by its arguments.
    ("prctl", libc::SYS_prctl, [22, 0, 0]),
];

/// How many there are.
pub const COUNT: usize = CALLS.len();

/// The one in this place: its name and arguments.
pub fn of(place: usize) -> Option<(&'static str, [u64; 3])> {
    CALLS
        .get(place)
        .map(|(name, _, arguments)| (*name, *arguments))
}

/// Makes it, with this in the sixth register.
pub fn make(place: usize, mark: u64) -> io::Result<()> {
    let Some((_, number, [a, b, c])) = CALLS.get(place) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: as addresses, all arguments are null or in the first page, where nothing
    // is mapped: the kernel neither reads nor writes memory of ours. The descriptors
    // that are changed are copies, or none.
    let r = unsafe { libc::syscall(*number, *a, *b, *c, 0u64, 0u64, mark) };
    if r >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

//! Calls with a mark in the sixth register, which none of them has: the kernel doesn't
//! read it then, but filters see it. A container's filter lets its forker make some
//! calls by that which the workload may not; a last filter takes them back before
//! anything is executed (`seccomp_profiles::marked`). Everywhere else the mark means
//! nothing.
//!
//! Here are those that `rustix` would make without the mark, and what the other modules
//! make theirs with.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What is in the register. (`seccomp_profiles::marked` has it too.)
pub const MARK: u64 = 0x9c5e_a117_d3b8_42f6;

/// A system call with the mark; what it returns.
///
/// # Safety
///
/// As for the call itself: `arguments` must be what it takes, and it takes five at most.
pub(crate) unsafe fn call(number: libc::c_long, arguments: [u64; 5]) -> io::Result<libc::c_long> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the caller's promise. A sixth argument is read by no call of five.
    let r = unsafe { libc::syscall(number, a, b, c, d, e, MARK) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(r)
}

/// A descriptor as an argument.
pub(crate) fn number(fd: impl AsFd) -> u64 {
    u64::from(fd.as_fd().as_raw_fd().cast_unsigned())
}

/// What a call returned, as a descriptor.
///
/// # Safety
///
/// The call makes a new one, which nobody else owns.
unsafe fn made(r: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(r).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn path(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// A copy with a number from `lowest` on, close-on-exec (fcntl(2), F_DUPFD_CLOEXEC).
pub fn copy_from(fd: impl AsFd, lowest: u32) -> io::Result<OwnedFd> {
    let command = libc::F_DUPFD_CLOEXEC.cast_unsigned().into();
    // SAFETY: integers only; the copy is new.
    unsafe {
        made(call(
            libc::SYS_fcntl,
            [number(fd), command, lowest.into(), 0, 0],
        )?)
    }
}

/// A copy, close-on-exec and no standard stream.
pub fn copy(fd: impl AsFd) -> io::Result<OwnedFd> {
    copy_from(fd, 3)
}

/// A session of its own (setsid(2)).
pub fn start_session() -> io::Result<()> {
    // SAFETY: no arguments.
    unsafe { call(libc::SYS_setsid, [0; 5]) }.map(drop)
}

/// The mask for modes of new files (umask(2)).
pub fn set_umask(mask: u32) {
    // SAFETY: an integer; it can't fail.
    let _never_fails = unsafe { call(libc::SYS_umask, [mask.into(), 0, 0, 0, 0]) };
}

/// Changes the working directory (chdir(2)).
pub fn change_directory(to: &str) -> io::Result<()> {
    let to = path(to)?;
    // SAFETY: a NUL-terminated string that outlives the call.
    unsafe { call(libc::SYS_chdir, [to.as_ptr() as u64, 0, 0, 0, 0]) }.map(drop)
}

/// The working directory as the kernel shows it (getcwd(2)).
pub fn current_directory() -> io::Result<Vec<u8>> {
    let mut buffer = [0u8; libc::PATH_MAX as usize];
    let arguments = [buffer.as_mut_ptr() as u64, buffer.len() as u64, 0, 0, 0];
    // SAFETY: the kernel writes at most as many bytes as there are to the live buffer.
    unsafe { call(libc::SYS_getcwd, arguments) }?;
    let text = CStr::from_bytes_until_nul(&buffer);
    Ok(text
        .map(|text| text.to_bytes().to_vec())
        .unwrap_or_default())
}

/// Whether the real user may execute the file (faccessat(2)).
pub fn may_execute(file: &str) -> io::Result<()> {
    let file = path(file)?;
    let here = i64::from(libc::AT_FDCWD).cast_unsigned();
    let mode = libc::X_OK.cast_unsigned().into();
    // SAFETY: a NUL-terminated string that outlives the call.
    unsafe {
        call(
            libc::SYS_faccessat,
            [here, file.as_ptr() as u64, mode, 0, 0],
        )
    }
    .map(drop)
}

/// Waits until one of these can be read or has come to its end; which (ppoll(2)). A
/// signal ends the wait, too.
pub fn wait_readable<const N: usize>(fds: [BorrowedFd<'_>; N]) -> io::Result<[bool; N]> {
    let mut all = fds.map(|fd| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    let arguments = [all.as_mut_ptr() as u64, N as u64, 0, 0, 0];
    // SAFETY: the kernel writes to the N structs of the live array; there is neither a
    // time limit nor a mask.
    match unsafe { call(libc::SYS_ppoll, arguments) } {
        Err(e) if e.kind() != io::ErrorKind::Interrupted => Err(e),
        _ => Ok(all.map(|fd| fd.revents != 0)),
    }
}

/// ioctl(2) with an integer, or a pointer, for the third argument.
///
/// # Safety
///
/// `argument` must be what `request` takes.
unsafe fn ioctl(fd: impl AsFd, request: libc::Ioctl, argument: u64) -> io::Result<libc::c_long> {
    // SAFETY: the caller's promise.
    unsafe { call(libc::SYS_ioctl, [number(fd), request, argument, 0, 0]) }
}

/// Makes `terminal` the controlling terminal of this session (TIOCSCTTY, tty_ioctl(4)).
pub fn set_controlling_terminal(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: takes an integer.
    unsafe { ioctl(terminal, libc::TIOCSCTTY, 0) }.map(drop)
}

/// Lets the other end of a pseudo terminal be opened (TIOCSPTLCK).
pub fn unlock_terminal(master: impl AsFd) -> io::Result<()> {
    let locked: libc::c_int = 0;
    // SAFETY: reads one int, which lives through the call.
    unsafe { ioctl(master, libc::TIOCSPTLCK, &raw const locked as u64) }.map(drop)
}

/// The other end of a pseudo terminal, close-on-exec (TIOCGPTPEER).
pub fn terminal_peer(master: impl AsFd) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: takes flags; the descriptor is new.
    unsafe {
        made(ioctl(
            master,
            libc::TIOCGPTPEER,
            flags.cast_unsigned().into(),
        )?)
    }
}

/// The size of a terminal in characters (TIOCSWINSZ).
pub fn set_terminal_size(terminal: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: reads the struct, which lives through the call.
    unsafe { ioctl(terminal, libc::TIOCSWINSZ, &raw const size as u64) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_no_notice_of_the_mark() {
        let before = current_directory().unwrap();
        assert_eq!(
            before,
            std::env::current_dir()
                .unwrap()
                .as_os_str()
                .as_encoded_bytes()
        );
        may_execute("/bin/sh").unwrap();
        assert_eq!(
            may_execute("/etc/passwd").unwrap_err().raw_os_error(),
            Some(libc::EACCES)
        );
        assert!(change_directory("/no such place").is_err());
        let (ours, theirs) = crate::message::pair().unwrap();
        let high = copy_from(&theirs, 100).unwrap();
        assert!(high.as_raw_fd() >= 100);
        let flags = rustix::io::fcntl_getfd(&high).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        crate::message::send(&high, b"x", &[]).unwrap();
        let (quiet, _kept) = crate::message::pair().unwrap();
        let ready = wait_readable([ours.as_fd(), quiet.as_fd()]).unwrap();
        assert_eq!(ready, [true, false]);
    }

    #[test]
    fn a_terminal_is_opened_and_sized() {
        let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
        let master = rustix::pty::openpt(flags).unwrap();
        unlock_terminal(&master).unwrap();
        let slave = terminal_peer(&master).unwrap();
        set_terminal_size(&slave, 24, 80).unwrap();
        let size = rustix::termios::tcgetwinsize(&master).unwrap();
        assert_eq!((size.ws_row, size.ws_col), (24, 80));
    }
}

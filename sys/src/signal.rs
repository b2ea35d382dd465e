//! Signals by process descriptor.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sends `signal` (any number, real-time ones included) to the process behind
/// `pidfd`; 0 only checks that it can be signalled. See pidfd_send_signal(2).
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed: `info` is null and the kernel fills it in.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0u32,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

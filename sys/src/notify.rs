//! The listener's side of a filter: what calls ask, and what they are answered
//! (seccomp_unotify(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `SECCOMP_IOCTL_NOTIF_RECV`: `_IOWR('!', 0, struct seccomp_notif)`.
const RECEIVE: libc::c_ulong = 0xc050_2100;
/// `SECCOMP_IOCTL_NOTIF_SEND`: `_IOWR('!', 1, struct seccomp_notif_resp)`.
pub(crate) const SEND: libc::c_ulong = 0xc018_2101;
/// `SECCOMP_IOCTL_NOTIF_SET_FLAGS`: `_IOW('!', 4, __u64)`.
const SET_FLAGS: libc::c_ulong = 0x4008_2104;
/// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP`.
const SYNC_WAKE_UP: libc::c_ulong = 1;

/// What a call asks: `struct seccomp_notif`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Question {
    /// Names the question in its answer.
    pub id: u64,
    /// The asking thread, in our pid namespace; 0 where it isn't seen.
    pub pid: u32,
    /// None are defined.
    pub flags: u32,
    /// Number of the call.
    pub nr: u32,
    /// `AUDIT_ARCH_*`.
    pub arch: u32,
    /// Where the call was made.
    pub instruction_pointer: u64,
    /// The six argument registers.
    pub args: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
pub(crate) struct Answer {
    pub id: u64,
    pub value: i64,
    pub error: i32,
    pub flags: u32,
}

/// `argument` is of the type that the request names, and alive for the call.
pub(crate) fn ioctl<T>(
    listener: impl AsFd,
    request: libc::c_ulong,
    argument: *mut T,
) -> io::Result<()> {
    let fd = listener.as_fd().as_raw_fd();
    // SAFETY: the callers below pass a pointer to a value of the type that the
    // request names, alive for the whole call.
    let done = unsafe { libc::ioctl(fd, request, argument) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The next question. For a descriptor that poll(2) has just found readable and
/// that nobody else reads: others may wait. `NotFound`: who asked has gone.
///
/// # Errors
/// What the kernel answers.
pub fn receive(listener: impl AsFd) -> io::Result<Question> {
    // The kernel wants it zeroed.
    let mut question = Question::default();
    ioctl(listener, RECEIVE, &raw mut question)?;
    Ok(question)
}

/// Answers a question with an error; the call doesn't run. There is no function
/// here that lets one run; that of [`crate::observe`] takes no question of these.
///
/// # Errors
/// `NotFound` when who asked has gone; else what the kernel answers.
pub fn refuse(listener: impl AsFd, id: u64, errno: u16) -> io::Result<()> {
    let mut answer = Answer {
        id,
        value: 0,
        error: -i32::from(errno),
        flags: 0,
    };
    ioctl(listener, SEND, &raw mut answer)
}

/// Has asker and listener share a processor while they talk (Linux 6.6).
///
/// # Errors
/// `InvalidInput` on older kernels.
pub fn wake_in_place(listener: impl AsFd) -> io::Result<()> {
    let fd = listener.as_fd().as_raw_fd();
    // SAFETY: this request takes its argument by value.
    let done = unsafe { libc::ioctl(fd, SET_FLAGS, SYNC_WAKE_UP) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_and_we_agree_on_sizes() {
        assert_eq!(size_of::<Question>(), 80);
        assert_eq!(size_of::<Answer>(), 24);
        // The size is part of the request's number (ioctl(2)).
        assert_eq!(RECEIVE >> 16 & 0x3fff, 80);
        assert_eq!(SEND >> 16 & 0x3fff, 24);
    }
}

//! What a pid means: identity by start time, and ending what it names.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

/// Field 22 of `/proc/PID/stat`, in clock ticks since boot (proc_pid_stat(5));
/// `None` when there is no such process or it is a zombie.
pub fn start_time(pid: u32) -> Option<u64> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Host pid of a process's parent: field 4 of `/proc/PID/stat`.
pub fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn parse_stat(stat: &str) -> Option<u64> {
    // The name in parentheses may hold blanks and parentheses of its own.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    // State is field 3.
    fields.nth(22 - 4)?.parse().ok()
}

/// A process that is certainly the one written down.
pub fn open(pid: u32, start: u64) -> Option<OwnedFd> {
    let raw = Pid::from_raw(i32::try_from(pid).ok()?)?;
    let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty()).ok()?;
    // The descriptor first, then the check: afterwards the pid can't be
    // another process's.
    (start_time(pid) == Some(start)).then_some(pidfd)
}

/// SIGKILL, then waits for the end, at most `limit`. True if it has gone.
pub fn kill(pidfd: &OwnedFd, limit: Duration) -> bool {
    match casemate_sys::signal::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => true,
        _ => wait(pidfd, limit),
    }
}

/// Waits for the end of the process, at most `limit`. True if it has ended.
pub fn wait(pidfd: &OwnedFd, limit: Duration) -> bool {
    poll_in(pidfd, limit).unwrap_or(false)
}

/// Waits until the descriptor can be read, at most `limit`.
pub fn poll_in(fd: impl AsFd, limit: Duration) -> io::Result<bool> {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&left)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let tail = (4..=21)
            .map(|n| n.to_string())
            .collect::<Vec<_>>()
            .join(" ");
        let stat = |state: &str| format!("7 (a) (b) {state} {tail} 4711 23");
        assert_eq!(parse_stat(&stat("S")), Some(4711));
        assert_eq!(parse_stat(&stat("Z")), None);
        assert_eq!(parse_stat("7 (a"), None);
    }

    #[test]
    fn we_are_who_we_are_and_nobody_else() {
        let pid = std::process::id();
        let start = start_time(pid).unwrap();
        assert!(open(pid, start).is_some());
        assert!(open(pid, start + 1).is_none());
    }
}

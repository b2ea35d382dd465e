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

/// The exit status of a process that has ended and hasn't been reaped: exit
/// code, or 128 + signal. `None` while it runs, and when it has been reaped.
pub fn ended(pid: u32) -> Option<u32> {
    parse_ended(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_ended(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    if !matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    // The last field, 52, is as wait(2) has it: code in the second byte, or the
    // signal in the first.
    let raw: u32 = fields.nth(52 - 4)?.parse().ok()?;
    match raw & 0x7f {
        0 => Some(raw >> 8 & 0xff),
        signal => Some(128 + signal),
    }
}

/// Whether every thread of a process is on its way out of the kernel, or gone:
/// none will run its own code any more. The first process of a pid namespace
/// stays like that until all others of the namespace have been reaped.
pub fn is_leaving(pid: u32) -> bool {
    const PF_EXITING: u64 = 4;
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    threads.flatten().all(|thread| {
        let flags = std::fs::read_to_string(thread.path().join("stat"))
            .ok()
            .and_then(|stat| {
                let (_, rest) = stat.rsplit_once(')')?;
                // Field 9; what follows the name begins with 3.
                rest.split_ascii_whitespace().nth(9 - 3)?.parse().ok()
            });
        flags.is_none_or(|flags: u64| flags & PF_EXITING != 0)
    })
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
    fn the_status_of_what_has_ended_is_read_from_its_last_field() {
        let tail = |status: &str| {
            let middle = vec!["0"; 51 - 3].join(" ");
            format!("{middle} {status}")
        };
        let stat = |state: &str, status: &str| format!("7 (a) {state} {}", tail(status));
        assert_eq!(parse_ended(&stat("Z", "768")), Some(3));
        assert_eq!(parse_ended(&stat("Z", "9")), Some(137));
        assert_eq!(parse_ended(&stat("Z", "139")), Some(139), "core dumped");
        assert_eq!(parse_ended(&stat("S", "0")), None);
        assert_eq!(parse_ended("7 (a) Z"), None);
    }

    #[test]
    fn only_what_is_gone_is_leaving() {
        assert!(!is_leaving(std::process::id()));
        assert!(is_leaving(0));
    }

    #[test]
    fn we_are_who_we_are_and_nobody_else() {
        let pid = std::process::id();
        let start = start_time(pid).unwrap();
        assert!(open(pid, start).is_some());
        assert!(open(pid, start + 1).is_none());
    }
}

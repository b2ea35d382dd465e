//! Kills a program after a certain one of its effects on files, with ptrace(2).

use std::process::{Command, Stdio};
use std::time::Duration;

use casemate_tests::run::until;
use casemate_tests::{Failure, procs};
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Calls of x86-64 that change a file system; of openat, those that make a file.
const EFFECTS: [(i64, &str); 13] = [
    (libc::SYS_mkdir, "mkdir"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_rmdir, "rmdir"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_symlink, "symlink"),
    (libc::SYS_symlinkat, "symlinkat"),
    (libc::SYS_link, "link"),
    (libc::SYS_linkat, "linkat"),
    (libc::SYS_rename, "rename"),
    (libc::SYS_renameat, "renameat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_openat, "openat, making a file"),
];

/// Runs `command` until `number` effects are made, and kills it; the last one's
/// name, or `None` if it came to its end before.
pub fn killed_after(
    command: &Command,
    number: usize,
) -> casemate_tests::Result<Option<&'static str>> {
    let wrong = |what: &str| Failure::Unexpected(format!("ptrace: {what}"));
    let mut stopped = Command::new("/bin/sh");
    // Stopped until it is traced.
    stopped
        .args(["-c", "kill -STOP $$; exec \"$@\"", "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = stopped.spawn().map_err(|source| Failure::Spawn {
        program: "sh".to_owned(),
        source,
    })?;
    let is_stopped =
        || procs::status_field(child.id(), "State").is_some_and(|s| s.starts_with('T'));
    until("a shell to stop", Duration::from_secs(10), is_stopped)?;
    let pid = Pid::from_raw(child.id().cast_signed());
    ptrace::seize(
        pid,
        Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL,
    )
    .map_err(|e| wrong(&e.to_string()))?;
    kill(pid, Signal::SIGCONT).map_err(|e| wrong(&e.to_string()))?;
    let mut inside = None;
    let mut seen = 0;
    loop {
        let signal = match waitpid(pid, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => return Ok(None),
            Ok(WaitStatus::PtraceSyscall(_)) => {
                let now = ptrace::getregs(pid).map_err(|e| wrong(&e.to_string()))?;
                match inside.take() {
                    None => inside = Some((now.orig_rax.cast_signed(), now.rdx)),
                    Some((call, flags)) if now.rax.cast_signed() >= 0 => {
                        let makes = call != libc::SYS_openat
                            || flags & u64::from(libc::O_CREAT.cast_unsigned()) != 0;
                        let effect = EFFECTS.iter().find(|(known, _)| *known == call);
                        if let Some((_, name)) = effect.filter(|_| makes) {
                            seen += 1;
                            if seen == number {
                                let _ = kill(pid, Signal::SIGKILL);
                                let _ = waitpid(pid, Some(WaitPidFlag::__WALL));
                                return Ok(Some(name));
                            }
                        }
                    }
                    Some(_) => {}
                }
                None
            }
            Ok(WaitStatus::Stopped(_, signal)) => Some(signal),
            Ok(_) => None,
            Err(error) => return Err(wrong(&error.to_string())),
        };
        // An error: it is gone, and the next wait says so.
        let _ = ptrace::syscall(pid, signal);
    }
}

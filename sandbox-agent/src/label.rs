//! Labels of security modules, which a process takes on with its execve
//! (proc_pid_attr(5)).

use std::io;

use casemate_protocol::plan::ProcessPlan;
use rustix::fs::{CWD, Mode, OFlags, PROC_SUPER_MAGIC};

use crate::error::{At, StepError};

/// In the child: sets what its execve is to change to. The kernel then refuses
/// that execve, rather than do it without.
pub fn set(plan: &ProcessPlan) -> Result<(), StepError> {
    if !plan.apparmor.is_empty() {
        // The second file is AppArmor's only where no other module has it.
        let files = ["self/attr/apparmor/exec", "self/attr/exec"];
        write(&files, &format!("exec {}", plan.apparmor))
            .at("apply process.apparmorProfile", &plan.apparmor)
            .map_err(StepError::blame_request)?;
    }
    if !plan.selinux.is_empty() {
        write(&["self/attr/exec"], &plan.selinux)
            .at("apply process.selinuxLabel", &plan.selinux)
            .map_err(StepError::blame_request)?;
    }
    Ok(())
}

/// Writes to the first of `files` that there is. What is written must reach the
/// kernel, and not a file that somebody has mounted there. (Of a proc, nobody
/// else's file can be written: the kernel refuses it. Nobody in the container can
/// mount, so that the name leads to one file; and strict has no fstatfs(2).)
fn write(files: &[&str], text: &str) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let proc = rustix::fs::openat(CWD, "/proc", flags, Mode::empty())?;
    let mut missing = io::ErrorKind::NotFound.into();
    for name in files {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&proc, *name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(rustix::io::Errno::NOENT) => {
                missing = io::Error::other("the container has no proc at /proc");
                continue;
            }
            Err(e) => return Err(e.into()),
        };
        if rustix::fs::statfs(format!("/proc/{name}"))?.f_type != PROC_SUPER_MAGIC {
            return Err(io::Error::other(
                "the container's /proc/self/attr is no proc",
            ));
        }
        return match rustix::io::write(&file, text.as_bytes())? {
            n if n == text.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        };
    }
    Err(missing)
}

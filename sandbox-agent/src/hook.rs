//! Hooks that run where a container is assembled, before its root is changed:
//! programs of the node, which come as descriptors.
//!
//! The first child of an unshared pid namespace is its init, and that is not to
//! be a hook. So whoever runs hooks is forked before, beside the assembling
//! process in its mount namespace, and waits. Each hook has a pid namespace of
//! its own, so that nothing it starts outlives it, and is locked as the
//! container's processes are.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use casemate_protocol::plan::{HookPlan, LaunchPlan};
use casemate_sys::namespace::kind;
use casemate_sys::process::{self, Fork};
use casemate_sys::{exec, marked, message, seccomp};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::confine::{NEW_ROOT, Who};
use crate::error::{At, StepError};
use crate::launch;
use crate::spawn;

/// The process that runs hooks.
pub struct Runner {
    pidfd: OwnedFd,
    socket: OwnedFd,
}

impl Runner {
    /// Forks it. It ends when this value is dropped.
    pub fn fork(plan: &LaunchPlan, namespace_b: &OwnedFd) -> Result<Runner, StepError> {
        let (ours, theirs) = message::pair().at("make", "socket pair")?;
        match process::fork().map_err(spawn::exhausted)? {
            Fork::Child => {
                // The channel to the shim above all is not for hooks.
                let done = exec::close_all_except(&[theirs.as_fd(), namespace_b.as_fd()])
                    .at("close", "inherited descriptors")
                    .and_then(|()| serve(plan, namespace_b, &theirs));
                if let Err(error) = done {
                    spawn::report(&theirs, &error);
                }
                process::exit_now(0)
            }
            Fork::Parent(_, pidfd) => Ok(Runner {
                pidfd,
                socket: ours,
            }),
        }
    }

    /// Runs all hooks of the plan. `fds`: /dev/null, then program and standard
    /// input of each.
    pub fn run(self, fds: &[OwnedFd]) -> Result<(), StepError> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        message::send(&self.socket, b"R", &fds).at("run", "hooks")?;
        let said = spawn::told(&self.socket)
            .and_then(|said| said.ok_or_else(|| failed("hooks", "who runs them has died")));
        drop(self.socket);
        let _ = process::wait(&self.pidfd);
        said.map(drop)
    }
}

fn failed(name: &str, reason: &str) -> StepError {
    StepError {
        invalid: false,
        ..StepError::invalid("run", name, reason)
    }
}

fn serve(plan: &LaunchPlan, namespace_b: &OwnedFd, socket: &OwnedFd) -> Result<(), StepError> {
    let mut buffer = [0u8; 4];
    let Some((_, mut fds)) = message::receive(socket, &mut buffer, true).at("wait for", "hooks")?
    else {
        return Ok(());
    };
    if fds.len() != 1 + 2 * plan.hooks.len() {
        return Err(failed("hooks", "not two descriptors for each"));
    }
    let null = fds.remove(0);
    let mut fds = fds.into_iter();
    for hook in &plan.hooks {
        let (Some(program), Some(stdin)) = (fds.next(), fds.next()) else {
            return Err(failed(&hook.name, "no program"));
        };
        let file = |fd: &OwnedFd| fd.try_clone().at("copy", "/dev/null");
        let files = vec![stdin, file(&null)?, file(&null)?];
        run_one(plan, hook, namespace_b, &program, files)?;
    }
    spawn::prepared(socket, &[])
}

fn run_one(
    plan: &LaunchPlan,
    hook: &HookPlan,
    namespace_b: &OwnedFd,
    program: &OwnedFd,
    files: Vec<OwnedFd>,
) -> Result<(), StepError> {
    let (ours, theirs) = message::pair().at("make", "socket pair")?;
    let pidfd = match process::fork_into(kind::PID, None).map_err(spawn::exhausted)? {
        Fork::Child => {
            drop(ours);
            let Err(error) = become_hook(plan, hook, namespace_b, program, files);
            spawn::report(&theirs, &error);
            process::exit_now(127)
        }
        Fork::Parent(_, pidfd) => pidfd,
    };
    drop((theirs, files));
    // The end of the stream is a hook that executes.
    if let Err(error) = spawn::told(&ours) {
        let _ = process::wait(&pidfd);
        return Err(error);
    }
    let mut watched = [PollFd::new(&pidfd, PollFlags::IN)];
    let patience = Timespec {
        tv_sec: hook.timeout.into(),
        tv_nsec: 0,
    };
    let ended = rustix::io::retry_on_intr(|| poll(&mut watched, Some(&patience)))
        .at("wait for", &hook.name)?;
    if ended == 0 {
        // Its pid namespace goes with it.
        let _ = process::signal(&pidfd, 9);
    }
    let status = process::wait(&pidfd).at("wait for", &hook.name)?.status;
    match (ended, status) {
        (0, _) => Err(failed(
            &hook.name,
            &format!("not done within {} s and killed", hook.timeout),
        )),
        (_, 0) => Ok(()),
        (_, status) => Err(failed(&hook.name, &format!("exit status {status}"))),
    }
}

fn become_hook(
    plan: &LaunchPlan,
    hook: &HookPlan,
    namespace_b: &OwnedFd,
    program: &OwnedFd,
    files: Vec<OwnedFd>,
) -> Result<std::convert::Infallible, StepError> {
    process::reset_signals();
    rustix::process::setsid().at("start", "session")?;
    rustix::process::chdir(NEW_ROOT).at("change to", "the container's root")?;
    let strings = |list: &[String]| -> Result<Vec<CString>, StepError> {
        let each = list.iter().map(|text| CString::new(text.as_str()));
        each.collect::<Result<_, _>>()
            .map_err(|_| failed(&hook.name, "a NUL byte inside"))
    };
    let (args, env) = (strings(&hook.args)?, strings(&hook.env)?);
    launch::enter_locked(plan, namespace_b, &Who::Hook(program))?;
    let program = marked::copy_from(program, 16).at("copy", "program")?;
    exec::install_descriptors(files).at("install", "descriptors")?;
    if !plan.closes.is_empty() {
        seccomp::install_filter(&plan.closes, 0).at("install filter", "last")?;
    }
    let error = exec::exec_fd(&program, &args, &env);
    Err(match error.kind() {
        // Of a program that is there it is the loader, or the interpreter.
        io::ErrorKind::NotFound => failed(
            &hook.name,
            "nothing of the node is in the container's mount namespace: it must be a static program",
        ),
        _ => failed(&hook.name, &error.to_string()),
    })
}

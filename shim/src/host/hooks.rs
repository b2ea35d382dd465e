//! OCI hooks that run in the host's namespaces: programs of the node, as its
//! root, without the locks that the shim has taken.
//!
//! The shim can't lend what it has given up, and must not wait for a program.
//! So where the configuration allows hooks at all, a runner is forked before the
//! shim locks itself. It runs what the configuration allows and nothing else, by
//! its own copy of the list, each hook from a fork of its own, and ends, with
//! all hooks under way, when the shim does.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_protocol::{Channel, clip, read_plan, seal_plan};
use casemate_spec::HookSpec;
use casemate_spec::config::Hooks;
use casemate_sys::process::{self, Fork};
use casemate_sys::{exec, ident, message, schedule};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;

use super::Step;
use crate::error::one_line;
use crate::sandbox::SandboxError;

/// What the runner may take longer than the hook itself.
const GRACE: Duration = Duration::from_secs(5);
/// How much of what a failed hook says is told on, in bytes.
const SAID: usize = 400;
const KILL: i32 = 9;

/// What to run.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    path: String,
    args: Vec<String>,
    env: Vec<String>,
    cwd: String,
    timeout: u32,
}

impl Order {
    fn new(hook: &HookSpec, cwd: &Path) -> Order {
        Order {
            path: hook.path.clone(),
            args: hook.args.clone(),
            env: hook.env.clone(),
            cwd: cwd.to_string_lossy().into_owned(),
            timeout: hook.timeout,
        }
    }
}

/// The shim's end of the runner.
pub struct Runner {
    channel: Channel,
}

impl Runner {
    /// Forks it, unless no hook is allowed. To be called while the shim has all
    /// its capabilities.
    pub fn start(policy: &Hooks) -> Result<Option<Runner>, SandboxError> {
        if policy.allow.is_empty() {
            return Ok(None);
        }
        let (ours, theirs) = message::pair().step("make", "socket pair")?;
        match process::fork_into(0, None).step("fork", "the runner of hooks")? {
            Fork::Child => {
                serve(policy, theirs);
                process::exit_now(0)
            }
            Fork::Parent(..) => Ok(Some(Runner {
                channel: Channel::new(ours),
            })),
        }
    }

    /// Runs one hook with `state` on its standard input. Waits without blocking.
    pub async fn run(&self, hook: &HookSpec, state: &[u8], cwd: &Path) -> Result<(), SandboxError> {
        let object = format!("{} ({})", hook.field, hook.path);
        let order = seal_plan(&Order::new(hook, cwd))
            .map_err(|e| SandboxError::Invalid(format!("run {object}: {e}")))?;
        let input = input(state)?;
        let (ours, theirs) = message::pair().step("make", "socket pair")?;
        self.channel
            .send(&(), &[order.as_fd(), input.as_fd(), theirs.as_fd()])
            .map_err(|e| SandboxError::Unavailable(format!("run {object}: {e}")))?;
        drop(theirs);
        let ours = crate::io::watch(Channel::new(ours), Interest::READABLE)
            .step("watch", "the runner of hooks")?;
        let answer = async {
            loop {
                let mut guard = ours.readable().await.step("wait for", &object)?;
                match ours.get_ref().receive::<Option<String>>(false) {
                    Ok(Some((None, _))) => return Ok(()),
                    Ok(Some((Some(text), _))) => {
                        return Err(SandboxError::Failed(format!("run {object}: {text}")));
                    }
                    Ok(None) => {
                        return Err(SandboxError::Unavailable(format!(
                            "run {object}: the runner of hooks is gone"
                        )));
                    }
                    Err(casemate_protocol::TransportError::Io(e))
                        if e.kind() == std::io::ErrorKind::WouldBlock =>
                    {
                        guard.clear_ready();
                    }
                    Err(e) => return Err(SandboxError::Unavailable(format!("run {object}: {e}"))),
                }
            }
        };
        let patience = Duration::from_secs(hook.timeout.into()) + GRACE;
        tokio::time::timeout(patience, answer)
            .await
            .unwrap_or_else(|_| {
                Err(SandboxError::Unavailable(format!(
                    "run {object}: no word within {} s",
                    patience.as_secs()
                )))
            })
    }
}

/// Runs a hook from a process that is its own runner, and waits.
pub fn run_here(policy: &Hooks, hook: &HookSpec, state: &[u8], cwd: &Path) -> Result<(), String> {
    let input = input(state).map_err(|e| e.to_string())?;
    carry_out(policy, &Order::new(hook, cwd), input)
}

/// The standard input of a hook: a file with `state` in it.
pub fn input(state: &[u8]) -> Result<OwnedFd, SandboxError> {
    use std::io::{Seek, Write};
    let fd = rustix::fs::memfd_create("oci-state", MemfdFlags::CLOEXEC)
        .step("make", "standard input of a hook")?;
    let mut file = std::fs::File::from(fd);
    file.write_all(state)
        .and_then(|()| file.rewind())
        .step("write", "standard input of a hook")?;
    Ok(file.into())
}

/// The runner's life.
fn serve(policy: &Hooks, socket: OwnedFd) {
    let prepared = exec::close_all_except(&[socket.as_fd()])
        .and_then(|()| Ok(rustix::process::setsid().map(drop)?))
        .and_then(|()| process::set_parent_death_signal(KILL))
        .and_then(|()| ident::set_dumpable(false));
    // 0, 1 and 2, which children get otherwise, are nothing here.
    let null = || rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let (Ok(()), Ok(_a), Ok(_b), Ok(_c)) = (prepared, null(), null(), null()) else {
        return;
    };
    let channel = Channel::new(socket);
    while let Ok(Some(((), mut fds))) = channel.receive::<()>(true) {
        while let Ok(Some(_)) = process::reap_any() {}
        let (Some(answer), Some(input), Some(order)) = (fds.pop(), fds.pop(), fds.pop()) else {
            continue;
        };
        match process::fork() {
            Ok(Fork::Child) => {
                let _ = process::set_parent_death_signal(KILL);
                let done = read_plan::<Order>(order)
                    .map_err(|e| e.to_string())
                    .and_then(|order| carry_out(policy, &order, input));
                let text = done.err().map(|text| clip(&text));
                let _ = Channel::new(answer).send(&text, &[]);
                process::exit_now(0)
            }
            Ok(Fork::Parent(..)) => {}
            Err(e) => {
                let text = Some(format!("fork: {e}"));
                let _ = Channel::new(answer).send(&text, &[]);
            }
        }
    }
}

/// Whoever can change the program can have root run it: nobody else may.
fn check_program(policy: &Hooks, path: &str) -> Result<(), String> {
    if !policy.allows(path) {
        return Err("it is not in hooks.allow of config.toml".into());
    }
    let real: PathBuf = std::fs::canonicalize(path).map_err(|e| e.to_string())?;
    for (i, part) in real.ancestors().enumerate() {
        let meta = std::fs::metadata(part).map_err(|e| e.to_string())?;
        let sticky_directory = i > 0 && meta.mode() & 0o1000 != 0;
        if meta.uid() != 0 || (meta.mode() & 0o022 != 0 && !sticky_directory) {
            return Err(format!(
                "{} can be changed by others than root; make root its owner and chmod go-w",
                part.display()
            ));
        }
        if i == 0 && !meta.is_file() {
            return Err("it is not a file".into());
        }
    }
    Ok(())
}

fn carry_out(policy: &Hooks, order: &Order, input: OwnedFd) -> Result<(), String> {
    check_program(policy, &order.path)?;
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| e.to_string())?;
    let (pid, pidfd) = match process::fork() {
        Ok(Fork::Child) => {
            let error = become_program(order, input, &write);
            let _ = rustix::io::write(&write, error.as_bytes());
            process::exit_now(127)
        }
        Ok(Fork::Parent(pid, pidfd)) => (pid, pidfd),
        Err(e) => return Err(format!("fork: {e}")),
    };
    drop((write, input));
    let (in_time, said) = watch_program(&pidfd, &read, order.timeout);
    if !in_time {
        let group = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(group) = group {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = process::signal(&pidfd, KILL);
    }
    let ended = process::wait(&pidfd).map_err(|e| format!("wait: {e}"))?;
    let said = one_line(&String::from_utf8_lossy(&said));
    let said = match said.is_empty() {
        true => String::new(),
        false => format!(": {said}"),
    };
    match (in_time, ended.status) {
        (true, 0) => Ok(()),
        (true, status) => Err(format!("exit status {status}{said}")),
        (false, _) => Err(format!("not done within {} s and killed", order.timeout)),
    }
}

/// Waits for the end, and keeps what is said meanwhile. Somebody who was left
/// behind may hold the pipe: its end is not waited for.
fn watch_program(pidfd: &OwnedFd, read: &OwnedFd, seconds: u32) -> (bool, Vec<u8>) {
    let until = Instant::now() + Duration::from_secs(seconds.into());
    let mut said = Vec::new();
    let mut open = true;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let patience = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = vec![PollFd::new(pidfd, PollFlags::IN)];
        if open {
            fds.push(PollFd::new(read, PollFlags::IN));
        }
        match poll(&mut fds, Some(&patience)) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(0) | Err(_) => return (false, said),
            Ok(_) => {}
        }
        let ended = !fds[0].revents().is_empty();
        if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
            let mut buffer = [0u8; 4096];
            let n = rustix::io::read(read, &mut buffer).unwrap_or(0);
            open = n > 0;
            said.extend_from_slice(&buffer[..n]);
            said.truncate(SAID);
            if open {
                continue;
            }
        }
        if ended {
            return (true, said);
        }
    }
}

/// In the child; returns only what went wrong.
fn become_program(order: &Order, input: OwnedFd, errors: &OwnedFd) -> String {
    let prepared = (|| -> std::io::Result<(CString, Vec<CString>, Vec<CString>)> {
        process::reset_signals();
        schedule::reset_personality()?;
        super::descriptors::restore_limit()?;
        rustix::process::setsid()?;
        process::set_parent_death_signal(KILL)?;
        rustix::process::chdir(order.cwd.as_str())?;
        rustix::process::umask(Mode::from(0o022));
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let strings = |list: &[String]| -> std::io::Result<Vec<CString>> {
            let each = list.iter().map(|text| CString::new(text.as_str()));
            Ok(each.collect::<Result<_, _>>()?)
        };
        let errors = rustix::io::fcntl_dupfd_cloexec(errors, 16)?;
        exec::install_descriptors(vec![input, null, errors])?;
        Ok((
            CString::new(order.path.as_str())?,
            strings(&order.args)?,
            strings(&order.env)?,
        ))
    })();
    match prepared {
        Ok((path, args, env)) => format!("execute: {}", exec::exec(&path, &args, &env)),
        Err(e) => format!("prepare: {e}"),
    }
}

//! Starts the agent: pid 1 of the pod, in namespaces of its own.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use casemate_cgroup::{Attach, Cgroup};
use casemate_protocol::plan::PodPlan;
use casemate_protocol::{Channel, FromAgent, ToAgent, VERSION, clip, seal_plan};
use casemate_sys::mount::{self, Change, attr, clone_tree};
use casemate_sys::namespace::{self, kind};
use casemate_sys::process::{self, Fork};
use casemate_sys::{exec, ident, message, schedule};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};

use super::Step;
use super::descriptors;
use super::ids::{IdRange, map_agent};
use super::network::Network;
use super::staging::Staging;
use crate::bootstrap::proc;
use crate::sandbox::SandboxError;

/// The running agent.
pub struct Agent {
    /// Its control channel.
    pub channel: Channel,
    /// Host pid.
    pub pid: u32,
    /// The process for certain.
    pub pidfd: OwnedFd,
}

const PATIENCE: Duration = Duration::from_secs(10);

/// Starts the agent and waits until nothing is left to do but [`configure`].
pub fn start(
    binary: &Path,
    range: &IdRange,
    network: &Network,
    staging: &Staging,
    cgroup: &Cgroup,
) -> Result<Agent, SandboxError> {
    let program = open_program(binary)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .step("open", "/dev/null")?;
    let (ours, theirs) = message::pair().step("make", "socket pair")?;
    let (go, wait) = message::pair().step("make", "socket pair")?;
    let attach = cgroup
        .attach()
        .map_err(|e| SandboxError::Failed(e.to_string()))?;
    let (tasks, directory) = match attach {
        Attach::V1(files) => (files, None),
        Attach::V2(dir) => (Vec::new(), Some(dir)),
    };
    let namespaces = kind::USER | kind::MOUNT | kind::PID | kind::IPC | kind::UTS;
    let locks = range.agent_locks();
    range.lend();
    let forked = network.inside(|| {
        staging
            .inside(|| {
                let forked = process::fork_into(namespaces, directory.as_ref().map(AsFd::as_fd))?;
                if let Fork::Child = forked {
                    let error = become_agent(&program, &null, &theirs, locks, &tasks, &wait, &go);
                    let text = clip(&error);
                    let _ = Channel::new(theirs).send(&FromAgent::Failed { text }, &[]);
                    process::exit_now(1);
                }
                Ok(forked)
            })
            .map_err(|e| no_namespaces(&e))
    });
    let forked = forked.inspect_err(|_| range.give_back())?;
    let Fork::Parent(pid, pidfd) = forked else {
        return Err(SandboxError::Failed("fork agent: on the wrong side".into()));
    };
    let begun = map_agent(pid, range)
        .step("map ids of", "agent")
        .and_then(|()| message::send_now(&go, b"g", &[]).step("start", "agent"));
    if let Err(error) = begun {
        if proc::kill(&pidfd, PATIENCE) {
            range.give_back();
        }
        let _ = process::try_wait(&pidfd);
        return Err(error);
    }
    Ok(Agent {
        channel: Channel::new(ours),
        pid,
        pidfd,
    })
}

fn failed(what: String) -> SandboxError {
    SandboxError::Failed(format!("start agent: {what}"))
}

/// Sends the pod's plan. The agent works on it while the shim goes on.
pub fn configure(agent: &Agent, plan: &PodPlan) -> Result<(), SandboxError> {
    let sealed = seal_plan(plan).map_err(|e| failed(e.to_string()))?;
    agent
        .channel
        .send_now(&ToAgent::Configure, &[sealed.as_fd()])
        .map_err(|e| ended_early(agent, failed(e.to_string())))
}

/// Waits until the agent has done what [`configure`] asked.
pub fn ready(agent: &Agent) -> Result<(), SandboxError> {
    let mut fds = [PollFd::new(&agent.channel, PollFlags::IN)];
    let patience = Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    let ready =
        rustix::io::retry_on_intr(|| poll(&mut fds, Some(&patience))).step("wait for", "agent")?;
    if ready == 0 {
        return Err(failed(format!("no answer within {} s", PATIENCE.as_secs())));
    }
    match agent.channel.receive::<FromAgent>(false) {
        Ok(Some((FromAgent::Ready { version }, _))) if version == VERSION => Ok(()),
        Ok(Some((FromAgent::Ready { version }, _))) => Err(failed(format!(
            "it speaks version {version} of the protocol, this shim {VERSION}; install shim and \
             agent of one release"
        ))),
        Ok(Some((FromAgent::Failed { text }, _))) => Err(failed(text)),
        Ok(Some((FromAgent::Denied { .. } | FromAgent::Pong, _))) => {
            Err(failed("it answers out of turn".into()))
        }
        Ok(None) => Err(failed(
            "it ended at once; is sandbox.agent_path in config.toml a casemate-agent?".into(),
        )),
        Err(e) => Err(failed(e.to_string())),
    }
}

/// What to say of `error`: if the agent has ended meanwhile, that is the
/// reason, and maybe it left a word.
pub fn ended_early(agent: &Agent, error: SandboxError) -> SandboxError {
    let mut fds = [PollFd::new(&agent.pidfd, PollFlags::IN)];
    let moment = Timespec {
        tv_sec: 0,
        tv_nsec: 20_000_000,
    };
    if !rustix::io::retry_on_intr(|| poll(&mut fds, Some(&moment))).is_ok_and(|n| n > 0) {
        return error;
    }
    let text = match agent.channel.receive::<FromAgent>(false) {
        Ok(Some((FromAgent::Failed { text }, _))) => text,
        _ => "it ended at once; is sandbox.agent_path in config.toml a casemate-agent?".into(),
    };
    SandboxError::Failed(format!("start agent: {text}"))
}

fn open_program(binary: &Path) -> Result<OwnedFd, SandboxError> {
    let object = format!("{} (sandbox.agent_path in config.toml)", binary.display());
    let tree = clone_tree(CWD, binary, false, true).step("open the agent's binary", &object)?;
    let change = Change {
        set: attr::RDONLY | attr::NOSUID | attr::NODEV,
        ..Change::default()
    };
    mount::set_attributes(&tree, change).step("protect the agent's binary", &object)?;
    // Out of the way of the numbers that the agent expects.
    rustix::io::fcntl_dupfd_cloexec(&tree, 16).step("open the agent's binary", &object)
}

fn no_namespaces(error: &std::io::Error) -> SandboxError {
    let hint = match error
        .raw_os_error()
        .map(rustix::io::Errno::from_raw_os_error)
    {
        Some(rustix::io::Errno::NOSPC | rustix::io::Errno::PERM) => {
            "; user namespaces are not allowed on this node: raise user.max_user_namespaces"
        }
        Some(rustix::io::Errno::AGAIN) => {
            "; the limit of processes is used up: see the pids cgroup and kernel.pid_max"
        }
        Some(rustix::io::Errno::INVAL) => "; this kernel is built without user namespaces",
        _ => "",
    };
    SandboxError::Failed(format!("clone the pod's namespaces: {error}{hint}"))
}

/// In the child: everything before the agent's own code.
fn become_agent(
    program: &OwnedFd,
    null: &OwnedFd,
    control: &OwnedFd,
    locks: &[OwnedFd],
    tasks: &[OwnedFd],
    wait: &OwnedFd,
    go: &OwnedFd,
) -> String {
    let prepared = (|| -> std::io::Result<()> {
        // Our copy of the parent's end: its death must be seen.
        exec::close_all_except(
            &[program, null, control, wait]
                .into_iter()
                .chain(locks)
                .chain(tasks)
                .map(AsFd::as_fd)
                .collect::<Vec<_>>(),
        )?;
        let _ = go;
        for file in tasks {
            rustix::io::write(file, b"0")?;
        }
        namespace::unshare(kind::CGROUP)?;
        let mut buffer = [0u8; 4];
        if message::receive(wait, &mut buffer, true)?.is_none() {
            process::exit_now(0);
        }
        ident::set_groups(&[])?;
        ident::set_gid(0)?;
        ident::set_uid(0)?;
        rustix::process::setsid()?;
        process::reset_signals();
        schedule::reset_personality()?;
        descriptors::restore_limit()?;
        let copy = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 16);
        let mut files = vec![copy(null)?, copy(null)?, copy(null)?, copy(control)?];
        for lock in locks {
            files.push(copy(lock)?);
        }
        exec::install_descriptors(files)
    })();
    if let Err(e) = prepared {
        return format!("prepare the agent's process: {e}");
    }
    match CString::new("casemate-agent") {
        Ok(name) => format!(
            "execute the agent: {}",
            exec::exec_fd(program, &[name], &[])
        ),
        Err(e) => e.to_string(),
    }
}

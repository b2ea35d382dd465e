//! The pause: what CRI's sandbox container stands for here. It is the first
//! process of a pid namespace that containers of the pod may share, and is in
//! the pod's other namespaces too: `/proc/PID/ns/…` of it leads to what they share.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use casemate_protocol::plan::PausePlan;
use casemate_protocol::{Channel, FromPause, ToAgent, TransportError, clip, seal_plan};
use casemate_sys::{message, process};
use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Sandbox, SandboxError, ended};
use crate::host::Step;
use crate::plan;

/// How long the agent may take to make it.
const PATIENCE: Duration = Duration::from_secs(10);

/// The running pause. It ends with the agent, whose child it is.
pub struct Pause {
    pid: u32,
    pidfd: OwnedFd,
    namespace: OwnedFd,
}

impl Pause {
    /// Has the agent make it, and looks at the result.
    pub(super) async fn make(pod: &Sandbox) -> Result<Pause, SandboxError> {
        let plan = PausePlan {
            filter: plan::program("pause")?,
        };
        let sealed =
            seal_plan(&plan).map_err(|e| SandboxError::Failed(format!("make the pause: {e}")))?;
        let (ours, theirs) = message::pair().step("make", "socket pair")?;
        let fds = [theirs.as_fd(), sealed.as_fd(), pod.userns.as_fd()];
        pod.agent
            .channel
            .send_now(&ToAgent::Pause, &fds)
            .map_err(|e| SandboxError::Unavailable(format!("ask the agent: {e}")))?;
        // Ours must not outlive its own, or its end is never seen.
        drop(theirs);
        let channel = crate::io::watch(Channel::new(ours), Interest::READABLE)
            .step("watch", "the pause's channel")?;
        let pidfd = tokio::time::timeout(PATIENCE, hear(&channel))
            .await
            .map_err(|_| {
                let text = format!("the pause is not ready within {} s", PATIENCE.as_secs());
                SandboxError::Unavailable(text)
            })??;
        let gone = |e: io::Error| SandboxError::Unavailable(format!("the pause has ended: {e}"));
        let pid = process::pid_of(&pidfd).map_err(gone)?;
        let status = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/status"));
        let (own, agents) = (
            status(pid).map_err(gone)?,
            status(pod.agent.pid).map_err(gone)?,
        );
        // Not to be killed here: whose descriptor it is isn't known for sure.
        check(&own, &agents).map_err(|what| {
            SandboxError::Failed(format!("the pause is not locked as planned: {what}"))
        })?;
        let namespace = pid_namespace(&pidfd).map_err(gone)?;
        Ok(Pause {
            pid,
            pidfd,
            namespace,
        })
    }

    /// Its host pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The pid namespace that it is the first process of.
    pub(super) fn namespace(&self) -> &OwnedFd {
        &self.namespace
    }

    /// Resolves when it has ended.
    pub async fn ended(&self) {
        ended(&self.pidfd).await;
    }
}

/// Its first word, then the end of the channel: everything of it is hostile.
async fn hear(channel: &AsyncFd<Channel>) -> Result<OwnedFd, SandboxError> {
    let turn = || SandboxError::Unavailable("the pause answers out of turn".into());
    let mut pidfd = None;
    loop {
        let mut guard = channel.readable().await.step("hear from", "the pause")?;
        match channel.get_ref().receive::<FromPause>(false) {
            Ok(Some((FromPause::Ready, mut fds))) if pidfd.is_none() && fds.len() == 1 => {
                pidfd = fds.pop();
            }
            Ok(Some((FromPause::Ready, _))) => return Err(turn()),
            Ok(Some((FromPause::Failed { text }, _))) => {
                return Err(SandboxError::Failed(format!(
                    "make the pause: {}",
                    clip(&text)
                )));
            }
            Ok(None) => return pidfd.ok_or_else(turn),
            Err(TransportError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                guard.clear_ready();
            }
            Err(e) => return Err(SandboxError::Unavailable(format!("the pause: {e}"))),
        }
    }
}

/// Whether `/proc/PID/status` says what it should: no capability, a filter, no
/// new privileges, and pid 1 of a pid namespace right below the agent's.
fn check(own: &str, agents: &str) -> Result<(), String> {
    let field = |text: &str, name: &str| -> Vec<String> {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(|value| value.split_ascii_whitespace().map(str::to_owned).collect())
            .unwrap_or_default()
    };
    for (name, wanted) in [
        ("CapBnd", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapInh", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        let is = field(own, name);
        if is != [wanted] {
            return Err(format!("its {name} is {}, not {wanted}", is.join(" ")));
        }
    }
    let (pids, above) = (field(own, "NSpid"), field(agents, "NSpid"));
    let agent = above.first();
    if field(own, "PPid").first() != agent
        || pids.len() != above.len() + 1
        || pids.last().is_none_or(|pid| pid != "1")
    {
        return Err(format!(
            "its pids are {}, those of the agent {}",
            pids.join(" "),
            above.join(" ")
        ));
    }
    Ok(())
}

/// The pid namespace of the process behind `pidfd`.
pub(super) fn pid_namespace(pidfd: &OwnedFd) -> io::Result<OwnedFd> {
    let pid = process::pid_of(pidfd)?;
    let namespace = rustix::fs::open(
        format!("/proc/{pid}/ns/pid"),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // The number was the process' before and is after: so it was meanwhile.
    process::pid_of(pidfd)?;
    Ok(namespace)
}

#[cfg(test)]
mod tests {
    use super::check;

    const AGENT: &str = "PPid:\t7\nNSpid:\t90\t1\n";
    const LOCKED: &str = "PPid:\t90\nNSpid:\t91\t4\t1\nCapInh:\t0000000000000000\n\
        CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n\
        NoNewPrivs:\t1\nSeccomp:\t2\n";

    #[test]
    fn a_pause_that_lacks_a_lock_is_seen() {
        check(LOCKED, AGENT).unwrap();
        for (is, would_be, named) in [
            ("CapBnd:\t0", "CapBnd:\t1", "CapBnd"),
            ("CapPrm:\t0", "CapPrm:\t1", "CapPrm"),
            ("CapEff:\t0", "CapEff:\t1", "CapEff"),
            ("CapInh:\t0", "CapInh:\t1", "CapInh"),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0", "NoNewPrivs"),
            ("Seccomp:\t2", "Seccomp:\t0", "Seccomp"),
            // In the agent's own pid namespace, too deep, not the first, not
            // the agent's child.
            ("NSpid:\t91\t4\t1", "NSpid:\t91\t1", "pids"),
            ("NSpid:\t91\t4\t1", "NSpid:\t91\t4\t2\t1", "pids"),
            ("NSpid:\t91\t4\t1", "NSpid:\t91\t4\t2", "pids"),
            ("PPid:\t90", "PPid:\t91", "pids"),
        ] {
            let status = LOCKED.replacen(is, would_be, 1);
            assert_ne!(status, LOCKED);
            let error = check(&status, AGENT).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        assert!(check("", AGENT).is_err());
        assert!(check(LOCKED, "").is_err());
    }
}

//! Sees to it that no call waits for somebody who doesn't answer: the agent, for
//! refused calls, or a container's learner, for all that are written down.
//!
//! The shim keeps a copy of each listener, only to see that something waits there.
//! Then who should answer is asked for a sign of life, at most twice a second; where
//! none comes, the agent is killed, and its pod ends with it. Nothing runs while
//! nothing is asked.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use casemate_protocol::{Channel, ToAgent, ToLearner};
use rustix::event::PollFlags;
use tokio::io::Interest;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{KILL, SandboxError};
use crate::host::Step;
use crate::record::{Record, Records};

/// Who is stopped, while calls wait for it, gets this long.
const STOPPED: Duration = Duration::from_millis(900);
/// Who isn't, but says nothing: it may be short of processor time.
const SILENT: Duration = Duration::from_secs(5);
/// From one look at a listener to the next.
pub const LOOK_EACH: Duration = Duration::from_millis(500);

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The pod's agent.
    Agent,
    /// A container's learner.
    Learner,
}

/// What is known of who answers.
pub struct Line {
    /// To it.
    pub channel: Channel,
    /// Its host pid.
    pub pid: u32,
    /// Of the agent: the pod ends with it.
    pub pidfd: OwnedFd,
    /// Signs of life so far.
    pub pongs: watch::Sender<u64>,
    /// Which of them it is.
    pub who: Who,
    /// It was told that the pod is ended for it.
    pub told: AtomicBool,
}

/// A descriptor that a forker sends may be anything.
pub fn is_listener(fd: &OwnedFd) -> Result<(), SandboxError> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let target = std::fs::read_link(&link).step("read", link)?;
    if target.as_os_str() == "anon_inode:seccomp notify" {
        return Ok(());
    }
    Err(SandboxError::Unavailable(
        "the container's forker sends something else than a listener".into(),
    ))
}

/// What waits at a descriptor, without waiting.
pub fn state(fd: &OwnedFd) -> PollFlags {
    let mut fds = [rustix::event::PollFd::new(fd, PollFlags::IN)];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match rustix::event::poll(&mut fds, Some(&now)) {
        Ok(_) => fds[0].revents(),
        Err(_) => PollFlags::empty(),
    }
}

/// Follows a listener until nobody is left behind its filter.
pub async fn guard(line: &Line, mut listener: OwnedFd, records: &Records, id: &str) {
    loop {
        // Registered anew each time: in between, questions don't wake the shim.
        let Ok(watched) = crate::io::watch(listener, Interest::READABLE) else {
            return;
        };
        let ready = watched.readable().await.is_ok();
        listener = watched.into_inner();
        let now = state(&listener);
        if !ready
            || (!now.contains(PollFlags::IN) && now.intersects(PollFlags::HUP | PollFlags::ERR))
        {
            return;
        }
        if let Err(why) = line.is_alive().await
            && state(&listener).contains(PollFlags::IN)
        {
            line.end_pod(why, records, id);
            return;
        }
        tokio::time::sleep(LOOK_EACH).await;
    }
}

impl Line {
    /// Kills the agent, and so the pod, of which calls wait.
    pub fn end_pod(&self, why: &str, records: &Records, id: &str) {
        // A learner ends with its pod, which is no second reason.
        if self.told.swap(true, Ordering::Relaxed) && self.who == Who::Learner {
            return;
        }
        let text = match self.who {
            Who::Agent => {
                format!("the agent {why} while refused calls wait for it; the pod is ended")
            }
            Who::Learner => {
                format!("the learner {why}, and calls would wait for it; the pod is ended")
            }
        };
        log::error!("container {id}: {text}");
        records.push(&Record::BrokerLoss {
            container: id.to_owned(),
            text,
        });
        let _gone = casemate_sys::process::signal(&self.pidfd, KILL);
    }

    /// Asks for a sign of life; how it is where none comes.
    async fn is_alive(&self) -> Result<(), &'static str> {
        let mut pongs = self.pongs.subscribe();
        let before = *pongs.borrow_and_update();
        let begun = Instant::now();
        // A full channel says nothing either.
        let _full = match self.who {
            Who::Agent => self.channel.send_now(&ToAgent::Ping, &[]),
            Who::Learner => self.channel.send_now(&ToLearner::Ping, &[]),
        };
        for (limit, why) in [(STOPPED, "is stopped"), (SILENT, "says nothing")] {
            let heard = pongs.wait_for(|pongs| *pongs > before);
            if tokio::time::timeout_at(begun + limit, heard).await.is_ok() {
                return Ok(());
            }
            if limit == SILENT || self.is_stopped() {
                return Err(why);
            }
        }
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid));
        let stat = stat.unwrap_or_default();
        let state = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_ascii_whitespace().next());
        matches!(state, Some("T" | "t"))
    }
}

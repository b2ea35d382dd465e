//! The learner of a container: writes down what it calls, for the profile that will
//! let it call that and nothing else.
//!
//! The container has two filters of ours: its profile's, whose refusals are plain
//! errors here, and one that refuses nothing and asks. Only what the first lets run
//! gets to a question, whose answer is always that it may: so to learn from a
//! container loosens nothing. The broker, which answers for refused calls, is other
//! code in another process.
//!
//! It is a child of the agent, in the containers' user namespace, with two
//! capabilities there: to read its callers' memory, for ports and paths. What it reads
//! is hostile, bounded, and decides nothing. It ends with the container. If it ends
//! before, or is stopped, the shim ends the pod: calls would wait.

mod memory;
mod notes;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use casemate_protocol::capabilities::LEARNER;
use casemate_protocol::plan::LearnPlan;
use casemate_protocol::{Channel, FromLearner, ToLearner, TransportError, clip, read_plan};
use casemate_sys::observe::Listener;
use casemate_sys::process::{self, Fork};
use casemate_sys::{exec, memory as own_memory, notify, seccomp};
use rustix::event::{PollFd, PollFlags, poll};

use crate::broker::is_readable;
use crate::companion;
use crate::error::{At, StepError};
use crate::pod::until;
use memory::Reader;
use notes::{Notes, Which};

/// Questions answered of one listener before the loop looks at the rest.
const AT_ONCE: usize = 64;
/// Between two reports of what happened again.
const REPORT_EACH: Duration = Duration::from_millis(500);

/// Forks it. It answers on its own channel, so nothing is to be said here.
pub fn start(mut fds: Vec<OwnedFd>) {
    if fds.len() < 4 {
        return;
    }
    let listeners = fds.split_off(3);
    let (Some(namespace_b), Some(plan), Some(channel)) = (fds.pop(), fds.pop(), fds.pop()) else {
        return;
    };
    let channel = Channel::new(channel);
    match process::fork_into(0, None) {
        Ok(Fork::Parent(..)) => {}
        Ok(Fork::Child) => {
            let mut keep = vec![channel.as_fd(), plan.as_fd(), namespace_b.as_fd()];
            keep.extend(listeners.iter().map(AsFd::as_fd));
            // The agent's own descriptors end here, its values are never used again.
            let closed = exec::close_all_except(&keep).at("close", "inherited descriptors");
            drop(keep);
            let result = closed
                .and_then(|()| lock(plan, namespace_b, &listeners, &channel))
                .and_then(|notes| {
                    let listeners = listeners.into_iter().map(Listener::of).collect();
                    Learner::new(&channel, listeners, notes).run()
                });
            let code = match result {
                Ok(()) => 0,
                Err(error) => {
                    tell(&channel, &error.to_string());
                    1
                }
            };
            process::exit_now(code)
        }
        Err(error) => tell(&channel, &format!("fork it: {error}")),
    }
}

fn tell(channel: &Channel, what: &str) {
    let text = clip(what);
    let _ = channel.send_now(&FromLearner::Failed { text }, &[]);
}

fn lock(
    plan: OwnedFd,
    namespace_b: OwnedFd,
    listeners: &[OwnedFd],
    channel: &Channel,
) -> Result<Notes, StepError> {
    let plan: LearnPlan = read_plan(plan)
        .map_err(io::Error::other)
        .at("read", "its plan")?;
    process::reset_signals();
    rustix::process::setsid().at("start", "session")?;
    let runtime = rustix::thread::name().at("read", "name")?;
    rustix::thread::set_name(c"casemate-learn").at("set", "name")?;
    for listener in listeners {
        // Only faster with it; kernels before 6.6 don't have it.
        let _slower = notify::wake_in_place(listener);
    }
    let me = companion::settle(namespace_b, LEARNER)?;
    own_memory::release_startup();
    seccomp::install_filter(&plan.filter, 0).at("install filter", "")?;
    channel
        .send(&FromLearner::Ready, &[me.as_fd()])
        .map_err(io::Error::other)
        .at("answer", "shim")?;
    Ok(Notes::new(&plan, Reader::new(runtime.to_bytes())))
}

struct Learner<'a> {
    channel: &'a Channel,
    listeners: Vec<Listener>,
    notes: Notes,
    last_report: Option<Instant>,
}

impl<'a> Learner<'a> {
    fn new(channel: &'a Channel, listeners: Vec<Listener>, notes: Notes) -> Learner<'a> {
        Learner {
            channel,
            listeners,
            notes,
            last_report: None,
        }
    }

    /// Answers until nobody is left behind the filter, or the shim has gone.
    fn run(mut self) -> Result<(), StepError> {
        while !self.listeners.is_empty() {
            let mut fds = vec![PollFd::new(self.channel, PollFlags::IN)];
            fds.extend(
                self.listeners
                    .iter()
                    .map(|fd| PollFd::new(fd, PollFlags::IN)),
            );
            let limit = self.notes.has_news().then(|| until(self.next_report()));
            match poll(&mut fds, limit.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e).at("poll", ""),
            }
            let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
            drop(fds);
            for (at, flags) in ready.iter().enumerate().skip(1).rev() {
                if flags.contains(PollFlags::IN) {
                    self.answer(at - 1);
                } else if flags.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
                    self.listeners.remove(at - 1);
                }
            }
            if self.notes.has_news() && self.next_report() <= Instant::now() {
                self.last_report = Some(Instant::now());
                self.notes.tell(self.channel, Which::All);
            }
            if !ready[0].is_empty() && !self.hear()? {
                return Ok(());
            }
        }
        self.notes.tell(self.channel, Which::All);
        Ok(())
    }

    fn next_report(&self) -> Instant {
        let now = Instant::now();
        self.last_report.map_or(now, |last| last + REPORT_EACH)
    }

    /// The shim's word; false when it has gone.
    fn hear(&self) -> Result<bool, StepError> {
        match self.channel.receive::<ToLearner>(false) {
            Ok(None) => Ok(false),
            Ok(Some((ToLearner::Ping, _))) => {
                // Full: the shim hears nothing, and is right.
                let _unheard = self.channel.send_now(&FromLearner::Pong, &[]);
                Ok(true)
            }
            Err(TransportError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(e) => Err(io::Error::other(e)).at("receive", ""),
        }
    }

    fn answer(&mut self, listener: usize) {
        let Some(listener) = self.listeners.get(listener) else {
            return;
        };
        for turn in 0..AT_ONCE {
            // receive() waits where there is nothing: the first is known to be there.
            if turn > 0 && !is_readable(listener) {
                return;
            }
            let Ok(asked) = listener.receive() else {
                // Who asked was killed meanwhile.
                return;
            };
            // What is new is told before it runs: so nothing that ran is missing,
            // whatever ends the pod then.
            if self.notes.take(&asked) {
                self.notes.tell(self.channel, Which::New);
            }
            // It may be gone by now: then there is nobody to answer.
            let _gone = asked.go_on();
        }
    }
}

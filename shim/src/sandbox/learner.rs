//! The shim's side of a container's learner, the process that writes down what the
//! container calls: has the agent make it, looks whether it is locked as planned,
//! takes its word, and sees to it that no call waits for it (see [`super::watch`]).
//!
//! It isn't the broker's business, nor its code: that one answers for refused calls.
//! A learning container's refusals are plain errors of its profile's filter, beside
//! the one that asks; so there is nothing that the learner could let run which the
//! profile doesn't.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use casemate_protocol::capabilities::LEARNER;
use casemate_protocol::plan::{AddressForm, LearnPlan};
use casemate_protocol::{Channel, FromLearner, ToAgent, TransportError, clip, seal_plan};
use casemate_spec::Tightened;
use casemate_sys::message;
use rustix::event::PollFlags;
use seccomp_profiles::recording::{Base, Pod};
use seccomp_profiles::{Hash, observed, table};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::Instant;

use super::watch::{Line, Who, guard, is_listener, state};
use super::{Sandbox, SandboxError, is_ready, verify};
use crate::host::Step;
use crate::plan;
use crate::record::Records;
use crate::record::learned::{Learned, Store};

/// How long the agent may take to make it.
const PATIENCE: Duration = Duration::from_secs(10);
/// Messages taken of it in a second; the rest waits with it.
const MESSAGES: u32 = 1024;
/// For what the learners of a dead pod have said to be taken.
const HEARD_WITHIN: Duration = Duration::from_secs(3);

/// Calls with an argument that leads to a path, which, and which one says where a
/// relative path starts, if that is not the working directory.
const PATHS: &[(&str, u8, Option<u8>)] = &[
    ("open", 0, None),
    ("openat", 1, Some(0)),
    ("openat2", 1, Some(0)),
    ("creat", 0, None),
    ("stat", 0, None),
    ("lstat", 0, None),
    ("newfstatat", 1, Some(0)),
    ("statx", 1, Some(0)),
    ("statfs", 0, None),
    ("access", 0, None),
    ("faccessat", 1, Some(0)),
    ("faccessat2", 1, Some(0)),
    ("readlink", 0, None),
    ("readlinkat", 1, Some(0)),
    ("execve", 0, None),
    ("execveat", 1, Some(0)),
    ("truncate", 0, None),
    ("mkdir", 0, None),
    ("mkdirat", 1, Some(0)),
    ("mknod", 0, None),
    ("mknodat", 1, Some(0)),
    ("rmdir", 0, None),
    ("unlink", 0, None),
    ("unlinkat", 1, Some(0)),
    ("rename", 1, None),
    ("renameat", 3, Some(2)),
    ("renameat2", 3, Some(2)),
    ("link", 1, None),
    ("linkat", 3, Some(2)),
    ("symlink", 1, None),
    ("symlinkat", 2, Some(1)),
    ("chmod", 0, None),
    ("fchmodat", 1, Some(0)),
    ("chown", 0, None),
    ("lchown", 0, None),
    ("fchownat", 1, Some(0)),
    ("utimensat", 1, Some(0)),
    ("inotify_add_watch", 1, None),
];

/// Calls with an argument that leads to socket addresses, which, and their form.
const ADDRESSES: &[(&str, u8, AddressForm)] = &[
    ("bind", 1, AddressForm::Own),
    ("connect", 1, AddressForm::Other),
    ("sendto", 4, AddressForm::Other),
    ("sendmsg", 1, AddressForm::Message),
    ("sendmmsg", 1, AddressForm::Messages),
];

/// A container's learner, for as long as anybody is behind the container's filter.
pub struct Learner {
    /// Host pid.
    pub pid: u32,
    pidfd: OwnedFd,
}

fn learn_plan() -> Result<LearnPlan, SandboxError> {
    let paths = PATHS.iter();
    let addresses = ADDRESSES.iter();
    Ok(LearnPlan {
        filter: plan::program("learner")?,
        kinds: observed::told_apart().collect(),
        paths: paths
            .filter_map(|(name, at, start)| Some((table::number(name)?, *at, *start)))
            .collect(),
        addresses: addresses
            .filter_map(|(name, at, form)| Some((table::number(name)?, *at, *form)))
            .collect(),
    })
}

impl Sandbox {
    /// What is learned from this pod, from its first learning container on.
    pub fn learned(&self) -> Option<&Arc<Learned>> {
        self.learned.get()
    }

    async fn begin_learning(&self, spec: &Tightened) -> Result<&Arc<Learned>, SandboxError> {
        let make = async || {
            let directory = &self.config.learn.directory;
            let (namespace, id) = self.records.place();
            let store = Store::open(directory, namespace, id).map_err(|error| {
                let directory = directory.display();
                SandboxError::Failed(format!("open learn.directory {directory}: {error}"))
            })?;
            let said = |text: &Option<String>| text.clone().unwrap_or_default();
            let pod = Pod {
                id: id.to_owned(),
                namespace: said(&spec.pod.namespace),
                name: said(&spec.pod.pod_name),
                uid: said(&spec.pod.pod_uid),
            };
            Ok(Learned::new(pod, store))
        };
        self.learned.get_or_try_init(make).await
    }

    /// Waits, a moment at most, until all that was learned has been taken, and keeps it.
    pub(super) async fn end_learning(&self) {
        if let Some(learned) = self.learned.get() {
            // In time or not: what there is then is kept.
            let _late = tokio::time::timeout(HEARD_WITHIN, learned.all_ended()).await;
            learned.keep();
        }
    }
}

impl Learner {
    /// Has the learner made for a container of `id`, behind whose filter nobody has
    /// asked anything yet.
    pub(super) async fn start(
        pod: &Sandbox,
        id: &str,
        spec: &Tightened,
        (base, listeners): (&[u8], Vec<OwnedFd>),
    ) -> Result<Learner, SandboxError> {
        for listener in &listeners {
            is_listener(listener)?;
        }
        let learned = pod.begin_learning(spec).await?;
        let sealed = seal_plan(&learn_plan()?)
            .map_err(|e| SandboxError::Failed(format!("make the learner: {e}")))?;
        let (ours, theirs) = message::pair().step("make", "socket pair")?;
        let mut fds = vec![theirs.as_fd(), sealed.as_fd(), pod.userns.as_fd()];
        fds.extend(listeners.iter().map(AsFd::as_fd));
        pod.agent
            .channel
            .send_now(&ToAgent::Learn, &fds)
            .map_err(|e| SandboxError::Unavailable(format!("ask the agent: {e}")))?;
        drop(fds);
        // Ours must not outlive its own, or its end is never seen.
        drop(theirs);
        let copy = ours.try_clone().step("copy", "the learner's channel")?;
        let channel = crate::io::watch(Channel::new(ours), Interest::READABLE)
            .step("watch", "the learner's channel")?;
        let pidfd = tokio::time::timeout(PATIENCE, first_word(&channel))
            .await
            .map_err(|_| {
                let text = format!("the learner is not ready within {} s", PATIENCE.as_secs());
                SandboxError::Unavailable(text)
            })??;
        let gone = || SandboxError::Unavailable("the learner has ended".into());
        let pid = verify::child(&pidfd, pod.agent.pid)?.ok_or_else(gone)?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        check(&status.map_err(|_| gone())?).map_err(|what| {
            SandboxError::Failed(format!("the learner is not locked as planned: {what}"))
        })?;

        let line = Arc::new(Line {
            channel: Channel::new(copy),
            pid,
            pidfd: pod
                .agent
                .pidfd
                .try_clone()
                .step("copy", "the agent's pidfd")?,
            pongs: watch::Sender::new(0),
            who: Who::Learner,
            told: AtomicBool::new(false),
        });
        let name = spec.pod.container_name.as_deref().unwrap_or(id);
        let base = Base {
            name: spec.effective.profile_name.clone(),
            hash: Hash::of(base).to_string(),
        };
        let copies: io::Result<_> = listeners.iter().map(OwnedFd::try_clone).collect();
        let copies = copies.step("copy", "listeners")?;
        // From here on nothing fails: what has begun must end.
        let ear = Ear {
            line: line.clone(),
            number: learned.begin(id, name, base),
            learned: learned.clone(),
            records: pod.records.clone(),
            id: id.to_owned(),
            listeners: copies,
        };
        tokio::spawn(ear.listen(channel));
        for listener in listeners {
            let (line, records, id) = (line.clone(), pod.records.clone(), id.to_owned());
            tokio::spawn(async move { guard(&line, listener, &records, &id).await });
        }
        Ok(Learner { pid, pidfd })
    }

    /// Whether it is there.
    pub fn lives(&self) -> bool {
        !is_ready(&self.pidfd)
    }
}

/// Everything of it is hostile.
async fn first_word(channel: &AsyncFd<Channel>) -> Result<OwnedFd, SandboxError> {
    let turn = || SandboxError::Unavailable("the learner answers out of turn".into());
    loop {
        let mut guard = channel.readable().await.step("hear from", "the learner")?;
        match channel.get_ref().receive::<FromLearner>(false) {
            Ok(Some((FromLearner::Ready, mut fds))) if fds.len() == 1 => {
                return fds.pop().ok_or_else(turn);
            }
            Ok(Some((FromLearner::Failed { text }, _))) => {
                let text = clip(&text);
                return Err(SandboxError::Failed(format!("make the learner: {text}")));
            }
            Ok(_) => return Err(turn()),
            Err(TransportError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                guard.clear_ready();
            }
            Err(e) => return Err(SandboxError::Unavailable(format!("the learner: {e}"))),
        }
    }
}

/// Whether `/proc/PID/status` says what it should.
fn check(status: &str) -> Result<(), String> {
    let caps = format!("{LEARNER:016x}");
    for (name, wanted) in [
        ("CapBnd", caps.as_str()),
        ("CapPrm", &caps),
        ("CapEff", &caps),
        ("CapInh", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        let mut lines = status.lines();
        let is = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let is = is.map_or("missing", str::trim);
        if is != wanted {
            return Err(format!("its {name} is {is}, not {wanted}"));
        }
    }
    Ok(())
}

/// What listens to a learner.
struct Ear {
    line: Arc<Line>,
    learned: Arc<Learned>,
    number: u32,
    records: Records,
    id: String,
    /// Only to see whether anybody is behind the filter.
    listeners: Vec<OwnedFd>,
}

impl Ear {
    /// Takes its word until it ends, or says what it must not.
    async fn listen(self, channel: AsyncFd<Channel>) {
        let why = self.hear(&channel).await;
        let asked = |fd: &OwnedFd| !state(fd).intersects(PollFlags::HUP | PollFlags::ERR);
        if why.is_some() || self.listeners.iter().any(asked) {
            self.line
                .end_pod(why.unwrap_or("has ended"), &self.records, &self.id);
        }
        self.learned.end(self.number);
    }

    /// What it said that it must not.
    async fn hear(&self, channel: &AsyncFd<Channel>) -> Option<&'static str> {
        let (mut taken, mut since) = (0, Instant::now());
        loop {
            let mut guard = channel.readable().await.ok()?;
            match channel.get_ref().receive::<FromLearner>(false) {
                Ok(Some((FromLearner::Seen(list), _))) => {
                    if let Err(lie) = self.learned.seen(self.number, &list) {
                        log::error!("container {}: the learner says {lie}", self.id);
                        return Some("says what it must not");
                    }
                }
                Ok(Some((FromLearner::Pong, _))) => {
                    self.line.pongs.send_modify(|pongs| *pongs += 1);
                }
                Ok(Some((FromLearner::Failed { text }, _))) => {
                    log::error!("container {}: the learner: {}", self.id, clip(&text));
                    return None;
                }
                Ok(None) => return None,
                Err(TransportError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                    guard.clear_ready();
                    continue;
                }
                Ok(Some((FromLearner::Ready, _))) | Err(_) => return Some("says what it must not"),
            }
            taken += 1;
            if taken >= MESSAGES {
                tokio::time::sleep_until(since + Duration::from_secs(1)).await;
                (taken, since) = (0, Instant::now());
            } else if since.elapsed() > Duration::from_secs(1) {
                (taken, since) = (0, Instant::now());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_looked_at_exists() {
        let plan = learn_plan().unwrap();
        assert_eq!(plan.paths.len(), PATHS.len());
        assert_eq!(plan.addresses.len(), ADDRESSES.len());
        assert!(plan.kinds.iter().all(|(_, bits)| bits.len() <= 3));
    }

    #[test]
    fn a_learner_that_lacks_a_lock_is_seen() {
        const LOCKED: &str = "CapInh:\t0000000000000000\nCapPrm:\t0000000000080004\n\
            CapEff:\t0000000000080004\nCapBnd:\t0000000000080004\nCapAmb:\t0000000000000000\n\
            NoNewPrivs:\t1\nSeccomp:\t2\n";
        check(LOCKED).unwrap();
        for (is, would_be, named) in [
            ("CapBnd:\t00000000000", "CapBnd:\t00000000002", "CapBnd"),
            ("CapPrm:\t00000000000", "CapPrm:\t00000000002", "CapPrm"),
            ("CapEff:\t00000000000", "CapEff:\t00000000002", "CapEff"),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0", "NoNewPrivs"),
            ("Seccomp:\t2", "Seccomp:\t0", "Seccomp"),
        ] {
            let error = check(&LOCKED.replacen(is, would_be, 1)).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        assert!(check("").is_err());
    }
}

//! The agent's life: set up the pod, then launch forkers and reap.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use casemate_protocol::plan::{BrokerPlan, LaunchPlan, PodPlan};
use casemate_protocol::{
    AGENT_LOCK, AGENT_SOCKET, Channel, FromAgent, FromForker, ToAgent, TransportError, VERSION,
    clip, read_plan,
};
use casemate_sys::mount::{self, NewFs, attr, clone_tree};
use casemate_sys::process::{self, Fork};
use casemate_sys::{exec, ident, memory, namespace};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode};

use crate::broker::Broker;
use crate::confine;
use crate::error::{At, StepError};
use crate::launch;

/// Runs until the shim is gone.
pub fn run() -> Result<(), StepError> {
    let channel = Channel::new(mount::adopt_inherited(AGENT_SOCKET).at("adopt", "control socket")?);
    let _lock = mount::adopt_inherited(AGENT_LOCK).at("adopt", "id range lock")?;
    // More of them follow where somebody else chose the containers' ids.
    let _more: Vec<OwnedFd> = (AGENT_LOCK + 1..)
        .map_while(|number| mount::adopt_inherited(number).ok())
        .collect();
    ident::set_dumpable(false).at("set", "dumpable")?;

    match configure(&channel) {
        Ok(()) => send(&channel, &FromAgent::Ready { version: VERSION })?,
        Err(error) => {
            send(
                &channel,
                &FromAgent::Failed {
                    text: clip(&error.to_string()),
                },
            )?;
            return Err(error);
        }
    }
    let signals = process::child_signals().at("watch", "children")?;
    memory::release_startup();
    let mut broker = Broker::default();
    loop {
        let mut fds = vec![
            PollFd::new(&channel, PollFlags::IN),
            PollFd::new(&signals, PollFlags::IN),
        ];
        fds.extend(broker.listeners().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let limit = broker.next_report(Instant::now()).map(until);
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).at("poll", ""),
        }
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        let (message, children) = (!ready[0].is_empty(), !ready[1].is_empty());
        broker.serve(&ready[2..]);
        broker.report(&channel);
        if children {
            drain(&signals);
            while let Ok(Some(_)) = process::reap_any() {}
        }
        if message {
            match channel.receive::<ToAgent>(false) {
                Ok(None) => return Ok(()),
                Ok(Some((ToAgent::Launch, fds))) => launch(fds),
                Ok(Some((ToAgent::Pause, fds))) => crate::pause::start(fds),
                Ok(Some((ToAgent::Learn, fds))) => crate::learner::start(fds),
                Ok(Some((ToAgent::Broker { container }, fds))) => {
                    take_listeners(&mut broker, container, fds)?;
                }
                // Full: the shim hears nothing, and is right.
                Ok(Some((ToAgent::Ping, _))) => {
                    let _unheard = channel.send_now(&FromAgent::Pong, &[]);
                }
                Ok(Some((ToAgent::Configure, _))) => {}
                Err(TransportError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(io::Error::other(e)).at("receive", ""),
            }
        }
    }
}

/// How long it is until then.
pub fn until(then: Instant) -> Timespec {
    let left = then.saturating_duration_since(Instant::now());
    // No longer than a report may wait: it fits.
    Timespec::try_from(left).unwrap_or(Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    })
}

/// Without its plan no call could be answered: the pod ends, rather than wait.
fn take_listeners(
    broker: &mut Broker,
    container: u32,
    mut fds: Vec<OwnedFd>,
) -> Result<(), StepError> {
    if fds.is_empty() {
        return Err(StepError::invalid("receive", "listeners", "no descriptor"));
    }
    let listeners = fds.split_off(1);
    let plan: BrokerPlan = read_plan(fds.remove(0))
        .map_err(io::Error::other)
        .at("read", "broker plan")?;
    broker.take(container, plan, listeners);
    Ok(())
}

fn send(channel: &Channel, message: &FromAgent) -> Result<(), StepError> {
    channel
        .send(message, &[])
        .map_err(io::Error::other)
        .at("answer", "shim")
}

/// Empties a signalfd; the signals say nothing that reaping doesn't.
pub fn drain(signals: &OwnedFd) {
    let mut buffer = [0u8; 1024];
    while rustix::io::read(signals, &mut buffer).is_ok_and(|n| n > 0) {}
}

fn configure(channel: &Channel) -> Result<(), StepError> {
    let received = channel
        .receive::<ToAgent>(true)
        .map_err(io::Error::other)
        .at("receive", "plan")?;
    let Some((ToAgent::Configure, mut fds)) = received else {
        return Err(StepError::invalid(
            "receive",
            "plan",
            "not a Configure message",
        ));
    };
    let fd = fds
        .pop()
        .ok_or_else(|| StepError::invalid("receive", "plan", "no descriptor"))?;
    let plan: PodPlan = read_plan(fd)
        .map_err(io::Error::other)
        .at("read", "pod plan")?;

    private_root()?;
    if !plan.hostname.is_empty() {
        namespace::set_hostname(&plan.hostname).at("set host name", &plan.hostname)?;
    }
    if !plan.domainname.is_empty() {
        namespace::set_domainname(&plan.domainname).at("set domain name", &plan.domainname)?;
    }
    for (name, value) in &plan.sysctls {
        std::fs::write(format!("/proc/sys/{name}"), value).at("set sysctl", name)?;
    }
    confine::agent(&plan)
}

/// A root of our own with nothing in it but /proc, the staging mount and an
/// empty directory to assemble containers on. proc must be made while the
/// host's, fully visible, is still in this namespace (user_namespaces(7)).
fn private_root() -> Result<(), StepError> {
    let staging = clone_tree(CWD, Path::new("/staging"), true, false).at("clone", "/staging")?;
    let proc = NewFs::open("proc")
        .and_then(|fs| fs.mount(attr::NOSUID | attr::NODEV | attr::NOEXEC))
        .at(
            "mount proc; it must be fully visible on the node, without masks,",
            "/proc",
        )?;
    let tmpfs = NewFs::open("tmpfs").at("open", "tmpfs")?;
    for (key, value) in [("size", "64k"), ("nr_inodes", "64"), ("mode", "0755")] {
        tmpfs.string(key, value).at("configure tmpfs", key)?;
    }
    let root = tmpfs
        .mount(attr::NOSUID | attr::NODEV | attr::NOEXEC)
        .at("mount", "tmpfs")?;
    mount::attach(&root, CWD, "/root").at("attach", "/root")?;
    for name in ["proc", "staging", "new"] {
        rustix::fs::mkdirat(&root, name, Mode::from(0o755)).at("make directory", name)?;
    }
    mount::attach(&proc, &root, "proc").at("attach", "/proc")?;
    mount::attach(&staging, &root, "staging").at("attach", "/staging")?;
    mount::change_root(&root).at("change root", "")
}

/// Forks the process that becomes a container's forker. It answers on the
/// container's own channel, so nothing is to be said here.
fn launch(mut fds: Vec<OwnedFd>) {
    if fds.len() < 3 {
        return;
    }
    let more: Vec<OwnedFd> = fds.drain(3..).collect();
    let (Some(namespace_b), Some(plan), Some(channel)) = (fds.pop(), fds.pop(), fds.pop()) else {
        return;
    };
    let channel = Channel::new(channel);
    match process::fork_into(casemate_sys::namespace::kind::MOUNT, None) {
        Ok(Fork::Parent(..)) => {}
        Ok(Fork::Child) => {
            let mut keep = vec![channel.as_fd(), plan.as_fd(), namespace_b.as_fd()];
            keep.extend(more.iter().map(AsFd::as_fd));
            // The agent's own descriptors end here, its values are never used again.
            let closed = exec::close_all_except(&keep).at("close", "inherited descriptors");
            drop(keep);
            let result = closed.and_then(|()| {
                let plan: LaunchPlan = read_plan(plan)
                    .map_err(io::Error::other)
                    .at("read", "launch plan")?;
                launch::assemble(&plan, more, namespace_b, &channel)
            });
            match result {
                Ok(container) => crate::forker::run(channel, container),
                Err(error) => {
                    let text = clip(&error.to_string());
                    let _ = channel.send(&FromForker::LaunchFailed { text }, &[]);
                    process::exit_now(1)
                }
            }
        }
        Err(error) => {
            let text = clip(&format!("fork the container's forker: {error}"));
            let _ = channel.send(&FromForker::LaunchFailed { text }, &[]);
        }
    }
}

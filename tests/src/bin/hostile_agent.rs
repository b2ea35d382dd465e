//! An agent that lies. The pod's host name says how: either it answers the shim
//! itself, or it puts itself between the shim and a real agent (whose program is
//! appended to this one's), and changes what a forker says.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use casemate_protocol::plan::PodPlan;
use casemate_protocol::{
    AGENT_SOCKET, Channel, Denial, FromAgent, FromForker, FromLearner, FromPause, Seen, ToAgent,
    ToForker, ToLearner,
};
use casemate_protocol::{VERSION, read_plan};
use casemate_sys::process::{self, Fork};
use casemate_sys::{exec, message, mount};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags};

/// A reply that no channel can be read after.
type Answer<T> = io::Result<T>;

fn main() {
    if let Err(error) = run() {
        // Nobody reads it but a debugger.
        eprintln!("hostile agent: {error}");
    }
    process::exit_now(1)
}

fn other(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

fn run() -> Answer<()> {
    let control = mount::adopt_inherited(AGENT_SOCKET)?;
    let shim = Channel::new(control.try_clone()?);
    let Some((ToAgent::Configure, fds)) = shim.receive::<ToAgent>(true).map_err(other)? else {
        return Err(other("no Configure"));
    };
    let plan = fds.last().ok_or_else(|| other("no plan"))?.try_clone()?;
    let plan: PodPlan = read_plan(plan).map_err(other)?;
    let word = plan.hostname;
    if word.starts_with("agent-") {
        agent(&shim, &control, &word)?;
        return wait_for_the_end(&shim);
    }
    if word.starts_with("launch-") {
        shim.send(&FromAgent::Ready { version: VERSION }, &[])
            .map_err(other)?;
        while let Some((message, fds)) = shim.receive::<ToAgent>(true).map_err(other)? {
            if let ToAgent::Launch = message {
                launch(fds, &word)?;
            }
        }
        return Ok(());
    }
    if word.starts_with("pause-") {
        shim.send(&FromAgent::Ready { version: VERSION }, &[])
            .map_err(other)?;
        while let Some((message, fds)) = shim.receive::<ToAgent>(true).map_err(other)? {
            if let ToAgent::Pause = message {
                pause(fds, &word)?;
            }
        }
        return Ok(());
    }
    between(shim, control, fds, &word)
}

/// What it says as the pause, or makes of one.
fn pause(mut fds: Vec<OwnedFd>, word: &str) -> Answer<()> {
    if fds.is_empty() {
        return Err(other("no channel"));
    }
    let raw = fds.remove(0);
    let channel = Channel::new(raw.try_clone()?);
    let say = |fds: &[&OwnedFd]| {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        channel.send(&FromPause::Ready, &fds).map_err(other)
    };
    let own = process::open_pidfd(process::own_pid())?;
    match word {
        "pause-garbage" => message::send(&raw, &[0xff; 64], &[]),
        "pause-oversize" => message::send(&raw, &[0; 20_000], &[]),
        "pause-close" => Ok(()),
        "pause-no-descriptor" => say(&[]),
        "pause-no-pidfd" => say(&[&null()?]),
        "pause-many-pidfds" => say(&[&own, &own, &own]),
        "pause-is-the-agent" => say(&[&own]),
        "pause-long-text" => channel
            .send(
                &FromPause::Failed {
                    text: "\u{1b}[31mline\nanother\r\n".repeat(100),
                },
                &[],
            )
            .map_err(other),
        // Never an end of it.
        "pause-nothing" => {
            std::mem::forget(raw);
            std::mem::forget(channel);
            Ok(())
        }
        // From here on there is a child to show: with no lock but the agent's.
        _ => match process::fork()? {
            Fork::Child => {
                drop((raw, channel, fds));
                loop {
                    std::thread::sleep(std::time::Duration::from_secs(1));
                }
            }
            Fork::Parent(_, child) => {
                say(&[&child])?;
                if word == "pause-ready-for-ever" {
                    // The shim hangs up: that is an error, and the end.
                    for _ in 0..10_000 {
                        if say(&[&child]).is_err() {
                            break;
                        }
                    }
                }
                Ok(())
            }
        },
    }
}

fn wait_for_the_end(shim: &Channel) -> Answer<()> {
    while shim.receive::<ToAgent>(true).map_err(other)?.is_some() {}
    Ok(())
}

fn null() -> Answer<OwnedFd> {
    // No /dev in the staging namespace: any file that is no pidfd will do.
    Ok(rustix::fs::open(
        "/proc/self/stat",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// What it says of itself.
fn agent(shim: &Channel, raw: &OwnedFd, word: &str) -> Answer<()> {
    let ready = FromAgent::Ready { version: VERSION };
    let send = |message: &FromAgent| shim.send(message, &[]).map_err(other);
    match word {
        "agent-old" => send(&FromAgent::Ready { version: 0 }),
        "agent-future" => send(&FromAgent::Ready { version: 9999 }),
        "agent-garbage" => message::send(raw, &[0xff; 64], &[]),
        "agent-oversize" => message::send(raw, &[0; 20_000], &[]),
        "agent-nothing" => Ok(()),
        "agent-long-text" => send(&FromAgent::Failed {
            text: "\u{1b}[31mline\nanother\r\n".repeat(100),
        }),
        "agent-descriptors" => {
            let file = null()?;
            let many: Vec<_> = (0..32).map(|_| file.as_fd()).collect();
            shim.send(&ready, &many).map_err(other)
        }
        _ => {
            for _ in 0..100 {
                send(&ready)?;
            }
            Ok(())
        }
    }
}

/// What it says as a forker, or makes of one.
fn launch(mut fds: Vec<OwnedFd>, word: &str) -> Answer<()> {
    if fds.is_empty() {
        return Err(other("no channel"));
    }
    let raw = fds.remove(0);
    let channel = Channel::new(raw.try_clone()?);
    let own = process::open_pidfd(process::own_pid())?;
    let say = |message: &FromForker, fds: &[&OwnedFd]| {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        channel.send(message, &fds).map_err(other)
    };
    match word {
        "launch-garbage" => message::send(&raw, &[0xff; 64], &[]),
        "launch-oversize" => message::send(&raw, &[0; 20_000], &[]),
        "launch-close" => Ok(()),
        "launch-no-descriptor" => say(&FromForker::Ready, &[]),
        "launch-no-pidfd" => say(&FromForker::Ready, &[&null()?]),
        "launch-itself" => say(&FromForker::Ready, &[&own]),
        "launch-spawned" => say(&FromForker::Spawned { key: 0 }, &[&own]),
        "launch-exited" => say(&FromForker::Exited { key: 0, status: 0 }, &[]),
        "launch-long-text" => say(
            &FromForker::LaunchFailed {
                text: "\u{1b}[31mline\nanother\r\n".repeat(100),
            },
            &[],
        ),
        // From here on there is a child to show.
        _ => match process::fork()? {
            Fork::Child => loop {
                std::thread::sleep(std::time::Duration::from_secs(1));
            },
            Fork::Parent(_, child) => {
                say(&FromForker::Ready, &[&child])?;
                if channel.receive::<ToForker>(true).map_err(other)?.is_none() {
                    return Ok(());
                }
                match word {
                    "launch-init-is-the-forker" => say(&FromForker::Spawned { key: 0 }, &[&child]),
                    "launch-init-is-the-agent" => say(&FromForker::Spawned { key: 0 }, &[&own]),
                    "launch-init-of-another-key" => say(&FromForker::Spawned { key: 7 }, &[&child]),
                    "launch-ready-twice" => say(&FromForker::Ready, &[&child]),
                    _ => say(&FromForker::Started { key: 0 }, &[]),
                }
            }
        },
    }
}

/// Becomes the real agent, with a relay between it and the shim.
fn between(shim: Channel, mut control: OwnedFd, plan: Vec<OwnedFd>, word: &str) -> Answer<()> {
    let real = real_agent()?;
    let (ours, theirs) = message::pair()?;
    let agent = Channel::new(ours);
    let plan: Vec<_> = plan.iter().map(AsFd::as_fd).collect();
    agent.send(&ToAgent::Configure, &plan).map_err(other)?;
    match process::fork()? {
        Fork::Child => {
            drop((theirs, control));
            let _ = relay(shim, agent, word);
            process::exit_now(0)
        }
        Fork::Parent(..) => {
            drop((shim, agent));
            rustix::io::dup2(&theirs, &mut control)?;
            let name = CString::new("casemate-agent")?;
            Err(exec::exec_fd(&real, &[name], &[]))
        }
    }
}

/// The program that was appended: its bytes, their number, and eight more.
fn real_agent() -> Answer<OwnedFd> {
    let mut all = Vec::new();
    File::open("/proc/self/exe")?.read_to_end(&mut all)?;
    let tail = all.len().checked_sub(16).ok_or_else(|| other("no tail"))?;
    let size: [u8; 8] = all[tail..tail + 8].try_into().map_err(other)?;
    let from = usize::try_from(u64::from_le_bytes(size))
        .ok()
        .and_then(|size| tail.checked_sub(size))
        .ok_or_else(|| other("no agent inside"))?;
    let mut file = File::from(rustix::fs::memfd_create("agent", MemfdFlags::CLOEXEC)?);
    file.write_all(&all[from..tail])?;
    Ok(file.into())
}

/// A forker's channel, cut in two.
struct Cut {
    shim: Channel,
    raw: OwnedFd,
    forker: Channel,
}

fn relay(shim: Channel, agent: Channel, word: &str) -> Answer<()> {
    let mut cuts: BTreeMap<u32, Cut> = BTreeMap::new();
    let mut next = 0;
    loop {
        let mut fds = vec![
            PollFd::new(&shim, PollFlags::IN),
            PollFd::new(&agent, PollFlags::IN),
        ];
        let order: Vec<u32> = cuts.keys().copied().collect();
        for cut in cuts.values() {
            fds.push(PollFd::new(&cut.shim, PollFlags::IN));
            fds.push(PollFd::new(&cut.forker, PollFlags::IN));
        }
        poll(&mut fds, None)?;
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready[0] {
            let Some((message, mut fds)) = shim.receive::<ToAgent>(true).map_err(other)? else {
                return Ok(());
            };
            if let (ToAgent::Launch, Some(theirs)) = (&message, fds.first_mut()) {
                let (ours, forkers) = message::pair()?;
                let theirs = std::mem::replace(theirs, forkers);
                let cut = Cut {
                    raw: theirs.try_clone()?,
                    shim: Channel::new(theirs),
                    forker: Channel::new(ours),
                };
                cuts.insert(next, cut);
                next += 1;
            }
            if let (ToAgent::Learn, Some(theirs)) = (&message, fds.first_mut()) {
                let (ours, learners) = message::pair()?;
                let raw = std::mem::replace(theirs, learners);
                beside_learner(raw, Channel::new(ours), word)?;
            }
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            agent.send(&message, &fds).map_err(other)?;
            if let ToAgent::Broker { container } = message {
                lie_of_denials(&shim, container, word)?;
            }
        }
        if ready[1] {
            let Some((message, fds)) = agent.receive::<FromAgent>(true).map_err(other)? else {
                return Ok(());
            };
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            shim.send(&message, &fds).map_err(other)?;
        }
        for (n, id) in order.into_iter().enumerate() {
            let Some(cut) = cuts.get(&id) else { continue };
            let mut goes_on = true;
            if ready[2 + 2 * n] {
                goes_on = down(cut).unwrap_or(false);
            }
            if goes_on && ready[3 + 2 * n] {
                goes_on = up(cut, word).unwrap_or(false);
            }
            if !goes_on {
                cuts.remove(&id);
            }
        }
    }
}

/// What it says of refused calls, of which there were none.
fn lie_of_denials(shim: &Channel, container: u32, word: &str) -> Answer<()> {
    let honest = Denial {
        rule: 0,
        own: None,
        nr: 165,
        args: [0; 3],
        others: false,
        count: 1,
    };
    let say = |container: u32, list: Vec<Denial>| {
        let message = FromAgent::Denied { container, list };
        shim.send(&message, &[]).map_err(other)
    };
    match word {
        "denials-of-nobody" => say(container + 7, vec![honest]),
        "denials-of-no-rule" => say(
            container,
            vec![Denial {
                rule: 60_000,
                ..honest
            }],
        ),
        "denials-of-no-call" => say(
            container,
            vec![Denial {
                nr: u32::MAX,
                ..honest
            }],
        ),
        "denials-too-many" => say(
            container,
            vec![Denial {
                count: u64::MAX,
                ..honest
            }],
        ),
        "denials-of-no-filter" => say(
            container,
            vec![Denial {
                own: Some(1),
                ..honest
            }],
        ),
        "denials-that-never-end" => {
            // The shim takes a few a second: it is this process that waits.
            for n in 0..40u32 {
                let list = (0..40u32).map(|m| Denial {
                    args: [n, m, 0],
                    count: 1 << 20,
                    ..honest
                });
                say(container, list.collect())?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Puts a process between shim and learner, which lies once the learner is ready.
fn beside_learner(raw: OwnedFd, learner: Channel, word: &str) -> Answer<()> {
    if let Fork::Child = process::fork()? {
        let _ended = learner_relay(&raw, &learner, word);
        process::exit_now(0)
    }
    Ok(())
}

fn learner_relay(raw: &OwnedFd, learner: &Channel, word: &str) -> Answer<()> {
    let shim = Channel::new(raw.try_clone()?);
    let seen = |list: Vec<Seen>| shim.send(&FromLearner::Seen(list), &[]).map_err(other);
    let call = |nr: u32, args: [u32; 3], count: u64| Seen::Call { nr, args, count };
    loop {
        let mut fds = [
            PollFd::new(&shim, PollFlags::IN),
            PollFd::new(learner, PollFlags::IN),
        ];
        poll(&mut fds, None)?;
        let ready = fds.map(|fd| !fd.revents().is_empty());
        if ready[0] {
            let Some((message, _)) = shim.receive::<ToLearner>(true).map_err(other)? else {
                return Ok(());
            };
            learner.send(&message, &[]).map_err(other)?;
        }
        if !ready[1] {
            continue;
        }
        let Some((message, mut fds)) = learner.receive::<FromLearner>(true).map_err(other)? else {
            return Ok(());
        };
        let is_ready = matches!(message, FromLearner::Ready);
        match word {
            "learner-without-pidfd" => fds.clear(),
            "learner-is-the-agent" if is_ready => fds = vec![process::open_pidfd(1)?],
            "learner-is-no-process" if is_ready => fds = vec![null()?],
            "learner-failed" if is_ready => {
                let text = "\u{1b}[31mline\nanother\r\n".repeat(100);
                shim.send(&FromLearner::Failed { text }, &[])
                    .map_err(other)?;
                continue;
            }
            _ => {}
        }
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        shim.send(&message, &fds).map_err(other)?;
        if !is_ready {
            continue;
        }
        match word {
            "learner-garbage" => message::send(raw, &[0xff; 64], &[])?,
            "learner-oversize" => message::send(raw, &[0; 20_000], &[])?,
            "learner-ready-twice" => shim.send(&FromLearner::Ready, &[]).map_err(other)?,
            "learner-no-call" => seen(vec![call(9999, [0; 3], 1)])?,
            "learner-no-count" => seen(vec![call(0, [0; 3], u64::MAX)])?,
            "learner-no-arguments" => seen(vec![call(0, [7, 0, 0], 1)])?,
            "learner-no-port" => seen(vec![Seen::Bound(0)])?,
            "learner-a-path" => seen(vec![Seen::Directory("../../etc/passwd".into())])?,
            "learner-colours" => seen(vec![Seen::Directory("\u{1b}[31m".into())])?,
            "learner-hangs-up" => return Ok(()),
            "learner-that-never-ends" => {
                // The shim takes so many a second: it is this process that waits.
                for n in 0..800u32 {
                    let list = (0..20).flat_map(|m| {
                        let number = n * 20 + m;
                        let port = (number % 65_535) as u16 + 1;
                        [call(16, [number, 0, 0], 1 << 20), Seen::Connected(port)]
                    });
                    seen(list.collect())?;
                }
            }
            _ => {}
        }
    }
}

/// Shim to forker, as it is.
fn down(cut: &Cut) -> Answer<bool> {
    let Some((message, fds)) = cut.shim.receive::<ToForker>(true).map_err(other)? else {
        return Ok(false);
    };
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    cut.forker.send(&message, &fds).map_err(other)?;
    Ok(true)
}

/// Forker to shim. Init's life is told as it is, an exec's is not.
fn up(cut: &Cut, word: &str) -> Answer<bool> {
    let Some((message, mut fds)) = cut.forker.receive::<FromForker>(true).map_err(other)? else {
        return Ok(false);
    };
    let send = |message: &FromForker, fds: &[OwnedFd]| {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        cut.shim.send(message, &fds).map_err(other)
    };
    match message {
        FromForker::Spawned { key } if key > 0 => match word {
            "exec-is-the-agent" => fds = vec![process::open_pidfd(1)?],
            "exec-is-the-relay" => fds = vec![process::open_pidfd(process::own_pid())?],
            "exec-without-descriptor" => fds.clear(),
            "exec-without-pidfd" => fds = vec![null()?],
            "exec-with-many-descriptors" => {
                while fds.len() < 32 {
                    fds.push(null()?);
                }
            }
            "exec-of-another-key" => {
                send(&FromForker::Spawned { key: key + 1 }, &fds)?;
                return Ok(true);
            }
            "exec-twice" => send(&message, &fds)?,
            "exec-garbage" => message::send(&cut.raw, &[0xff; 64], &[])?,
            "exec-oversize" => message::send(&cut.raw, &[0; 20_000], &[])?,
            "exec-ended-before" => send(&FromForker::Exited { key, status: 3 }, &[])?,
            "exec-flood" => {
                let exited = FromForker::Exited {
                    key: 4242,
                    status: 0,
                };
                for _ in 0..100_000 {
                    send(&exited, &[])?;
                }
            }
            "exec-flood-of-descriptors" => {
                let file = null()?;
                let many: Vec<_> = (0..32).map(|_| file.as_fd()).collect();
                for _ in 0..10_000 {
                    cut.shim
                        .send(&FromForker::Started { key: 4242 }, &many)
                        .map_err(other)?;
                }
            }
            "exec-ready-again" => send(&FromForker::Ready, &fds)?,
            "exec-long-text" => {
                let text = "\u{1b}[31mline\nanother\r\n".repeat(100);
                let invalid = true;
                send(&FromForker::SpawnFailed { key, text, invalid }, &[])?;
                return Ok(true);
            }
            _ => {}
        },
        FromForker::Exited { key, .. } if key > 0 => match word {
            "exit-twice" => send(&message, &[])?,
            "exit-of-nobody" => send(
                &FromForker::Exited {
                    key: 4242,
                    status: 0,
                },
                &[],
            )?,
            "exit-huge" => {
                let status = u32::MAX;
                send(&FromForker::Exited { key, status }, &[])?;
                return Ok(true);
            }
            "exit-started" => send(&FromForker::Started { key: 0 }, &[])?,
            "exit-launch-failed" => send(
                &FromForker::LaunchFailed {
                    text: "too late".to_owned(),
                },
                &[],
            )?,
            "exit-hang-up" => return Ok(false),
            _ => {}
        },
        _ => {}
    }
    send(&message, &fds)?;
    Ok(true)
}

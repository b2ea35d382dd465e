//! What shim, agent and forker say to each other, with the limits that make
//! each side safe from the other.
//!
//! Four processes, three kinds of channel, both inherited SOCK_SEQPACKET pairs
//! (one message per packet, descriptors by SCM_RIGHTS):
//!
//! * shim ⇄ agent: [`ToAgent`], one for the pod. The agent only launches
//!   forkers and the pause; it answers nothing but [`FromAgent::Ready`].
//! * shim ⇄ forker: [`ToForker`] and [`FromForker`], one for each container.
//!   Everything about a container's processes comes in order on this one.
//! * shim ⇄ learner: [`ToLearner`] and [`FromLearner`], one for each container that
//!   is learned from.
//!
//! Packets towards the shim are at most [`MAX_PACKET`] bytes. What can be
//! larger (arguments, environment, filters) goes from the shim in a sealed
//! memfd beside the packet, and never the other way.
#![forbid(unsafe_code)]

pub mod capabilities;
pub mod plan;
mod transport;

use serde::{Deserialize, Serialize};

pub use transport::{Channel, TransportError, read_plan, seal_plan};

/// Version of these messages; a shim also speaks to agents one version back.
pub const VERSION: u16 = 11;
/// The largest packet, in bytes.
pub const MAX_PACKET: usize = 4096;
/// The largest plan that a memfd may hold, in bytes.
pub const MAX_PLAN: u64 = 8 * 1024 * 1024;
/// The longest text of an error, in bytes; longer ones are cut.
pub const MAX_TEXT: usize = 2048;
/// Number of the control socket in the agent at its start.
pub const AGENT_SOCKET: i32 = 3;
/// Number of the id range's lock in the agent at its start; more locks may
/// follow it.
pub const AGENT_LOCK: i32 = 4;
/// The most entries of one [`FromAgent::Denied`]: they fit into a packet.
pub const MAX_DENIALS: usize = 64;
/// The most entries of one [`FromLearner::Seen`]: they fit into a packet.
pub const MAX_SEEN: usize = 40;
/// The longest name of a directory in [`Seen::Directory`], in bytes.
pub const MAX_DIRECTORY: usize = 63;
/// Key of a container's init among its processes.
pub const INIT_KEY: u32 = 0;

/// From the shim to the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToAgent {
    /// Set up the pod. Descriptor: the plan ([`plan::PodPlan`] in a memfd).
    /// Answered by [`FromAgent::Ready`].
    Configure,
    /// Make the forker of a container. Descriptors: the forker's channel, the
    /// plan ([`plan::LaunchPlan`] in a memfd), the user namespace B, and the
    /// files that put their writer into the cgroup: `tasks` of each hierarchy
    /// on v1, `cgroup.procs` on v2. Last, if the plan joins one, the pid
    /// namespace.
    Launch,
    /// Make the pod's pid namespace, which containers may share, and its first
    /// process, the pause. Descriptors: the channel for [`FromPause`], the plan
    /// ([`plan::PausePlan`] in a memfd), and the user namespace B.
    Pause,
    /// Answer refused calls. Descriptors: the plan ([`plan::BrokerPlan`] in a
    /// memfd), and the listeners of the container's filter.
    Broker {
        /// Names the container in [`FromAgent::Denied`].
        container: u32,
    },
    /// Say [`FromAgent::Pong`].
    Ping,
    /// Make the learner of a container: the process that writes its calls down.
    /// Descriptors: the channel for [`FromLearner`], the plan ([`plan::LearnPlan`]
    /// in a memfd), the user namespace B, and the listeners of the container's
    /// filter.
    Learn,
}

/// From the shim to a container's learner.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToLearner {
    /// Say [`FromLearner::Pong`].
    Ping,
}

/// From a container's learner.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromLearner {
    /// Locked, and answering from now on. Descriptor: a pidfd of it.
    Ready,
    /// It could not be made, and ends.
    Failed {
        /// One line: step and reason.
        text: String,
    },
    /// What is new, or happened again: at most [`MAX_SEEN`].
    Seen(Vec<Seen>),
    /// It heard [`ToLearner::Ping`].
    Pong,
}

/// Something that a container did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seen {
    /// Calls of one kind.
    Call {
        /// Number of the call.
        nr: u32,
        /// The arguments that [`plan::LearnPlan::kinds`] chooses, cut down as it
        /// says, in its order.
        args: [u32; 3],
        /// How many since it last said so.
        count: u64,
    },
    /// It bound an internet socket to this port.
    Bound(u16),
    /// It connected one to this port of others, or sent there.
    Connected(u16),
    /// It named an absolute path below this directory of the root; empty: the root
    /// itself.
    Directory(String),
    /// What there was no room for, or what couldn't be read, by number.
    Lost {
        /// Calls of more kinds than are told apart.
        calls: u64,
        /// Ports.
        ports: u64,
        /// Directories.
        directories: u64,
        /// Addresses and paths that the caller's memory didn't give.
        unread: u64,
    },
}

/// From the first process of the pod's pid namespace. That the channel ends
/// after [`FromPause::Ready`] says that its filter is on too: the last thing
/// that it ever does.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromPause {
    /// Set up, but for its filter. Descriptor: a pidfd of it.
    Ready,
    /// It could not be made, and ends.
    Failed {
        /// One line: step and reason.
        text: String,
    },
}

/// From the agent to the shim.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromAgent {
    /// Set up and locked down.
    Ready {
        /// [`VERSION`] of the agent.
        version: u16,
    },
    /// It could not set itself up, and ends.
    Failed {
        /// One line: step and reason.
        text: String,
    },
    /// Calls of a container that were refused since it last said so.
    Denied {
        /// Which one, as in [`ToAgent::Broker`].
        container: u32,
        /// At most [`MAX_DENIALS`].
        list: Vec<Denial>,
    },
    /// It heard [`ToAgent::Ping`].
    Pong,
}

/// Refused calls of one sort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// Number of the rule; `u16::MAX` where none was found.
    pub rule: u16,
    /// The error of the specification's own filter, where that refuses it, too or
    /// alone.
    pub own: Option<u16>,
    /// Number of the call.
    pub nr: u32,
    /// The arguments that [`plan::BrokerPlan::classes`] chooses, low halves.
    pub args: [u32; 3],
    /// Stands for all others too, of which there is no room to tell more.
    pub others: bool,
    /// How many.
    pub count: u64,
}

/// From the shim to the forker of a container.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToForker {
    /// Fork a process. Descriptors: the plan ([`plan::ProcessPlan`] in a
    /// memfd), then stdin, stdout, stderr unless the plan wants a terminal.
    Spawn {
        /// Names the process from now on.
        key: u32,
        /// Wait for [`ToForker::Go`] before exec (a container's init).
        parked: bool,
    },
    /// Let a parked process exec.
    Go {
        /// Which one.
        key: u32,
    },
    /// Go on after [`FromForker::Waiting`]. Descriptors, where the plan has
    /// hooks and it is their turn: /dev/null, then of each hook its program and
    /// its standard input.
    Proceed,
}

/// From the forker (or, before it exists, from the process that becomes it).
#[derive(Debug, Serialize, Deserialize)]
pub enum FromForker {
    /// The container is assembled and the forker locked down. Descriptors: a
    /// pidfd of the forker; where init exists already, one of init; then, where
    /// the plan has a filter that asks, its listeners: of the forker, and of init.
    Ready,
    /// The container can't be made; the sender ends.
    LaunchFailed {
        /// One line: step, object, reason.
        text: String,
    },
    /// A process exists (and has passed exec, unless parked). Descriptors: its
    /// pidfd, and the terminal's master if it has one.
    Spawned {
        /// Which one.
        key: u32,
    },
    /// A process could not be made; no exit follows.
    SpawnFailed {
        /// Which one.
        key: u32,
        /// One line: step, object, reason.
        text: String,
        /// The request was at fault (missing binary, bad cwd), not the sandbox.
        invalid: bool,
    },
    /// A parked process has passed exec.
    Started {
        /// Which one.
        key: u32,
    },
    /// A process has ended and was reaped.
    Exited {
        /// Which one.
        key: u32,
        /// Exit code, or 128 + signal.
        status: u32,
    },
    /// On the way to [`FromForker::Ready`]: as the plan demands, the sender waits
    /// for [`ToForker::Proceed`]. Descriptor: its pidfd.
    Waiting,
}

/// Cuts a text to [`MAX_TEXT`] and one line, for a message.
pub fn clip(text: &str) -> String {
    let mut out: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_TEXT / 4)
        .collect();
    out.truncate(out.trim_end().len());
    out
}

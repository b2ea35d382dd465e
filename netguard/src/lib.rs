//! The guard of a pod's network: rules of nftables in its network namespace,
//! where nobody in the pod has a capability, so that it can't remove them.
//!
//! Written for what a sandbox needs and no more: one table, replaced as a whole in
//! one transaction, and its counters read again. The calling thread must be in
//! the namespace and have CAP_NET_ADMIN over it.
#![forbid(unsafe_code)]

mod expression;
mod listing;
mod refusals;
mod socket;
mod table;
mod wire;

use std::io;
use std::net::IpAddr;

pub use listing::{Line, installed, promised};
pub use refusals::{Refused, Watch, refused};
pub use table::{COMMENT_LENGTH, MOST_REFUSED, counters, install};

/// The table's name, in the family inet.
pub const TABLE: &str = "casemate";

/// The group of nfnetlink_log that hears of refused packets.
const GROUP: u16 = 0xca5e;

/// What of the rules holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Installed {
    /// Refused packets are shown to a [`Watch`]; not where the kernel has no
    /// nfnetlink_log.
    pub shows: bool,
}

/// Which way packets go, as the pod sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Into the pod.
    In,
    /// Out of it.
    Out,
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// As IP numbers it.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// Ports, both of them included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

/// Where packets go to, or come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// How it is told in counters: one line, at most [`COMMENT_LENGTH`] bytes.
    pub name: String,
    /// Of the other side.
    pub address: IpAddr,
    /// How many bits of the address count.
    pub prefix: u8,
    /// Destination ports; `None`: all.
    pub ports: Option<Ports>,
    /// Which protocols; empty: all, and then no ports.
    pub protocols: Vec<Protocol>,
}

/// What holds for a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Nothing goes there, whatever else is said.
    pub denied: Vec<Target>,
    /// If given, connections go nowhere else.
    pub egress: Option<Vec<Target>>,
    /// If given, connections come from nowhere else.
    pub ingress: Option<Vec<Target>>,
}

impl Rules {
    /// Nothing to hold.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.denied.is_empty() && self.egress.is_none() && self.ingress.is_none()
    }

    /// Connections have to be tracked.
    #[must_use]
    pub fn needs_tracking(&self) -> bool {
        self.egress.is_some() || self.ingress.is_some()
    }
}

/// What a rule has counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// What the rule is for, as `egress denied 169.254.169.254`.
    pub name: String,
    /// Packets that met it.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Why the guard couldn't be set up or read.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// No nf_tables in this kernel.
    #[error("this kernel has no nf_tables ({0})")]
    Missing(io::Error),
    /// nf_tables is there, but not this part of it.
    #[error("nf_tables: {what}: {reason}")]
    Refused {
        /// Which rule or chain.
        what: String,
        /// The kernel's reason.
        reason: io::Error,
    },
    /// Talking to the kernel failed.
    #[error("netlink: {0}")]
    Io(#[from] io::Error),
    /// The kernel said something else than was asked.
    #[error("netlink: {0}")]
    Unexpected(&'static str),
}

//! The port lock: what Landlock is to know of a list. It knows TCP ports and no
//! addresses, so it would hold a pod's own connections to itself as well; a list
//! says with `loopback:…` which ports these need, and without that it is off.

use super::{Entry, EntryError, Transport, decimal, wrong};

/// The most ports that are locked open: each is a rule of every domain.
pub const MOST_PORTS: usize = 1024;

/// What a list says of the pod's own addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Loopback {
    /// Nothing.
    #[default]
    Unsaid,
    /// `loopback:*`.
    All,
    /// `loopback:none` (no port), or ports from the first to the last.
    Ports(Vec<(u16, u16)>),
}

impl Loopback {
    /// One more entry, `loopback:` and this.
    pub(super) fn add(&mut self, entry: &str, ports: &str) -> Result<(), EntryError> {
        let alone = *self == Self::Unsaid;
        match (ports, &mut *self) {
            ("*", _) if alone => *self = Self::All,
            ("none", _) if alone => *self = Self::Ports(Vec::new()),
            ("*" | "none", _) | (_, Self::All) => {
                return Err(wrong(entry, "stands beside other entries of loopback"));
            }
            (_, Self::Ports(ports)) if ports.is_empty() => {
                return Err(wrong(entry, "stands beside loopback:none"));
            }
            (some, Self::Ports(ports)) => ports.push(range(entry, some)?),
            (some, Self::Unsaid) => *self = Self::Ports(vec![range(entry, some)?]),
        }
        Ok(())
    }
}

/// `first-last`, or one port.
pub(super) fn range(entry: &str, text: &str) -> Result<(u16, u16), EntryError> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (decimal(first), decimal(last)) {
        (Some(first), Some(last)) if 0 < first && first <= last => Ok((first, last)),
        _ => Err(wrong(
            entry,
            "has no port from 1 to 65535, first-last, or *",
        )),
    }
}

/// Which TCP ports there are for one direction, whatever the addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortLock {
    /// All, and why.
    Off(&'static str),
    /// These, from the first to the last; in order, none twice.
    On(Vec<(u16, u16)>),
}

impl Default for PortLock {
    fn default() -> Self {
        Self::Off("there is no list")
    }
}

impl PortLock {
    /// Of a list.
    ///
    /// # Errors
    /// It asks for the lock and has more ports than that takes.
    pub(super) fn of(loopback: &Loopback, entries: &[Entry]) -> Result<Self, EntryError> {
        let mut ranges = match loopback {
            Loopback::Unsaid => return Ok(Self::Off("the list says nothing of loopback")),
            Loopback::All => return Ok(Self::Off("the list has loopback:*")),
            Loopback::Ports(ports) => ports.clone(),
        };
        for entry in entries {
            match (entry.transport, entry.ports) {
                (Some(Transport::Udp | Transport::Sctp), _) => {}
                (_, Some(ports)) => ranges.push(ports),
                (_, None) => {
                    return Err(wrong(
                        &entry.to_string(),
                        "has all ports of TCP, which leaves loopback:… nothing to lock: give it \
                         ports, or write loopback:*",
                    ));
                }
            }
        }
        let merged = merged(ranges);
        let count: usize = merged
            .iter()
            .map(|(first, last)| usize::from(last - first) + 1)
            .sum();
        if count > MOST_PORTS {
            return Err(wrong(
                "loopback:…",
                format!(
                    "locks TCP ports, of which the list has {count}, and {MOST_PORTS} is the most: \
                     name fewer, or write loopback:*"
                ),
            ));
        }
        Ok(Self::On(merged))
    }

    /// The ports, where it is on.
    #[must_use]
    pub fn ports(&self) -> Option<&[(u16, u16)]> {
        match self {
            Self::Off(_) => None,
            Self::On(ports) => Some(ports),
        }
    }
}

fn merged(mut ranges: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if u32::from(first) <= u32::from(before.1) + 1 => {
                before.1 = before.1.max(last);
            }
            _ => merged.push((first, last)),
        }
    }
    merged
}

//! Calls as they were seen, as far as a profile may decide by them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::interp::SeccompData;
use crate::table;

/// An argument, the bits of its low word that count, and what it is called.
pub(crate) type Class = (u8, u32, &'static str);

/// Of which calls which arguments tell kinds apart. Low words all of them, as the
/// kernel reads these arguments.
const CLASSES: &[(&str, &[Class])] = &[
    (
        "socket",
        &[
            (0, u32::MAX, "family"),
            (1, 0xf, "type"),
            (2, u32::MAX, "protocol"),
        ],
    ),
    ("socketpair", &[(0, u32::MAX, "family"), (1, 0xf, "type")]),
    (
        "setsockopt",
        &[(1, u32::MAX, "level"), (2, u32::MAX, "option")],
    ),
    ("ioctl", &[(1, u32::MAX, "request")]),
    ("prctl", &[(0, u32::MAX, "option")]),
    ("arch_prctl", &[(0, u32::MAX, "option")]),
    ("madvise", &[(2, u32::MAX, "advice")]),
    ("clone", &[(0, 0x7e02_0000, "namespaces")]),
    ("personality", &[(0, u32::MAX, "persona")]),
    (
        "seccomp",
        &[(0, u32::MAX, "operation"), (1, u32::MAX, "flags")],
    ),
    ("mknod", &[(1, 0xf000, "kind")]),
    ("mknodat", &[(2, 0xf000, "kind")]),
    ("keyctl", &[(0, u32::MAX, "operation")]),
];

/// The arguments of call `number` that tell its kinds apart, with the bits that do.
pub(crate) fn classes(number: u32) -> &'static [Class] {
    let name = table::name(number).unwrap_or_default();
    CLASSES
        .iter()
        .find(|(known, _)| *known == name)
        .map_or(&[], |(_, classes)| classes)
}

/// Of which calls, by number, which bits of which arguments tell kinds apart: at most
/// three of one, all below 32.
pub fn told_apart() -> impl Iterator<Item = (u32, Vec<(u8, u32)>)> {
    let bits = |classes: &[Class]| classes.iter().map(|(at, mask, _)| (*at, *mask)).collect();
    CLASSES
        .iter()
        .filter_map(move |(name, classes)| Some((table::number(name)?, bits(classes))))
}

/// A kind of call: a number, and the arguments that tell kinds apart; all others 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind {
    /// The number of the call.
    pub number: u32,
    /// Its arguments, as far as they count.
    pub args: [u64; 6],
}

impl Kind {
    /// The kind of a call through the x86-64 ABI.
    #[must_use]
    pub fn of(number: u32, args: &[u64; 6]) -> Self {
        let mut kept = [0; 6];
        for &(index, mask, _) in classes(number) {
            let at = usize::from(index);
            if let (Some(kept), Some(arg)) = (kept.get_mut(at), args.get(at)) {
                *kept = arg & u64::from(mask);
            }
        }
        Self { number, args: kept }
    }

    /// The first in order of its number.
    pub(crate) fn first(number: u32) -> Self {
        let args = [0; 6];
        Self { number, args }
    }

    /// A call of this kind.
    #[must_use]
    pub fn call(&self) -> SeccompData {
        SeccompData::x86_64(self.number, self.args)
    }
}

/// `socket(family 2, type 1, protocol 6)`, `openat`, `call 999`.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match table::name(self.number) {
            Some(name) => f.write_str(name)?,
            None => write!(f, "call {}", self.number)?,
        }
        for (at, (index, _, what)) in classes(self.number).iter().enumerate() {
            let arg = self.args.get(usize::from(*index)).copied().unwrap_or(0);
            let before = if at == 0 { "(" } else { ", " };
            if arg < 0x400 {
                write!(f, "{before}{what} {arg}")?;
            } else {
                write!(f, "{before}{what} {arg:#x}")?;
            }
        }
        match classes(self.number) {
            [] => Ok(()),
            _ => f.write_str(")"),
        }
    }
}

/// A set of kinds of calls. What it takes in is bounded by the kinds there are, for
/// arguments by [`Observed::KINDS`] of one call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed(BTreeMap<u32, BTreeSet<Kind>>);

impl Observed {
    /// How many kinds of one call are kept; the rest are dropped, so that a
    /// workload can't grow the set as it likes.
    pub const KINDS: usize = 512;

    /// Takes in a call through the x86-64 ABI; whether it is new. Numbers without a
    /// name are not kept: no profile can allow them.
    pub fn add(&mut self, number: u32, args: &[u64; 6]) -> bool {
        if table::name(number).is_none() {
            return false;
        }
        let kinds = self.0.entry(number).or_default();
        kinds.len() < Self::KINDS && kinds.insert(Kind::of(number, args))
    }

    /// All kinds, by number.
    pub fn kinds(&self) -> impl Iterator<Item = &Kind> {
        self.0.values().flatten()
    }

    /// The kinds of one call.
    pub fn of(&self, number: u32) -> impl Iterator<Item = &Kind> {
        self.0.get(&number).into_iter().flatten()
    }

    /// How many calls, by number.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.0.len()
    }
}

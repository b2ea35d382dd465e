//! The profile model and its TOML form.
//!
//! A profile is a list of groups, a group is one action and its rules, a rule
//! is a list of calls, perhaps with argument conditions, and the reason why it
//! is there. Groups and rules are tried in file order and the first that matches
//! a call decides; a call that no rule matches gets `default`, a number that has
//! no name in [`crate::table`] gets `unknown`.
//!
//! ```toml
//! name = "example"
//! description = "only local sockets"
//! default = "errno(ENOSYS)"
//!
//! [[group]]
//! name = "sockets"
//! action = "allow"
//!
//! [[group.rule]]
//! syscalls = ["socket", "socketpair"]
//! args = [{ index = 0, op = "eq", value = 1 }] # AF_UNIX
//! reason = "talks to its neighbours in the pod"
//! ```
//!
//! Conditions compare the low 32 bits unless they say `width = 64`: the kernel
//! ignores the high word of an `int` argument, so a 64-bit comparison would let
//! a caller slip past a refusal by setting a bit there.

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::action::Action;
use crate::explain;
use crate::table;

/// `ENOSYS`: programs take it for an older kernel and use an older call.
pub const ENOSYS: Action = Action::Errno(38);

/// How many alternatives one rule may expand to.
const MAX_ALTERNATIVES: usize = 1024;
/// How many rules a profile may have: `SECCOMP_RET_DATA` has 16 bits for their index.
const MAX_RULES: usize = 4096;

/// A named set of rules.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// What the profile is called; for a shipped profile, its file name.
    pub name: String,
    /// Whom it is for and what it trades.
    pub description: String,
    /// Of a profile of a node: which shipped profile it is within, whose other locks
    /// come with it ([`crate::node`]).
    #[serde(default)]
    pub within: Option<String>,
    /// The answer to a named call that no rule matches.
    pub default: Action,
    /// The answer to a number that has no name; `ENOSYS` unless set.
    #[serde(default = "enosys")]
    pub unknown: Action,
    /// The answer to the x32 ABI (numbers from 0x4000_0000); `ENOSYS` unless set.
    #[serde(default = "enosys")]
    pub x32: Action,
    /// The rules, in the order in which they are tried.
    #[serde(default, rename = "group")]
    pub groups: Vec<Group>,
    /// Calls left to `default` on purpose, and why. Changes no verdict; lets a
    /// reader (and a test) see that every call was thought of.
    #[serde(default)]
    pub left_out: Vec<LeftOut>,
}

/// Rules that share an action.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// What the calls have in common.
    pub name: String,
    /// The answer when one of the rules matches.
    pub action: Action,
    /// The rules; one that matches is enough.
    #[serde(rename = "rule")]
    pub rules: Vec<Rule>,
}

/// Calls, conditions on their arguments, and the reason.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Names as in [`crate::table`].
    pub syscalls: Vec<String>,
    /// All must hold; empty matches every call of that name.
    #[serde(default)]
    pub args: Vec<ArgSet>,
    /// Why the rule exists. Mandatory.
    pub reason: String,
    /// Programs probe for it all the time: a refusal is nobody's news.
    #[serde(default)]
    pub quiet: bool,
}

/// A condition in which any of several values will do.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, try_from = "RawArgSet")]
pub struct ArgSet {
    /// Argument, 0 to 5.
    pub index: u8,
    /// The comparison.
    pub op: Op,
    /// The condition holds when the comparison does for one of these.
    pub values: Vec<u64>,
    /// How many bits of the argument are looked at.
    pub width: Width,
}

/// A call left to the default action on purpose.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeftOut {
    /// Names as in [`crate::table`].
    pub syscalls: Vec<String>,
    /// Why no rule mentions them.
    pub reason: String,
    /// As of a [`Rule`].
    #[serde(default)]
    pub quiet: bool,
}

/// A comparison of an argument with a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less than, unsigned.
    Lt,
    /// Less than or equal, unsigned.
    Le,
    /// Greater than, unsigned.
    Gt,
    /// Greater than or equal, unsigned.
    Ge,
    /// Equal on the bits of this mask.
    MaskedEq(u64),
}

/// How many bits of an argument a condition looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Width {
    /// The low word, as the kernel does for `int`-typed arguments.
    W32,
    /// The whole register: pointers, sizes, `unsigned long`.
    W64,
}

/// One comparison of one argument with one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Condition {
    /// Argument, 0 to 5.
    pub index: u8,
    /// The comparison.
    pub op: Op,
    /// What the argument is compared with.
    pub value: u64,
    /// How many bits of the argument are looked at.
    pub width: Width,
}

/// A profile that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// Not TOML, a field missing, unknown or of the wrong type.
    #[error("read seccomp profile: {reason}")]
    Syntax {
        /// What the parser found, on one line.
        reason: String,
    },
    /// A name that x86-64 does not have.
    #[error(
        "read seccomp profile {profile}: group \"{group}\", syscalls: \"{syscall}\" is no x86-64 system call; correct or remove it"
    )]
    UnknownSyscall {
        /// The profile.
        profile: String,
        /// The group, or `left_out`.
        group: String,
        /// The name as found.
        syscall: String,
    },
    /// A text that must say something is empty.
    #[error("read seccomp profile {profile}: group \"{group}\": {field} is empty; fill it in")]
    Empty {
        /// The profile.
        profile: String,
        /// The group, or `left_out`.
        group: String,
        /// The field.
        field: &'static str,
    },
    /// `left_out` names a call that a rule decides.
    #[error(
        "read seccomp profile {profile}: left_out names \"{syscall}\", which group \"{group}\" decides; remove one of them"
    )]
    NotLeftOut {
        /// The profile.
        profile: String,
        /// The group.
        group: String,
        /// The call.
        syscall: String,
    },
    /// Two groups whose rules would have the same ids.
    #[error(
        "read seccomp profile {profile}: group \"{group}\" has the same id as another group, or one that is reserved; give it another name"
    )]
    SameId {
        /// The profile.
        profile: String,
        /// The group.
        group: String,
    },
    /// More rules than a verdict can name.
    #[error(
        "read seccomp profile {profile}: {count} rules, at most {MAX_RULES} are allowed; use fewer"
    )]
    TooManyRules {
        /// The profile.
        profile: String,
        /// How many.
        count: usize,
    },
    /// The combinations of values in one rule are too many.
    #[error(
        "read seccomp profile {profile}: group \"{group}\": args make {count} alternatives, at most {MAX_ALTERNATIVES} are allowed; use ranges or a mask"
    )]
    TooManyAlternatives {
        /// The profile.
        profile: String,
        /// The group.
        group: String,
        /// How many.
        count: usize,
    },
}

fn enosys() -> Action {
    ENOSYS
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawArgSet {
    index: u8,
    op: String,
    value: Option<u64>,
    values: Option<Vec<u64>>,
    mask: Option<u64>,
    width: Option<u8>,
}

impl TryFrom<RawArgSet> for ArgSet {
    type Error = String;

    fn try_from(raw: RawArgSet) -> Result<Self, String> {
        if raw.index > 5 {
            return Err(format!(
                "args.index is {}, at most 5 is possible",
                raw.index
            ));
        }
        let width = match raw.width {
            None | Some(32) => Width::W32,
            Some(64) => Width::W64,
            Some(other) => return Err(format!("args.width is {other}, must be 32 or 64")),
        };
        let op = match (raw.op.as_str(), raw.mask) {
            ("masked_eq", Some(mask)) => Op::MaskedEq(mask),
            ("masked_eq", None) => return Err("args.op masked_eq needs mask".to_owned()),
            (_, Some(_)) => {
                return Err(format!("args.mask has no meaning with op \"{}\"", raw.op));
            }
            ("eq", _) => Op::Eq,
            ("ne", _) => Op::Ne,
            ("lt", _) => Op::Lt,
            ("le", _) => Op::Le,
            ("gt", _) => Op::Gt,
            ("ge", _) => Op::Ge,
            (other, _) => {
                return Err(format!(
                    "args.op is \"{other}\", must be one of eq, ne, lt, le, gt, ge, masked_eq"
                ));
            }
        };
        let values = match (raw.value, raw.values) {
            (Some(value), None) => vec![value],
            (None, Some(values)) if !values.is_empty() => values,
            _ => return Err("args needs either value or a list of values".to_owned()),
        };
        let mask = match op {
            Op::MaskedEq(mask) => Some(mask),
            _ => None,
        };
        for &number in values.iter().chain(&mask) {
            if width == Width::W32 && number > u64::from(u32::MAX) {
                return Err(format!(
                    "args value {number:#x} does not fit 32 bits; say width = 64"
                ));
            }
        }
        if let Some(mask) = mask
            && let Some(bad) = values.iter().find(|value| **value & !mask != 0)
        {
            return Err(format!(
                "args value {bad:#x} has bits outside mask {mask:#x}, it can never match"
            ));
        }
        Ok(Self {
            index: raw.index,
            op,
            values,
            width,
        })
    }
}

impl ArgSet {
    /// That these bits of the low word of an argument are those of `value`.
    #[must_use]
    pub fn one(index: u8, mask: u32, value: u64) -> Self {
        Self {
            index,
            op: match mask {
                u32::MAX => Op::Eq,
                mask => Op::MaskedEq(mask.into()),
            },
            values: vec![value],
            width: Width::W32,
        }
    }

    /// Whether the argument compares with one of the values.
    #[must_use]
    pub fn holds(&self, args: &[u64; 6]) -> bool {
        self.values.iter().any(|&value| {
            let condition = Condition {
                index: self.index,
                op: self.op,
                value,
                width: self.width,
            };
            condition.holds(args)
        })
    }
}

impl From<&Condition> for ArgSet {
    fn from(condition: &Condition) -> Self {
        Self {
            index: condition.index,
            op: condition.op,
            values: vec![condition.value],
            width: condition.width,
        }
    }
}

impl Condition {
    /// Whether the condition holds for these arguments.
    #[must_use]
    pub fn holds(&self, args: &[u64; 6]) -> bool {
        let keep = match self.width {
            Width::W32 => u64::from(u32::MAX),
            Width::W64 => u64::MAX,
        };
        let arg = args.get(usize::from(self.index)).copied().unwrap_or(0) & keep;
        let value = self.value & keep;
        match self.op {
            Op::Eq => arg == value,
            Op::Ne => arg != value,
            Op::Lt => arg < value,
            Op::Le => arg <= value,
            Op::Gt => arg > value,
            Op::Ge => arg >= value,
            Op::MaskedEq(mask) => arg & mask == value & mask,
        }
    }
}

impl Rule {
    /// How many lists of conditions [`Rule::alternatives`] makes.
    fn alternative_count(&self) -> usize {
        self.args.iter().fold(1, |count: usize, arg| {
            count.saturating_mul(arg.values.len())
        })
    }

    /// The rule as lists of plain conditions: the rule matches when all
    /// conditions of one list hold. An empty list always matches.
    #[must_use]
    pub fn alternatives(&self) -> Vec<Vec<Condition>> {
        alternatives(&self.args)
    }
}

/// All combinations of one value of each of `args`.
pub(crate) fn alternatives(args: &[ArgSet]) -> Vec<Vec<Condition>> {
    let mut lists = vec![Vec::new()];
    for arg in args {
        lists = lists
            .iter()
            .flat_map(|list| {
                arg.values.iter().map(|&value| {
                    let mut longer = list.clone();
                    longer.push(Condition {
                        index: arg.index,
                        op: arg.op,
                        value,
                        width: arg.width,
                    });
                    longer
                })
            })
            .collect();
    }
    lists
}

impl Profile {
    /// Reads a profile from TOML and checks it.
    ///
    /// # Errors
    /// [`ProfileError`], naming the group and the field.
    pub fn from_toml(text: &str) -> Result<Self, ProfileError> {
        let profile: Self = toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .and_then(|span| text.get(..span.start))
                .map_or(1, |before| before.matches('\n').count() + 1);
            ProfileError::Syntax {
                reason: format!("line {line}: {}", error.message().replace('\n', ", ")),
            }
        })?;
        profile.check()?;
        Ok(profile)
    }

    /// Checks what the types do not say: names exist, reasons are given,
    /// alternatives are bounded.
    ///
    /// # Errors
    /// The first [`ProfileError`] found.
    pub fn check(&self) -> Result<(), ProfileError> {
        let empty = |group: &str, field| ProfileError::Empty {
            profile: self.name.clone(),
            group: group.to_owned(),
            field,
        };
        let known = |group: &str, syscalls: &[String]| {
            if syscalls.is_empty() {
                return Err(empty(group, "syscalls"));
            }
            match syscalls.iter().find(|name| table::number(name).is_none()) {
                Some(name) => Err(ProfileError::UnknownSyscall {
                    profile: self.name.clone(),
                    group: group.to_owned(),
                    syscall: name.clone(),
                }),
                None => Ok(()),
            }
        };
        let rules = self.groups.iter().map(|group| group.rules.len());
        let count = rules.sum::<usize>() + self.left_out.len();
        if count > MAX_RULES {
            return Err(ProfileError::TooManyRules {
                profile: self.name.clone(),
                count,
            });
        }
        let mut ids = BTreeSet::from([explain::LEFT_OUT.to_owned()]);
        for group in &self.groups {
            if !ids.insert(explain::slug(&group.name)) {
                return Err(ProfileError::SameId {
                    profile: self.name.clone(),
                    group: group.name.clone(),
                });
            }
        }
        for group in &self.groups {
            for rule in &group.rules {
                if rule.reason.trim().is_empty() {
                    return Err(empty(&group.name, "reason"));
                }
                known(&group.name, &rule.syscalls)?;
                let count = rule.alternative_count();
                if count > MAX_ALTERNATIVES {
                    return Err(ProfileError::TooManyAlternatives {
                        profile: self.name.clone(),
                        group: group.name.clone(),
                        count,
                    });
                }
            }
        }
        for left_out in &self.left_out {
            if left_out.reason.trim().is_empty() {
                return Err(empty("left_out", "reason"));
            }
            known("left_out", &left_out.syscalls)?;
            for name in &left_out.syscalls {
                let decided = self
                    .groups
                    .iter()
                    .find(|group| group.rules.iter().any(|rule| rule.syscalls.contains(name)));
                if let Some(group) = decided {
                    return Err(ProfileError::NotLeftOut {
                        profile: self.name.clone(),
                        group: group.name.clone(),
                        syscall: name.clone(),
                    });
                }
            }
        }
        Ok(())
    }
}

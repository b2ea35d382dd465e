//! Profiles against each other, and against what was observed.

use std::collections::BTreeSet;
use std::fmt;

use crate::action::Action;
use crate::compile::CompileError;
use crate::explain::{Explainer, RuleInfo};
use crate::observed::{Kind, Observed};
use crate::profile::{Op, Profile, alternatives};
use crate::reference;
use crate::table;

/// A kind of call that two profiles answer differently.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// The call.
    pub kind: Kind,
    /// The first profile's answer.
    pub first: Action,
    /// The second one's.
    pub second: Action,
}

/// `+ ioctl(request 0x5401): allow, was errno(ENOTTY)`; `-` for what no longer runs,
/// `~` for what is refused in other words.
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = |action| matches!(action, Action::Allow | Action::Log);
        let sign = match (runs(self.first), runs(self.second)) {
            (false, true) => '+',
            (true, false) => '-',
            _ => '~',
        };
        write!(
            f,
            "{sign} {}: {}, was {}",
            self.kind, self.second, self.first
        )
    }
}

/// What differs from `first` to `second`, by call: for each call the arguments that
/// either of them asks about, and others.
#[must_use]
pub fn diff(first: &Profile, second: &Profile) -> Vec<Difference> {
    let mut differences = BTreeSet::new();
    for &(number, name) in table::SYSCALLS {
        // An argument that no rule asks for; then each that one does.
        let mut tried = BTreeSet::from([[0xdead_0000; 6]]);
        let groups = first.groups.iter().chain(&second.groups);
        for rule in groups.flat_map(|group| &group.rules) {
            if !rule.syscalls.iter().any(|syscall| syscall == name) {
                continue;
            }
            for list in alternatives(&rule.args) {
                let mut args = [0xdead_0000; 6];
                for condition in &list {
                    let value = match condition.op {
                        Op::Ne | Op::Gt => condition.value.wrapping_add(1),
                        Op::Lt => condition.value.wrapping_sub(1),
                        _ => condition.value,
                    };
                    if let Some(arg) = args.get_mut(usize::from(condition.index)) {
                        *arg = value;
                    }
                }
                tried.insert(args);
            }
        }
        for args in tried {
            let data = crate::interp::SeccompData::x86_64(number, args);
            let answers = (
                reference::decide(first, &data),
                reference::decide(second, &data),
            );
            if answers.0 != answers.1 {
                differences.insert(Difference {
                    kind: Kind::of(number, &args),
                    first: answers.0,
                    second: answers.1,
                });
            }
        }
    }
    differences.into_iter().collect()
}

/// Something observed that a profile refuses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// The call.
    pub kind: Kind,
    /// The rule that refuses it.
    pub rule: RuleInfo,
}

/// `mount: errno(EPERM) by default/refused/1: the mount table is the agent's`
impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RuleInfo {
            id, action, reason, ..
        } = &self.rule;
        write!(f, "{}: {action} by {id}: {reason}", self.kind)
    }
}

/// What of `observed` the profile refuses.
///
/// # Errors
/// As [`crate::compile()`].
pub fn check(profile: &Profile, observed: &Observed) -> Result<Vec<Denial>, CompileError> {
    let explainer = Explainer::of(profile)?;
    let denied = |kind: &Kind| {
        explainer.explain(&kind.call()).map(|rule| Denial {
            kind: *kind,
            rule: rule.clone(),
        })
    };
    Ok(observed.kinds().filter_map(denied).collect())
}

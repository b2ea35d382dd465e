//! Which rule refused a call, and why.
//!
//! Every rule of a profile has an id, `profile/group/n`: the profile's name, the
//! group's in small letters with dashes, and the rule's place in its group, from 1.
//! What `left_out` names has `profile/left-out/n`, and what a profile says without
//! a rule `profile/default`, `profile/unknown`, `profile/x32` and
//! `profile/foreign`. New rules go to the end of their group, so ids stay.
//!
//! [`Explainer`] answers from a program ([`Form::Explain`]) and a table, both made
//! when the crate is built for the shipped profiles: nothing is parsed to answer.

use std::borrow::Cow;

use crate::action::Action;
use crate::compile::{self, CompileError, Form};
use crate::interp::{self, SeccompData};
use crate::profile::Profile;
use crate::program::Program;

/// What stands for a group in the ids of `left_out`.
pub const LEFT_OUT: &str = "left-out";

/// One rule, as an operator wants to see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleInfo {
    /// `profile/group/n`, see the [module](self).
    pub id: Cow<'static, str>,
    /// What the rule answers.
    pub action: Action,
    /// Whether a refusal is expected probing, which nobody is told of.
    pub quiet: bool,
    /// Why the rule is there.
    pub reason: Cow<'static, str>,
}

/// Where the table has what a profile says without a rule.
pub(crate) struct Ends {
    pub default: u16,
    pub unknown: u16,
    pub x32: u16,
    pub foreign: u16,
}

impl Ends {
    /// Behind all rules and all of `left_out`, whose number is bounded by
    /// [`Profile::check`].
    pub fn of(profile: &Profile) -> Self {
        let rules: usize = profile.groups.iter().map(|group| group.rules.len()).sum();
        let first = u16::try_from(rules + profile.left_out.len()).unwrap_or(u16::MAX - 3);
        Self {
            default: first,
            unknown: first.saturating_add(1),
            x32: first.saturating_add(2),
            foreign: first.saturating_add(3),
        }
    }
}

/// A group's name as it is in ids.
#[must_use]
pub fn slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_alphanumeric());
    let words: Vec<String> = words
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    words.join("-")
}

/// All rules of `profile`, in the order of the indexes that [`Form::Explain`] returns.
#[must_use]
pub fn rules(profile: &Profile) -> Vec<RuleInfo> {
    let name = &profile.name;
    let info = |id: String, action, quiet, reason: &str| RuleInfo {
        id: id.into(),
        action,
        quiet,
        reason: reason.to_owned().into(),
    };
    let mut all = Vec::new();
    for group in &profile.groups {
        let slug = slug(&group.name);
        for (at, rule) in group.rules.iter().enumerate() {
            let id = format!("{name}/{slug}/{}", at + 1);
            all.push(info(id, group.action, rule.quiet, &rule.reason));
        }
    }
    for (at, left_out) in profile.left_out.iter().enumerate() {
        let id = format!("{name}/{LEFT_OUT}/{}", at + 1);
        all.push(info(id, profile.default, left_out.quiet, &left_out.reason));
    }
    let ends = [
        (
            "default",
            profile.default,
            false,
            "no rule of the profile names this call",
        ),
        (
            "unknown",
            profile.unknown,
            false,
            "a call newer than the profile, or none at all",
        ),
        (
            "x32",
            profile.x32,
            true,
            "the x32 ABI: a second way to every call, which nearly nothing uses",
        ),
        (
            "foreign",
            Action::KillProcess,
            false,
            "a call through another architecture's ABI, such as i386's",
        ),
    ];
    for (end, action, quiet, reason) in ends {
        all.push(info(format!("{name}/{end}"), action, quiet, reason));
    }
    all
}

/// Tells which rule of one profile refuses a call.
#[derive(Debug, Clone)]
pub struct Explainer {
    program: Program,
    rules: Cow<'static, [RuleInfo]>,
}

impl Explainer {
    /// Of any profile.
    ///
    /// # Errors
    /// As [`compile::compile`].
    pub fn of(profile: &Profile) -> Result<Self, CompileError> {
        let program = compile::compile_as(profile, Form::Explain)?;
        Ok(Self::from_parts(program, rules(profile).into()))
    }

    /// Of a program of [`Form::Explain`] and the table that goes with it.
    pub(crate) fn from_parts(program: Program, rules: Cow<'static, [RuleInfo]>) -> Self {
        Self { program, rules }
    }

    /// The rule that refuses this call; `None` when it may run.
    #[must_use]
    pub fn explain(&self, data: &SeccompData) -> Option<&RuleInfo> {
        match Action::from_ret(interp::run(&self.program, data)) {
            Action::Trace(index) => self.rules.get(usize::from(index)),
            _ => None,
        }
    }

    /// The rule with this id.
    #[must_use]
    pub fn rule(&self, id: &str) -> Option<&RuleInfo> {
        self.rules.iter().find(|rule| rule.id == id)
    }

    /// All rules, those that allow included.
    #[must_use]
    pub fn rules(&self) -> &[RuleInfo] {
        &self.rules
    }
}

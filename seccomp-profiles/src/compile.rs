//! From rules to a program.
//!
//! The program tests the architecture, then finds the verdict of the call's
//! number in a binary tree over ranges of numbers with equal verdicts; a range
//! whose verdict depends on arguments leads to their checks. The kernel runs the
//! filter for every number when it is installed, so a small program makes every
//! container start and exec faster; calls allowed without conditions never run
//! it afterwards (the kernel's action cache).

use std::collections::BTreeMap;

use crate::action::{Action, RET_KILL_PROCESS};
use crate::args;
use crate::explain;
use crate::graph::{Graph, NodeId, TooLarge};
use crate::profile::{ArgSet, Profile, ProfileError};
use crate::program::{self as bpf, Program};
use crate::table;

/// `__X32_SYSCALL_BIT` (asm/unistd.h). Tested as a lower bound, as in the
/// kernel, which also keeps -1 (a call skipped by a tracer) out of the table.
pub const X32: u32 = 0x4000_0000;

/// A profile that cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// The profile names something that does not exist.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The checks of one call cannot be written.
    #[error("compile seccomp rules of {syscall}: {reason}")]
    Args {
        /// The call.
        syscall: String,
        /// What went wrong.
        reason: String,
    },
    /// Too many rules.
    #[error("compile seccomp rules: {0}; use fewer argument conditions")]
    TooLarge(#[from] TooLarge),
}

/// What the verdicts of a program are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// The profile as written: the filter that binds.
    Enforce,
    /// A call that would be answered with an error asks the filter's listener
    /// (`SECCOMP_RET_USER_NOTIF`), but for rules that are quiet and for x32. Calls
    /// that run and calls that kill are as in [`Form::Enforce`].
    Notify,
    /// Never installed, only interpreted: a call that runs gets
    /// `SECCOMP_RET_ALLOW` or `_LOG`; any other gets `SECCOMP_RET_TRACE` with the
    /// index of its rule, see [`crate::explain`].
    Explain,
}

impl Form {
    /// The `SECCOMP_RET_*` value of a leaf.
    fn ret(self, action: Action, index: u16, quiet: bool) -> u32 {
        match (self, action) {
            (_, Action::Allow | Action::Log) | (Self::Enforce, _) => action.to_ret(),
            (Self::Notify, Action::Errno(_)) if !quiet => Action::Notify.to_ret(),
            (Self::Notify, _) => action.to_ret(),
            (Self::Explain, _) => Action::Trace(index).to_ret(),
        }
    }
}

/// When all of `args` hold, `ret`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clause {
    /// Empty: always.
    pub args: Vec<ArgSet>,
    /// The verdict, a `SECCOMP_RET_*` value.
    pub ret: u32,
}

/// Rules by number: what both front ends, profiles and OCI, come down to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// What to return for numbers, by the lowest number of each range: a range
    /// ends where the next begins. Holds an entry for 0.
    pub ranges: BTreeMap<u32, u32>,
    /// Clauses of single numbers, tried in order; a call that none of them
    /// matches gets the value of its range.
    pub calls: BTreeMap<u32, Vec<Clause>>,
    /// What calls of other architectures get.
    pub foreign: u32,
}

impl Rules {
    /// The rules of `profile`, by number.
    #[must_use]
    pub fn from_profile(profile: &Profile, form: Form) -> Self {
        let ends = explain::Ends::of(profile);
        let default = form.ret(profile.default, ends.default, false);
        let unknown = form.ret(profile.unknown, ends.unknown, false);
        let x32 = form.ret(profile.x32, ends.x32, true);
        let mut ranges = BTreeMap::from([(0, unknown), (X32, x32)]);
        for &(number, _) in table::SYSCALLS {
            ranges.insert(number, default);
            ranges.entry(number + 1).or_insert(unknown);
        }
        let mut calls: BTreeMap<u32, Vec<Clause>> = BTreeMap::new();
        let mut index = 0u16;
        for group in &profile.groups {
            for rule in &group.rules {
                let ret = form.ret(group.action, index, rule.quiet);
                let clause = Clause {
                    args: rule.args.clone(),
                    ret,
                };
                for number in rule.syscalls.iter().filter_map(|name| table::number(name)) {
                    calls.entry(number).or_default().push(clause.clone());
                }
                index = index.saturating_add(1);
            }
        }
        for left_out in &profile.left_out {
            let ret = form.ret(profile.default, index, left_out.quiet);
            let names = left_out.syscalls.iter();
            for number in names.filter_map(|name| table::number(name)) {
                ranges.insert(number, ret);
            }
            index = index.saturating_add(1);
        }
        Self {
            ranges,
            calls,
            foreign: form.ret(Action::KillProcess, ends.foreign, false),
        }
    }

    fn range_ret(&self, number: u32) -> u32 {
        self.ranges
            .range(..=number)
            .next_back()
            .map_or(RET_KILL_PROCESS, |(_, ret)| *ret)
    }

    /// Compiles the rules.
    ///
    /// # Errors
    /// [`CompileError`] when the checks of a call cannot be written or the
    /// program is longer than seccomp(2) takes.
    pub fn compile(&self) -> Result<Program, CompileError> {
        let mut graph = Graph::default();
        // Where a range with another verdict begins.
        let mut verdicts: BTreeMap<u32, NodeId> = BTreeMap::new();
        for (&start, &ret) in &self.ranges {
            verdicts.insert(start, graph.ret(ret));
        }
        for (&number, clauses) in &self.calls {
            let otherwise = self.range_ret(number);
            let node = checks(&mut graph, number, clauses, otherwise)?;
            verdicts.insert(number, node);
            if let Some(next) = number.checked_add(1)
                && !self.calls.contains_key(&next)
            {
                let node = graph.ret(self.range_ret(next));
                verdicts.insert(next, node);
            }
        }
        let mut ranges: Vec<(u32, NodeId)> = verdicts.into_iter().collect();
        ranges.dedup_by_key(|(_, node)| *node);

        let tree = tree(&mut graph, &ranges);
        let load_number = graph.step(bpf::LD_W_ABS, 0, tree);
        let foreign = graph.ret(self.foreign);
        let arch = graph.branch(bpf::JEQ_K, bpf::AUDIT_ARCH_X86_64, load_number, foreign);
        let root = graph.step(bpf::LD_W_ABS, 4, arch);
        let root = graph.without_repeated_loads(root)?;
        Ok(graph.emit(root)?)
    }
}

/// Compiles a profile into the filter that binds.
///
/// # Errors
/// [`CompileError`], naming the group or the call.
pub fn compile(profile: &Profile) -> Result<Program, CompileError> {
    compile_as(profile, Form::Enforce)
}

/// Compiles a profile.
///
/// # Errors
/// As [`compile`].
pub fn compile_as(profile: &Profile, form: Form) -> Result<Program, CompileError> {
    profile.check()?;
    Rules::from_profile(profile, form).compile()
}

/// The decision over the clauses of one number.
fn checks(
    graph: &mut Graph,
    number: u32,
    clauses: &[Clause],
    otherwise: u32,
) -> Result<NodeId, CompileError> {
    // What follows a clause that always matches is never reached.
    let (clauses, otherwise) = match clauses.iter().position(|c| c.args.is_empty()) {
        Some(at) => (
            clauses.get(..at).unwrap_or_default(),
            clauses.get(at).map_or(otherwise, |clause| clause.ret),
        ),
        None => (clauses, otherwise),
    };
    let mut node = graph.ret(otherwise);
    // Built from the end: what a clause does not match falls through to the next.
    for clause in clauses.iter().rev() {
        let hit = graph.ret(clause.ret);
        node = args::check(graph, &clause.args, hit, node).map_err(|error| CompileError::Args {
            syscall: table::name(number).map_or_else(|| number.to_string(), str::to_owned),
            reason: error.to_string(),
        })?;
        graph.check_size()?;
    }
    Ok(node)
}

/// A binary tree over ranges, given by their lowest numbers. Not empty.
pub(crate) fn tree(graph: &mut Graph, ranges: &[(u32, NodeId)]) -> NodeId {
    match ranges {
        [] => graph.ret(RET_KILL_PROCESS),
        [(_, only)] => *only,
        // One number with another verdict than both its neighbours.
        [(_, below), (number, inside), (next, above)] if below == above && number + 1 == *next => {
            graph.branch(bpf::JEQ_K, *number, *inside, *below)
        }
        _ => {
            let (low, high) = ranges.split_at(split(ranges));
            let start = high.first().map_or(0, |(start, _)| *start);
            let yes = tree(graph, high);
            let no = tree(graph, low);
            graph.branch(bpf::JGE_K, start, yes, no)
        }
    }
}

/// Where to cut `ranges` in two: near the middle, and such that the halves
/// keep single-number exceptions whole where possible.
fn split(ranges: &[(u32, NodeId)]) -> usize {
    let middle = ranges.len() / 2;
    let whole = |at: usize| {
        !matches!(
            ranges.get(at.saturating_sub(2)..at + 1),
            Some([(_, below), (number, _), (next, above)]) if below == above && number + 1 == *next
        ) && !matches!(
            ranges.get(at.saturating_sub(1)..at + 2),
            Some([(_, below), (number, _), (next, above)]) if below == above && number + 1 == *next
        )
    };
    [middle, middle + 1, middle.saturating_sub(1)]
        .into_iter()
        .find(|&at| at > 0 && at < ranges.len() && whole(at))
        .unwrap_or(middle)
}

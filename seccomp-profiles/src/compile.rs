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
use crate::graph::{Graph, NodeId, TooLarge};
use crate::profile::{Condition, Profile, ProfileError};
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

/// When all of `conditions` hold, `action`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Clause {
    /// Empty: always.
    pub conditions: Vec<Condition>,
    /// The verdict.
    pub action: Action,
}

/// Rules by number: what both front ends, profiles and OCI, come down to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// What to do with numbers, by the lowest number of each range: a range
    /// ends where the next begins. Holds an entry for 0.
    pub ranges: BTreeMap<u32, Action>,
    /// Clauses of single numbers, tried in order; a call that none of them
    /// matches gets the action of its range.
    pub calls: BTreeMap<u32, Vec<Clause>>,
}

impl Rules {
    /// The rules of `profile`, by number.
    #[must_use]
    pub fn from_profile(profile: &Profile) -> Self {
        let mut ranges = BTreeMap::from([(0, profile.unknown), (X32, profile.x32)]);
        for &(number, _) in table::SYSCALLS {
            ranges.insert(number, profile.default);
            ranges.entry(number + 1).or_insert(profile.unknown);
        }
        let mut calls: BTreeMap<u32, Vec<Clause>> = BTreeMap::new();
        for group in &profile.groups {
            for rule in &group.rules {
                let alternatives = rule.alternatives();
                for number in rule.syscalls.iter().filter_map(|name| table::number(name)) {
                    calls
                        .entry(number)
                        .or_default()
                        .extend(alternatives.iter().map(|conditions| Clause {
                            conditions: conditions.clone(),
                            action: group.action,
                        }));
                }
            }
        }
        Self { ranges, calls }
    }

    fn range_action(&self, number: u32) -> Action {
        self.ranges
            .range(..=number)
            .next_back()
            .map_or(Action::KillProcess, |(_, action)| *action)
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
        for (&start, action) in &self.ranges {
            verdicts.insert(start, graph.ret(action.to_ret()));
        }
        for (&number, clauses) in &self.calls {
            let otherwise = self.range_action(number);
            let node = checks(&mut graph, number, clauses, otherwise)?;
            verdicts.insert(number, node);
            if let Some(next) = number.checked_add(1)
                && !self.calls.contains_key(&next)
            {
                let node = graph.ret(self.range_action(next).to_ret());
                verdicts.insert(next, node);
            }
        }
        let mut ranges: Vec<(u32, NodeId)> = verdicts.into_iter().collect();
        ranges.dedup_by_key(|(_, node)| *node);

        let tree = tree(&mut graph, &ranges);
        let load_number = graph.step(bpf::LD_W_ABS, 0, tree);
        let foreign = graph.ret(RET_KILL_PROCESS);
        let arch = graph.branch(bpf::JEQ_K, bpf::AUDIT_ARCH_X86_64, load_number, foreign);
        let root = graph.step(bpf::LD_W_ABS, 4, arch);
        let root = graph.without_repeated_loads(root)?;
        Ok(graph.emit(root)?)
    }
}

/// Compiles a profile.
///
/// # Errors
/// [`CompileError`], naming the group or the call.
pub fn compile(profile: &Profile) -> Result<Program, CompileError> {
    profile.check()?;
    Rules::from_profile(profile).compile()
}

/// The decision over the clauses of one number.
fn checks(
    graph: &mut Graph,
    number: u32,
    clauses: &[Clause],
    otherwise: Action,
) -> Result<NodeId, CompileError> {
    // What follows a clause that always matches is never reached.
    let (clauses, otherwise) = match clauses.iter().position(|c| c.conditions.is_empty()) {
        Some(at) => (
            clauses.get(..at).unwrap_or_default(),
            clauses.get(at).map_or(otherwise, |clause| clause.action),
        ),
        None => (clauses, otherwise),
    };
    let mut node = graph.ret(otherwise.to_ret());
    // Built from the end: each run of clauses with one action falls through to
    // the runs after it.
    for run in clauses.chunk_by(|a, b| a.action == b.action).rev() {
        let Some(first) = run.first() else { continue };
        let hit = graph.ret(first.action.to_ret());
        let lists: Vec<&[Condition]> = run.iter().map(|c| c.conditions.as_slice()).collect();
        node = args::check(graph, &lists, hit, node).map_err(|error| CompileError::Args {
            syscall: table::name(number).map_or_else(|| number.to_string(), str::to_owned),
            reason: error.to_string(),
        })?;
        graph.check_size()?;
    }
    Ok(node)
}

/// A binary tree over ranges, given by their lowest numbers. Not empty.
fn tree(graph: &mut Graph, ranges: &[(u32, NodeId)]) -> NodeId {
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

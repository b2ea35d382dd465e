//! Argument checks.
//!
//! Whatever looks at low words alone is written here, as binary trees over the
//! values of an argument. Comparisons of whole registers are seccompiler's, and
//! [`Graph`] takes them in.

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::compile;
use crate::graph::{Graph, NodeId};
use crate::profile::{ArgSet, Condition, Op, Width, alternatives};
use crate::program as bpf;

/// Where `struct seccomp_data` has the low word of argument 0 (linux/seccomp.h).
const FIRST_ARGUMENT: u32 = 16;

/// Stand-ins for "all conditions of a list hold" and "no list does", replaced
/// by the real continuation while the code is taken into the graph.
const HIT: SeccompAction = SeccompAction::Trace(0xbeef);
const MISS: SeccompAction = SeccompAction::Trace(0xdead);

/// Before the checks of the only call in the program, seccompiler puts the
/// architecture test (3), the load of the number and its comparison.
const PROLOGUE: usize = 5;

/// Code that seccompiler refused to write, or wrote in a shape not known here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("generate argument checks: {reason}")]
pub struct ArgError {
    /// What went wrong.
    pub reason: String,
}

/// Conditions in the form that seccompiler takes.
pub fn rule(conditions: &[Condition]) -> Result<SeccompRule, ArgError> {
    let failed = |error: seccompiler::BackendError| ArgError {
        reason: error.to_string(),
    };
    let conditions = conditions
        .iter()
        .map(|condition| {
            let width = match condition.width {
                Width::W32 => SeccompCmpArgLen::Dword,
                Width::W64 => SeccompCmpArgLen::Qword,
            };
            let op = match condition.op {
                Op::Eq => SeccompCmpOp::Eq,
                Op::Ne => SeccompCmpOp::Ne,
                Op::Lt => SeccompCmpOp::Lt,
                Op::Le => SeccompCmpOp::Le,
                Op::Gt => SeccompCmpOp::Gt,
                Op::Ge => SeccompCmpOp::Ge,
                Op::MaskedEq(mask) => SeccompCmpOp::MaskedEq(mask),
            };
            SeccompCondition::new(condition.index, width, op, condition.value).map_err(failed)
        })
        .collect::<Result<_, _>>()?;
    SeccompRule::new(conditions).map_err(failed)
}

/// Adds checks to `graph`: to `hit` when all of `args` hold, otherwise to `miss`.
pub fn check(
    graph: &mut Graph,
    args: &[ArgSet],
    hit: NodeId,
    miss: NodeId,
) -> Result<NodeId, ArgError> {
    if args.iter().all(|arg| arg.width == Width::W32) {
        let mut node = hit;
        for arg in args.iter().rev() {
            node = low_word(graph, arg, node, miss)?;
        }
        return Ok(node);
    }
    let lists = alternatives(args);
    let lists: Vec<&[Condition]> = lists.iter().map(Vec::as_slice).collect();
    by_seccompiler(graph, &lists, hit, miss)
}

/// To `yes` when the low word of the argument compares with one of the values.
fn low_word(graph: &mut Graph, arg: &ArgSet, yes: NodeId, no: NodeId) -> Result<NodeId, ArgError> {
    let values = arg.values.iter().map(|value| u32::try_from(*value));
    let values: BTreeSet<u32> = values.collect::<Result<_, _>>().map_err(|_| ArgError {
        reason: "a value does not fit 32 bits".to_owned(),
    })?;
    let (Some(&least), Some(&most)) = (values.first(), values.last()) else {
        return Ok(no);
    };
    let up_to = |end: Option<u32>, below, above| match end {
        Some(0) => vec![(0, above)],
        Some(end) => vec![(0, below), (end, above)],
        None => vec![(0, below)],
    };
    let ranges = match arg.op {
        Op::Eq | Op::MaskedEq(_) => among(&values, yes, no),
        // Whatever it is, it differs from one of two.
        Op::Ne if least != most => vec![(0, yes)],
        Op::Ne => among(&values, no, yes),
        Op::Lt => up_to(Some(most), yes, no),
        Op::Le => up_to(most.checked_add(1), yes, no),
        Op::Gt => up_to(least.checked_add(1), no, yes),
        Op::Ge => up_to(Some(least), no, yes),
    };
    let tree = compile::tree(graph, &ranges);
    let masked = match arg.op {
        Op::MaskedEq(mask) => match u32::try_from(mask) {
            Ok(mask) => graph.step(bpf::AND_K, mask, tree),
            Err(_) => {
                return Err(ArgError {
                    reason: "a mask does not fit 32 bits".to_owned(),
                });
            }
        },
        _ => tree,
    };
    // Nothing to look at where every value leads to the same place.
    if tree == yes || tree == no {
        return Ok(tree);
    }
    let offset = FIRST_ARGUMENT + 8 * u32::from(arg.index);
    Ok(graph.step(bpf::LD_W_ABS, offset, masked))
}

/// Ranges by their lowest numbers: to `inside` for `values`, else to `outside`.
fn among(values: &BTreeSet<u32>, inside: NodeId, outside: NodeId) -> Vec<(u32, NodeId)> {
    let mut ranges = Vec::new();
    if !values.contains(&0) {
        ranges.push((0, outside));
    }
    for &value in values {
        if value == 0 || !values.contains(&(value - 1)) {
            ranges.push((value, inside));
        }
        if let Some(next) = value.checked_add(1)
            && !values.contains(&next)
        {
            ranges.push((next, outside));
        }
    }
    ranges
}

/// As [`check`]: to `hit` when all conditions of one of `lists` hold. No list may
/// be empty.
fn by_seccompiler(
    graph: &mut Graph,
    lists: &[&[Condition]],
    hit: NodeId,
    miss: NodeId,
) -> Result<NodeId, ArgError> {
    let failed = |reason: String| ArgError { reason };
    let rules = lists
        .iter()
        .map(|list| rule(list))
        .collect::<Result<Vec<_>, _>>()?;
    let filter = SeccompFilter::new(BTreeMap::from([(0, rules)]), MISS, HIT, TargetArch::x86_64)
        .map_err(|error| failed(error.to_string()))?;
    let code: BpfProgram = filter
        .try_into()
        .map_err(|error: seccompiler::BackendError| failed(error.to_string()))?;

    let (hit_ret, miss_ret) = (u32::from(HIT), u32::from(MISS));
    // All jumps go forward, so from the end every target is already known.
    let mut nodes: Vec<Option<NodeId>> = vec![None; code.len()];
    for (at, ins) in code.iter().enumerate().skip(PROLOGUE).rev() {
        let target = |distance: u32| {
            usize::try_from(distance)
                .ok()
                .and_then(|distance| nodes.get(at + 1 + distance).copied().flatten())
        };
        let node = match ins.code {
            bpf::RET_K if ins.k == hit_ret => Some(hit),
            bpf::RET_K if ins.k == miss_ret => Some(miss),
            bpf::LD_W_ABS | bpf::AND_K => target(0).map(|next| graph.step(ins.code, ins.k, next)),
            // Each rule has a way around it for other numbers; behind the last
            // rule that leads out of this code, and nothing here takes it.
            bpf::JA => {
                nodes[at] = target(ins.k);
                continue;
            }
            bpf::JEQ_K | bpf::JGT_K | bpf::JGE_K => {
                match (target(ins.jt.into()), target(ins.jf.into())) {
                    (Some(yes), Some(no)) => Some(graph.branch(ins.code, ins.k, yes, no)),
                    _ => None,
                }
            }
            _ => None,
        };
        match node {
            Some(node) => nodes[at] = Some(node),
            None => {
                return Err(failed(format!(
                    "instruction {at} (code {:#x}, k {:#x}) has an unknown shape",
                    ins.code, ins.k
                )));
            }
        }
    }
    nodes
        .get(PROLOGUE)
        .copied()
        .flatten()
        .ok_or_else(|| failed("seccompiler wrote no code".to_owned()))
}

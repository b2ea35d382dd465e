//! Argument checks: seccompiler writes them, [`Graph`] takes them in.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::graph::{Graph, NodeId};
use crate::profile::{Condition, Op, Width};
use crate::program as bpf;

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

/// Adds checks to `graph`: to `hit` when all conditions of one of `lists`
/// hold, otherwise to `miss`. No list may be empty.
pub fn check(
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

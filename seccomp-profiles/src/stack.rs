//! A filter of the specification's own, stacked on a profile's that asks a listener.
//!
//! Of stacked filters the most severe verdict counts (seccomp(2)), and an error is
//! more severe than a question. So where both refuse, the specification's filter
//! would answer first, and the listener of the profile's would never hear of it; and
//! what the specification's refuses alone it can't ask about, since a process has
//! one listener. [`stack`] makes two programs of the two that refuse the same calls:
//!
//! * `asks`, in place of the profile's: it asks about what the specification's filter
//!   refuses with an error, too. Not so for calls that the forker makes, which is
//!   bound by this program and not by the other ([`forker_calls`]);
//! * `own`, in place of the specification's: without the errors for what `asks` asks
//!   about.
//!
//! What kills, traps or is traced is as it was, and so is what runs. The error that
//! the listener has to answer is the specification's own where that has one, as the
//! newest filter's counts.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::action::Action;
use crate::compile;
use crate::graph::{Graph, NodeId, TooLarge};
use crate::interp::{self, SeccompData};
use crate::program::{self as bpf, Program};
use crate::table;
use crate::{marked, minimal};

/// Two programs that refuse together what two others did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stacked {
    /// In place of the profile's, with a listener.
    pub asks: Program,
    /// In place of the specification's.
    pub own: Program,
}

/// What a forker and its children call before they execute, beside
/// [`minimal::BASE`] and [`marked::FORKER`]: where a plan asks for it, or by way of the C library.
const FORKER_TOO: &[&str] = &[
    "sched_setattr",
    "ioprio_set",
    "sched_setaffinity",
    "sched_getaffinity",
    "setrlimit",
    "getrlimit",
    "setuid",
    "setgid",
    "setreuid",
    "setregid",
    "setfsuid",
    "setfsgid",
    "setpriority",
    "personality",
    "capget",
    "getppid",
    "getpid",
    "gettid",
    "getresuid",
    "getresgid",
    "getgroups",
    "kill",
    "tgkill",
    "pidfd_send_signal",
    "pidfd_open",
    "wait4",
    "fork",
    "vfork",
    "execveat",
    "poll",
    "epoll_create1",
    "epoll_ctl",
    "epoll_wait",
    "epoll_pwait",
    "pipe2",
    "eventfd2",
    "dup",
    "dup3",
    "readv",
    "writev",
    "pread64",
    "pwrite64",
    "recvfrom",
    "sendto",
    "read",
    "stat",
    "lstat",
    "statx",
    "access",
    "faccessat2",
    "readlink",
    "readlinkat",
    "openat2",
    "getdents64",
    "fchdir",
    "fchown",
    "fchownat",
    "fchmod",
    "mremap",
    "sigaltstack",
    "rt_sigtimedwait",
    "getrandom",
    "clock_gettime",
    "clock_nanosleep",
    "nanosleep",
    "sched_yield",
    "rseq",
    "set_robust_list",
    "membarrier",
    "uname",
];

/// Numbers of the calls that a forker makes: refused to it, no process of its
/// container could be made.
pub fn forker_calls() -> BTreeSet<u32> {
    let base = minimal::BASE.iter().map(|(name, _)| *name);
    base.chain(marked::FORKER.iter().map(|(name, _)| *name))
        .chain(FORKER_TOO.iter().copied())
        .filter_map(table::number)
        .collect()
}

/// What the accumulator is, as far as it does not depend on arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Held {
    Known(u32),
    /// A word of the arguments, or what a mask left of it.
    Argument,
}

/// Where a state leads.
enum Next {
    Ret(u32),
    Step(u16, u32, (usize, Held)),
    Branch(u16, u32, (usize, Held), (usize, Held)),
    /// The instruction decides nothing that isn't known.
    Same((usize, Held)),
}

/// What a comparison by this instruction says.
pub(crate) fn compares(code: u16, value: u32, k: u32) -> bool {
    match code {
        bpf::JEQ_K => value == k,
        bpf::JGT_K => value > k,
        bpf::JGE_K => value >= k,
        _ => value & k != 0,
    }
}

/// What `program` does at an instruction, for calls of the number `nr`.
fn next(program: &Program, (at, held): (usize, Held), nr: u32) -> Next {
    let Some(ins) = program.instructions().get(at) else {
        return Next::Ret(crate::action::RET_KILL_PROCESS);
    };
    let after = at + 1;
    let (yes, no) = (after + usize::from(ins.jt), after + usize::from(ins.jf));
    match (ins.code, held) {
        (bpf::RET_K, _) => Next::Ret(ins.k),
        (bpf::LD_W_ABS, _) => match ins.k {
            0 => Next::Same((after, Held::Known(nr))),
            4 => Next::Same((after, Held::Known(bpf::AUDIT_ARCH_X86_64))),
            _ => Next::Step(ins.code, ins.k, (after, Held::Argument)),
        },
        (bpf::AND_K, Held::Known(value)) => Next::Same((after, Held::Known(value & ins.k))),
        (bpf::AND_K, Held::Argument) => Next::Step(ins.code, ins.k, (after, held)),
        (bpf::JA, _) => Next::Same((after.saturating_add(ins.k as usize), held)),
        (bpf::JEQ_K | bpf::JGT_K | bpf::JGE_K | bpf::JSET_K, Held::Known(value)) => {
            let taken = compares(ins.code, value, ins.k);
            Next::Same((if taken { yes } else { no }, held))
        }
        (bpf::JEQ_K | bpf::JGT_K | bpf::JGE_K | bpf::JSET_K, Held::Argument) => {
            Next::Branch(ins.code, ins.k, (yes, held), (no, held))
        }
        _ => Next::Ret(crate::action::RET_KILL_PROCESS),
    }
}

/// What is left of `program` for calls of the number `nr`, with `leaf` in place of
/// each verdict.
pub(crate) fn only(
    graph: &mut Graph,
    program: &Program,
    nr: u32,
    leaf: &mut dyn FnMut(&mut Graph, u32) -> NodeId,
) -> Result<NodeId, TooLarge> {
    // Up to the first look at an argument there is one way only, and mostly no more.
    let mut start = (0, Held::Known(0));
    loop {
        match next(program, start, nr) {
            Next::Same(to) if to.0 > start.0 => start = to,
            Next::Ret(ret) => return Ok(leaf(graph, ret)),
            _ => break,
        }
    }
    // Jumps only go forward, so what a state leads to is behind it in this order.
    let mut states = BTreeSet::from([start]);
    let mut from = start;
    loop {
        match next(program, from, nr) {
            Next::Ret(_) => {}
            Next::Step(_, _, to) | Next::Same(to) => {
                states.insert(to);
            }
            Next::Branch(_, _, yes, no) => states.extend([yes, no]),
        }
        match states
            .range((std::ops::Bound::Excluded(from), std::ops::Bound::Unbounded))
            .next()
        {
            Some(state) => from = *state,
            None => break,
        }
    }
    let mut nodes: HashMap<(usize, Held), NodeId> = HashMap::new();
    for state in states.into_iter().rev() {
        let known = |to: &(usize, Held)| nodes.get(to).copied();
        let node = match next(program, state, nr) {
            Next::Ret(ret) => Some(leaf(graph, ret)),
            Next::Same(to) => known(&to),
            Next::Step(code, k, to) => known(&to).map(|to| graph.step(code, k, to)),
            Next::Branch(code, k, yes, no) => known(&yes)
                .zip(known(&no))
                .map(|(yes, no)| graph.branch(code, k, yes, no)),
        };
        // A jump backwards: no program that the kernel takes.
        let node = node.unwrap_or_else(|| graph.ret(crate::action::RET_KILL_PROCESS));
        nodes.insert(state, node);
        graph.check_size()?;
    }
    Ok(nodes
        .get(&start)
        .copied()
        .unwrap_or_else(|| graph.ret(crate::action::RET_KILL_PROCESS)))
}

/// The lowest number of each range of numbers that `programs` don't tell apart.
pub(crate) fn ranges(programs: &[&Program]) -> BTreeSet<u32> {
    let mut starts = BTreeSet::from([0]);
    for program in programs {
        // Whether it is the number that is compared isn't asked: too many are right.
        for ins in program.instructions() {
            if matches!(ins.code, bpf::JEQ_K | bpf::JGT_K | bpf::JGE_K) {
                starts.insert(ins.k);
                starts.extend(ins.k.checked_add(1));
            }
        }
    }
    starts
}

/// The program that decides as `node` says for each number, and as `foreign` for
/// other architectures.
pub(crate) fn whole(
    starts: &BTreeSet<u32>,
    foreign: u32,
    mut node: impl FnMut(&mut Graph, u32) -> Result<NodeId, TooLarge>,
) -> Result<Program, TooLarge> {
    let mut graph = Graph::default();
    let mut verdicts: BTreeMap<u32, NodeId> = BTreeMap::new();
    for &start in starts {
        verdicts.insert(start, node(&mut graph, start)?);
    }
    let mut ranges: Vec<(u32, NodeId)> = verdicts.into_iter().collect();
    ranges.dedup_by_key(|(_, node)| *node);
    let tree = compile::tree(&mut graph, &ranges);
    let load = graph.step(bpf::LD_W_ABS, 0, tree);
    let foreign = graph.ret(foreign);
    let arch = graph.branch(bpf::JEQ_K, bpf::AUDIT_ARCH_X86_64, load, foreign);
    let root = graph.step(bpf::LD_W_ABS, 4, arch);
    let root = graph.without_repeated_loads(root)?;
    graph.emit(root)
}

/// What a program answers to calls of other architectures: the same to all.
pub(crate) fn foreign(program: &Program) -> u32 {
    let data = SeccompData {
        arch: 0,
        ..SeccompData::x86_64(0, [0; 6])
    };
    interp::run(program, &data)
}

fn is_error(ret: u32) -> bool {
    matches!(Action::from_ret(ret), Action::Errno(_))
}

fn asks(ret: u32) -> bool {
    Action::from_ret(ret) == Action::Notify
}

/// Two programs in place of `profile`, which asks a listener, and `own`, that of the
/// specification. See the [module](self).
///
/// # Errors
/// [`TooLarge`] where one of them is more than seccomp(2) takes: then only the two
/// as they are can be installed.
pub fn stack(profile: &Program, own: &Program) -> Result<Stacked, TooLarge> {
    let (allow, notify) = (Action::Allow.to_ret(), Action::Notify.to_ret());
    let mut starts = ranges(&[profile, own]);
    let forker = forker_calls();
    starts.extend(forker.iter().flat_map(|nr| [*nr, nr + 1]));
    let both = whole(&starts, foreign(profile), |graph, nr| {
        let is_forkers = forker.contains(&nr);
        let runs = match is_forkers {
            true => None,
            false => Some(only(graph, own, nr, &mut |graph, ret| {
                graph.ret(if is_error(ret) { notify } else { allow })
            })?),
        };
        only(graph, profile, nr, &mut |graph, ret| match runs {
            // The specification's error is more severe than running, being logged
            // and being traced.
            Some(runs) if ret == allow => runs,
            _ => graph.ret(ret),
        })
    })?;
    let starts = ranges(&[&both, own]);
    let own = whole(&starts, foreign(own), |graph, nr| {
        let as_is = only(graph, own, nr, &mut |graph, ret| graph.ret(ret))?;
        let asked = only(graph, own, nr, &mut |graph, ret| {
            graph.ret(if is_error(ret) { allow } else { ret })
        })?;
        if as_is == asked {
            return Ok(as_is);
        }
        only(graph, &both, nr, &mut |_, ret| {
            if asks(ret) { asked } else { as_is }
        })
    })?;
    Ok(Stacked { asks: both, own })
}

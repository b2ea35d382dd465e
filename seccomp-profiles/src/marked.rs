//! Calls that the forker of a container makes, and its children before they execute,
//! told apart from the workload's by a mark.
//!
//! A forker is bound by the filter of its container, which whatever it starts
//! inherits. So that filter has to let it set ids, limits and capabilities, send
//! descriptors and wait, also where the workload never does. None of these calls has
//! six arguments; the kernel doesn't read the sixth register then, but filters see it.
//! There the forker puts [`MARK`], and:
//!
//! * [`open`] makes of a profile's program one that lets the forker's calls
//!   ([`FORKER`]) run where they have the mark, and is as before for all others;
//! * [`close`] makes the program that each child installs last, before it executes: it
//!   takes that back. From then on a call with the mark runs if it would run without,
//!   and kills if not.
//!
//! So the mark is no secret, and nothing depends on who knows it: behind [`close`]
//! there is no argument that opens anything. Calls that a profile allows whatever
//! their arguments are, are in neither program: the kernel goes on remembering that
//! they run, and asks no filter.

use std::collections::BTreeSet;

use crate::action::{Action, RET_KILL_PROCESS};
use crate::graph::{Graph, NodeId, TooLarge};
use crate::program::{self as bpf, Program};
use crate::stack::{self, foreign, only, ranges, whole};
use crate::table;

/// What is in the sixth register of the forker's calls: no address, no text, and
/// nothing that is counted. (`casemate_sys::marked` has it too.)
pub const MARK: u64 = 0x9c5e_a117_d3b8_42f6;

/// Where `struct seccomp_data` has the low half of the sixth argument.
const SIXTH: u32 = 56;

/// Low words of arguments, as they must be.
type Fixed = &'static [(u8, u32)];

/// What a forker calls, and its children until they execute, that a workload need
/// not: with the arguments that it passes, where they tell kinds of calls apart.
pub const FORKER: &[(&str, &[Fixed])] = &[
    ("faccessat", &[&[]]),
    // F_DUPFD_CLOEXEC
    ("fcntl", &[&[(1, 1030)]]),
    ("dup2", &[&[]]),
    ("close_range", &[&[]]),
    ("getcwd", &[&[]]),
    ("chdir", &[&[]]),
    ("umask", &[&[]]),
    ("ppoll", &[&[]]),
    ("recvmsg", &[&[]]),
    ("sendmsg", &[&[]]),
    // AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC
    ("socketpair", &[&[(0, 1), (1, 0x8_0005), (2, 0)]]),
    // CLONE_PIDFD | SIGCHLD
    ("clone", &[&[(0, 0x1011)]]),
    ("waitid", &[&[]]),
    // KEEPCAPS, CAPBSET_DROP, NO_NEW_PRIVS, CAP_AMBIENT
    ("prctl", &[&[(0, 8)], &[(0, 24)], &[(0, 38)], &[(0, 47)]]),
    // TIOCSCTTY, TIOCSWINSZ, TIOCSPTLCK, TIOCGPTPEER
    (
        "ioctl",
        &[
            &[(1, 0x540e)],
            &[(1, 0x5414)],
            &[(1, 0x4004_5431)],
            &[(1, 0x5441)],
        ],
    ),
    // All but RLIMIT_CORE, which is not for anybody inside to set.
    (
        "prlimit64",
        &[
            &[(1, 0)],
            &[(1, 1)],
            &[(1, 2)],
            &[(1, 3)],
            &[(1, 5)],
            &[(1, 6)],
            &[(1, 7)],
            &[(1, 8)],
            &[(1, 9)],
            &[(1, 10)],
            &[(1, 11)],
            &[(1, 12)],
            &[(1, 13)],
            &[(1, 14)],
            &[(1, 15)],
        ],
    ),
    ("setsid", &[&[]]),
    ("setgroups", &[&[]]),
    ("setresuid", &[&[]]),
    ("setresgid", &[&[]]),
    ("capset", &[&[]]),
    // SECCOMP_SET_MODE_FILTER, for the last filter
    ("seccomp", &[&[(0, 1), (1, 0)]]),
];

/// Numbers and arguments of [`FORKER`].
pub(crate) fn kinds() -> impl Iterator<Item = (u32, Fixed)> {
    FORKER.iter().flat_map(|(name, kinds)| {
        let number = table::number(name);
        kinds
            .iter()
            .filter_map(move |fixed| Some((number?, *fixed)))
    })
}

/// Those of the forker's calls that `program` doesn't let run without the mark.
#[must_use]
pub fn lacking(program: &Program) -> Vec<(u32, Fixed)> {
    kinds()
        .filter(|(number, fixed)| !always_runs(program, *number, fixed))
        .collect()
}

/// What the accumulator is, as far as number and fixed arguments say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Held {
    Known(u32),
    Unknown,
}

/// Whether a call of this number with these arguments runs whatever the others are. No
/// may also mean that it can't be seen.
fn always_runs(program: &Program, number: u32, fixed: Fixed) -> bool {
    let load = |offset: u32| {
        let of = |(index, _): &&(u8, u32)| offset == 16 + 8 * u32::from(*index);
        match offset {
            0 => Held::Known(number),
            4 => Held::Known(bpf::AUDIT_ARCH_X86_64),
            _ => match fixed.iter().find(of) {
                Some((_, value)) => Held::Known(*value),
                None => Held::Unknown,
            },
        }
    };
    let mut seen = BTreeSet::new();
    let mut ways = vec![(0usize, Held::Unknown)];
    while let Some((at, held)) = ways.pop() {
        if !seen.insert((at, held)) {
            continue;
        }
        let Some(ins) = program.instructions().get(at) else {
            return false;
        };
        let next = at + 1;
        let (yes, no) = (next + usize::from(ins.jt), next + usize::from(ins.jf));
        match (ins.code, held) {
            (bpf::RET_K, _) => {
                if !matches!(Action::from_ret(ins.k), Action::Allow | Action::Log) {
                    return false;
                }
            }
            (bpf::LD_W_ABS, _) => ways.push((next, load(ins.k))),
            (bpf::AND_K, Held::Known(value)) => ways.push((next, Held::Known(value & ins.k))),
            (bpf::AND_K, Held::Unknown) => ways.push((next, held)),
            (bpf::JA, _) => ways.push((next.saturating_add(ins.k as usize), held)),
            (bpf::JEQ_K | bpf::JGT_K | bpf::JGE_K | bpf::JSET_K, Held::Known(value)) => {
                let taken = stack::compares(ins.code, value, ins.k);
                ways.push((if taken { yes } else { no }, held));
            }
            (bpf::JEQ_K | bpf::JGT_K | bpf::JGE_K | bpf::JSET_K, Held::Unknown) => {
                ways.extend([(yes, held), (no, held)]);
            }
            _ => return false,
        }
    }
    true
}

/// `then` for a call that has the mark and one of these sets of arguments, else
/// `otherwise`.
fn if_marked(graph: &mut Graph, kinds: &[Fixed], then: NodeId, otherwise: NodeId) -> NodeId {
    let mut node = otherwise;
    for fixed in kinds {
        let mut all = then;
        for (index, value) in fixed.iter().rev() {
            let branch = graph.branch(bpf::JEQ_K, *value, all, node);
            all = graph.step(bpf::LD_W_ABS, 16 + 8 * u32::from(*index), branch);
        }
        node = all;
    }
    let [low, high] = [MARK & u64::from(u32::MAX), MARK >> 32].map(|half| half as u32);
    let high = graph.branch(bpf::JEQ_K, high, node, otherwise);
    let high = graph.step(bpf::LD_W_ABS, SIXTH + 4, high);
    let low = graph.branch(bpf::JEQ_K, low, high, otherwise);
    graph.step(bpf::LD_W_ABS, SIXTH, low)
}

fn of(lacking: &[(u32, Fixed)], number: u32) -> Vec<Fixed> {
    let of = lacking.iter().filter(|(of, _)| *of == number);
    of.map(|(_, fixed)| *fixed).collect()
}

fn starts(programs: &[&Program], lacking: &[(u32, Fixed)]) -> BTreeSet<u32> {
    let mut starts = ranges(programs);
    starts.extend(lacking.iter().flat_map(|(nr, _)| [*nr, nr + 1]));
    starts
}

/// `program`, which lets the forker's calls run where they have the mark; `None`: it
/// does without.
///
/// # Errors
/// [`TooLarge`] where that is more than seccomp(2) takes.
pub fn open(program: &Program) -> Result<Option<Program>, TooLarge> {
    let lacking = lacking(program);
    if lacking.is_empty() {
        return Ok(None);
    }
    let starts = starts(&[program], &lacking);
    whole(&starts, foreign(program), |graph, nr| {
        let as_is = only(graph, program, nr, &mut |graph, ret| graph.ret(ret))?;
        let kinds = of(&lacking, nr);
        if kinds.is_empty() {
            return Ok(as_is);
        }
        let allow = graph.ret(Action::Allow.to_ret());
        Ok(if_marked(graph, &kinds, allow, as_is))
    })
    .map(Some)
}

/// What takes back the marked calls that [`open`] lets run in each of `programs`, and
/// is `own` for the rest, where there is one; `None`: there are none, and `own` does as
/// it is.
///
/// # Errors
/// [`TooLarge`] where that is more than seccomp(2) takes.
pub fn close(programs: &[&Program], own: Option<&Program>) -> Result<Option<Program>, TooLarge> {
    let mut lacks: Vec<(u32, Fixed)> = programs.iter().flat_map(|p| lacking(p)).collect();
    lacks.sort_unstable();
    lacks.dedup();
    if lacks.is_empty() {
        return Ok(None);
    }
    let read: Vec<&Program> = programs.iter().copied().chain(own).collect();
    let starts = starts(&read, &lacks);
    let allow = Action::Allow.to_ret();
    let foreign = own.map_or(allow, foreign);
    whole(&starts, foreign, |graph, nr| {
        let otherwise = match own {
            Some(own) => only(graph, own, nr, &mut |graph, ret| graph.ret(ret))?,
            None => graph.ret(allow),
        };
        let kinds = of(&lacks, nr);
        if kinds.is_empty() {
            return Ok(otherwise);
        }
        let mut marked = otherwise;
        for program in programs {
            marked = only(
                graph,
                program,
                nr,
                &mut |graph, ret| match Action::from_ret(ret) {
                    Action::Allow | Action::Log => marked,
                    _ => graph.ret(RET_KILL_PROCESS),
                },
            )?;
        }
        Ok(if_marked(graph, &kinds, marked, otherwise))
    })
    .map(Some)
}

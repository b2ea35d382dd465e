//! How much of the kernel stacked filters leave in reach.
//!
//! Which calls can run is found by evaluating programs, for every number and all
//! arguments that make a difference: those that a program compares with, and their
//! neighbours. So it holds for any filter, ours or not, as the kernel has it.

use std::collections::{BTreeSet, HashSet};

use crate::action::Action;
use crate::interp::{self, SeccompData};
use crate::program::{self as bpf, Program};

/// `AUDIT_ARCH_I386` (linux/audit.h).
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// The last number that is tried of each ABI.
const LAST: u32 = 1023;
/// How many combinations of arguments are tried for one call.
const COMBINATIONS: usize = 1 << 18;

/// A way into the kernel: each has numbers of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abi {
    /// `syscall` in 64-bit code.
    X86_64,
    /// The same with numbers from 0x4000_0000.
    X32,
    /// `int 0x80` and 32-bit code.
    I386,
}

impl Abi {
    /// A call of number `nr` in this ABI.
    #[must_use]
    pub fn call(self, nr: u32, args: [u64; 6]) -> SeccompData {
        let data = SeccompData::x86_64(nr, args);
        match self {
            Self::X86_64 => data,
            Self::X32 => SeccompData {
                nr: nr | crate::compile::X32,
                ..data
            },
            Self::I386 => SeccompData {
                arch: AUDIT_ARCH_I386,
                ..data
            },
        }
    }
}

/// The verdict of stacked filters: of the most severe action the newest filter's
/// (seccomp(2), "the highest precedence value"). `chain` is oldest first.
#[must_use]
pub fn verdict(chain: &[&Program], data: &SeccompData) -> Action {
    let rank = |ret: u32| (ret & 0xffff_0000).cast_signed();
    let rets = chain.iter().rev().map(|program| interp::run(program, data));
    // The first of equals: the newest.
    rets.min_by_key(|ret| rank(*ret))
        .map_or(Action::Allow, Action::from_ret)
}

/// Whether a call of this number can run, with the arguments in `fixed` as given
/// (index, value) and any others.
#[must_use]
pub fn reaches(chain: &[&Program], abi: Abi, nr: u32, fixed: &[(usize, u64)]) -> bool {
    let mut words: [BTreeSet<u32>; 12] = Default::default();
    let data = abi.call(nr, [0; 6]);
    for program in chain {
        compared(program, &data, &mut words);
    }
    let values: Vec<Vec<u64>> = (0..6)
        .map(|index| {
            if let Some((_, value)) = fixed.iter().find(|(at, _)| *at == index) {
                return vec![*value];
            }
            let [low, high] = [&words[2 * index], &words[2 * index + 1]];
            let high: Vec<u64> = high.iter().copied().chain([0]).map(u64::from).collect();
            let mut all: Vec<u64> = Vec::new();
            for low in low.iter().copied().chain([0]) {
                all.extend(high.iter().map(|high| high << 32 | u64::from(low)));
            }
            all.sort_unstable();
            all.dedup();
            all
        })
        .collect();
    let count = values
        .iter()
        .fold(1usize, |n, set| n.saturating_mul(set.len()));
    (0..count.min(COMBINATIONS)).any(|at| {
        let mut rest = at;
        let mut args = [0; 6];
        for (arg, set) in args.iter_mut().zip(&values) {
            *arg = set.get(rest % set.len()).copied().unwrap_or(0);
            rest /= set.len();
        }
        let data = abi.call(nr, args);
        matches!(verdict(chain, &data), Action::Allow | Action::Log)
    })
}

/// The numbers of `abi` that can run, with some arguments.
#[must_use]
pub fn reachable(chain: &[&Program], abi: Abi) -> Vec<u32> {
    (0..=LAST)
        .filter(|nr| reaches(chain, abi, *nr, &[]))
        .collect()
}

/// What the accumulator is, as far as it does not depend on arguments.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Held {
    Known(u32),
    /// This word of the arguments, cut down by the mask.
    Word(usize, u32),
}

/// Collects the values that `program` compares words of the arguments with, for
/// calls of this number and architecture, and what lies beside them.
fn compared(program: &Program, data: &SeccompData, words: &mut [BTreeSet<u32>; 12]) {
    let mut seen = HashSet::new();
    let mut stack = vec![(0usize, Held::Known(0))];
    while let Some((at, held)) = stack.pop() {
        if !seen.insert((at, held)) {
            continue;
        }
        let Some(ins) = program.instructions().get(at) else {
            continue;
        };
        let next = at + 1;
        let (yes, no) = (next + usize::from(ins.jt), next + usize::from(ins.jf));
        match (ins.code, held) {
            (bpf::LD_W_ABS, _) => {
                let held = match ins.k {
                    0 => Held::Known(data.nr),
                    4 => Held::Known(data.arch),
                    16..64 => Held::Word((ins.k as usize - 16) / 4, u32::MAX),
                    _ => Held::Known(0),
                };
                stack.push((next, held));
            }
            (bpf::AND_K, Held::Known(value)) => stack.push((next, Held::Known(value & ins.k))),
            (bpf::AND_K, Held::Word(word, mask)) => {
                stack.push((next, Held::Word(word, mask & ins.k)));
            }
            (bpf::JA, _) => stack.push((next.saturating_add(ins.k as usize), held)),
            (bpf::JEQ_K | bpf::JGT_K | bpf::JGE_K | bpf::JSET_K, Held::Known(value)) => {
                let taken = match ins.code {
                    bpf::JEQ_K => value == ins.k,
                    bpf::JGT_K => value > ins.k,
                    bpf::JGE_K => value >= ins.k,
                    _ => value & ins.k != 0,
                };
                stack.push((if taken { yes } else { no }, held));
            }
            (bpf::JEQ_K | bpf::JGT_K | bpf::JGE_K | bpf::JSET_K, Held::Word(word, mask)) => {
                let k = ins.k & mask;
                let lowest = mask & mask.wrapping_neg();
                if let Some(set) = words.get_mut(word) {
                    set.extend([k, k ^ lowest, k.wrapping_sub(1), k.wrapping_add(1)]);
                }
                stack.extend([(yes, held), (no, held)]);
            }
            _ => {}
        }
    }
}

//! A classic-BPF interpreter for filters, as the kernel runs them.
//!
//! For tests and for explaining a verdict; nothing on a hot path needs it.

use crate::action::RET_KILL_PROCESS;
use crate::program::{self as bpf, Program};

/// `struct seccomp_data` (linux/seccomp.h): what a filter sees of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeccompData {
    /// The number of the call.
    pub nr: u32,
    /// The ABI, an `AUDIT_ARCH_*` value (linux/audit.h).
    pub arch: u32,
    /// Where the call was made.
    pub instruction_pointer: u64,
    /// The six argument registers.
    pub args: [u64; 6],
}

impl SeccompData {
    /// A call made through the x86-64 ABI.
    #[must_use]
    pub fn x86_64(nr: u32, args: [u64; 6]) -> Self {
        Self {
            nr,
            arch: bpf::AUDIT_ARCH_X86_64,
            instruction_pointer: 0,
            args,
        }
    }

    /// The little-endian word at `offset`, which the kernel requires to be aligned.
    fn word(&self, offset: u32) -> Option<u32> {
        let low = |value: u64| u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0);
        let half = |value: u64| {
            if offset.is_multiple_of(8) {
                low(value)
            } else {
                low(value >> 32)
            }
        };
        match offset {
            _ if !offset.is_multiple_of(4) => None,
            0 => Some(self.nr),
            4 => Some(self.arch),
            8 | 12 => Some(half(self.instruction_pointer)),
            16..=60 => {
                let index = usize::try_from((offset - 16) / 8).ok()?;
                self.args.get(index).copied().map(half)
            }
            _ => None,
        }
    }
}

/// The `SECCOMP_RET_*` value that `program` returns for `data`.
///
/// A program that the kernel would refuse to install answers "kill the process".
#[must_use]
pub fn run(program: &Program, data: &SeccompData) -> u32 {
    run_with(program, data, |_| {})
}

/// As [`run`], telling `visit` the index of every instruction on the way.
pub fn run_with(program: &Program, data: &SeccompData, mut visit: impl FnMut(usize)) -> u32 {
    let mut acc = 0u32;
    let mut at = 0usize;
    // Jumps only go forward, so the loop ends after at most one pass.
    while let Some(ins) = program.instructions().get(at) {
        visit(at);
        at += 1;
        let branch = |taken: bool| usize::from(if taken { ins.jt } else { ins.jf });
        match ins.code {
            bpf::LD_W_ABS => match data.word(ins.k) {
                Some(word) => acc = word,
                None => return RET_KILL_PROCESS,
            },
            bpf::AND_K => acc &= ins.k,
            bpf::JA => match usize::try_from(ins.k) {
                Ok(distance) => at = at.saturating_add(distance),
                Err(_) => return RET_KILL_PROCESS,
            },
            bpf::JEQ_K => at += branch(acc == ins.k),
            bpf::JGT_K => at += branch(acc > ins.k),
            bpf::JGE_K => at += branch(acc >= ins.k),
            bpf::JSET_K => at += branch(acc & ins.k != 0),
            bpf::RET_K => return ins.k,
            _ => return RET_KILL_PROCESS,
        }
    }
    RET_KILL_PROCESS
}

//! The compiled form: classic BPF as seccomp(2) takes it.

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
pub const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// `BPF_MAXINSNS` (linux/bpf_common.h): the longest program seccomp(2) takes.
pub const MAX_INSTRUCTIONS: usize = 4096;

/// `BPF_LD | BPF_W | BPF_ABS`: load a word of `struct seccomp_data`.
pub const LD_W_ABS: u16 = 0x20;
/// `BPF_ALU | BPF_AND | BPF_K`.
pub const AND_K: u16 = 0x54;
/// `BPF_JMP | BPF_JA`.
pub const JA: u16 = 0x05;
/// `BPF_JMP | BPF_JEQ | BPF_K`.
pub const JEQ_K: u16 = 0x15;
/// `BPF_JMP | BPF_JGT | BPF_K`.
pub const JGT_K: u16 = 0x25;
/// `BPF_JMP | BPF_JGE | BPF_K`.
pub const JGE_K: u16 = 0x35;
/// `BPF_JMP | BPF_JSET | BPF_K`; libseccomp's programs have it, ours do not.
pub const JSET_K: u16 = 0x45;
/// `BPF_RET | BPF_K`.
pub const RET_K: u16 = 0x06;

/// `struct sock_filter` (linux/filter.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SockFilter {
    /// Operation.
    pub code: u16,
    /// How far to jump when the comparison holds.
    pub jt: u8,
    /// How far to jump when it does not.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// A filter, ready to install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program(Vec<SockFilter>);

impl Program {
    /// A program of these instructions; the kernel checks them when it is installed.
    #[must_use]
    pub fn new(instructions: Vec<SockFilter>) -> Self {
        Self(instructions)
    }

    /// The instructions in order.
    #[must_use]
    pub fn instructions(&self) -> &[SockFilter] {
        &self.0
    }

    /// The instructions as an array of `struct sock_filter` in native layout.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0
            .iter()
            .flat_map(|ins| {
                let [c0, c1] = ins.code.to_ne_bytes();
                let [k0, k1, k2, k3] = ins.k.to_ne_bytes();
                [c0, c1, ins.jt, ins.jf, k0, k1, k2, k3]
            })
            .collect()
    }

    /// The program in bytes made by [`Program::to_bytes`]; `None` when they are
    /// not a whole number of instructions.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (whole, rest) = bytes.as_chunks::<8>();
        rest.is_empty().then(|| {
            Self(
                whole
                    .iter()
                    .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| SockFilter {
                        code: u16::from_ne_bytes([c0, c1]),
                        jt,
                        jf,
                        k: u32::from_ne_bytes([k0, k1, k2, k3]),
                    })
                    .collect(),
            )
        })
    }
}

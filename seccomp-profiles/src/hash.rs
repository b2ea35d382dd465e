//! Names for programs, to compare what is installed with what was promised.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::program::Program;

/// The SHA-256 of a program's bytes, as `struct sock_filter` in native layout: as
/// seccomp(2) took them, and as `PTRACE_SECCOMP_GET_FILTER` gives them back.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// Of a program's bytes.
    #[must_use]
    pub fn of(program: &[u8]) -> Self {
        Self(Sha256::digest(program).into())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hash({self})")
    }
}

impl Program {
    /// The program's [`Hash`].
    #[must_use]
    pub fn hash(&self) -> Hash {
        Hash::of(&self.to_bytes())
    }
}

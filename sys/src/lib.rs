//! Safe wrappers of the Linux calls casemate needs beyond `rustix`. This is the
//! only crate with `unsafe` code: each block is small and says why it is sound.
//! Return values are `std::io::Error` with the raw errno; the callers add the
//! step and the object.

pub mod attempt;
pub mod bpf;
pub mod exec;
pub mod ident;
pub mod landlock;
pub mod marked;
pub mod memory;
pub mod message;
pub mod mount;
pub mod namespace;
pub mod notify;
pub mod observe;
pub mod process;
pub mod schedule;
pub mod seccomp;
pub mod signal;

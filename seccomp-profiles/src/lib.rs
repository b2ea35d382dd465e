//! Readable system-call profiles and their compiler, for x86-64.
//!
//! A [`Profile`] is a TOML file of rules with reasons; [`compile()`] makes a
//! [`Program`] of it that seccomp(2) takes. The profiles under `profiles/` are
//! part of the crate, and compiled when it is built: [`shipped_program`] costs
//! nothing at run time. [`oci`] compiles the `linux.seccomp` object of a
//! container's `config.json` the same way.
//!
//! Every program refuses foreign ABIs: a call through another architecture
//! (i386's `int 0x80`) kills the process, an x32 number gets the profile's `x32`
//! answer. Several filters on one process compose by the most restrictive
//! verdict, so a workload's own profile can only tighten ours.

#![forbid(unsafe_code)]

pub mod action;
mod args;
pub mod compile;
pub mod errno;
mod graph;
pub mod interp;
pub mod oci;
pub mod profile;
pub mod program;
pub mod reference;
pub mod table;

pub use action::Action;
pub use compile::{CompileError, compile};
pub use graph::TooLarge;
pub use profile::{Profile, ProfileError};
pub use program::{Program, SockFilter};

/// A file under `profiles/` and what it compiled to.
struct Shipped {
    name: &'static str,
    text: &'static str,
    program: &'static [u8],
}

// `static SHIPPED: &[Shipped]`, written by the build script, which fails the
// build when a profile does not compile.
include!(concat!(env!("OUT_DIR"), "/shipped.rs"));

/// The names of the shipped profiles, in alphabetical order.
pub fn shipped_names() -> impl Iterator<Item = &'static str> {
    SHIPPED.iter().map(|shipped| shipped.name)
}

/// A shipped profile by name.
#[must_use]
pub fn shipped(name: &str) -> Option<Profile> {
    let shipped = SHIPPED.iter().find(|shipped| shipped.name == name)?;
    Profile::from_toml(shipped.text).ok()
}

/// A shipped profile as an array of `struct sock_filter`, ready for seccomp(2).
#[must_use]
pub fn shipped_program(name: &str) -> Option<&'static [u8]> {
    let shipped = SHIPPED.iter().find(|shipped| shipped.name == name)?;
    Some(shipped.program)
}

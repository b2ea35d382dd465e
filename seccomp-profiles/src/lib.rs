//! Readable system-call profiles and their compiler, for x86-64.
//!
//! A [`Profile`] is a TOML file of rules with reasons; [`compile()`] makes a
//! [`Program`] of it that seccomp(2) takes. The profiles under `profiles/` are
//! part of the crate, and compiled when it is built: [`shipped_program`] costs
//! nothing at run time. [`Explainer`] says which rule refused a call. [`oci`] compiles the `linux.seccomp` object of a
//! container's `config.json` the same way.
//!
//! Every program refuses foreign ABIs: a call through another architecture
//! (i386's `int 0x80`) kills the process, an x32 number gets the profile's `x32`
//! answer. Several filters on one process compose by the most restrictive
//! verdict, so a workload's own profile can only tighten ours.

#![forbid(unsafe_code)]

pub mod action;
mod args;
pub mod compare;
pub mod compile;
pub mod errno;
pub mod explain;
pub mod export;
pub mod file;
mod graph;
mod hash;
pub mod interp;
pub mod marked;
pub mod minimal;
pub mod node;
pub mod observed;
pub mod oci;
mod prepared;
pub mod profile;
pub mod program;
pub mod recording;
pub mod reference;
mod shipped;
pub mod stack;
pub mod surface;
pub mod table;
mod within;

pub use action::Action;
pub use compare::{check, diff};
pub use compile::{CompileError, Form, compile, compile_as};
pub use explain::{Explainer, RuleInfo};
pub use graph::TooLarge;
pub use hash::Hash;
pub use minimal::minimal;
pub use observed::{Kind, Observed};
pub use prepared::{Marked, Prepared};
pub use profile::{Profile, ProfileError};
pub use program::{Program, SockFilter};
pub use recording::{Recording, RecordingError};
pub use shipped::{
    shipped, shipped_explainer, shipped_names, shipped_program, shipped_program_as, shipped_text,
};
pub use within::{Beyond, beyond};

//! Control groups from the host's side: create, limit, attach, measure, kill,
//! remove; version 1 (with or without the unified hierarchy beside it) and
//! version 2, both through the file system, and with systemd's consent where it
//! runs and is asked for ([`systemd`]).
//!
//! Nothing here ever writes to `cgroup.procs`: that takes the kernel's
//! `cgroup_threadgroup_rwsem` and waits for an RCU grace period, milliseconds
//! per write. A process is born in its place instead ([`Attach`]).

mod apply;
mod apply_v1;
mod apply_v2;
mod cgroup;
mod convert;
mod devices;
mod error;
mod files;
mod hierarchy;
mod kill;
mod limits;
mod oom;
mod remove;
mod scope;
mod stats;
mod stats_read;
pub mod systemd;

#[cfg(test)]
mod tests;

pub use cgroup::{Attach, Cgroup};
pub use error::CgroupError;
pub use hierarchy::Hierarchy;
pub use limits::DEVICE_PROGRAM;
pub use oom::OomWatch;
pub use remove::remove_empty;
pub use scope::Scope;
pub use stats::*;

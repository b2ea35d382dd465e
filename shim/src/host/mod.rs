//! Effects on the host. Each returns a descriptor or a kernel object that dies
//! with its owner; what can't is in the journal before it is made.

pub mod agent;
pub mod cgroup_view;
pub mod descriptors;
pub mod dev;
pub mod guard;
pub mod hooks;
pub mod ids;
pub mod lockdown;
pub mod lsm;
pub mod network;
pub mod rootfs;
pub mod scope;
pub mod sources;
pub mod staging;
pub mod userns;
pub mod users;
pub mod volume;

use std::io;

use crate::sandbox::SandboxError;

/// Adds step and object to an I/O error.
pub trait Step<T> {
    /// `step object: reason`, as a failure of the host.
    fn step(self, step: &str, object: impl AsRef<str>) -> Result<T, SandboxError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &str, object: impl AsRef<str>) -> Result<T, SandboxError> {
        self.map_err(|e| {
            let object = object.as_ref();
            let gap = if object.is_empty() { "" } else { " " };
            SandboxError::Failed(format!("{step}{gap}{object}: {}", e.into()))
        })
    }
}

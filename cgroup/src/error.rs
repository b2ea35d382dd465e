//! What can go wrong, one line each: step, object, reason, way out.

use std::io;
use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup file system is mounted.
    #[error(
        "find cgroup hierarchies: /proc/self/mountinfo names no usable cgroup or cgroup2 mount: mount cgroup2 at /sys/fs/cgroup"
    )]
    NoHierarchy,
    /// `linux.cgroupsPath` is not a usable path.
    #[error("linux.cgroupsPath = {path:?}: {reason}: give an absolute path such as /default/NAME")]
    Path {
        /// The field's value.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// systemd didn't do what it was asked for.
    #[error(
        "{step} scope {unit:?} in {slice:?}: systemd: {reason}: look at systemctl status and the journal of the host"
    )]
    Systemd {
        /// What was asked for.
        step: &'static str,
        /// Of which scope.
        unit: String,
        /// In which slice.
        slice: String,
        /// systemd's reason, or what we didn't hear.
        reason: String,
    },
    /// The leaf is there already: it may be another container's.
    #[error(
        "create cgroup {dir:?}: it exists already, maybe for another container: choose another linux.cgroupsPath or, if nothing uses it, rmdir it"
    )]
    Exists {
        /// The leaf.
        dir: PathBuf,
    },
    /// The leaf is no longer there.
    #[error(
        "{step}: cgroup {dir:?} is gone: the container was deleted or something else removed it"
    )]
    Gone {
        /// What was tried.
        step: &'static str,
        /// The leaf.
        dir: PathBuf,
    },
    /// A resource field that this host can't enforce as asked.
    #[error("linux.resources.{field} = {value}: {reason}: {way_out}")]
    Limit {
        /// The field below `linux.resources`.
        field: String,
        /// Its value.
        value: String,
        /// Why not.
        reason: String,
        /// What to do about it.
        way_out: String,
    },
    /// A feature whose controller this host hasn't got.
    #[error("{step}: {reason}: {way_out}")]
    Unsupported {
        /// What was tried.
        step: String,
        /// Why it can't be done.
        reason: String,
        /// What to do about it.
        way_out: String,
    },
    /// Still in use when the time was over.
    #[error(
        "{step} {dir:?}: still busy after {waited_ms} ms with process ids {pids:?}: a process in uninterruptible sleep keeps it; look at /proc/PID/stack"
    )]
    Busy {
        /// What was tried.
        step: &'static str,
        /// Which directory.
        dir: PathBuf,
        /// How long.
        waited_ms: u128,
        /// The first few that are still there.
        pids: Vec<u32>,
    },
    /// A file operation failed.
    #[error("{step} {path:?}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl CgroupError {
    /// Whether the cgroup isn't there (any more): `NotFound` towards containerd.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }

    pub(crate) fn io(step: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        Self::Io { step, path, source }
    }

    pub(crate) fn limit(
        field: &str,
        value: impl ToString,
        reason: impl Into<String>,
        way_out: impl Into<String>,
    ) -> Self {
        Self::Limit {
            field: field.to_owned(),
            value: value.to_string(),
            reason: reason.into(),
            way_out: way_out.into(),
        }
    }
}

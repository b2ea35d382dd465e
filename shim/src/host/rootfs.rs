//! A container's root file system, from containerd's mount list: layers mapped
//! to the pod's ids, assembled by the shim, handed on as a detached mount.
//!
//! Files keep their ids on disk (0 stays 0): the mapping is on the mounts. An
//! overlay can't be mapped itself, its layers can (mount_setattr(2)).

mod overlay;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use casemate_sys::mount::{self, Change, attr, clone_tree};
use rustix::fs::CWD;

use super::Step;
use super::staging::Staging;
use crate::sandbox::{RootfsMount, SandboxError};

/// Whose the files are: the containers' user namespace, and the host id of
/// its root.
pub struct Owner<'a> {
    /// Maps the ids of layers.
    pub userns: &'a OwnedFd,
    /// Host id of the namespace's root.
    pub root_id: u32,
}

/// Assembles the root; `attributes` go on the mount. On older kernels (or with
/// the flag beside it) an overlay is made inside of the staging namespace.
pub fn make(
    mounts: &[RootfsMount],
    root_path: &Path,
    owner: &Owner<'_>,
    attributes: u64,
    (staging, older_ways): (&Staging, bool),
) -> Result<OwnedFd, SandboxError> {
    match mounts {
        [] => bind(root_path, false, owner.userns, attributes),
        [one] => {
            if !one.target.is_empty() && one.target != "/" {
                return Err(refuse(&format!("rootfs mount target \"{}\"", one.target)));
            }
            if let Some(bad) = one.options.iter().find(|o| o.starts_with("X-")) {
                return Err(refuse(&format!("rootfs mount option \"{bad}\"")));
            }
            match one.fstype.as_str() {
                "overlay" => overlay::make(&one.options, owner, attributes, staging, older_ways),
                "bind" | "rbind" | "none" | "" => {
                    let read_only = one.options.iter().any(|o| o == "ro");
                    bind(Path::new(&one.source), read_only, owner.userns, attributes)
                }
                other => Err(refuse(&format!("rootfs mount type \"{other}\""))),
            }
        }
        many => Err(refuse(&format!("rootfs of {} mounts", many.len()))),
    }
}

fn refuse(what: &str) -> SandboxError {
    SandboxError::Invalid(format!(
        "{what} is not supported: use a snapshotter that gives one overlay or bind mount \
         (overlayfs, native)"
    ))
}

fn bind(
    source: &Path,
    read_only: bool,
    userns: &OwnedFd,
    attributes: u64,
) -> Result<OwnedFd, SandboxError> {
    let object = source.display().to_string();
    let tree = clone_tree(CWD, source, false, true).step("open rootfs", &object)?;
    map(
        &tree,
        userns,
        attributes | if read_only { attr::RDONLY } else { 0 },
        false,
    )
    .map_err(|e| explain_idmap(e, &object))?;
    Ok(tree)
}

/// Maps ids of a detached tree through `userns` and sets `attributes`.
pub fn map(tree: &OwnedFd, userns: &OwnedFd, attributes: u64, recursive: bool) -> io::Result<()> {
    mount::set_attributes(
        tree,
        Change {
            set: attributes,
            userns: Some(userns.as_fd()),
            recursive,
            ..Change::default()
        },
    )
}

/// EINVAL of an id mapping means one thing: the file system can't.
pub fn explain_idmap(error: io::Error, object: &str) -> SandboxError {
    if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) {
        return SandboxError::Failed(format!(
            "map ids of {object}: its file system has no id-mapped mounts on this kernel (ext4, \
             xfs, btrfs since Linux 5.12/5.15, overlay layers since 5.19, tmpfs since 6.3); put \
             it on one of these"
        ));
    }
    SandboxError::Failed(format!("map ids of {object}: {error}"))
}

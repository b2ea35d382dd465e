//! Binds of host files and directories: opened by the shim, ids mapped, flags
//! set, handed on as detached mounts.

use std::os::fd::OwnedFd;
use std::path::Path;

use casemate_spec::MountSpec;
use casemate_sys::mount::{self, Change, clone_tree};
use rustix::fs::{CWD, FileType};

use super::Step;
use super::rootfs::{explain_idmap, map};
use crate::plan::attributes;
use crate::sandbox::SandboxError;

/// A bind, detached, and whether it is a directory.
pub fn open(spec: &MountSpec, userns: &OwnedFd) -> Result<(OwnedFd, bool), SandboxError> {
    let object = format!("mount source {} (for {})", spec.source, spec.destination);
    let tree =
        clone_tree(CWD, Path::new(&spec.source), spec.flags.rbind, true).step("open", &object)?;
    let own = attributes(&spec.flags.attrs);
    let below = attributes(&spec.flags.recursive);
    map(&tree, None, 0, spec.flags.rbind).step("cut off", &object)?;
    // Mounts below are mapped where they can be; what can't is shown with ids
    // that the pod doesn't have, which is safe.
    if !spec.flags.rbind || map(&tree, Some(userns), 0, true).is_err() {
        map(&tree, Some(userns), 0, false).map_err(|e| explain_idmap(e, &object))?;
    }
    map(&tree, None, own, false).step("set flags of", &object)?;
    if below != 0 {
        let change = Change {
            set: below,
            recursive: true,
            ..Change::default()
        };
        mount::set_attributes(&tree, change).step("set flags of", &object)?;
    }
    let stat = rustix::fs::fstat(&tree).step("look at", &object)?;
    Ok((tree, FileType::from_raw_mode(stat.st_mode).is_dir()))
}

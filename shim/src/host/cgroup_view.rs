//! `/sys/fs/cgroup` of a container on cgroup v1.

use std::os::fd::OwnedFd;

use casemate_cgroup::Cgroup;
use casemate_sys::mount::{Change, NewFs, attr, clone_tree, set_attributes};
use rustix::fs::CWD;

use super::Step;
use crate::sandbox::SandboxError;

/// Read-only views of the container's own cgroup, one for each v1 controller.
pub fn each(cgroup: &Cgroup) -> Result<Vec<(String, OwnedFd)>, SandboxError> {
    let mut views = Vec::new();
    for dir in cgroup.leaf_dirs() {
        let Ok(relative) = dir.strip_prefix("/sys/fs/cgroup") else {
            continue;
        };
        let Some(name) = relative.components().next() else {
            continue;
        };
        let name = name.as_os_str().to_string_lossy().into_owned();
        let object = dir.display().to_string();
        let tree = clone_tree(CWD, dir, false, false).step("clone", &object)?;
        set_attributes(
            &tree,
            Change {
                set: attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC,
                ..Default::default()
            },
        )
        .step("protect", &object)?;
        views.push((name, tree));
    }
    Ok(views)
}

/// The tmpfs that they are mounted on.
pub fn base(views: &[(String, OwnedFd)]) -> std::io::Result<OwnedFd> {
    let fs = NewFs::open("tmpfs")?;
    fs.string("mode", "0755")?;
    fs.string("size", "64k")?;
    let tmpfs = fs.mount(attr::NOSUID | attr::NODEV | attr::NOEXEC)?;
    for (name, _) in views {
        rustix::fs::mkdirat(&tmpfs, name.as_str(), rustix::fs::Mode::from(0o755))?;
    }
    // Nobody in the pod could write there, as the host's root owns it; and nobody shall.
    let change = Change {
        set: attr::RDONLY,
        ..Change::default()
    };
    set_attributes(&tmpfs, change)?;
    Ok(tmpfs)
}

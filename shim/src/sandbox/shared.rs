//! What the containers of one pod share beside namespaces: `/dev/shm`, and
//! `/etc/hostname`, `hosts` and `resolv.conf`. CRI's own sandbox controller
//! makes them on the host and binds them in by each specification; a pod of the
//! sandbox API gets them here.
//!
//! All of it is one tmpfs in the staging namespace, so nothing of it is on the
//! host and it goes with the pod.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use casemate_protocol::plan::{LaunchPlan, Mount, MountSource};
use casemate_spec::Tightened;
use casemate_sys::mount::{self, Change, NewFs, attr};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};

use super::SandboxError;
use crate::host::Step;
use crate::host::staging::Staging;

/// Contents of the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// `/etc/hostname`.
    pub hostname: String,
    /// `/etc/hosts`.
    pub hosts: String,
    /// `/etc/resolv.conf`.
    pub resolv_conf: String,
}

/// What is there: name in the tmpfs, place in a container.
pub(super) const PLACES: [(&str, &str); 4] = [
    ("hostname", "/etc/hostname"),
    ("hosts", "/etc/hosts"),
    ("resolv.conf", "/etc/resolv.conf"),
    (MEMORY, "/dev/shm"),
];
const MEMORY: &str = "shm";

/// The most that is in it, as CRI has it for `/dev/shm`; it is charged to the
/// container that writes.
const SIZE: &str = "64m";
const INODES: &str = "65536";

/// Made, and kept by the staging namespace.
pub struct Shared(());

impl Shared {
    /// Makes it, owned by host id `owner`.
    pub fn make(files: &Files, staging: &Staging, owner: u32) -> Result<Shared, SandboxError> {
        let object = "the pod's shared files";
        let fs = NewFs::open("tmpfs").step("make", object)?;
        for (key, value) in [("size", SIZE), ("nr_inodes", INODES), ("mode", "0755")] {
            fs.string(key, value).step("mount option of", object)?;
        }
        let root = fs
            .mount(attr::NOSUID | attr::NODEV | attr::NOEXEC)
            .step("mount", object)?;
        for (name, text) in [
            ("hostname", &files.hostname),
            ("hosts", &files.hosts),
            ("resolv.conf", &files.resolv_conf),
        ] {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            let file =
                rustix::fs::openat(&root, name, flags, Mode::from(0o644)).step("make", name)?;
            File::from(file)
                .write_all(text.as_bytes())
                .step("write", name)?;
            give(&root, name, 0o644, owner).step("give to the pod", name)?;
        }
        rustix::fs::mkdirat(&root, MEMORY, Mode::from(0o755)).step("make", MEMORY)?;
        give(&root, MEMORY, 0o1777, owner).step("give to the pod", MEMORY)?;
        staging.keep(&root).step("keep", object)?;
        Ok(Shared(()))
    }

    /// Adds to a container what its specification has no mount of its own for,
    /// and puts the pod's memory in the place of a tmpfs.
    pub fn add(
        &self,
        spec: &Tightened,
        staging: &Staging,
        plan: &mut LaunchPlan,
        entries: &mut Vec<(String, OwnedFd)>,
    ) -> Result<(), SandboxError> {
        for (name, place) in PLACES {
            let is_memory = name == MEMORY;
            if let Some(own) = plan.mounts.iter().position(|m| m.target == place) {
                let is_default = plan.mounts.get(own).is_some_and(is_tmpfs);
                if !(is_memory && is_default) {
                    continue;
                }
                // containerd's default for a container that is alone.
                plan.mounts.remove(own);
            }
            let tree = staging.copy(name).step("copy shared", place)?;
            if spec.readonly_rootfs && !is_memory {
                let change = Change {
                    set: attr::RDONLY,
                    ..Change::default()
                };
                mount::set_attributes(&tree, change).step("protect", place)?;
            }
            let entry = format!("shared-{name}");
            let below = format!("{place}/");
            // Before what the specification mounts in it.
            let index = plan
                .mounts
                .iter()
                .position(|mount| mount.target.starts_with(&below))
                .unwrap_or(plan.mounts.len());
            plan.mounts.insert(
                index,
                Mount {
                    target: place.to_owned(),
                    source: MountSource::Staged {
                        name: entry.clone(),
                        directory: is_memory,
                        recursive: false,
                    },
                    attributes: 0,
                    receives: false,
                },
            );
            entries.push((entry, tree));
        }
        Ok(())
    }
}

fn is_tmpfs(mount: &Mount) -> bool {
    matches!(&mount.source, MountSource::New { fstype, .. } if fstype == "tmpfs")
}

/// Mode bits past the creation mask, and an owner.
fn give(root: impl AsFd, name: &str, mode: u32, owner: u32) -> std::io::Result<()> {
    rustix::fs::chmodat(&root, name, Mode::from(mode), AtFlags::empty())?;
    let (uid, gid) = (Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)));
    Ok(rustix::fs::chownat(
        &root,
        name,
        uid,
        gid,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

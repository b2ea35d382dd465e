//! A container's root file system, from containerd's mount list: layers mapped
//! to the pod's ids, assembled by the shim, handed on as a detached mount.
//!
//! Files keep their ids on disk (0 stays 0): the mapping is on the mounts. An
//! overlay can't be mapped itself, its layers can (mount_setattr(2)). Where the
//! kubelet has chosen the ids, containerd prepares the files, and says how: see
//! [`Files`].

mod overlay;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use casemate_sys::mount::{self, Change, attr, clone_tree, propagation};
use rustix::fs::CWD;

use super::Step;
use super::ids::CONTAINER_IDS;
use super::staging::Staging;
use crate::sandbox::{RootfsMount, SandboxError};

/// Whose the files are: the containers' user namespace, and the host id of
/// its root.
pub struct Owner<'a> {
    /// Maps the ids of layers.
    pub userns: &'a OwnedFd,
    /// Host id of the namespace's root.
    pub root_id: u32,
    /// containerd knows that id: it was chosen by the kubelet.
    pub chosen: bool,
    /// `linux.mountLabel`.
    pub label: Option<&'a str>,
}

/// With which ids the files are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Files {
    /// The container's, in all layers: 0 is its root.
    Plain,
    /// The container's in lower layers, the host's in its own: what containerd
    /// prepares for an overlay with `uidmap=` and `gidmap=`.
    PlainBelow,
    /// The host's, in all layers: a copy that containerd has given to the pod.
    Shifted,
}

impl Owner<'_> {
    /// What containerd's options say of the ids on disk.
    fn files(&self, options: &[String]) -> Result<Files, SandboxError> {
        let value = |key: &str| options.iter().find_map(|o| o.strip_prefix(key));
        let own = format!("0:{}:{CONTAINER_IDS}", self.root_id);
        match (value("uidmap="), value("gidmap=")) {
            (None, None) if self.chosen => Ok(Files::Shifted),
            (None, None) => Ok(Files::Plain),
            (Some(uids), Some(gids)) if self.chosen && uids == own && gids == own => {
                Ok(Files::PlainBelow)
            }
            (uids, gids) => Err(SandboxError::Invalid(format!(
                "rootfs mount options \"uidmap={}\" and \"gidmap={}\": {}",
                uids.unwrap_or_default(),
                gids.unwrap_or_default(),
                if self.chosen {
                    format!("both must be \"{own}\", as linux.uidMappings has it")
                } else {
                    "the pod has no linux.uidMappings that they could agree with".to_owned()
                }
            ))),
        }
    }
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
        [] => bind(root_path, owner, Files::PlainBelow, attributes),
        [one] => {
            if !one.target.is_empty() && one.target != "/" {
                return Err(refuse(&format!("rootfs mount target \"{}\"", one.target)));
            }
            if let Some(bad) = one.options.iter().find(|o| o.starts_with("X-")) {
                return Err(refuse(&format!("rootfs mount option \"{bad}\"")));
            }
            let files = owner.files(&one.options)?;
            match one.fstype.as_str() {
                "overlay" => overlay::make(
                    &one.options,
                    (owner, files),
                    attributes,
                    staging,
                    older_ways,
                ),
                "bind" | "rbind" | "none" | "" => {
                    let read_only = if one.options.iter().any(|o| o == "ro") {
                        attr::RDONLY
                    } else {
                        0
                    };
                    let source = Path::new(&one.source);
                    bind(source, owner, files, attributes | read_only)
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
    owner: &Owner<'_>,
    files: Files,
    attributes: u64,
) -> Result<OwnedFd, SandboxError> {
    let object = source.display().to_string();
    if let Some(label) = owner.label {
        log::warn!("linux.mountLabel {label}: {object} is a bind mount, and keeps its labels");
    }
    let tree = clone_tree(CWD, source, false, true).step("open rootfs", &object)?;
    let shifted = match files {
        Files::Plain => false,
        Files::Shifted => true,
        // An image's one layer, or a container's own: its root tells.
        Files::PlainBelow => {
            let root = rustix::fs::fstat(&tree).step("look at", &object)?.st_uid;
            owner.chosen && (owner.root_id..owner.root_id + CONTAINER_IDS).contains(&root)
        }
    };
    let userns = (!shifted).then_some(owner.userns);
    map(&tree, userns, attributes, false).map_err(|e| explain_idmap(e, &object))?;
    Ok(tree)
}

/// Maps ids of a detached tree through `userns`, sets `attributes`, and cuts it
/// off from the mount that it is a clone of: whatever is mounted or unmounted on
/// one of them later must not be on the other.
pub fn map(
    tree: &OwnedFd,
    userns: Option<&OwnedFd>,
    attributes: u64,
    recursive: bool,
) -> io::Result<()> {
    mount::set_attributes(
        tree,
        Change {
            set: attributes,
            userns: userns.map(AsFd::as_fd),
            propagation: propagation::PRIVATE,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pods_own_mapping_is_taken_from_containerd() {
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        let userns: OwnedFd = null();
        let owner = |chosen| Owner {
            userns: &userns,
            root_id: 65536,
            chosen,
            label: None,
        };
        let say = |chosen, options: &[&str]| {
            let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
            owner(chosen).files(&options).map_err(|e| e.to_string())
        };
        assert_eq!(say(false, &["ro"]), Ok(Files::Plain));
        assert_eq!(say(true, &["ro"]), Ok(Files::Shifted));
        let own = ["uidmap=0:65536:65536", "gidmap=0:65536:65536"];
        assert_eq!(say(true, &own), Ok(Files::PlainBelow));
        for (chosen, options) in [
            (false, &own[..]),
            (true, &own[..1]),
            (true, &own[1..]),
            (true, &["uidmap=0:131072:65536", own[1]][..]),
            (true, &[own[0], "gidmap=0:65536:65536,65536:0:1"][..]),
        ] {
            let text = say(chosen, options).unwrap_err();
            assert!(
                text.contains("uidmap=") && text.contains("gidmap="),
                "{text}"
            );
        }
    }
}

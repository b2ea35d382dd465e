//! A container's root file system, from containerd's mount list: layers mapped
//! to the pod's ids, assembled by the shim, handed on as a detached mount.
//!
//! Files keep their ids on disk (0 stays 0): the mapping is on the mounts. An
//! overlay can't be mapped itself, its layers can (mount_setattr(2)).

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use casemate_sys::ident::{self, CapSets, securebits};
use casemate_sys::mount::{self, Change, NewFs, attr, clone_tree};
use rustix::fs::{CWD, Mode, OFlags};

use super::Step;
use crate::sandbox::{RootfsMount, SandboxError};

/// Options of overlayfs that images and snapshotters need; all others are refused.
const OVERLAY_OPTIONS: [&str; 7] = [
    "index",
    "metacopy",
    "redirect_dir",
    "volatile",
    "xino",
    "nfs_export",
    "userxattr",
];

/// What overlayfs needs of its mounter, whose credentials it keeps for every
/// later operation on the layers: CHOWN, DAC_OVERRIDE, FOWNER, FSETID,
/// SYS_ADMIN (trusted.* attributes), MKNOD (whiteouts), SETFCAP.
const MOUNTER_CAPS: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 21 | 1 << 27 | 1 << 31;

/// Assembles the root. `userns` is the containers' user namespace, `root_id`
/// the host id of its root; `attributes` go on the mount.
pub fn make(
    mounts: &[RootfsMount],
    root_path: &Path,
    userns: &OwnedFd,
    root_id: u32,
    attributes: u64,
) -> Result<OwnedFd, SandboxError> {
    match mounts {
        [] => bind(root_path, false, userns, attributes),
        [one] => {
            if !one.target.is_empty() && one.target != "/" {
                return Err(refuse(&format!("rootfs mount target \"{}\"", one.target)));
            }
            if let Some(bad) = one.options.iter().find(|o| o.starts_with("X-")) {
                return Err(refuse(&format!("rootfs mount option \"{bad}\"")));
            }
            match one.fstype.as_str() {
                "overlay" => overlay(&one.options, userns, root_id, attributes),
                "bind" | "rbind" | "none" | "" => {
                    let read_only = one.options.iter().any(|o| o == "ro");
                    bind(Path::new(&one.source), read_only, userns, attributes)
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

struct Layers {
    lower: Vec<PathBuf>,
    upper: Option<PathBuf>,
    work: Option<PathBuf>,
    other: Vec<(String, Option<String>)>,
}

fn parse(options: &[String]) -> Result<Layers, SandboxError> {
    let mut layers = Layers {
        lower: Vec::new(),
        upper: None,
        work: None,
        other: Vec::new(),
    };
    for option in options {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option.as_str(), None),
        };
        match (key, value) {
            ("lowerdir", Some(list)) => layers.lower = list.split(':').map(PathBuf::from).collect(),
            ("upperdir", Some(path)) => layers.upper = Some(path.into()),
            ("workdir", Some(path)) => layers.work = Some(path.into()),
            ("ro" | "rw" | "defaults", None) => {}
            (key, value) if OVERLAY_OPTIONS.contains(&key) => {
                layers
                    .other
                    .push((key.to_owned(), value.map(str::to_owned)));
            }
            _ => return Err(refuse(&format!("overlay option \"{option}\""))),
        }
    }
    if layers.lower.is_empty() || layers.upper.is_some() != layers.work.is_some() {
        return Err(SandboxError::Invalid(format!(
            "rootfs overlay options \"{}\": lowerdir is needed, and upperdir and workdir together",
            options.join(",")
        )));
    }
    Ok(layers)
}

fn overlay(
    options: &[String],
    userns: &OwnedFd,
    root_id: u32,
    attributes: u64,
) -> Result<OwnedFd, SandboxError> {
    let layers = parse(options)?;
    let trees = Trees::open(&layers, userns)?;
    let fs = NewFs::open("overlay").step("mount", "overlay")?;
    for (key, value) in &layers.other {
        match value {
            Some(value) => fs.string(key, value),
            None => fs.flag(key),
        }
        .step("overlay option", key)?;
    }
    for (dir, path) in trees.lower.iter().zip(&layers.lower) {
        fs.fd("lowerdir+", dir)
            .step("overlay layer", path.display().to_string())?;
    }
    if let (Some(upper), Some(work)) = (&trees.upper, &trees.work) {
        fs.fd("upperdir", upper).step("overlay", "upperdir")?;
        fs.fd("workdir", work).step("overlay", "workdir")?;
    }
    let wants_ro = options.iter().any(|o| o == "ro");
    let made = as_mounter(root_id, || {
        fs.mount(attributes | if wants_ro { attr::RDONLY } else { 0 })
    })
    .step("mount", "overlay")?;
    // With credentials that can't write the work directory overlayfs succeeds
    // and is silently read-only.
    if trees.upper.is_some()
        && !wants_ro
        && mount::is_read_only(&made).step("look at", "overlay")?
    {
        return Err(SandboxError::Failed(
            "mount overlay: the kernel made it read-only; see its log for overlayfs".into(),
        ));
    }
    Ok(made)
}

struct Trees {
    /// The mapped mounts that the others are opened through. Closing one would
    /// dissolve the mount below them.
    _shared: Vec<Shared>,
    lower: Vec<OwnedFd>,
    upper: Option<OwnedFd>,
    work: Option<OwnedFd>,
}

impl Trees {
    /// Opens all layers through mapped mounts: one for all that lie on one
    /// mount below a common parent (as containerd's snapshots do), else one
    /// each (snapshotters whose layers are mounts).
    fn open(layers: &Layers, userns: &OwnedFd) -> Result<Trees, SandboxError> {
        let all: Vec<&PathBuf> = layers
            .lower
            .iter()
            .chain(&layers.upper)
            .chain(&layers.work)
            .collect();
        // A parent whose file system can't be mapped may hold mounts that can.
        let shared = Shared::of(&all, userns).ok().flatten();
        let below = |path: &PathBuf| match &shared {
            Some(shared) => shared.open(path),
            None => Ok(None),
        };
        let mut lower = Vec::new();
        for path in &layers.lower {
            lower.push(match below(path)? {
                Some(fd) => fd,
                None => own_tree(path, userns)?,
            });
        }
        let (mut upper, mut work, mut pair) = (None, None, None);
        if let (Some(u), Some(w)) = (&layers.upper, &layers.work) {
            (upper, work) = (below(u)?, below(w)?);
            // Both must be on one mount: the kernel checks it.
            if upper.is_none() || work.is_none() {
                pair = Shared::of(&[u, w], userns)?;
                if let Some(pair) = &pair {
                    (upper, work) = (pair.open(u)?, pair.open(w)?);
                }
                if upper.is_none() || work.is_none() {
                    return Err(SandboxError::Invalid(format!(
                        "mount overlay: upperdir {} and workdir {} are not on one mount",
                        u.display(),
                        w.display()
                    )));
                }
            }
        }
        Ok(Trees {
            _shared: shared.into_iter().chain(pair).collect(),
            lower,
            upper,
            work,
        })
    }
}

fn own_tree(path: &Path, userns: &OwnedFd) -> Result<OwnedFd, SandboxError> {
    let object = path.display().to_string();
    let tree = clone_tree(CWD, path, false, true).step("open layer", &object)?;
    map(&tree, userns, 0, false).map_err(|e| explain_idmap(e, &object))?;
    Ok(tree)
}

/// A mapped clone of the mount that several layers are on.
struct Shared {
    parent: PathBuf,
    tree: OwnedFd,
}

impl Shared {
    /// Of the common parent of `paths`, if there is one.
    fn of(paths: &[&PathBuf], userns: &OwnedFd) -> Result<Option<Shared>, SandboxError> {
        let Some(parent) = common_parent(paths) else {
            return Ok(None);
        };
        let object = parent.display().to_string();
        let tree = clone_tree(CWD, &parent, false, true).step("open", &object)?;
        map(&tree, userns, 0, false).map_err(|e| explain_idmap(e, &object))?;
        Ok(Some(Shared { parent, tree }))
    }

    /// Opens `path` through the clone. `None` unless it is the same directory
    /// as by its path: a mount in between is missing in the clone.
    fn open(&self, path: &Path) -> Result<Option<OwnedFd>, SandboxError> {
        let object = path.display().to_string();
        let relative = path
            .strip_prefix(&self.parent)
            .map_err(io::Error::other)
            .step("open layer", &object)?;
        let there = rustix::fs::stat(path).step("open layer", &object)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(&self.tree, relative, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(e).step("open layer", &object),
        };
        let here = rustix::fs::fstat(&fd).step("look at", &object)?;
        Ok(((here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)).then_some(fd))
    }
}

fn common_parent(paths: &[&PathBuf]) -> Option<PathBuf> {
    if paths
        .iter()
        .any(|p| !p.is_absolute() || p.components().any(|c| matches!(c, Component::ParentDir)))
    {
        return None;
    }
    let parents: BTreeSet<&Path> = paths.iter().filter_map(|p| p.parent()).collect();
    let mut common = parents.iter().next()?.to_path_buf();
    for parent in parents {
        while !parent.starts_with(&common) {
            common = common.parent()?.to_path_buf();
        }
    }
    // The root of everything isn't a parent worth cloning.
    (common.components().count() > 1).then_some(common)
}

/// Runs `f` with the file ids of the containers' root and only the
/// capabilities that overlayfs needs, then restores.
fn as_mounter<T>(root_id: u32, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let before = ident::get_caps()?;
    let bits = ident::get_securebits()?;
    ident::set_securebits(bits | securebits::NO_SETUID_FIXUP)?;
    let limited = CapSets {
        effective: before.effective & MOUNTER_CAPS,
        ..before
    };
    let result = ident::set_fs_ids(root_id, root_id)
        .and_then(|()| ident::set_caps(limited))
        .and_then(|()| f());
    // A shim that can't get its own identity back must not go on.
    let restored = ident::set_caps(before)
        .and_then(|()| ident::set_fs_ids(0, 0))
        .and_then(|()| ident::set_securebits(bits));
    if restored.is_err() {
        std::process::abort();
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_below_one_directory_have_a_common_parent() {
        let paths: Vec<PathBuf> = ["/a/b/1/fs", "/a/b/22/fs", "/a/b/22/work"]
            .map(PathBuf::from)
            .to_vec();
        let refs: Vec<&PathBuf> = paths.iter().collect();
        assert_eq!(common_parent(&refs), Some(PathBuf::from("/a/b")));
        let far = [PathBuf::from("/x/fs"), PathBuf::from("/y/fs")];
        assert_eq!(common_parent(&far.iter().collect::<Vec<_>>()), None);
        let up = [PathBuf::from("/a/../b/fs"), PathBuf::from("/a/c/fs")];
        assert_eq!(common_parent(&up.iter().collect::<Vec<_>>()), None);
    }

    #[test]
    fn unknown_overlay_options_are_refused_by_name() {
        let Err(e) = parse(&["lowerdir=/a".into(), "frobnicate=1".into()]) else {
            panic!()
        };
        assert!(e.to_string().contains("frobnicate=1"), "{e}");
        assert!(parse(&["upperdir=/a".into()]).is_err());
        assert!(parse(&["lowerdir=/a".into(), "upperdir=/b".into()]).is_err());
    }
}

//! The overlay of an image's layers and a container's own.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use casemate_sys::ident::{self, CapSets, securebits};
use casemate_sys::mount::{self, NewFs, attr, clone_tree};
use rustix::fs::{CWD, Mode, OFlags};

use super::{Files, Owner, Step, explain_idmap, map, refuse};
use crate::host::staging::Staging;
use crate::plan;
use crate::sandbox::SandboxError;

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

struct Layers {
    lower: Vec<PathBuf>,
    upper: Option<PathBuf>,
    work: Option<PathBuf>,
    other: Vec<(String, Option<String>)>,
}

/// `label` is `linux.mountLabel`, which containerd names once more as
/// `context="…"`.
fn parse(options: &[String], label: Option<&str>) -> Result<Layers, SandboxError> {
    let mut layers = Layers {
        lower: Vec::new(),
        upper: None,
        work: None,
        other: label
            .map(|label| (plan::CONTEXT.to_owned(), Some(label.to_owned())))
            .into_iter()
            .collect(),
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
            // What they say of the files has been read.
            ("uidmap" | "gidmap", Some(_)) => {}
            (plan::CONTEXT, Some(value)) if Some(value.trim_matches('"')) == label => {}
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

/// Makes the overlay that containerd's `options` describe.
pub fn make(
    options: &[String],
    (owner, files): (&Owner<'_>, Files),
    attributes: u64,
    staging: &Staging,
    older_ways: bool,
) -> Result<OwnedFd, SandboxError> {
    let layers = parse(options, owner.label)?;
    let trees = Trees::open(&layers, owner.userns, files)?;
    let wants_ro = options.iter().any(|o| o == "ro");
    let attributes = attributes | if wants_ro { attr::RDONLY } else { 0 };
    let newer = if older_ways || OLDER_KERNEL.load(Ordering::Relaxed) {
        None
    } else {
        match by_descriptor(&layers, &trees, owner.root_id, attributes) {
            // What it says of all that it doesn't know; the older way will
            // find fault with what is really wrong.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
                ) =>
            {
                None
            }
            done => Some(done),
        }
    };
    let made = match newer {
        Some(made) => made,
        None => {
            let made = by_name(&layers, &trees, owner.root_id, attributes, staging);
            OLDER_KERNEL.fetch_or(made.is_ok() && !older_ways, Ordering::Relaxed);
            made
        }
    }
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

/// Set once the kernel has refused layers by descriptor and taken them by name.
static OLDER_KERNEL: AtomicBool = AtomicBool::new(false);

/// Layers by descriptor (Linux 6.13), of mounts that are attached nowhere (6.15).
fn by_descriptor(
    layers: &Layers,
    trees: &Trees,
    root_id: u32,
    attributes: u64,
) -> io::Result<OwnedFd> {
    let fs = configured(layers)?;
    for (dir, path) in trees.lower.iter().zip(&layers.lower) {
        fs.fd("lowerdir+", dir)
            .map_err(|e| named(&e, "layer", &path.display().to_string()))?;
    }
    if let (Some(upper), Some(work)) = (&trees.upper, &trees.work) {
        fs.fd("upperdir", upper)
            .map_err(|e| named(&e, "option", "upperdir"))?;
        fs.fd("workdir", work)
            .map_err(|e| named(&e, "option", "workdir"))?;
    }
    as_mounter(root_id, || fs.mount(attributes))
}

/// The longest value of fsconfig(2), without its NUL.
const LONGEST_VALUE: usize = 255;

/// Layers by name: the number of each one's descriptor, below /proc/self/fd.
/// The layers' mounts must be attached in the caller's own namespace.
fn by_name(
    layers: &Layers,
    trees: &Trees,
    root_id: u32,
    attributes: u64,
    staging: &Staging,
) -> io::Result<OwnedFd> {
    staging.holding(&trees.mounts(), || {
        // Short names, since all of them together must be.
        rustix::process::chdir("/proc/self/fd")?;
        let fs = configured(layers)?;
        let number = |fd: &OwnedFd| fd.as_raw_fd().to_string();
        let lower: Vec<String> = trees.lower.iter().map(number).collect();
        let all = lower.join(":");
        if all.len() <= LONGEST_VALUE {
            fs.string("lowerdir", &all)?;
        } else {
            // Linux 6.7.
            lower
                .iter()
                .try_for_each(|one| fs.string("lowerdir+", one))
                .map_err(|e| {
                    io::Error::new(
                        e.kind(),
                        format!(
                            "{e}; so many layers ({}) need Linux 6.7, or an image with fewer",
                            lower.len()
                        ),
                    )
                })?;
        }
        if let (Some(upper), Some(work)) = (&trees.upper, &trees.work) {
            fs.string("upperdir", &number(upper))?;
            fs.string("workdir", &number(work))?;
        }
        as_mounter(root_id, || fs.mount(attributes))
    })
}

fn configured(layers: &Layers) -> io::Result<NewFs> {
    let fs = NewFs::open("overlay")?;
    for (key, value) in &layers.other {
        match value {
            Some(value) => fs.string(key, value),
            None => fs.flag(key),
        }
        .map_err(|e| named(&e, "option", key))?;
    }
    Ok(fs)
}

fn named(error: &io::Error, what: &str, name: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what} {name}: {error}"))
}

struct Trees {
    /// The mapped mounts that the others are opened through. Closing one would
    /// dissolve the mount below them.
    shared: Vec<Shared>,
    /// Layers that are mounts of their own.
    own: Vec<OwnedFd>,
    lower: Vec<OwnedFd>,
    upper: Option<OwnedFd>,
    work: Option<OwnedFd>,
}

impl Trees {
    /// The mounts that all layers lie on.
    fn mounts(&self) -> Vec<&OwnedFd> {
        let shared = self.shared.iter().map(|shared| &shared.tree);
        shared.chain(&self.own).collect()
    }

    /// Opens all layers through mapped mounts: one for all that lie on one
    /// mount below a common parent (as containerd's snapshots do), else one
    /// each (snapshotters whose layers are mounts).
    fn open(layers: &Layers, userns: &OwnedFd, files: Files) -> Result<Trees, SandboxError> {
        let map_lower = (files != Files::Shifted).then_some(userns);
        let map_upper = (files == Files::Plain).then_some(userns);
        let together = map_lower.is_some() == map_upper.is_some();
        let upper_too = layers.upper.iter().chain(&layers.work);
        let all: Vec<&PathBuf> = layers
            .lower
            .iter()
            .chain(upper_too.filter(|_| together))
            .collect();
        // A parent whose file system can't be mapped may hold mounts that can.
        let shared = Shared::of(&all, map_lower).ok().flatten();
        let below = |path: &PathBuf| match &shared {
            Some(shared) => shared.open(path),
            None => Ok(None),
        };
        let (mut lower, mut own) = (Vec::new(), Vec::new());
        for path in &layers.lower {
            lower.push(match below(path)? {
                Some(fd) => fd,
                None => {
                    let tree = own_tree(path, map_lower)?;
                    own.push(
                        tree.try_clone()
                            .step("open layer", path.display().to_string())?,
                    );
                    tree
                }
            });
        }
        let (mut upper, mut work, mut pair) = (None, None, None);
        if let (Some(u), Some(w)) = (&layers.upper, &layers.work) {
            if together {
                (upper, work) = (below(u)?, below(w)?);
            }
            // Both must be on one mount: the kernel checks it.
            if upper.is_none() || work.is_none() {
                pair = Shared::of(&[u, w], map_upper)?;
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
            shared: shared.into_iter().chain(pair).collect(),
            own,
            lower,
            upper,
            work,
        })
    }
}

fn own_tree(path: &Path, userns: Option<&OwnedFd>) -> Result<OwnedFd, SandboxError> {
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
    fn of(paths: &[&PathBuf], userns: Option<&OwnedFd>) -> Result<Option<Shared>, SandboxError> {
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
        let Err(e) = parse(&["lowerdir=/a".into(), "frobnicate=1".into()], None) else {
            panic!()
        };
        assert!(e.to_string().contains("frobnicate=1"), "{e}");
        assert!(parse(&["upperdir=/a".into()], None).is_err());
        assert!(parse(&["lowerdir=/a".into(), "upperdir=/b".into()], None).is_err());
    }
}

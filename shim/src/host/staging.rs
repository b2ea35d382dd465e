//! A small mount namespace of the shim's own, and the shared tmpfs in it
//! through which mounts reach the pod.
//!
//! What is attached there propagates into the agent's namespace, where it
//! arrives locked: not even the agent, with every capability of its user
//! namespace, can clear a flag of it (mount_namespaces(7), "Restrictions").
//! The namespace has nothing but /proc and this tmpfs, so the agent starts
//! from next to nothing and no host mount is kept alive by it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use casemate_sys::mount::{self, Change, NewFs, attr, clone_tree, propagation};
use casemate_sys::namespace::{self, kind};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};

use super::Step;
use crate::sandbox::SandboxError;

/// The namespace and the way back.
pub struct Staging {
    host: OwnedFd,
    own: OwnedFd,
    /// The tmpfs' root.
    root: OwnedFd,
}

/// Where [`Staging::holding`] holds mounts; not shared with the pod.
const HOLD: &str = "/hold";
/// Where [`Staging::keep`] keeps one; not shared with the pod either.
const KEPT: &str = "/kept";

fn path_flags() -> OFlags {
    OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC
}

impl Staging {
    /// Makes the namespace. The caller's own stays what it was.
    pub fn new() -> Result<Staging, SandboxError> {
        let open_ns = || {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::open("/proc/self/ns/mnt", flags, Mode::empty())
        };
        let host = open_ns().step("open", "/proc/self/ns/mnt")?;
        let cwd = rustix::fs::open(".", path_flags(), Mode::empty()).step("open", "bundle")?;
        namespace::unshare(kind::MOUNT).step("unshare", "mount namespace")?;
        let built =
            build().and_then(|root| Ok((open_ns().step("open", "/proc/self/ns/mnt")?, root)));
        namespace::enter(&host, kind::MOUNT).step("return to", "the host's mount namespace")?;
        rustix::process::fchdir(cwd).step("return to", "bundle")?;
        let (own, root) = built?;
        Ok(Staging { host, own, root })
    }

    /// Runs `f` in the small namespace.
    pub fn inside<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let cwd = rustix::fs::open(".", path_flags(), Mode::empty())?;
        namespace::enter(&self.own, kind::MOUNT)?;
        let result = f();
        // Staying there would make the shim resolve host paths in an empty
        // tree: nothing after that could be right.
        if namespace::enter(&self.host, kind::MOUNT).is_err()
            || rustix::process::fchdir(cwd).is_err()
        {
            std::process::abort();
        }
        result
    }

    /// Runs `f` in the small namespace with `trees` attached in it, out of the
    /// pod's sight: what the kernel wants of layers that aren't its caller's
    /// own detached mounts (before Linux 6.15).
    pub fn holding<T>(
        &self,
        trees: &[&OwnedFd],
        f: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        self.inside(|| {
            let mut held = 0;
            let result = trees
                .iter()
                // One on the other: nobody has to see them.
                .try_for_each(|tree| mount::attach(tree, CWD, HOLD).map(|()| held += 1))
                .and_then(|()| f());
            for _ in 0..held {
                mount::detach(Path::new(HOLD))?;
            }
            result
        })
    }

    /// Keeps `tree` in the small namespace, out of the pod's sight, for
    /// [`Staging::copy`].
    pub fn keep(&self, tree: &OwnedFd) -> io::Result<()> {
        self.inside(|| mount::attach(tree, CWD, KEPT))
    }

    /// A detached mount of `name` in what is kept, or of all of it.
    pub fn copy(&self, name: &str) -> io::Result<OwnedFd> {
        let path = Path::new(KEPT).join(name);
        self.inside(|| clone_tree(CWD, &path, false, false))
    }

    /// Attaches `entries` (name, mount) below `directory`, which is made.
    pub fn attach(&self, directory: &str, entries: &[(String, OwnedFd)]) -> io::Result<()> {
        self.inside(|| {
            rustix::fs::mkdirat(&self.root, directory, Mode::from(0o755))?;
            let dir = rustix::fs::openat(&self.root, directory, path_flags(), Mode::empty())?;
            for (name, tree) in entries {
                if is_dir(tree)? {
                    rustix::fs::mkdirat(&dir, name.as_str(), Mode::from(0o755))?;
                } else {
                    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                    rustix::fs::openat(&dir, name.as_str(), flags, Mode::from(0o644))?;
                }
                mount::attach(tree, &dir, name)?;
            }
            Ok(())
        })
    }

    /// Attaches `entries` below the attached mount `tree`, at these paths in it.
    /// Where one has become a link or is gone, that is an error: nothing outside
    /// of the tree is ever reached.
    pub fn attach_in(&self, tree: &OwnedFd, entries: &[(PathBuf, OwnedFd)]) -> io::Result<()> {
        self.inside(|| {
            let resolve =
                ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            for (path, entry) in entries {
                let at = rustix::fs::openat2(tree, path, flags, Mode::empty(), resolve)?;
                mount::attach(entry, &at, "")?;
            }
            Ok(())
        })
    }

    /// Attaches `entries` on directories that already exist below `directory`.
    pub fn attach_below(&self, directory: &str, entries: &[(String, OwnedFd)]) -> io::Result<()> {
        self.inside(|| {
            let dir = rustix::fs::openat(&self.root, directory, path_flags(), Mode::empty())?;
            entries
                .iter()
                .try_for_each(|(name, tree)| mount::attach(tree, &dir, name))
        })
    }

    /// Takes everything below `directory` away, here and in the pod. Missing
    /// is fine.
    pub fn remove(&self, directory: &str) -> io::Result<()> {
        self.inside(|| {
            let base = format!("/staging/{directory}");
            let dir = match rustix::fs::open(
                &*base,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            ) {
                Ok(dir) => dir,
                Err(rustix::io::Errno::NOENT) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            for entry in rustix::fs::Dir::read_from(&dir)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy();
                if name == "." || name == ".." {
                    continue;
                }
                let path = format!("{base}/{name}");
                match mount::detach(Path::new(&path)) {
                    Err(e) if e.raw_os_error() != Some(rustix::io::Errno::INVAL.raw_os_error()) => {
                        return Err(e);
                    }
                    _ => {}
                }
                let flags = match rustix::fs::statat(&dir, &*name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(s) if rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir() => {
                        AtFlags::REMOVEDIR
                    }
                    _ => AtFlags::empty(),
                };
                rustix::fs::unlinkat(&dir, &*name, flags)?;
            }
            Ok(rustix::fs::unlinkat(
                &self.root,
                directory,
                AtFlags::REMOVEDIR,
            )?)
        })
    }
}

fn is_dir(fd: impl AsFd) -> io::Result<bool> {
    Ok(rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode).is_dir())
}

fn build() -> Result<OwnedFd, SandboxError> {
    let old = rustix::fs::open("/", path_flags(), Mode::empty()).step("open", "/")?;
    let private = Change {
        propagation: propagation::PRIVATE,
        recursive: true,
        ..Change::default()
    };
    mount::set_attributes(&old, private).step("make private", "/")?;
    let proc = clone_tree(CWD, Path::new("/proc"), false, false).step("clone", "/proc")?;
    let root = tmpfs("64k", "24").step("make", "root tmpfs")?;
    let stage = tmpfs("1m", "8192").step("make", "staging tmpfs")?;
    mount::attach(&root, CWD, "/run").step("attach", "root tmpfs")?;
    for name in ["proc", "staging", "root", "hold", "kept"] {
        rustix::fs::mkdirat(&root, name, Mode::from(0o755)).step("make directory", name)?;
    }
    mount::attach(&proc, &root, "proc").step("attach", "/proc")?;
    mount::attach(&stage, &root, "staging").step("attach", "/staging")?;
    let shared = Change {
        propagation: propagation::SHARED,
        ..Change::default()
    };
    mount::set_attributes(&stage, shared).step("share", "/staging")?;
    mount::change_root(&root).step("change root", "")?;
    Ok(stage)
}

fn tmpfs(size: &str, inodes: &str) -> io::Result<OwnedFd> {
    let fs = NewFs::open("tmpfs")?;
    fs.string("size", size)?;
    fs.string("nr_inodes", inodes)?;
    fs.string("mode", "0755")?;
    fs.mount(attr::NOSUID | attr::NODEV | attr::NOEXEC)
}

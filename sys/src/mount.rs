//! The mount API that works on descriptors (open_tree(2), fsopen(2),
//! move_mount(2), mount_setattr(2)).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

/// Attributes of a mount (`MOUNT_ATTR_*` of mount_setattr(2)).
pub mod attr {
    /// No writes through this mount.
    pub const RDONLY: u64 = 0x1;
    /// Ignore set-user-id bits and file capabilities.
    pub const NOSUID: u64 = 0x2;
    /// Device nodes can't be opened.
    pub const NODEV: u64 = 0x4;
    /// Nothing can be executed.
    pub const NOEXEC: u64 = 0x8;
    /// Mask of the access-time policies.
    pub const ATIME_MASK: u64 = 0x70;
    /// Never update access times.
    pub const NOATIME: u64 = 0x10;
    /// Always update access times.
    pub const STRICTATIME: u64 = 0x20;
    /// No access times for directories.
    pub const NODIRATIME: u64 = 0x80;
    /// Ids are mapped through a user namespace.
    pub const IDMAP: u64 = 0x0010_0000;
    /// Symbolic links aren't followed.
    pub const NOSYMFOLLOW: u64 = 0x0020_0000;
}

/// Propagation types for [`set_attributes`] (mount_namespaces(7)).
pub mod propagation {
    /// Leave as it is.
    pub const KEEP: u64 = 0;
    /// No propagation.
    pub const PRIVATE: u64 = libc::MS_PRIVATE;
    /// Receives, doesn't send.
    pub const SLAVE: u64 = libc::MS_SLAVE;
    /// Sends and receives.
    pub const SHARED: u64 = libc::MS_SHARED;
}

#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// A change of mount attributes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Change<'a> {
    /// Attributes to set.
    pub set: u64,
    /// Attributes to clear.
    pub clear: u64,
    /// New propagation type, 0 to keep it.
    pub propagation: u64,
    /// User namespace of an id mapping; goes with [`attr::IDMAP`].
    pub userns: Option<BorrowedFd<'a>>,
    /// The whole tree below, too.
    pub recursive: bool,
}

/// Changes attributes of the mount that `fd` refers to (its root, or a
/// directory whose mount is meant: the kernel wants a mount's root).
pub fn set_attributes(fd: impl AsFd, change: Change<'_>) -> io::Result<()> {
    let attr = MountAttr {
        attr_set: change.set
            | if change.userns.is_some() {
                attr::IDMAP
            } else {
                0
            },
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: change.userns.map_or(0, |f| f.as_raw_fd() as u64),
    };
    let flags = libc::AT_EMPTY_PATH
        | if change.recursive {
            libc::AT_RECURSIVE
        } else {
            0
        };
    // SAFETY: the empty path is a NUL-terminated static; the struct lives
    // through the call and its size is passed with it.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A detached copy of the mount (with `recursive`: the tree of mounts) that
/// `path`, relative to `dir`, lies on; its root is `path`. Symbolic links at
/// the end of `path` are followed only with `follow`.
pub fn clone_tree(
    dir: impl AsFd,
    path: &Path,
    recursive: bool,
    follow: bool,
) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    if !follow {
        flags |= OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    }
    Ok(rustix::mount::open_tree(dir, path, flags)?)
}

/// A file system being configured (fsopen(2)).
pub struct NewFs {
    fd: OwnedFd,
    what: String,
}

impl NewFs {
    /// Starts to configure a file system of type `fstype`.
    pub fn open(fstype: &str) -> io::Result<NewFs> {
        let fd = rustix::mount::fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC)?;
        Ok(NewFs {
            fd,
            what: fstype.to_owned(),
        })
    }

    /// Sets `key=value`.
    pub fn string(&self, key: &str, value: &str) -> io::Result<()> {
        rustix::mount::fsconfig_set_string(self.fd.as_fd(), key, value)
            .map_err(|e| self.explain(e.into()))
    }

    /// Sets a flag.
    pub fn flag(&self, key: &str) -> io::Result<()> {
        rustix::mount::fsconfig_set_flag(self.fd.as_fd(), key).map_err(|e| self.explain(e.into()))
    }

    /// Sets `key` to an open file.
    pub fn fd(&self, key: &str, value: impl AsFd) -> io::Result<()> {
        rustix::mount::fsconfig_set_fd(self.fd.as_fd(), key, value.as_fd())
            .map_err(|e| self.explain(e.into()))
    }

    /// Makes the superblock and a detached mount of it.
    ///
    /// The type also stands as its source in /proc/mounts, as programs expect;
    /// [`NewFs::string`] with `source` says otherwise.
    pub fn mount(self, attributes: u64) -> io::Result<OwnedFd> {
        // Refused where one is set already, or where there is none to set.
        let _ = rustix::mount::fsconfig_set_string(self.fd.as_fd(), "source", &*self.what);
        rustix::mount::fsconfig_create(self.fd.as_fd()).map_err(|e| self.explain(e.into()))?;
        let flags = MountAttrFlags::from_bits_retain(attributes as u32);
        rustix::mount::fsmount(self.fd.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
            .map_err(|e| self.explain(e.into()))
    }

    /// Joins the kernel's own words (one message can be read from the
    /// descriptor after a failure) to the errno.
    fn explain(&self, error: io::Error) -> io::Error {
        let mut buffer = [0u8; 512];
        match rustix::io::read(&self.fd, &mut buffer) {
            Ok(n) if n > 2 => {
                let text = String::from_utf8_lossy(&buffer[2..n]).trim().to_owned();
                io::Error::new(error.kind(), format!("{}: {text} ({error})", self.what))
            }
            _ => error,
        }
    }
}

/// Attaches the detached mount `tree` on `path` below `dir` (`path` empty: on
/// `dir` itself). Symbolic links are never followed.
pub fn attach(tree: impl AsFd, dir: impl AsFd, path: &str) -> io::Result<()> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if path.is_empty() {
        flags |= MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    }
    Ok(rustix::mount::move_mount(tree, "", dir, path, flags)?)
}

/// Makes the directory `new` (a mount's root) the root of this mount
/// namespace and lets go of the old one, without needing a place to put it
/// (pivot_root(2), "pivot_root(".", ".")").
pub fn change_root(new: impl AsFd) -> io::Result<()> {
    rustix::process::fchdir(new)?;
    rustix::process::pivot_root(".", ".")?;
    // The old root is now mounted on top of the new one; "." is the old root.
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// Detaches the mount at `path` (umount2(2) with MNT_DETACH, no link followed).
pub fn detach(path: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(
        path,
        UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
    )?)
}

/// The name by which this process can open `fd` once more, whatever it was
/// opened for (proc(5), /proc/PID/fd).
pub fn own_link(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// Whether the file system behind `fd` is mounted read-only.
pub fn is_read_only(fd: impl AsFd) -> io::Result<bool> {
    let s = rustix::fs::fstatvfs(fd)?;
    Ok(s.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// A device node `name` in the directory `dir` (mknodat(2)).
pub fn make_device(
    dir: impl AsFd,
    name: &str,
    mode: u32,
    major: u32,
    minor: u32,
) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: `name` is NUL-terminated and outlives the call.
    let r = unsafe {
        libc::mknodat(
            dir.as_fd().as_raw_fd(),
            name.as_ptr(),
            mode,
            libc::makedev(major, minor),
        )
    };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Duplicates a raw descriptor number that was inherited across exec, taking
/// ownership of it. Fails if the number isn't open.
pub fn adopt_inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: fcntl on any number is defined; EBADF is returned for closed ones.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open, was given to this program by its parent for
    // this purpose, and is adopted once, at start.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

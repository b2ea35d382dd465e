//! /dev of a container: a tmpfs made by the shim, so that its device nodes
//! work (nodes of a tmpfs made inside a user namespace never do), with inodes
//! of its own, so that nothing done to them reaches the host's.

use std::os::fd::OwnedFd;

use casemate_sys::mount::{self, NewFs, attr};
use rustix::fs::{Gid, Mode, OFlags, Uid};

use super::Step;
use crate::sandbox::SandboxError;

/// Name, minor of the memory devices and the terminal device every container has.
const NODES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];
const CHARACTER_DEVICE: u32 = 0o020_000;

/// A detached /dev whose files belong to host id `owner`. `options` are the
/// spec's for its tmpfs (`size`, `mode`).
pub fn make(
    owner: u32,
    options: &[(String, Option<String>)],
    attributes: u64,
) -> Result<OwnedFd, SandboxError> {
    let fs = NewFs::open("tmpfs").step("make", "/dev")?;
    let mut sized = false;
    for (key, value) in options {
        if let (true, Some(value)) = (["size", "mode", "nr_inodes"].contains(&&**key), value) {
            sized |= key == "size";
            fs.string(key, value).step("mount option of /dev:", key)?;
        }
    }
    if !sized {
        fs.string("size", "65536k")
            .step("mount option of", "/dev")?;
    }
    let dev = fs
        .mount((attributes | attr::NOSUID) & !attr::NODEV)
        .step("mount", "/dev")?;
    let chown = |name: &str| {
        let (uid, gid) = (Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)));
        rustix::fs::chownat(&dev, name, uid, gid, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
            .step("chown", format!("/dev/{name}"))
    };
    for (name, major, minor) in NODES {
        mount::make_device(&dev, name, CHARACTER_DEVICE | 0o666, major, minor)
            .step("make device", name)?;
        // The creation mask is the process', and not ours to change here.
        rustix::fs::chmodat(&dev, name, Mode::from(0o666), rustix::fs::AtFlags::empty())
            .step("chmod", name)?;
        chown(name)?;
    }
    for (name, to) in LINKS {
        rustix::fs::symlinkat(to, &dev, name).step("link", name)?;
        chown(name)?;
    }
    for name in ["pts", "shm", "mqueue"] {
        rustix::fs::mkdirat(&dev, name, Mode::from(0o755)).step("make directory", name)?;
        chown(name)?;
    }
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(&dev, "console", flags, Mode::from(0o600)).step("make", "/dev/console")?;
    chown("console")?;
    // fsmount(2) gives an O_PATH descriptor, which fchown(2) refuses.
    let (uid, gid) = (Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)));
    rustix::fs::chownat(&dev, "", uid, gid, rustix::fs::AtFlags::EMPTY_PATH)
        .step("chown", "/dev")?;
    Ok(dev)
}

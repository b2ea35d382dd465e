//! /dev of a container: a tmpfs made by the shim, so that its device nodes
//! work (nodes of a tmpfs made inside a user namespace never do), with inodes
//! of its own, so that nothing done to them reaches the host's.

use std::os::fd::OwnedFd;

use casemate_spec::{DeviceSpec, NodeDevice};
use casemate_sys::mount::{self, NewFs, attr};
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};

use super::Step;
use crate::plan;
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
const BLOCK_DEVICE: u32 = 0o060_000;

/// The node's devices at `paths`. What isn't there, or is something else, is
/// left out with a warning: a specification that asks for it is refused.
pub fn at(paths: &[String]) -> Vec<NodeDevice> {
    let look = |path: &String| {
        let found = rustix::fs::lstat(path.as_str());
        let kind = found
            .as_ref()
            .map(|stat| FileType::from_raw_mode(stat.st_mode));
        match (found.as_ref(), kind) {
            (Ok(stat), Ok(kind @ (FileType::CharacterDevice | FileType::BlockDevice))) => {
                Some(NodeDevice {
                    block: kind == FileType::BlockDevice,
                    major: rustix::fs::major(stat.st_rdev),
                    minor: rustix::fs::minor(stat.st_rdev),
                })
            }
            _ => {
                log::warn!("devices.allow in config.toml: {path} is not a device of this node");
                None
            }
        }
    };
    paths.iter().filter_map(look).collect()
}

/// A detached /dev whose files belong to host id `owner`. `options` are the
/// spec's for its tmpfs (`size`, `mode`), `devices` those beside the default ones.
pub fn make(
    owner: u32,
    options: &[(String, Option<String>)],
    attributes: u64,
    devices: &[DeviceSpec],
) -> Result<OwnedFd, SandboxError> {
    let fs = NewFs::open("tmpfs").step("make", "/dev")?;
    let mut sized = false;
    for (key, value) in options {
        if let (true, Some(value)) = (
            ["size", "mode", "nr_inodes", plan::CONTEXT].contains(&&**key),
            value,
        ) {
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
    let give = |name: &str, user: u32, group: u32| {
        let (uid, gid) = (Uid::from_raw(owner + user), Gid::from_raw(owner + group));
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(&dev, name, Some(uid), Some(gid), flags)
            .step("chown", format!("/dev/{name}"))
    };
    let chown = |name: &str| give(name, 0, 0);
    let node = |name: &str, kind: u32, mode: u32, major: u32, minor: u32| {
        mount::make_device(&dev, name, kind | mode, major, minor).step("make device", name)?;
        // The creation mask is the process', and not ours to change here.
        rustix::fs::chmodat(&dev, name, Mode::from(mode), rustix::fs::AtFlags::empty())
            .step("chmod", name)
    };
    for (name, major, minor) in NODES {
        node(name, CHARACTER_DEVICE, 0o666, major, minor)?;
        chown(name)?;
    }
    for spec in devices {
        // Nobody else has seen this tree yet: what is there is ours.
        for (end, _) in spec.path.match_indices('/') {
            let directory = &spec.path[..end];
            match rustix::fs::mkdirat(&dev, directory, Mode::from(0o755)) {
                Err(rustix::io::Errno::EXIST) => {}
                made => {
                    made.step("make directory", directory)?;
                    chown(directory)?;
                }
            }
        }
        let kind = match spec.device.block {
            true => BLOCK_DEVICE,
            false => CHARACTER_DEVICE,
        };
        let NodeDevice { major, minor, .. } = spec.device;
        node(&spec.path, kind, spec.mode, major, minor)?;
        give(&spec.path, spec.uid, spec.gid)?;
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

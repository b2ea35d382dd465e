//! Copies of small volumes in memory, with the pod's ids: for secrets on a kernel
//! that can't map ids there. A copy is of the moment; later changes don't arrive.
//!
//! Nothing in the source is trusted: no link is followed, nothing but regular
//! files is opened, devices can't be, and all of it is counted.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use casemate_sys::mount::{self, NewFs, attr, clone_tree};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};

use crate::host::ids::CONTAINER_IDS;
use crate::host::staging::Staging;

/// The most bytes of a copy: the kubelet's secrets and maps have at most 1 MiB
/// each, and a projected volume several of them.
pub const MOST_BYTES: u64 = 4 << 20;
/// The most files, directories and links of a copy.
pub const MOST_ENTRIES: u32 = 1024;
const DEPTH: u32 = 8;
/// Who owns what has no owner in the pod (user_namespaces(7)).
const NOBODY: u32 = 65534;

/// What may still be read.
struct Budget {
    bytes: u64,
    entries: u32,
}

impl Budget {
    fn new() -> Budget {
        Budget {
            bytes: MOST_BYTES,
            entries: MOST_ENTRIES,
        }
    }

    fn spend(&mut self, bytes: u64) -> io::Result<()> {
        let too_much = || {
            io::Error::other(format!(
                "it has more than {MOST_ENTRIES} files or {} MiB",
                MOST_BYTES >> 20
            ))
        };
        self.entries = self.entries.checked_sub(1).ok_or_else(too_much)?;
        self.bytes = self.bytes.checked_sub(bytes).ok_or_else(too_much)?;
        Ok(())
    }
}

const INSIDE: OFlags = OFlags::NOFOLLOW
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

fn names(dir: impl AsFd) -> io::Result<Vec<std::ffi::CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
        if names.len() > MOST_ENTRIES as usize {
            break;
        }
    }
    Ok(names)
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Whether `tree` holds anything that others than its owner may not read. Too
/// much to look at counts as that.
pub fn is_closed(tree: &OwnedFd) -> io::Result<bool> {
    let top = rustix::fs::fstat(tree)?;
    if kind(&top) != FileType::Directory {
        return Ok(kind(&top) == FileType::RegularFile && top.st_mode & 0o4 == 0);
    }
    if top.st_mode & 0o5 != 0o5 {
        return Ok(true);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(tree, c".", flags, Mode::empty())?;
    closed(&dir, &mut Budget::new(), 0)
}

fn closed(dir: &OwnedFd, budget: &mut Budget, depth: u32) -> io::Result<bool> {
    for name in names(dir)? {
        let stat = rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        if budget.spend(0).is_err() || depth > DEPTH {
            return Ok(true);
        }
        let found = match kind(&stat) {
            FileType::RegularFile => stat.st_mode & 0o4 == 0,
            FileType::Directory if stat.st_mode & 0o5 == 0o5 => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | INSIDE;
                let inner = rustix::fs::openat(dir, &name, flags, Mode::empty())?;
                closed(&inner, budget, depth + 1)?
            }
            FileType::Directory => true,
            _ => false,
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A detached, writable mount with all that is in `tree`, which must be one that
/// opens no devices. Owners are host ids from `root` on.
pub fn make(tree: &OwnedFd, root: u32, staging: &Staging) -> io::Result<OwnedFd> {
    let top = rustix::fs::fstat(tree)?;
    let fs = NewFs::open("tmpfs")?;
    fs.string("size", &(2 * MOST_BYTES).to_string())?;
    fs.string("nr_inodes", &(2 * MOST_ENTRIES).to_string())?;
    let directory = kind(&top) == FileType::Directory;
    let mode = if directory {
        top.st_mode & 0o7777
    } else {
        0o755
    };
    fs.string("mode", &format!("{mode:o}"))?;
    // Secrets stay in memory (Linux 6.4; before, where copies are what there is,
    // only a node without swap keeps them there).
    let _older_kernel = fs.flag("noswap");
    let copy = fs.mount(attr::NOSUID | attr::NODEV)?;
    let mut budget = Budget::new();
    if directory {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let from = rustix::fs::openat(tree, c".", flags, Mode::empty())?;
        copy_all(&from, &copy, root, &mut budget, 0)?;
        give(&copy, c"", AtFlags::EMPTY_PATH, &top, root)?;
        return Ok(copy);
    }
    if kind(&top) != FileType::RegularFile {
        return Err(special());
    }
    // It was opened by path only; this is the same file, by its own link.
    let link = mount::own_link(tree);
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let from = rustix::fs::openat(CWD, link.as_str(), flags, Mode::empty())?;
    copy_file(from, &copy, c"file", root, &mut budget)?;
    staging.holding(&[&copy], || {
        clone_tree(CWD, Path::new("/hold/file"), false, false)
    })
}

fn special() -> io::Error {
    io::Error::other("it has a special file, which has no copy")
}

fn copy_all(
    from: &OwnedFd,
    to: &OwnedFd,
    root: u32,
    budget: &mut Budget,
    depth: u32,
) -> io::Result<()> {
    if depth > DEPTH {
        return Err(io::Error::other("its directories are too deep"));
    }
    for name in names(from)? {
        let stat = rustix::fs::statat(from, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        match kind(&stat) {
            FileType::Symlink => {
                budget.spend(0)?;
                let target = rustix::fs::readlinkat(from, &name, Vec::new())?;
                rustix::fs::symlinkat(&target, to, &name)?;
                give(to, &name, AtFlags::SYMLINK_NOFOLLOW, &stat, root)?;
            }
            FileType::Directory => {
                budget.spend(0)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | INSIDE;
                let inner = rustix::fs::openat(from, &name, flags, Mode::empty())?;
                rustix::fs::mkdirat(to, &name, Mode::from(0o700))?;
                let made = rustix::fs::openat(to, &name, flags, Mode::empty())?;
                copy_all(&inner, &made, root, budget, depth + 1)?;
                rustix::fs::fchmod(&made, Mode::from(stat.st_mode & 0o7777))?;
                give(to, &name, AtFlags::SYMLINK_NOFOLLOW, &stat, root)?;
            }
            FileType::RegularFile => {
                let opened =
                    rustix::fs::openat(from, &name, OFlags::RDONLY | INSIDE, Mode::empty())?;
                copy_file(opened, to, &name, root, budget)?;
            }
            _ => return Err(special()),
        }
    }
    Ok(())
}

fn copy_file(
    from: OwnedFd,
    to: &OwnedFd,
    name: &std::ffi::CStr,
    root: u32,
    budget: &mut Budget,
) -> io::Result<()> {
    let stat = rustix::fs::fstat(&from)?;
    if kind(&stat) != FileType::RegularFile {
        return Err(special());
    }
    let mut bytes = Vec::new();
    // One more than is allowed, so that a file that grows is seen.
    std::fs::File::from(from)
        .take(budget.bytes + 1)
        .read_to_end(&mut bytes)?;
    budget.spend(bytes.len() as u64)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let mut made: std::fs::File = rustix::fs::openat(to, name, flags, Mode::from(0o600))?.into();
    made.write_all(&bytes)?;
    give(to, name, AtFlags::SYMLINK_NOFOLLOW, &stat, root)?;
    // Set-id bits mean nothing on a mount that is nosuid; they aren't copied.
    Ok(rustix::fs::fchmod(&made, Mode::from(stat.st_mode & 0o777))?)
}

fn give(
    dir: &OwnedFd,
    name: &std::ffi::CStr,
    flags: AtFlags,
    stat: &Stat,
    root: u32,
) -> io::Result<()> {
    let host = |id: u32| root + if id < CONTAINER_IDS { id } else { NOBODY };
    let (uid, gid) = (
        Uid::from_raw(host(stat.st_uid)),
        Gid::from_raw(host(stat.st_gid)),
    );
    Ok(rustix::fs::chownat(dir, name, Some(uid), Some(gid), flags)?)
}

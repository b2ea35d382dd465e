//! Mounts of a container: which there are, their types, flags and propagation, as its
//! forker has them, whose root no process of the container can change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, makedev, openat,
    openat2, statx,
};

use crate::Report;
use crate::promise::{Container, Mount};

/// `STATX_MNT_ID` and `STATX_ATTR_MOUNT_ROOT` of statx(2), since Linux 5.8.
const MOUNT_ID: StatxFlags = StatxFlags::from_bits_retain(0x1000);
const MOUNT_ROOT: u64 = 0x2000;

/// A line of mountinfo (proc_pid_mountinfo(5)).
struct Entry {
    parent: u64,
    point: String,
    flags: Vec<String>,
    /// Of its propagation: `shared:N`, `master:N`.
    peers: Vec<String>,
    fstype: String,
}

/// All mounts by id.
fn table(pid: u32) -> Option<BTreeMap<u64, Entry>> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
    Some(text.lines().filter_map(line).collect())
}

fn line(line: &str) -> Option<(u64, Entry)> {
    let (front, back) = line.split_once(" - ")?;
    let fields: Vec<&str> = front.split(' ').collect();
    let [id, parent, _, _, point, flags, peers @ ..] = fields.as_slice() else {
        return None;
    };
    let entry = Entry {
        parent: parent.parse().ok()?,
        point: (*point).to_owned(),
        flags: flags.split(',').map(str::to_owned).collect(),
        peers: peers.iter().map(|p| (*p).to_owned()).collect(),
        fstype: back.split(' ').next()?.to_owned(),
    };
    Some((id.parse().ok()?, entry))
}

/// The root of a process, which is looked into, and never followed out of.
fn root(pid: u32) -> Option<OwnedFd> {
    let path = format!("/proc/{pid}/root");
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// What is at a path as the container sees it; links stay below its root.
fn look(root: &OwnedFd, path: &str) -> Option<Statx> {
    let found = openat2(
        root,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
    .ok()?;
    statx(
        found,
        "",
        AtFlags::EMPTY_PATH,
        MOUNT_ID | StatxFlags::BASIC_STATS,
    )
    .ok()
}

fn is_mounted(found: &Statx) -> bool {
    found.stx_attributes.bits() & MOUNT_ROOT != 0
}

fn is_null(found: &Statx) -> bool {
    let device = makedev(found.stx_rdev_major, found.stx_rdev_minor);
    FileType::from_raw_mode(found.stx_mode.into()) == FileType::CharacterDevice
        && device == makedev(1, 3)
}

/// What is known of a container's mounts.
struct Seen<'a> {
    promised: &'a Container,
    table: BTreeMap<u64, Entry>,
    root: OwnedFd,
    /// Mounts that were promised, and how often: one path may have two names.
    known: BTreeMap<u64, usize>,
    /// Those with others below that came along.
    with_below: BTreeSet<u64>,
    /// Those that receive.
    receive: BTreeSet<u64>,
}

/// Compares; whether some masked path is a device.
pub fn check(report: &mut Report, promised: &Container) -> bool {
    let pid = promised.forker;
    let (Some(table), Some(root)) = (table(pid), root(pid)) else {
        // Gone, with its container.
        return false;
    };
    let mut seen = Seen {
        promised,
        table,
        root,
        known: BTreeMap::new(),
        with_below: BTreeSet::new(),
        receive: BTreeSet::new(),
    };
    for mount in &promised.mounts {
        seen.mount(report, mount);
    }
    seen.readonly(report);
    let witness = seen.masked(report);
    seen.propagation(report);
    if promised.no_other_mounts {
        seen.others(report);
    }
    witness
}

impl Seen<'_> {
    fn mount(&mut self, report: &mut Report, mount: &Mount) {
        let what = format!("container {}: mount {}", self.promised.id, mount.target);
        let Some(found) = look(&self.root, &mount.target) else {
            return report.add(what, "mounted", "nothing there");
        };
        if !is_mounted(&found) {
            return report.add(what, "mounted", "a file or directory of what is below");
        }
        let id = found.stx_mnt_id;
        let Some(entry) = self.table.get(&id) else {
            return report.add(what, "a mount of its namespace", "another");
        };
        for flag in &mount.flags {
            if !entry.flags.contains(flag) {
                report.add(what.clone(), flag, entry.flags.join(","));
            }
        }
        if !mount.fstype.is_empty() {
            report.equal(format!("{what}: type"), &mount.fstype, &entry.fstype);
        }
        *self.known.entry(id).or_default() += 1;
        if mount.with_below || mount.receives {
            self.with_below.insert(id);
        }
        if mount.receives {
            self.receive.insert(id);
        }
    }

    /// Each is a mount of its own; paths that weren't there have none.
    fn readonly(&mut self, report: &mut Report) {
        for path in &self.promised.readonly {
            let Some(found) = look(&self.root, path) else {
                continue;
            };
            let what = format!("container {}: {path}", self.promised.id);
            let entry = self.table.get(&found.stx_mnt_id);
            let is = entry.is_some_and(|e| e.flags.iter().any(|f| f == "ro"));
            if !is && !self.promised.masked.contains(path) {
                report.add(what, "read-only", "writable");
            }
            if is_mounted(&found) {
                // What is mounted below came with it.
                self.with_below.insert(found.stx_mnt_id);
                *self.known.entry(found.stx_mnt_id).or_default() += 1;
            }
        }
    }

    /// Whether one of them is a device.
    fn masked(&mut self, report: &mut Report) -> bool {
        let mut device = false;
        for path in &self.promised.masked {
            let Some(found) = look(&self.root, path) else {
                continue;
            };
            let what = format!("container {}: {path}", self.promised.id);
            if !is_mounted(&found) {
                report.add(what, "hidden", "no mount over it");
                continue;
            }
            let id = found.stx_mnt_id;
            *self.known.entry(id).or_default() += 1;
            let entry = self.table.get(&id);
            let empty = entry
                .is_some_and(|e| e.fstype == "tmpfs" && e.flags.iter().any(|flag| flag == "ro"));
            match is_null(&found) {
                true => device = true,
                false if empty && self.is_empty(path) => {}
                false if empty => {
                    let wanted = "hidden by an empty tmpfs";
                    report.add(what, wanted, "a tmpfs with something in it");
                }
                false => {
                    let found = entry.map_or("another mount", |e| &e.fstype);
                    report.add(what, "hidden by the null device or an empty tmpfs", found);
                }
            }
        }
        device
    }

    /// Whether nothing is in a directory.
    fn is_empty(&self, path: &str) -> bool {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let entries = openat2(&self.root, path, flags, Mode::empty(), how).and_then(Dir::new);
        entries.is_ok_and(|all| {
            all.into_iter().all(|entry| {
                // What can't be read isn't known to be nothing.
                entry.is_ok_and(|e| matches!(e.file_name().to_bytes(), b"." | b".."))
            })
        })
    }

    /// Whether the mount is, or is below, one of these.
    fn is_within(&self, id: u64, of: &BTreeSet<u64>) -> bool {
        let mut at = id;
        // The table is a tree; a bound all the same.
        for _ in 0..self.table.len() {
            if of.contains(&at) {
                return true;
            }
            match self.table.get(&at) {
                Some(entry) if entry.parent != at => at = entry.parent,
                _ => return false,
            }
        }
        false
    }

    /// Nothing that is mounted inside goes anywhere, and only what was asked for
    /// comes in.
    fn propagation(&self, report: &mut Report) {
        for (id, entry) in &self.table {
            let receives = self.is_within(*id, &self.receive);
            let wrong = entry.peers.iter().any(|p| match p.split_once(':') {
                Some(("master" | "propagate_from", _)) => !receives,
                _ => true,
            });
            if wrong {
                let what = format!("container {}: mount {}", self.promised.id, entry.point);
                let wanted = if receives { "a slave" } else { "private" };
                report.add(
                    format!("{what}: propagation"),
                    wanted,
                    entry.peers.join(" "),
                );
            }
        }
    }

    /// Mounts that nobody promised, be it over one that was.
    fn others(&self, report: &mut Report) {
        let mut stacks: BTreeMap<&str, (usize, usize, bool)> = BTreeMap::new();
        for (id, entry) in &self.table {
            let stack = stacks.entry(&entry.point).or_default();
            stack.0 += 1;
            stack.1 += self.known.get(id).copied().unwrap_or(0);
            stack.2 |= self.is_within(*id, &self.with_below);
        }
        for (point, (count, promised, came_along)) in stacks {
            if count > promised && !(came_along && promised == 0) {
                let what = format!("container {}: mount {point}", self.promised.id);
                report.add(what, format!("{promised} in this place"), count);
            }
        }
    }
}

//! Mounts of a container and their flags, as its init has them.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat, openat2, statx,
};

use crate::Report;
use crate::promise::Container;

/// `STATX_MNT_ID` and `STATX_ATTR_MOUNT_ROOT` of statx(2), since Linux 5.8.
const MOUNT_ID: StatxFlags = StatxFlags::from_bits_retain(0x1000);
const MOUNT_ROOT: u64 = 0x2000;

/// Flags of all mounts by id (proc_pid_mountinfo(5)).
fn table(pid: u32) -> Option<BTreeMap<u64, Vec<String>>> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
    let mut all = BTreeMap::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        if let (Some(Ok(id)), Some(flags)) = (fields.first().map(|f| f.parse()), fields.get(5)) {
            all.insert(id, flags.split(',').map(str::to_owned).collect());
        }
    }
    Some(all)
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
    statx(found, "", AtFlags::EMPTY_PATH, MOUNT_ID).ok()
}

pub fn check(report: &mut Report, promised: &Container) {
    let (Some(table), Some(root)) = (table(promised.init), root(promised.init)) else {
        return;
    };
    for mount in &promised.mounts {
        let what = format!("container {}: mount {}", promised.id, mount.target);
        let Some(found) = look(&root, &mount.target) else {
            report.add(what, "mounted", "nothing there");
            continue;
        };
        if found.stx_attributes.bits() & MOUNT_ROOT == 0 {
            report.add(what, "mounted", "a file or directory of what is below");
            continue;
        }
        let Some(flags) = table.get(&found.stx_mnt_id) else {
            report.add(what, "a mount of its namespace", "another");
            continue;
        };
        for flag in &mount.flags {
            if !flags.contains(flag) {
                report.add(what.clone(), flag, flags.join(","));
            }
        }
    }
    for path in &promised.masked {
        let bare = look(&root, path).is_some_and(|s| s.stx_attributes.bits() & MOUNT_ROOT == 0);
        if bare {
            let what = format!("container {}: {path}", promised.id);
            report.add(what, "hidden", "no mount over it");
        }
    }
}

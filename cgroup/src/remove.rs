//! Taking the directories away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cgroup::Cgroup;
use crate::error::CgroupError;
use crate::files;

/// The first pause between two tries; it doubles up to [`LAST_PAUSE`]. A
/// process that was just killed needs some hundred microseconds to leave.
const FIRST_PAUSE: Duration = Duration::from_micros(100);
const LAST_PAUSE: Duration = Duration::from_millis(10);

impl Cgroup {
    /// Removes the leaf in every hierarchy with what was made below it, then
    /// the parents that were made for it if nothing else is in them. A leaf
    /// that is still in use is tried again until `deadline` is over. Missing
    /// ones are fine: a second call does nothing.
    ///
    /// Only directories that [`Cgroup::create`] made are touched, and only if
    /// they are on a cgroup file system; a mount point never is one of them.
    pub fn remove(&self, deadline: Duration) -> Result<(), CgroupError> {
        let started = Instant::now();
        let mut first_error = None;
        for leaf in &self.leaves {
            if !self.dirs().contains(&leaf.dir) || files::on_cgroupfs(&leaf.dir).is_none() {
                continue;
            }
            // One busy hierarchy must not keep the others.
            if let Err(e) = remove_until(&leaf.dir, started, deadline) {
                first_error.get_or_insert(e);
            }
        }
        for dir in self.dirs().iter().rev() {
            let is_leaf = self.leaves.iter().any(|l| l.dir == *dir);
            if !is_leaf && files::on_cgroupfs(dir).is_some() {
                match fs::remove_dir(dir) {
                    Ok(()) => {}
                    Err(e) if in_use(&e) || files::is_gone(&e) => {}
                    Err(e) => log::warn!("remove empty parent cgroup {dir:?}: {e}"),
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }
}

/// Removes those of `dirs` that are empty cgroups; for parents that several
/// cgroups had in common and one of them has made. Parents come first in the
/// list, as in [`Cgroup::dirs`].
pub fn remove_empty(dirs: &[PathBuf]) {
    for dir in dirs.iter().rev() {
        if files::on_cgroupfs(dir).is_some() {
            // In use, or gone: both are somebody else's affair.
            let _left = fs::remove_dir(dir);
        }
    }
}

fn remove_until(dir: &Path, started: Instant, deadline: Duration) -> Result<(), CgroupError> {
    let mut pause = FIRST_PAUSE;
    loop {
        match remove_tree(dir) {
            Ok(()) => return Ok(()),
            Err(e) if in_use(&e) => {}
            Err(e) => return Err(CgroupError::io("remove cgroup: rmdir", dir, e)),
        }
        let waited = started.elapsed();
        if waited >= deadline {
            let mut pids = Vec::new();
            files::collect_pids(dir, &mut pids)?;
            pids.truncate(8);
            return Err(CgroupError::Busy {
                step: "remove cgroup",
                dir: dir.to_owned(),
                waited_ms: waited.as_millis(),
                pids,
            });
        }
        std::thread::sleep(pause.min(deadline.saturating_sub(waited)));
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Children first. Nothing but directories can be removed, or need be, on a
/// cgroup file system.
fn remove_tree(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Ok(()) => return Ok(()),
        Err(e) if files::is_gone(&e) => return Ok(()),
        Err(e) if !in_use(&e) => return Err(e),
        Err(_) => {}
    }
    let subs = match files::subdirs(dir) {
        Err(e) if files::is_gone(&e) => return Ok(()),
        other => other?,
    };
    for sub in subs {
        remove_tree(&sub)?;
    }
    match fs::remove_dir(dir) {
        Err(e) if files::is_gone(&e) => Ok(()),
        other => other,
    }
}

/// Processes inside (EBUSY), or children (kernfs says EBUSY or ENOTEMPTY).
fn in_use(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EBUSY | libc::ENOTEMPTY))
}

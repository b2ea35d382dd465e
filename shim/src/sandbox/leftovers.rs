//! Cgroups that couldn't be removed with their container: tried again at the
//! pod's end, and else by `delete`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use casemate_cgroup::Cgroup;

/// Those of one pod.
#[derive(Default)]
pub struct Leftovers {
    /// Containers whose cgroup was still in use, and its directories.
    busy: Mutex<Vec<(String, Vec<PathBuf>)>>,
    /// Directories that were made for one cgroup and outlived it, because
    /// others were below them too.
    parents: Mutex<BTreeSet<PathBuf>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leftovers {
    /// Looks at what is left of the cgroup of a container, which is `busy` or
    /// has been removed.
    pub fn note(&self, id: &str, cgroup: &Cgroup, busy: bool) {
        if busy {
            lock(&self.busy).push((id.to_owned(), cgroup.dirs().to_vec()));
        }
        let left = cgroup.dirs().iter().filter(|dir| dir.exists()).cloned();
        lock(&self.parents).extend(left);
    }

    /// Whether the cgroup of that container is among them.
    pub fn has(&self, id: &str) -> bool {
        lock(&self.busy).iter().any(|(left, _)| left == id)
    }

    /// Takes over those that were in use.
    pub fn take(&self) -> Vec<(String, Vec<PathBuf>)> {
        std::mem::take(&mut lock(&self.busy))
    }

    /// Directories that may be empty by now, parents first.
    pub fn parents(&self) -> Vec<PathBuf> {
        lock(&self.parents).iter().cloned().collect()
    }
}

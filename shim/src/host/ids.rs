//! Exclusive ranges of host ids, one for each pod.
//!
//! A range is taken by locking its file (flock(2)); the lock goes with the
//! shim. A second file is locked through a descriptor that only the agent
//! keeps: while either lives, nobody else gets the range.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use casemate_spec::config::Ids;
use rustix::fs::FlockOperation;

use super::Step;
use crate::sandbox::SandboxError;

/// Where the locks are.
pub const DIRECTORY: &str = "/run/casemate/ids";
/// Ids of the containers of a pod.
pub const CONTAINER_IDS: u32 = 65536;

/// A range in our hands.
pub struct IdRange {
    base: u32,
    _lock: File,
    agent_lock: OwnedFd,
}

impl IdRange {
    /// Takes a free range.
    pub fn take(ids: &Ids, directory: &Path) -> Result<IdRange, SandboxError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .step("make directory", directory.display().to_string())?;
        // Start anywhere: a freed range isn't handed out again at once, and
        // concurrent shims seldom try the same one.
        let mut seed = [0u8; 4];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
            .step("get random bytes", "")?;
        let start = u32::from_ne_bytes(seed) % ids.count.max(1);
        for i in 0..ids.count {
            let slot = (start + i) % ids.count;
            // Named after its first id: a change of `base` can't hand out a
            // living pod's ids under another number.
            let base = ids.base + slot * ids.size;
            let lock = try_lock(directory, &format!("{base}.shim"))?;
            let Some(lock) = lock else { continue };
            let Some(agent) = try_lock(directory, &format!("{base}.agent"))? else {
                continue;
            };
            return Ok(IdRange {
                base,
                _lock: lock,
                agent_lock: agent.into(),
            });
        }
        Err(SandboxError::Failed(format!(
            "take an id range: all {} are in use (ids.count in config.toml); \
             raise ids.count or run fewer pods on this node",
            ids.count
        )))
    }

    /// Host id of the agent; the containers' root is the next one.
    pub fn base(&self) -> u32 {
        self.base
    }

    /// Host id of the containers' root.
    pub fn container_root(&self) -> u32 {
        self.base + 1
    }

    /// The lock for the agent to hold.
    pub fn agent_lock(&self) -> &OwnedFd {
        &self.agent_lock
    }
}

fn try_lock(directory: &Path, name: &str) -> Result<Option<File>, SandboxError> {
    let path = directory.join(name);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .step("open lock", path.display().to_string())?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(e).step("lock", path.display().to_string()),
    }
}

/// Writes the maps of user namespace A: 0 the agent, 1… the containers.
pub fn map_agent(pid: u32, range: &IdRange) -> io::Result<()> {
    let line = format!("0 {} {}\n", range.base(), CONTAINER_IDS + 1);
    fs::write(format!("/proc/{pid}/uid_map"), &line)?;
    fs::write(format!("/proc/{pid}/gid_map"), &line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::{Arc, Mutex};

    fn scratch(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("casemate-ids-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn two_hundred_ranges_taken_and_freed_concurrently_never_collide() {
        let dir = scratch("many");
        let ids = Ids {
            base: 0x7000_0000,
            count: 256,
            size: 131_072,
        };
        let live = Arc::new(Mutex::new(BTreeSet::new()));
        let workers: Vec<_> = (0..20)
            .map(|_| {
                let (dir, ids, live) = (dir.clone(), ids.clone(), live.clone());
                std::thread::spawn(move || {
                    for _ in 0..5 {
                        let held: Vec<_> = (0..10)
                            .map(|_| IdRange::take(&ids, &dir).unwrap())
                            .collect();
                        for range in &held {
                            assert!(
                                live.lock().unwrap().insert(range.base()),
                                "handed out twice"
                            );
                        }
                        for range in held {
                            live.lock().unwrap().remove(&range.base());
                            drop(range);
                        }
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().unwrap();
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn exhaustion_is_a_clear_error_and_a_freed_range_comes_back() {
        let dir = scratch("few");
        let ids = Ids {
            base: 0x7000_0000,
            count: 3,
            size: 131_072,
        };
        let mut held: Vec<_> = (0..3).map(|_| IdRange::take(&ids, &dir).unwrap()).collect();
        let Err(error) = IdRange::take(&ids, &dir) else {
            panic!("a fourth of three")
        };
        assert!(error.to_string().contains("ids.count"), "{error}");
        let freed = held.pop().unwrap().base();
        assert_eq!(IdRange::take(&ids, &dir).unwrap().base(), freed);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_changed_base_does_not_hand_out_the_ids_of_a_living_pod() {
        let dir = scratch("moved");
        let ids = |base, count| Ids {
            base,
            count,
            size: 131_072,
        };
        let living = IdRange::take(&ids(0x7002_0000, 1), &dir).unwrap();
        let moved = IdRange::take(&ids(0x7000_0000, 2), &dir).unwrap();
        assert_eq!(moved.base(), 0x7000_0000);
        assert!(IdRange::take(&ids(0x7000_0000, 2), &dir).is_err());
        drop(living);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_range_stays_taken_while_only_its_agent_holds_it() {
        let dir = scratch("agent");
        let ids = Ids {
            base: 0x7000_0000,
            count: 1,
            size: 131_072,
        };
        let range = IdRange::take(&ids, &dir).unwrap();
        let agents = range.agent_lock().try_clone().unwrap();
        drop(range);
        assert!(IdRange::take(&ids, &dir).is_err());
        drop(agents);
        assert!(IdRange::take(&ids, &dir).is_ok());
        fs::remove_dir_all(dir).unwrap();
    }
}

//! Exclusive ranges of host ids, one for each pod.
//!
//! A range is taken by locking its file (flock(2)); the lock goes with the
//! shim. A second file is locked through a descriptor that only the agent
//! keeps: while either lives, nobody else gets the range.
//!
//! Where the kubelet has chosen the containers' ids (`hostUsers: false`), only
//! the agent's own is taken from the node's ranges, and the kubelet's are locked
//! as well.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use casemate_spec::config::Ids;
use rustix::fs::FlockOperation;

use super::Step;
use crate::sandbox::SandboxError;

/// Where the locks are.
pub const DIRECTORY: &str = "/run/casemate/ids";
/// Ids of the containers of a pod.
pub const CONTAINER_IDS: u32 = 65536;

/// How long a pod may take to let go of ids that the kubelet gives away again.
const HANDOVER: Duration = Duration::from_secs(1);

/// A range in our hands.
pub struct IdRange {
    base: u32,
    container_root: u32,
    locks: Vec<File>,
    agent_locks: Vec<OwnedFd>,
    files: Vec<PathBuf>,
    lent: AtomicBool,
}

impl Drop for IdRange {
    fn drop(&mut self) {
        if self.lent.load(Ordering::Relaxed) {
            return;
        }
        for file in &self.files {
            // Locked by us, so it is the file that others would lock.
            if let Err(error) = fs::remove_file(file) {
                log::warn!("remove {}: {error}", file.display());
            }
        }
    }
}

/// A range may look taken for the moment in which somebody removes a lock file
/// that is no longer held.
const PASSES: u32 = 10;
const BETWEEN_PASSES: Duration = Duration::from_millis(10);

impl IdRange {
    /// Takes a free range. `chosen` is the containers' first id, where it isn't
    /// ours to choose.
    pub fn take(ids: &Ids, chosen: Option<u32>, directory: &Path) -> Result<IdRange, SandboxError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .step("make directory", directory.display().to_string())?;
        let mut range = IdRange {
            base: 0,
            container_root: 0,
            locks: Vec::new(),
            agent_locks: Vec::new(),
            files: Vec::new(),
            lent: AtomicBool::new(false),
        };
        for block in chosen.into_iter().flat_map(blocks) {
            range.hold(take_over(directory, block)?);
        }
        // Start anywhere: a freed range isn't handed out again at once, and
        // concurrent shims seldom try the same one.
        let mut seed = [0u8; 4];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
            .step("get random bytes", "")?;
        let start = u32::from_ne_bytes(seed) % ids.count.max(1);
        for pass in 1..=PASSES {
            for i in 0..ids.count {
                let slot = (start + i) % ids.count;
                // Named after its first id: a change of `base` can't hand out a
                // living pod's ids under another number.
                let base = ids.base + slot * ids.size;
                let Some(both) = try_both(directory, base)? else {
                    continue;
                };
                range.hold(both);
                range.base = base;
                range.container_root = chosen.unwrap_or(base + 1);
                return Ok(range);
            }
            if pass < PASSES {
                std::thread::sleep(BETWEEN_PASSES);
            }
        }
        Err(SandboxError::Failed(format!(
            "take an id range: all {} are in use (ids.count in config.toml); \
             raise ids.count or run fewer pods on this node",
            ids.count
        )))
    }

    fn hold(&mut self, both: Both) {
        self.locks.push(both.shim);
        self.agent_locks.push(both.agent);
        self.files.extend(both.files);
    }

    /// From now on an agent may hold the range beyond our own life.
    pub fn lend(&self) {
        self.lent.store(true, Ordering::Relaxed);
    }

    /// The agent has ended, for certain.
    pub fn give_back(&self) {
        self.lent.store(false, Ordering::Relaxed);
    }

    /// Host id of the agent.
    pub fn base(&self) -> u32 {
        self.base
    }

    /// Host id of the containers' root.
    pub fn container_root(&self) -> u32 {
        self.container_root
    }

    /// The locks for the agent to hold.
    pub fn agent_locks(&self) -> &[OwnedFd] {
        &self.agent_locks
    }
}

/// First ids of the blocks of 65536 that a pod's ids lie in: one where the
/// kubelet chose them, as its ranges are such blocks. Whoever else chooses may
/// straddle two.
fn blocks(first: u32) -> impl Iterator<Item = u32> {
    let (low, high) = (first, first + (CONTAINER_IDS - 1));
    let block = |id: u32| id - id % CONTAINER_IDS;
    std::iter::once(block(low)).chain((block(high) != block(low)).then(|| block(high)))
}

/// Locks a block that somebody else gave this pod. Who had it before may be on
/// the way out.
fn take_over(directory: &Path, block: u32) -> Result<Both, SandboxError> {
    let begun = Instant::now();
    loop {
        if let Some(both) = try_both(directory, block)? {
            return Ok(both);
        }
        if begun.elapsed() > HANDOVER {
            return Err(SandboxError::Failed(format!(
                "take the ids of linux.uidMappings: some of {block} to {} are another living \
                 pod's; give each pod ids of its own (the kubelet does), or end that pod",
                block + (CONTAINER_IDS - 1)
            )));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The two locks of a range, and their files.
struct Both {
    shim: File,
    agent: OwnedFd,
    files: [PathBuf; 2],
}

/// Locks the range from `first`, for the shim and for the agent.
fn try_both(directory: &Path, first: u32) -> Result<Option<Both>, SandboxError> {
    let files = ["shim", "agent"].map(|kind| directory.join(format!("{first}.{kind}")));
    let Some(shim) = try_lock(&files[0])? else {
        return Ok(None);
    };
    let agent = try_lock(&files[1])?;
    Ok(agent.map(|agent| Both {
        shim,
        agent: agent.into(),
        files,
    }))
}

/// Locks the file at `path`, making it where it isn't there. A lock counts only
/// on the file that the path leads to: whoever holds it may remove the file.
fn try_lock(path: &Path) -> Result<Option<File>, SandboxError> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .step("open lock", path.display().to_string())?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if is_at(&file, path) => return Ok(Some(file)),
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(e).step("lock", path.display().to_string()),
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let here = file.metadata().map(|m| (m.dev(), m.ino()));
    let there = fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()));
    matches!((here, there), (Ok(here), Ok(there)) if here == there)
}

/// Removes the lock files in `directory` that nobody holds: what shims leave
/// that were killed.
pub fn sweep(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let path = entry?.path();
        let is_lock = path
            .extension()
            .is_some_and(|kind| kind == "shim" || kind == "agent");
        // Gone between our look and this: somebody else sweeps.
        let Ok(file) = File::open(&path) else {
            continue;
        };
        if is_lock
            && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
            && is_at(&file, &path)
        {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Writes the maps of user namespace A: 0 the agent, 1… the containers.
pub fn map_agent(pid: u32, range: &IdRange) -> io::Result<()> {
    // Two lines even where they could be one: the ids inside are the same.
    let lines = format!(
        "0 {} 1\n1 {} {CONTAINER_IDS}\n",
        range.base(),
        range.container_root()
    );
    fs::write(format!("/proc/{pid}/uid_map"), &lines)?;
    fs::write(format!("/proc/{pid}/gid_map"), &lines)
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
                            .map(|_| IdRange::take(&ids, None, &dir).unwrap())
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
        let mut held: Vec<_> = (0..3)
            .map(|_| IdRange::take(&ids, None, &dir).unwrap())
            .collect();
        let Err(error) = IdRange::take(&ids, None, &dir) else {
            panic!("a fourth of three")
        };
        assert!(error.to_string().contains("ids.count"), "{error}");
        let freed = held.pop().unwrap().base();
        assert_eq!(IdRange::take(&ids, None, &dir).unwrap().base(), freed);
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
        let living = IdRange::take(&ids(0x7002_0000, 1), None, &dir).unwrap();
        let moved = IdRange::take(&ids(0x7000_0000, 2), None, &dir).unwrap();
        assert_eq!(moved.base(), 0x7000_0000);
        assert!(IdRange::take(&ids(0x7000_0000, 2), None, &dir).is_err());
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
        let range = IdRange::take(&ids, None, &dir).unwrap();
        range.lend();
        let agents = range.agent_locks()[0].try_clone().unwrap();
        drop(range);
        assert!(IdRange::take(&ids, None, &dir).is_err());
        sweep(&dir).unwrap();
        assert!(
            IdRange::take(&ids, None, &dir).is_err(),
            "swept from under its holder"
        );
        drop(agents);
        assert!(IdRange::take(&ids, None, &dir).is_ok());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn ids_that_the_kubelet_chose_are_one_living_pods() {
        let dir = scratch("chosen");
        let ids = Ids {
            base: 0x7000_0000,
            count: 8,
            size: 131_072,
        };
        let take = |first| IdRange::take(&ids, Some(first), &dir);
        let pod = take(65536).unwrap();
        assert_eq!(pod.container_root(), 65536);
        assert!(pod.base() >= 0x7000_0000, "the agent's is the node's");
        let beside = take(131_072).unwrap();
        assert_ne!(beside.base(), pod.base());
        // The same, and any that have only some of them.
        for first in [65536, 65537, 1000 + 65536, 131_071] {
            let Err(error) = take(first) else {
                panic!("{first} twice")
            };
            let text = error.to_string();
            assert!(text.contains("another living"), "{text}");
        }
        // While the agent alone lives too; then never again.
        let agents: Vec<OwnedFd> = pod
            .agent_locks()
            .iter()
            .map(|l| l.try_clone().unwrap())
            .collect();
        pod.lend();
        drop(pod);
        assert!(take(65536).is_err());
        drop(agents);
        assert!(take(65536).is_ok());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn lock_files_go_with_the_range_or_are_swept() {
        let dir = scratch("files");
        let ids = Ids {
            base: 0x7000_0000,
            count: 4,
            size: 131_072,
        };
        let count = || fs::read_dir(&dir).unwrap().count();
        let held = IdRange::take(&ids, None, &dir).unwrap();
        let killed = IdRange::take(&ids, None, &dir).unwrap();
        killed.lend();
        drop(killed);
        assert_eq!(count(), 4);
        sweep(&dir).unwrap();
        assert_eq!(count(), 2, "only the held ones stay");
        drop(held);
        assert_eq!(count(), 0);
        fs::remove_dir_all(dir).unwrap();
    }
}

//! Stopping, continuing and ending everything in the cgroup.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use casemate_sys::process;

use crate::cgroup::Cgroup;
use crate::error::CgroupError;
use crate::files;

/// How long the kernel may take to stop all processes. Those in
/// uninterruptible sleep stop only when that ends. The caller waits, and does
/// nothing else meanwhile: well below a second.
const FREEZE_WITHIN: Duration = Duration::from_millis(500);
/// The same before a kill, which can go on without.
const FREEZE_BEFORE_KILL: Duration = Duration::from_millis(150);
/// How long to run after processes that fork while they are being killed.
const KILL_WITHIN: Duration = Duration::from_millis(500);
/// How many pidfds are open at a time: far below any RLIMIT_NOFILE.
const BATCH: usize = 128;

impl Cgroup {
    /// Stops all processes and waits until they are stopped.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        self.freeze_within(FREEZE_WITHIN).inspect_err(|_| {
            // Half a pod stopped is worse than none.
            if let Err(e) = self.thaw() {
                log::warn!("thaw after a freeze that failed: {e}");
            }
        })
    }

    fn freeze_within(&self, limit: Duration) -> Result<(), CgroupError> {
        let freezer = self.freezer("freeze cgroup")?;
        freezer.set(true)?;
        let started = Instant::now();
        loop {
            if freezer.is_frozen()? {
                return Ok(());
            }
            if started.elapsed() >= limit {
                let mut pids = self.pids()?;
                pids.truncate(8);
                return Err(CgroupError::Busy {
                    step: "freeze cgroup",
                    dir: freezer.dir.to_owned(),
                    waited_ms: started.elapsed().as_millis(),
                    pids,
                });
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Lets stopped processes go on.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.freezer("thaw cgroup")?.set(false)
    }

    /// Whether all processes are stopped.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        self.freezer("look whether the cgroup is frozen")?
            .is_frozen()
    }

    fn freezer(&self, step: &'static str) -> Result<Freezer<'_>, CgroupError> {
        let (dir, v2) = if self.is_v2() {
            (self.first()?.dir.as_path(), true)
        } else {
            let dir = self.v1("freezer").ok_or_else(|| CgroupError::Unsupported {
                step: step.to_owned(),
                reason: "the freezer controller of cgroup v1 is not mounted".to_owned(),
                way_out: "mount it at /sys/fs/cgroup/freezer or boot the host with cgroup v2 only"
                    .to_owned(),
            })?;
            (dir, false)
        };
        Ok(Freezer { dir, v2, step })
    }

    /// Sends `signal` to every process in the cgroup except `except`.
    ///
    /// SIGKILL gets everything, also what forks faster than one can look:
    /// `cgroup.kill` on version 2 (Linux 5.14), else (and with exceptions) all
    /// processes are stopped first, signalled, and let go. The processes may
    /// still be dying when this returns; [`Cgroup::remove`] waits for them.
    ///
    /// Other signals go to the processes that are there. A pid is signalled
    /// through a pidfd that was opened while the pid was in the cgroup, so it
    /// can't be another process's by then.
    pub fn kill(&self, signal: i32, except: &[u32]) -> Result<(), CgroupError> {
        if signal != libc::SIGKILL {
            return self.signal_present(signal, except).map(drop);
        }
        if except.is_empty()
            && let Some(leaf) = self.unified()
        {
            match files::write(&leaf.dir.join("cgroup.kill"), "1") {
                // On a hybrid host the rest may sit in version 1's leaves only.
                Ok(()) if self.is_v2() => return Ok(()),
                Ok(()) => {}
                Err(e) if files::is_gone(&e) => {}
                Err(e) => log::warn!("write cgroup.kill in {:?}: {e}; go on one by one", leaf.dir),
            }
        }
        self.kill_one_by_one(except)
    }

    fn kill_one_by_one(&self, except: &[u32]) -> Result<(), CgroupError> {
        let started = Instant::now();
        let mut before: Option<HashSet<u32>> = None;
        loop {
            // Nothing to stop: the common case of a container that has ended.
            if self.pids()?.iter().all(|p| except.contains(p)) {
                return self.thaw_if_any();
            }
            let frozen = match self.freeze_within(FREEZE_BEFORE_KILL) {
                Ok(()) => true,
                Err(e) => {
                    log::debug!("kill without a full stop: {e}");
                    false
                }
            };
            let found = self.signal_present(libc::SIGKILL, except);
            // Version 1's frozen processes die only when let go.
            self.thaw_if_any()?;
            let found: HashSet<u32> = found?.into_iter().collect();
            if frozen {
                // All were stopped, so all were listed, and have got it.
                return Ok(());
            }
            // Not all were stopped. Done when a later look finds nothing new.
            if before.as_ref().is_some_and(|b| found.is_subset(b)) {
                return Ok(());
            }
            if started.elapsed() >= KILL_WITHIN {
                let mut pids: Vec<u32> = found.into_iter().collect();
                pids.truncate(8);
                return Err(CgroupError::Busy {
                    step: "kill cgroup",
                    dir: self.first()?.dir.clone(),
                    waited_ms: started.elapsed().as_millis(),
                    pids,
                });
            }
            before = Some(found);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn thaw_if_any(&self) -> Result<(), CgroupError> {
        match self.thaw() {
            Err(CgroupError::Unsupported { .. }) => Ok(()),
            other => other,
        }
    }

    /// Signals what is there now and says which pids that were.
    fn signal_present(&self, signal: i32, except: &[u32]) -> Result<Vec<u32>, CgroupError> {
        let mut listed = self.pids()?;
        listed.retain(|p| !except.contains(p));
        let mut first_error = None;
        for batch in listed.chunks(BATCH) {
            let opened: Vec<(u32, OwnedFd)> = batch
                .iter()
                .filter_map(|&pid| Some((pid, process::open_pidfd(pid).ok()?)))
                .collect();
            // A pid that is still listed after its pidfd was opened was in the
            // cgroup all along; one that was given to another process is not.
            let now: HashSet<u32> = self.pids()?.into_iter().collect();
            for (pid, fd) in opened.iter().filter(|(pid, _)| now.contains(pid)) {
                match process::signal(fd, signal) {
                    Ok(()) => {}
                    Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                    Err(e) => {
                        first_error.get_or_insert_with(|| {
                            CgroupError::io(
                                "kill cgroup: send a signal to",
                                format!("/proc/{pid}"),
                                e,
                            )
                        });
                    }
                }
            }
        }
        first_error.map_or(Ok(listed), Err)
    }
}

/// The freezer of either version: `freezer.state` (kernel:
/// cgroup-v1/freezer-subsystem.rst) or `cgroup.freeze` and `cgroup.events`
/// (cgroup-v2.rst).
struct Freezer<'a> {
    dir: &'a Path,
    v2: bool,
    step: &'static str,
}

impl Freezer<'_> {
    fn set(&self, frozen: bool) -> Result<(), CgroupError> {
        let (file, value) = match (self.v2, frozen) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        match files::write(&self.dir.join(file), value) {
            // Nothing runs in a cgroup that is gone, nor is stopped there.
            Err(e) if files::is_gone(&e) && !frozen => Ok(()),
            other => other.map_err(|e| self.error(file, e)),
        }
    }

    fn is_frozen(&self) -> Result<bool, CgroupError> {
        if self.v2 {
            let file = "cgroup.events";
            let value = files::line(&self.dir.join(file), "frozen");
            Ok(value.map_err(|e| self.error(file, e))? == Some(1))
        } else {
            let file = "freezer.state";
            let text = files::read(&self.dir.join(file)).map_err(|e| self.error(file, e))?;
            Ok(text.trim() == "FROZEN")
        }
    }

    fn error(&self, file: &str, e: io::Error) -> CgroupError {
        // Without the directory it is gone; with it, the kernel lacks the file.
        if files::is_gone(&e) && !self.dir.exists() {
            return CgroupError::Gone {
                step: self.step,
                dir: self.dir.to_owned(),
            };
        }
        CgroupError::io(self.step, self.dir.join(file), e)
    }
}

//! Hearing of kills for want of memory.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::fs::{CWD, Mode, OFlags, inotify};

use crate::cgroup::Cgroup;
use crate::error::CgroupError;
use crate::files;

/// Version 1 signals before it kills: how often, and how long each time, to
/// look for the kill. It follows within microseconds unless it hit a sibling.
const LOOKS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(1);

/// Readable when the kernel may have killed a process of the cgroup for want
/// of memory; [`OomWatch::drain`] says whether it did.
#[derive(Debug)]
pub struct OomWatch {
    fd: OwnedFd,
    /// Where the kernel counts its kills (`oom_kill`).
    counter: PathBuf,
    /// How many have been told.
    told: AtomicU64,
    /// The same of the parent, which counts what happens below it too, as of
    /// the last look. Version 2 with systemd: it removes a scope as soon as it is
    /// empty, and with `memory.oom.group` one kill empties it.
    above: Option<(PathBuf, AtomicU64)>,
    v1: bool,
}

impl Cgroup {
    /// Starts to watch for OOM kills. Version 1: an eventfd registered in
    /// `cgroup.event_control` (kernel: cgroup-v1/memory.rst, "OOM Control").
    /// Version 2: inotify on `memory.events`.
    pub fn oom_watch(&self) -> Result<OomWatch, CgroupError> {
        if self.is_v2() {
            return watch_v2(&self.first()?.dir, self.scope().is_some());
        }
        let dir = self
            .v1("memory")
            .ok_or_else(|| no_memory("the memory controller of cgroup v1 is not mounted".into()))?;
        watch_v1(dir)
    }
}

fn no_memory(reason: String) -> CgroupError {
    CgroupError::Unsupported {
        step: "watch for OOM kills".to_owned(),
        reason,
        way_out: "enable the memory controller on the host (cgroup_enable=memory)".to_owned(),
    }
}

fn watch_v1(dir: &Path) -> Result<OomWatch, CgroupError> {
    let step = "watch for OOM kills: open";
    let counter = dir.join("memory.oom_control");
    let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| CgroupError::io("watch for OOM kills: eventfd for", dir, e.into()))?;
    let control = rustix::fs::openat(
        CWD,
        &counter,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| CgroupError::io(step, &counter, e.into()))?;
    // Read first: a kill in between is then told, not lost.
    let told = count(&counter);
    let file = dir.join("cgroup.event_control");
    let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
    files::write(&file, &line)
        .map_err(|e| CgroupError::io("watch for OOM kills: write", file, e))?;
    Ok(OomWatch {
        fd: event,
        counter,
        told: AtomicU64::new(told),
        above: None,
        v1: true,
    })
}

fn watch_v2(dir: &Path, may_vanish: bool) -> Result<OomWatch, CgroupError> {
    let counter = dir.join("memory.events");
    if !counter.exists() {
        return Err(no_memory(format!(
            "the memory controller is not enabled in cgroup {dir:?}"
        )));
    }
    let error = |e: rustix::io::Errno| {
        CgroupError::io("watch for OOM kills: inotify on", &counter, e.into())
    };
    let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
        .map_err(error)?;
    inotify::add_watch(&fd, &counter, inotify::WatchFlags::MODIFY).map_err(error)?;
    let told = count(&counter);
    let mut above = None;
    if let Some(parent) = dir.parent().filter(|_| may_vanish) {
        let file = parent.join("memory.events");
        // So that a sibling's kill is seen when it happens, and not taken for
        // this cgroup's later. In the root there is no such file, nor is it needed.
        if inotify::add_watch(&fd, &file, inotify::WatchFlags::MODIFY).is_ok() {
            let now = AtomicU64::new(count(&file));
            above = Some((file, now));
        }
    }
    Ok(OomWatch {
        fd,
        counter,
        told: AtomicU64::new(told),
        above,
        v1: false,
    })
}

fn count(file: &Path) -> u64 {
    files::line(file, "oom_kill").ok().flatten().unwrap_or(0)
}

impl OomWatch {
    /// Empties the event and says whether the kernel has killed a process of
    /// this cgroup for want of memory since the last `true`.
    ///
    /// The kernel counts a kill before it sends the signal, so after a process
    /// of the cgroup has ended by SIGKILL this call is conclusive: ask once more
    /// before its exit is reported, and the OOM event comes first. A shortage of
    /// the whole pod wakes every container's watch on version 1; only the one
    /// that lost a process says `true`.
    pub fn drain(&self) -> bool {
        let mut buffer = [0u8; 4096];
        let mut woken = false;
        // Both kinds of fd are non-blocking; an eventfd is empty after one read.
        while rustix::io::read(&self.fd, &mut buffer).is_ok_and(|n| n > 0) {
            woken = true;
        }
        let looks = if self.v1 && woken { LOOKS } else { 1 };
        for look in 0..looks {
            let now = match files::line(&self.counter, "oom_kill") {
                Ok(Some(now)) => now,
                // Version 1 before Linux 4.13 doesn't count.
                Ok(None) => return self.v1 && woken,
                // Removed: that signals the eventfd too.
                Err(_) => return self.counted_above(),
            };
            self.counted_above();
            if now > self.told.swap(now, Ordering::Relaxed) {
                return true;
            }
            if look + 1 < looks {
                std::thread::sleep(PAUSE);
            }
        }
        false
    }
}

impl OomWatch {
    /// Whether the parent has counted a kill since the last look, a moment ago.
    /// It may be a sibling's, so it says something only if this cgroup is gone.
    fn counted_above(&self) -> bool {
        self.above.as_ref().is_some_and(|(file, seen)| {
            let now = count(file);
            now > seen.swap(now, Ordering::Relaxed)
        })
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for OomWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

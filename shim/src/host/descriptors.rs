//! How many files the shim may have open. Each container costs it a dozen
//! descriptors, and the usual soft limit of 1024 is there for programs that use
//! select(2): the shim raises its own to the hard one, and whatever it starts
//! gets back what the shim itself was started with.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use casemate_sys::process;

use super::Step;
use crate::sandbox::SandboxError;

const RESOURCE: u32 = libc::RLIMIT_NOFILE;

/// The soft limit that the shim was started with, once it has another.
static ORIGINAL: OnceLock<u64> = OnceLock::new();

/// For calls that are under way, new connections, Kill and Delete: requests that
/// only need more leave these.
const SPARE: u64 = 24;

/// What a request takes of them, with what it needs only for a moment.
#[derive(Debug, Clone, Copy)]
pub enum Need {
    /// Create.
    Container,
    /// Start of an exec.
    Exec,
}

impl Need {
    fn count(self) -> u64 {
        match self {
            Need::Container => 24,
            Need::Exec => 12,
        }
    }
}

/// Raises the soft limit of this process to the hard one.
pub fn raise_limit() -> io::Result<()> {
    let (soft, hard) = process::get_limit(RESOURCE)?;
    if soft < hard {
        process::set_limit(0, RESOURCE, hard, hard)?;
        let _first = ORIGINAL.set(soft);
    }
    Ok(())
}

/// Undoes [`raise_limit`] in a child that is about to be somebody else.
pub fn restore_limit() -> io::Result<()> {
    let Some(soft) = ORIGINAL.get() else {
        return Ok(());
    };
    let (_, hard) = process::get_limit(RESOURCE)?;
    process::set_limit(0, RESOURCE, *soft, hard)
}

/// Promised to requests that are under way.
static PROMISED: AtomicU64 = AtomicU64::new(0);

/// Room that is kept for a request as long as this lives.
#[derive(Debug)]
pub struct Room(u64);

impl Room {
    /// Refuses what would leave the shim without descriptors for ending what it
    /// has.
    pub fn keep(need: Need) -> Result<Self, SandboxError> {
        let room = Self(need.count());
        let promised = PROMISED.fetch_add(room.0, Ordering::Relaxed) + room.0;
        let (soft, _) = process::get_limit(RESOURCE).step("read", "the limit of open files")?;
        let open = std::fs::read_dir("/proc/self/fd").step("count", "the shim's open files")?;
        let open = u64::try_from(open.count()).unwrap_or(soft);
        if open + promised + SPARE <= soft {
            return Ok(room);
        }
        Err(SandboxError::Failed(format!(
            "the shim has {open} open files of {soft} that it may have (RLIMIT_NOFILE), too many \
             for {}; raise LimitNOFILE of containerd's service, or put fewer into this pod",
            match need {
                Need::Container => "another container",
                Need::Exec => "another exec",
            }
        )))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        PROMISED.fetch_sub(self.0, Ordering::Relaxed);
    }
}

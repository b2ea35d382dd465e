//! What is promised. The shim says it through its operator service, as JSON.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A pod. Fields are only added, with defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Promise {
    /// The shim.
    pub shim: Process,
    /// The agent.
    pub agent: Process,
    /// The pod's pause, where there is one.
    pub pause: Option<Process>,
    /// Its living containers.
    pub containers: Vec<Container>,
    /// Host pids of the forkers of those that have ended and weren't deleted yet.
    pub forkers: Vec<u32>,
    /// Who writes down what containers call, of those that are learned from.
    pub learners: Vec<Process>,
}

/// A process of the runtime's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    /// Host pid.
    pub pid: u32,
    /// Host user id.
    pub uid: u32,
    /// The most that it may be capable of: bits of capabilities(7).
    pub capabilities: u64,
    /// `no_new_privs` is set.
    pub no_new_privs: bool,
    /// [`hash`] of each filter, the first installed in front.
    pub filters: Vec<String>,
}

/// A container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Host pid of init.
    pub init: u32,
    /// Host pid of the forker.
    pub forker: u32,
    /// Host id of its root; 65536 ids from there on are its own.
    pub root: u32,
    /// The most that a process of it may be capable of, in its user namespace.
    pub capabilities: u64,
    /// What the forker may be capable of beside that.
    pub forker_capabilities: u64,
    /// `no_new_privs` is set for all.
    pub no_new_privs: bool,
    /// [`hash`] of each filter that all of its processes have, the first
    /// installed in front; they may have more of their own.
    pub filters: Vec<String>,
    /// Mounts and their flags.
    pub mounts: Vec<Mount>,
    /// Paths that are hidden, where they are at all.
    pub masked: Vec<String>,
    /// Its cgroups' directories.
    pub cgroups: Vec<String>,
    /// What was last set there.
    pub limits: Limits,
}

/// A mount that the specification asks for, or the root.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// Where.
    pub target: String,
    /// Flags that it has, as in mountinfo: `ro`, `nosuid`, `nodev`, `noexec`.
    pub flags: Vec<String>,
}

/// Files of cgroups, and their content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits(pub BTreeMap<String, String>);

/// Files that hold limits, of v1 and v2.
const LIMITS: [&str; 17] = [
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.soft_limit_in_bytes",
    "memory.max",
    "memory.high",
    "memory.low",
    "memory.swap.max",
    "pids.max",
    "cpu.cfs_quota_us",
    "cpu.cfs_period_us",
    "cpu.shares",
    "cpu.max",
    "cpu.weight",
    "cpuset.cpus",
    "cpuset.mems",
    "devices.list",
    "memory.oom_control",
];

/// A limit as the kernel shows it; of what has moving parts the settings alone.
pub(crate) fn limit(file: &Path) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let text = match file.ends_with("memory.oom_control") {
        true => text.lines().next().unwrap_or_default(),
        false => text.trim(),
    };
    Some(text.replace('\n', "; "))
}

impl Limits {
    /// What is set in these directories now.
    pub fn read<'a>(directories: impl Iterator<Item = &'a Path>) -> Self {
        let mut all = BTreeMap::new();
        for directory in directories {
            for name in LIMITS {
                let file = directory.join(name);
                if let Some(value) = limit(&file) {
                    all.insert(file.display().to_string(), value);
                }
            }
        }
        Self(all)
    }
}

/// What stands for a filter (`struct sock_filter` array): SHA-256, in hex.
pub fn hash(program: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    for byte in Sha256::digest(program) {
        let _ = write!(out, "{byte:02x}");
    }
    out
}

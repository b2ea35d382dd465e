//! What is promised. The shim says it through its operator service, as JSON.

use std::collections::BTreeMap;

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
    /// Inode of the containers' user namespace.
    pub users: Option<u64>,
    /// Host id of the containers' root; 65536 ids from there on are theirs.
    pub root: Option<u32>,
    /// The pod's network.
    pub network: Network,
    /// Its living containers.
    pub containers: Vec<Container>,
    /// Host pids of the forkers of those that have ended and weren't deleted yet.
    pub forkers: Vec<u32>,
    /// Who writes down what containers call, of those that are learned from.
    pub learners: Vec<Process>,
}

/// The network of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Inode of its namespace.
    pub namespace: Option<u64>,
    /// Rules in it, where there are any.
    pub guard: Option<Vec<Rule>>,
}

/// A table, chain or rule of nftables, in the form that `casemate-netguard` gives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Which.
    pub name: String,
    /// What it says.
    pub content: String,
}

impl From<casemate_netguard::Line> for Rule {
    fn from(line: casemate_netguard::Line) -> Self {
        Self {
            name: line.name,
            content: line.content,
        }
    }
}

/// A process of the runtime's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    /// Host pid.
    pub pid: u32,
    /// Host user and group id.
    pub uid: u32,
    /// What it is capable of: bits of capabilities(7).
    pub capabilities: u64,
    /// `no_new_privs` is set.
    pub no_new_privs: bool,
    /// [`hash`] of each filter, the first installed in front; it has no others.
    pub filters: Vec<String>,
    /// Its cgroups' directories.
    pub cgroups: Vec<String>,
    /// It leaves no core file.
    pub no_core: bool,
    /// Directories and files whose descriptors it may have, with all below them,
    /// beside what has no path. `None`: any.
    pub files: Option<Vec<String>>,
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
    /// [`hash`] of the one that each has next from its execve on: the forker hasn't.
    pub last_filter: Option<String>,
    /// No process leaves a core file.
    pub no_core: bool,
    /// It is in a Landlock domain.
    pub landlock: bool,
    /// Mounts and their flags.
    pub mounts: Vec<Mount>,
    /// There are no other mounts.
    pub no_other_mounts: bool,
    /// Paths that are hidden, where they are at all.
    pub masked: Vec<String>,
    /// Paths that are read-only, where they are at all.
    pub readonly: Vec<String>,
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
    /// Type of its file system; empty: whatever it is on the host.
    pub fstype: String,
    /// Others that came with it are below.
    pub with_below: bool,
    /// It goes on receiving what the host mounts.
    pub receives: bool,
}

/// Files of cgroups, and what was written there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits(pub BTreeMap<String, String>);

/// What stands for a filter (`struct sock_filter` array): SHA-256, in hex.
pub fn hash(program: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    for byte in Sha256::digest(program) {
        let _ = write!(out, "{byte:02x}");
    }
    out
}

//! Capability sets as bit masks. See capabilities(7).

use oci_spec::runtime::{Capabilities, LinuxCapabilities};

/// Names by number, from `linux/capability.h`.
pub const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Tracing, and reading other processes' memory.
pub const SYS_PTRACE: u64 = 1 << 19;

/// All capabilities that exist.
pub const ALL: u64 = (1 << NAMES.len()) - 1;

/// The five sets of a process, bit `n` for capability number `n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Caps {
    /// Limit of what an execve can gain.
    pub bounding: u64,
    /// Limit of what can be made effective.
    pub permitted: u64,
    /// What the kernel checks.
    pub effective: u64,
    /// Kept across an execve of a file that has them inheritable.
    pub inheritable: u64,
    /// Kept across an execve of an ordinary file.
    pub ambient: u64,
}

impl Caps {
    /// Every set cut to `mask`, and the sets made consistent with each other
    /// as the kernel demands: effective within permitted, ambient within
    /// permitted and inheritable, permitted and inheritable within bounding.
    #[must_use]
    pub fn limited_to(self, mask: u64) -> Self {
        let bounding = self.bounding & mask;
        let permitted = self.permitted & bounding;
        let inheritable = self.inheritable & bounding;
        Self {
            bounding,
            permitted,
            effective: self.effective & permitted,
            inheritable,
            ambient: self.ambient & permitted & inheritable,
        }
    }

    /// Everything named in any of the sets.
    #[must_use]
    pub fn union(self) -> u64 {
        self.bounding | self.permitted | self.effective | self.inheritable | self.ambient
    }
}

impl From<&LinuxCapabilities> for Caps {
    fn from(sets: &LinuxCapabilities) -> Self {
        Self {
            bounding: set(sets.bounding().as_ref()),
            permitted: set(sets.permitted().as_ref()),
            effective: set(sets.effective().as_ref()),
            inheritable: set(sets.inheritable().as_ref()),
            ambient: set(sets.ambient().as_ref()),
        }
    }
}

fn set(names: Option<&Capabilities>) -> u64 {
    // `Display` of oci-spec's enum leaves the prefix out; `number` takes both.
    names
        .into_iter()
        .flatten()
        .filter_map(|c| number(&c.to_string()))
        .fold(0, |mask, n| mask | 1 << n)
}

/// The number of a capability: `CAP_CHOWN`, `chown` and `CHOWN` are the same.
#[must_use]
pub fn number(name: &str) -> Option<u8> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES
        .iter()
        .zip(0u8..)
        .find(|(n, _)| n.strip_prefix("CAP_") == Some(bare))
        .map(|(_, i)| i)
}

/// Names in a mask, lowest number first.
#[must_use]
pub fn names(mask: u64) -> Vec<&'static str> {
    NAMES
        .iter()
        .enumerate()
        .filter(|(i, _)| mask & (1 << i) != 0)
        .map(|(_, n)| *n)
        .collect()
}

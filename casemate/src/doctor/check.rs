//! What is asked of a node: one row for each question.

use serde::Serialize;

use super::node::Node;
use super::{containerd, kernel, policy};

/// How much depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Without it no pod starts, or none is held as promised.
    Required,
    /// Without it some pods don't start, or some of what is promised is missing.
    Optional,
    /// What an operator should know.
    Advisory,
}

impl Level {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::Optional => "optional",
            Self::Advisory => "advisory",
        }
    }
}

/// What a look has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be: what was found.
    Good(String),
    /// Not as it should be.
    Bad {
        /// What was found.
        found: String,
        /// The command that mends it, or what to do.
        mend: String,
    },
    /// It doesn't apply here, or can't be told; why.
    Skipped(String),
}

/// A verdict that isn't good.
pub fn bad(found: impl Into<String>, mend: impl Into<String>) -> Verdict {
    Verdict::Bad {
        found: found.into(),
        mend: mend.into(),
    }
}

/// A question.
pub struct Check {
    /// Its name, for ever.
    pub id: &'static str,
    /// How much depends on it.
    pub level: Level,
    /// What is asked.
    pub asks: &'static str,
    /// What it is to be without.
    pub without: &'static str,
    /// Looks.
    pub look: fn(&Node) -> Verdict,
}

use Level::{Advisory, Optional, Required};

/// All of them, in the order in which they are told.
pub static CHECKS: &[Check] = &[
    Check {
        id: "kernel",
        level: Required,
        asks: "Linux 6.1 or later, on x86-64",
        without: "older kernels lack what pods are made of, and there are profiles for x86-64 alone",
        look: kernel::version,
    },
    Check {
        id: "namespaces",
        level: Required,
        asks: "a user namespace with ids of the node's range, and in it one of each kind",
        without: "no pod starts",
        look: kernel::namespaces,
    },
    Check {
        id: "seccomp",
        level: Required,
        asks: "seccomp filters with errors, kills, traps, logging and user notification",
        without: "no pod starts",
        look: kernel::seccomp,
    },
    Check {
        id: "landlock",
        level: Required,
        asks: "Landlock, unless fallback.without_landlock allows doing without",
        without: "no pod starts",
        look: kernel::landlock,
    },
    Check {
        id: "filesystems",
        level: Required,
        asks: "overlay, tmpfs, proc, sysfs, devpts and mqueue",
        without: "no container starts",
        look: kernel::filesystems,
    },
    Check {
        id: "idmapped-images",
        level: Required,
        asks: "mounts with mapped ids on the file system of containerd's snapshots",
        without: "no container starts: images belong to ids that pods don't have",
        look: kernel::idmapped_images,
    },
    Check {
        id: "nftables",
        level: Required,
        asks: "nf_tables with connection tracking, unless network.without_nftables allows doing without",
        without: "pods with a network of their own don't start",
        look: kernel::nftables,
    },
    Check {
        id: "cgroups",
        level: Required,
        asks: "cgroups, writable, with the controllers cpu, cpuset, memory and pids",
        without: "limits can't be set, and no pod starts",
        look: kernel::cgroups,
    },
    Check {
        id: "config",
        level: Required,
        asks: "a configuration of casemate's that is one, or none",
        without: "no pod starts: a misspelt key would be a policy that isn't there",
        look: policy::config,
    },
    Check {
        id: "ids",
        level: Required,
        asks: "a range of ids that no user of the node, no /etc/subuid and no /etc/subgid has",
        without: "somebody else on the node has the ids of a pod, and what they may do to its files",
        look: policy::ids,
    },
    Check {
        id: "run-directory",
        level: Required,
        asks: "/run/casemate, or a place for it: root's alone, and writable",
        without: "no pod starts: its ids are locked there",
        look: policy::run_directory,
    },
    Check {
        id: "programs",
        level: Required,
        asks: "shim and agent where containerd finds them, of one release",
        without: "no pod starts: shim and agent of different releases refuse each other",
        look: containerd::programs,
    },
    Check {
        id: "containerd",
        level: Required,
        asks: "containerd 1.6 or later",
        without: "nobody starts pods; casemate run works all the same",
        look: containerd::release,
    },
    Check {
        id: "containerd-handler",
        level: Required,
        asks: "containerd's configuration has the runtime handler, without an options table",
        without: "pods with runtimeClassName: casemate stay in ContainerCreating",
        look: containerd::handler,
    },
    Check {
        id: "containerd-running",
        level: Optional,
        asks: "containerd's socket answers",
        without: "no pod starts until containerd runs",
        look: containerd::running,
    },
    Check {
        id: "pod-annotations",
        level: Optional,
        asks: "the handler passes casemate.io/* annotations on",
        without: "annotations of pods are not seen, so what they ask to be tightened isn't",
        look: containerd::annotations,
    },
    Check {
        id: "idmapped-volumes",
        level: Optional,
        asks: "mounts with mapped ids where the kubelet keeps volumes",
        without: "writable volumes there are refused (volumes.without_idmap)",
        look: kernel::idmapped_volumes,
    },
    Check {
        id: "namespace-limits",
        level: Optional,
        asks: "user.max_*_namespaces leave room for 110 pods",
        without: "the pod that goes beyond doesn't start",
        look: kernel::namespace_limits,
    },
    Check {
        id: "ids-free",
        level: Optional,
        asks: "ranges of ids that no pod has yet",
        without: "no further pod starts until one ends",
        look: policy::ids_free,
    },
    Check {
        id: "ptrace",
        level: Optional,
        asks: "kernel.yama.ptrace_scope leaves tracing to root",
        without: "casemate posture can't compare filters",
        look: kernel::ptrace,
    },
    Check {
        id: "landlock-abi",
        level: Advisory,
        asks: "Landlock of Linux 6.12 or later",
        without: "ioctls of devices (before 6.10) and abstract sockets (before 6.12) are left to the other locks",
        look: kernel::landlock_abi,
    },
    Check {
        id: "kernel-recent",
        level: Advisory,
        asks: "Linux 6.17 or later",
        without: "containers start by a longer way, and an image may have about 80 layers before 6.7",
        look: kernel::recent,
    },
    Check {
        id: "cgroup-v2",
        level: Advisory,
        asks: "cgroup v2 alone",
        without: "v1 works, but systemd and casemate may both want to have the last word",
        look: kernel::cgroup_v2,
    },
    Check {
        id: "core-pattern",
        level: Advisory,
        asks: "kernel.core_pattern names a file",
        without: "a program of the host's reads the memory of whatever crashes, with root's rights",
        look: kernel::core_pattern,
    },
    Check {
        id: "swap",
        level: Advisory,
        asks: "no swap, or volumes in memory that stay out of it (Linux 6.4)",
        without: "secrets may be written to the swap device",
        look: kernel::swap,
    },
    Check {
        id: "cpu",
        level: Advisory,
        asks: "no vulnerability of the processor that the kernel leaves open",
        without: "a pod may read what isn't its own: the kernel and the processor are shared",
        look: kernel::processor,
    },
    Check {
        id: "apparmor-userns",
        level: Advisory,
        asks: "AppArmor doesn't restrict user namespaces",
        without: "where pods fail to start with \"permission denied\", this may be why",
        look: kernel::apparmor,
    },
    Check {
        id: "selinux",
        level: Advisory,
        asks: "SELinux is off, permissive, or has labels for containers",
        without: "denials of SELinux's own are not seen by casemate why; look at the audit log",
        look: kernel::selinux,
    },
    Check {
        id: "loosened",
        level: Advisory,
        asks: "a configuration that takes no lock away",
        without: "less holds pods than the defaults would",
        look: policy::loosened,
    },
    Check {
        id: "debugging",
        level: Advisory,
        asks: "no setting that is for finding faults",
        without: "logs are large, or hold what workloads were given",
        look: policy::debugging,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_have_names_of_their_own_and_come_by_level() {
        let ids: std::collections::BTreeSet<_> = CHECKS.iter().map(|check| check.id).collect();
        assert_eq!(ids.len(), CHECKS.len());
        assert!(CHECKS.is_sorted_by_key(|check| check.level));
        for check in CHECKS {
            for text in [check.asks, check.without] {
                assert!(!text.ends_with('.') && !text.is_empty(), "{}", check.id);
            }
        }
    }
}

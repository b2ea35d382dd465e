//! `[host_paths]`.

use serde::{Deserialize, Serialize};

/// Which of the node's files may be mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostPaths {
    /// These, and all below them, whatever else says no.
    pub allow: Vec<String>,
    /// Not these, nor what is below or has them in it, whatever else says yes.
    pub deny: Vec<String>,
    /// These, and all below them, only to be read.
    pub read_only: Vec<String>,
    /// Nothing but what `allow` names, and the pod's own volumes.
    pub only_allowed: bool,
    /// The kubelet's directory (`--root-dir`).
    pub kubelet: String,
}

/// The node's programs, and logs of other pods.
const READ_ONLY: [&str; 9] = [
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/opt/cni",
    "/sbin",
    "/usr",
    "/var/log/containers",
    "/var/log/pods",
];

impl Default for HostPaths {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            deny: Vec::new(),
            read_only: READ_ONLY.map(str::to_owned).to_vec(),
            only_allowed: false,
            kubelet: "/var/lib/kubelet".to_owned(),
        }
    }
}

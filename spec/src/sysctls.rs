//! Sysctls of a pod.

use std::collections::BTreeMap;

use oci_spec::runtime::Linux;

use crate::config::Sysctls;
use crate::error::{Refusal, one_line};
use crate::rules::{SYSCTL, SYSCTL_UNSAFE};
use crate::tighten::{Namespace, Namespaces};

/// What Kubernetes calls safe: it holds for the pod alone, and harms neither the
/// node nor who talks to the pod.
pub const SAFE: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// Those that a network or ipc namespace has for itself, see
/// network_namespaces(7) and ipc_namespaces(7); of them the safe ones, and what
/// the configuration lets in.
pub(crate) fn check(
    linux: &Linux,
    namespaces: &Namespaces,
    config: &Sysctls,
) -> Result<BTreeMap<String, String>, Refusal> {
    let mut sysctls = BTreeMap::new();
    for (key, value) in linux.sysctl().iter().flatten() {
        let refuse = |rule, why: &str| {
            let shown = one_line(key);
            Err(Refusal::new(rule, "linux.sysctl", format!("{shown}{why}")))
        };
        // The name becomes a path below /proc/sys.
        let plain = key.split(['.', '/']).all(|part| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        });
        if !plain || value.contains('\0') {
            return refuse(&SYSCTL, " is not a plain name and value");
        }
        let dotted = key.replace('/', ".");
        let ipc = dotted == "kernel.sem"
            || ["kernel.shm", "kernel.msg", "fs.mqueue."]
                .iter()
                .any(|p| dotted.starts_with(p));
        if dotted.starts_with("net.") {
            if namespaces.network == Namespace::Host {
                return refuse(&SYSCTL, " would change the host's network");
            }
        } else if !ipc {
            return refuse(&SYSCTL, "");
        }
        if !(SAFE.contains(&&*dotted) || config.allows(&dotted)) {
            return refuse(&SYSCTL_UNSAFE, "");
        }
        sysctls.insert(key.clone(), value.clone());
    }
    Ok(sysctls)
}

//! Namespaces that a container asks for, against those its pod has.
//!
//! All containers of a pod live in the pod's network, ipc and uts namespaces
//! and in a pid namespace of their own. A path in a spec is what containerd
//! thinks: it counts only as the namespace it leads to, and must be the pod's.

use std::os::fd::OwnedFd;

use casemate_spec::{Namespace, Namespaces};

use super::SandboxError;

/// Checks what the spec of a container says about its namespaces. `agent` is
/// the agent's host pid, `network` the pod's network namespace (`None`: the
/// host's, which the configuration must have allowed).
pub fn check(
    wanted: &Namespaces,
    agent: u32,
    network: Option<&OwnedFd>,
) -> Result<(), SandboxError> {
    match &wanted.pid {
        Namespace::New => {}
        Namespace::Path(path) => {
            return Err(refuse(
                "pid",
                &format!("shared through {path}"),
                "set shareProcessNamespace: false and use no target container",
            ));
        }
        Namespace::Host => return Err(refuse("pid", "the host's", "set hostPID: false")),
    }
    for (kind, namespace) in [("ipc", &wanted.ipc), ("uts", &wanted.uts)] {
        match namespace {
            Namespace::New => {}
            Namespace::Path(path) => {
                same(kind, path, identity(&format!("/proc/{agent}/ns/{kind}")))?;
            }
            Namespace::Host => return Err(refuse(kind, "the host's", "give the pod its own")),
        }
    }
    if let (Namespace::Path(path), Some(own)) = (&wanted.network, network) {
        let own = rustix::fs::fstat(own).ok().map(|s| (s.st_dev, s.st_ino));
        same("network", path, own)?;
    }
    Ok(())
}

fn identity(path: &str) -> Option<(u64, u64)> {
    rustix::fs::stat(path).ok().map(|s| (s.st_dev, s.st_ino))
}

fn same(kind: &str, path: &str, own: Option<(u64, u64)>) -> Result<(), SandboxError> {
    if own.is_some() && identity(path) == own {
        return Ok(());
    }
    Err(refuse(
        kind,
        &format!("{path}, which is not the pod's own"),
        "containers of a pod share the pod's namespaces",
    ))
}

fn refuse(kind: &str, what: &str, way_out: &str) -> SandboxError {
    SandboxError::Invalid(format!(
        "a {kind} namespace that is {what} isn't supported \
         (linux.namespaces[type={kind}]); {way_out}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Namespaces {
        Namespaces {
            network: Namespace::New,
            pid: Namespace::New,
            ipc: Namespace::New,
            uts: Namespace::New,
        }
    }

    #[test]
    fn only_the_pods_own_namespaces_are_accepted_by_path() {
        let me = std::process::id();
        check(&own(), me, None).unwrap();
        let ipc = Namespace::Path(format!("/proc/{me}/ns/ipc"));
        check(&Namespaces { ipc, ..own() }, me, None).unwrap();
        let wrong = Namespace::Path(format!("/proc/{me}/ns/uts"));
        let e = check(
            &Namespaces {
                ipc: wrong,
                ..own()
            },
            me,
            None,
        )
        .unwrap_err()
        .to_string();
        assert!(e.contains("ipc") && e.contains("not the pod's"), "{e}");
        for pid in [Namespace::Host, Namespace::Path("/proc/1/ns/pid".into())] {
            let e = check(&Namespaces { pid, ..own() }, me, None)
                .unwrap_err()
                .to_string();
            assert!(e.contains("pid namespace"), "{e}");
        }
        let e = check(
            &Namespaces {
                ipc: Namespace::Host,
                ..own()
            },
            me,
            None,
        )
        .unwrap_err();
        assert!(e.to_string().contains("ipc"), "{e}");
    }
}

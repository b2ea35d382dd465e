//! Namespaces that a container asks for, against those its pod has.
//!
//! All containers of a pod live in the pod's network, ipc and uts namespaces,
//! and in a pid namespace of their own, the pause's, or that of another of them.
//! A path in a spec is what containerd thinks: it counts only as the namespace it
//! leads to, and must be the pod's.

use std::os::fd::{AsFd, OwnedFd};

use casemate_spec::{Namespace, Namespaces};
use rustix::io::Errno;

use super::SandboxError;

/// Checks what the spec of a container says about its namespaces. `agent` is
/// the agent's host pid, `network` the pod's network namespace (`None`: the
/// host's, which the configuration must have allowed), `pids` gives the pid
/// namespaces that the pod has already. Returns the one to join, if any.
pub fn check(
    wanted: &Namespaces,
    agent: u32,
    network: Option<&OwnedFd>,
    pids: impl FnOnce() -> Vec<OwnedFd>,
) -> Result<Option<OwnedFd>, SandboxError> {
    let joined = match &wanted.pid {
        Namespace::New => None,
        Namespace::Path(path) => Some(find(path, pids())?),
        Namespace::Host => return Err(refuse("pid", "the host's", "set hostPID: false")),
    };
    for (kind, namespace) in [("ipc", &wanted.ipc), ("uts", &wanted.uts)] {
        match namespace {
            Namespace::New => {}
            Namespace::Path(path) => {
                same(kind, path, identity(&format!("/proc/{agent}/ns/{kind}")))?;
            }
            Namespace::Host => return Err(refuse(kind, "the host's", "give the pod its own")),
        }
    }
    match (&wanted.network, network) {
        (Namespace::Path(path), Some(own)) => same("network", path, identity_of(own))?,
        // A pod on the host's network: containerd names it through the pause.
        (Namespace::Path(path), None) => same("network", path, identity("/proc/self/ns/net"))?,
        (Namespace::Host, Some(_)) => {
            return Err(refuse(
                "network",
                "the host's, while the pod has its own",
                "containers of a pod share the pod's namespaces",
            ));
        }
        (Namespace::Host, None) | (Namespace::New, _) => {}
    }
    Ok(joined)
}

/// Which of the pod's pid namespaces `path` leads to. The path's own process is
/// of no account: only the descriptors that we opened ourselves are used.
fn find(path: &str, known: Vec<OwnedFd>) -> Result<OwnedFd, SandboxError> {
    let wanted = rustix::fs::stat(path).map_err(|error| {
        let what = match error {
            Errno::NOENT | Errno::SRCH => "where there is none (any more),".to_owned(),
            error => format!("which can't be looked at ({error}),"),
        };
        refuse(
            "pid",
            &format!("{path}, {what}"),
            "is the pod, or the target container, still running?",
        )
    })?;
    let wanted = (wanted.st_dev, wanted.st_ino);
    known
        .into_iter()
        .find(|namespace| identity_of(namespace) == Some(wanted))
        .ok_or_else(|| {
            refuse(
                "pid",
                &format!("{path}, which is neither the pod's nor that of one of its containers,"),
                "share the pod's processes (shareProcessNamespace), or target a container of this pod",
            )
        })
}

fn identity(path: &str) -> Option<(u64, u64)> {
    rustix::fs::stat(path).ok().map(|s| (s.st_dev, s.st_ino))
}

/// Device and inode of a namespace: two descriptors with equal ones are of one.
pub fn identity_of(namespace: impl AsFd) -> Option<(u64, u64)> {
    let stat = rustix::fs::fstat(namespace).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

fn same(kind: &str, path: &str, own: Option<(u64, u64)>) -> Result<(), SandboxError> {
    if own.is_some() && identity(path) == own {
        return Ok(());
    }
    Err(refuse(
        kind,
        &format!("{path}, which is not the pod's own,"),
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

    fn open(path: &str) -> OwnedFd {
        std::fs::File::open(path).unwrap().into()
    }

    fn refused(wanted: Namespaces, network: Option<&OwnedFd>) -> String {
        let known = || vec![open("/proc/self/ns/pid")];
        check(&wanted, std::process::id(), network, known)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn only_the_pods_own_namespaces_are_accepted_by_path() {
        let me = std::process::id();
        assert!(check(&own(), me, None, Vec::new).unwrap().is_none());
        let ipc = Namespace::Path(format!("/proc/{me}/ns/ipc"));
        check(&Namespaces { ipc, ..own() }, me, None, Vec::new).unwrap();
        let ipc = Namespace::Path(format!("/proc/{me}/ns/uts"));
        let e = refused(Namespaces { ipc, ..own() }, None);
        assert!(e.contains("ipc") && e.contains("not the pod's"), "{e}");
        let ipc = Namespace::Host;
        let e = refused(Namespaces { ipc, ..own() }, None);
        assert!(e.contains("ipc"), "{e}");
    }

    #[test]
    fn a_pid_namespace_is_known_by_what_its_path_leads_to() {
        let me = std::process::id();
        let known = || vec![open("/proc/self/ns/uts"), open("/proc/self/ns/pid")];
        for path in ["/proc/self/ns/pid".to_owned(), format!("/proc/{me}/ns/pid")] {
            let pid = Namespace::Path(path);
            let joined = check(&Namespaces { pid, ..own() }, me, None, known).unwrap();
            assert_eq!(identity_of(joined.unwrap()), identity("/proc/self/ns/pid"));
        }
        for (path, why) in [
            ("/proc/self/ns/mnt", "neither the pod's"),
            ("/proc/self", "neither the pod's"),
            ("/proc/0/ns/pid", "there is none"),
        ] {
            let pid = Namespace::Path(path.into());
            let e = refused(Namespaces { pid, ..own() }, None);
            assert!(e.contains(why) && e.contains(path), "{e}");
        }
        let pid = Namespace::Host;
        let e = refused(Namespaces { pid, ..own() }, None);
        assert!(e.contains("hostPID"), "{e}");
    }

    #[test]
    fn a_network_must_be_the_pods() {
        let me = std::process::id();
        let net = open("/proc/self/ns/net");
        let path = || Namespace::Path("/proc/self/ns/net".into());
        for pods in [None, Some(&net)] {
            let network = path();
            check(&Namespaces { network, ..own() }, me, pods, Vec::new).unwrap();
        }
        let other = open("/proc/self/ns/uts");
        for (network, pods) in [
            (path(), Some(&other)),
            (Namespace::Path("/proc/self/ns/uts".into()), None),
            (Namespace::Host, Some(&net)),
        ] {
            let e = refused(Namespaces { network, ..own() }, pods);
            assert!(e.contains("network"), "{e}");
        }
    }
}

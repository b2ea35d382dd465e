//! Volumes that hold secrets, known by the kubelet's paths; tokens that are
//! withheld; core dumps, which would carry secrets out.

use crate::config::{Secrets, Token};
use crate::journal::Journal;
use crate::mount::{MountAttrs, MountFlags, MountKind, MountSpec};
use crate::paths::within;
use crate::process::ProcessSpec;
use crate::tightenings;

/// Where the kubelet mounts a pod's token, by both of the directory's names.
const TOKENS: [&str; 2] = [
    "/var/run/secrets/kubernetes.io/serviceaccount",
    "/run/secrets/kubernetes.io/serviceaccount",
];
/// What the kubelet calls the volume with it, before a random suffix.
const TOKEN_VOLUME: &str = "kube-api-access-";

/// The limit of core files (`asm-generic/resource.h`).
pub const RLIMIT_CORE: u32 = 4;

/// What a volume of the kubelet's holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// Secrets: kinds `secret` and `projected`.
    Secrets,
    /// Configuration: kinds `configmap` and `downward-api`.
    Configuration,
}

/// The directories of a pod's volumes, below its own in the kubelet's.
const KINDS: [(&str, Holds); 4] = [
    ("kubernetes.io~secret", Holds::Secrets),
    ("kubernetes.io~projected", Holds::Secrets),
    ("kubernetes.io~configmap", Holds::Configuration),
    ("kubernetes.io~downward-api", Holds::Configuration),
];

/// What the volume at a path of the host holds, as far as the path says:
/// `…/pods/UID/volumes/kubernetes.io~secret/NAME`.
fn by_path(source: &str) -> Option<Holds> {
    let mut parts = source.split('/');
    parts.find(|part| *part == "volumes")?;
    let kind = parts.next()?;
    KINDS.iter().find(|(name, _)| *name == kind).map(|k| k.1)
}

/// Where the volume may be that a sub path is of: the kubelet binds a `subPath`
/// to `…/pods/UID/volume-subpaths/VOLUME/CONTAINER/N`, and its volume is at
/// `…/pods/UID/volumes/KIND/VOLUME`. One of them exists, or it is no such volume.
#[must_use]
pub fn volumes_of_sub_path(source: &str) -> Vec<(String, Holds)> {
    let Some((pod, rest)) = source.split_once("/volume-subpaths/") else {
        return Vec::new();
    };
    match rest.split('/').next() {
        Some(name) if !name.is_empty() => KINDS
            .iter()
            .map(|(kind, holds)| (format!("{pod}/volumes/{kind}/{name}"), *holds))
            .collect(),
        _ => Vec::new(),
    }
}

/// Sets what a volume that holds these must have.
pub fn harden(mount: &mut MountSpec, holds: Holds, secrets: &Secrets) {
    let noexec = holds == Holds::Secrets && secrets.noexec;
    let set = |attrs: &mut MountAttrs| {
        attrs.ro = true;
        attrs.nosuid = true;
        attrs.nodev = true;
        attrs.noexec |= noexec;
    };
    set(&mut mount.flags.attrs);
    // Of mounts below it too.
    if mount.flags.rbind {
        set(&mut mount.flags.recursive);
    }
}

/// Applies the policy to one mount; a note of what was taken away.
pub(crate) fn apply(mount: &mut MountSpec, secrets: &Secrets, withhold: bool) -> Option<String> {
    if mount.kind != MountKind::Bind {
        return None;
    }
    let token = TOKENS.iter().any(|t| within(&mount.destination, t))
        || (by_path(&mount.source) == Some(Holds::Secrets)
            && mount
                .source
                .split('/')
                .any(|part| part.starts_with(TOKEN_VOLUME)));
    if token && (withhold || secrets.service_account_token == Token::Withhold) {
        let flags = MountFlags {
            attrs: MountAttrs {
                ro: true,
                nosuid: true,
                nodev: true,
                noexec: true,
                ..MountAttrs::default()
            },
            data: vec![
                ("mode".into(), Some("0555".into())),
                ("nr_inodes".into(), Some("2".into())),
            ],
            ..MountFlags::default()
        };
        mount.kind = MountKind::Tmpfs;
        mount.source = "tmpfs".into();
        mount.flags = flags;
        return Some(format!(
            "{}: the service account's token is withheld",
            mount.destination
        ));
    }
    let holds = by_path(&mount.source).or_else(|| token.then_some(Holds::Secrets));
    if let Some(holds) = holds {
        harden(mount, holds, secrets);
    }
    None
}

/// A container's core dumps would go, with all that its memory holds, to a file of
/// its own or to a program of the node's.
pub(crate) fn no_core_dumps(process: &mut ProcessSpec, secrets: &Secrets, journal: &mut Journal) {
    let before = process.rlimits.len();
    if !secrets.core_dumps {
        process.rlimits.retain(|l| l.resource != RLIMIT_CORE);
    }
    if process.rlimits.len() != before {
        journal.tighten(
            tightenings::CORE_LIMIT,
            "no core dumps (secrets.core_dumps in the node's configuration)",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(source: &str, destination: &str) -> MountSpec {
        MountSpec {
            destination: destination.into(),
            kind: MountKind::Bind,
            source: source.into(),
            flags: MountFlags {
                rbind: true,
                ..MountFlags::default()
            },
        }
    }

    fn applied(mount: &MountSpec, secrets: &Secrets, withhold: bool) -> (MountSpec, bool) {
        let mut mount = mount.clone();
        let note = apply(&mut mount, secrets, withhold);
        (mount, note.is_some())
    }

    const POD: &str = "/var/lib/kubelet/pods/0c1/volumes";

    #[test]
    fn volumes_of_the_kubelet_are_known_by_their_paths() {
        let secrets = Secrets::default();
        for (kind, noexec, known) in [
            ("kubernetes.io~secret/key", true, true),
            ("kubernetes.io~projected/all", true, true),
            ("kubernetes.io~configmap/conf", false, true),
            ("kubernetes.io~downward-api/info", false, true),
            ("kubernetes.io~empty-dir/data", false, false),
            ("kubernetes.io~secrets/x", false, false),
        ] {
            let (mount, _) = applied(&bind(&format!("{POD}/{kind}"), "/v"), &secrets, false);
            for attrs in [mount.flags.attrs, mount.flags.recursive] {
                assert_eq!((attrs.ro, attrs.nosuid), (known, known), "{kind}");
                assert_eq!(attrs.noexec, noexec, "{kind}");
            }
        }
        let runs = Secrets {
            noexec: false,
            ..Secrets::default()
        };
        let mount = bind(&format!("{POD}/kubernetes.io~secret/key"), "/v");
        let (mount, _) = applied(&mount, &runs, false);
        assert!(mount.flags.attrs.ro && !mount.flags.attrs.noexec);
    }

    #[test]
    fn a_sub_path_is_of_a_volume_of_the_same_name() {
        let path = "/var/lib/kubelet/pods/0c1/volume-subpaths/key/app/0";
        let all = volumes_of_sub_path(path);
        assert_eq!(
            all[0],
            (format!("{POD}/kubernetes.io~secret/key"), Holds::Secrets)
        );
        assert_eq!(all.len(), KINDS.len());
        assert!(volumes_of_sub_path(POD).is_empty());
        assert!(volumes_of_sub_path("/x/volume-subpaths/").is_empty());
    }

    #[test]
    fn tokens_are_withheld_by_the_pod_or_by_the_node() {
        let node = Secrets {
            service_account_token: Token::Withhold,
            ..Secrets::default()
        };
        let volume = format!("{POD}/kubernetes.io~projected/kube-api-access-x2v9k");
        let secret = format!("{POD}/kubernetes.io~secret/key");
        for (source, destination, token) in [
            (&*volume, TOKENS[0], true),
            ("/anywhere", TOKENS[1], true),
            ("/anywhere/token", &format!("{}/token", TOKENS[0]), true),
            (&*volume, "/elsewhere", true),
            (&*secret, "/key", false),
            ("/data", "/var/run/secrets/other", false),
        ] {
            let mount = bind(source, destination);
            assert!(!applied(&mount, &Secrets::default(), false).1);
            for (secrets, pod) in [(&node, false), (&Secrets::default(), true)] {
                let (mount, withheld) = applied(&mount, secrets, pod);
                assert_eq!(withheld, token, "{source} {destination}");
                assert_eq!(mount.kind == MountKind::Tmpfs, token);
                assert!(!token || (mount.flags.attrs.ro && !mount.flags.rbind));
            }
        }
    }
}

//! Which of the node's files a bind may show.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use std::collections::BTreeSet;

use casemate_spec::config::HostPaths;
use casemate_spec::host_paths::{
    self, DENIED, Lists, Mounts, Named, Owner, Source, Verdict, judge, own,
};
use casemate_spec::{MountSpec, Refusal};
use common::{CRI_CONTAINER, CTR_1_6, accepted, config, with};
use serde_json::json;

/// A node: `/var/run` is a link, `/etc` is mounted once more, and so is a part of
/// it; `/srv` has a part of the kubelet's disk mounted below.
const MOUNTS: &str = "21 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
    22 21 0:5 / /proc rw - proc proc rw\n\
    23 21 0:6 / /run rw - tmpfs tmpfs rw\n\
    24 21 8:1 /etc /mnt/twice rw - ext4 /dev/sda1 rw\n\
    25 21 8:1 /etc/ssh /mnt/a\\040part rw - ext4 /dev/sda1 rw\n\
    26 21 8:2 / /var/lib/kubelet rw - ext4 /dev/sda2 rw\n\
    27 21 8:2 /pods /srv/deep/pods rw - ext4 /dev/sda2 rw\n\
    28 21 8:1 /srv/plain /mnt/plain rw - ext4 /dev/sda1 rw\n";

fn resolve(path: &str) -> String {
    path.replace("/var/run", "/run")
        .replace("/srv/link", "/srv/real")
}

fn source(path: &str) -> Source {
    Source {
        mount: 0,
        path: path.to_owned(),
        socket: path.ends_with(".sock"),
    }
}

/// A bind of everything below, writable.
fn spec() -> Vec<MountSpec> {
    let bytes = with(
        CTR_1_6,
        &[(
            "/mounts",
            json!([{"destination": "/v", "type": "bind", "source": "/x", "options": ["rbind", "rw"]}]),
        )],
    );
    accepted(&bytes).mounts
}

fn verdict(path: &str, config: &HostPaths) -> Result<Verdict, Refusal> {
    let lists = Lists::look_up(config, &["/var/lib/daemon"], resolve);
    let mounts = Mounts::parse(MOUNTS);
    judge(&[source(path)], &spec(), (config, &lists), &mounts)
}

fn rule(path: &str, config: &HostPaths) -> &'static str {
    match verdict(path, config) {
        Ok(verdict) if verdict.read_only.is_empty() => "",
        Ok(_) => "read-only",
        Err(refusal) => {
            assert_eq!(refusal.field, "mounts[0].source");
            assert!(refusal.to_string().contains(path), "{refusal}");
            refusal.rule
        }
    }
}

fn node(text: &str) -> HostPaths {
    config(&format!("[host_paths]\n{text}")).host_paths
}

#[test]
fn what_the_node_is_run_by_is_refused_with_all_that_is_in_it_and_all_that_has_it() {
    let none = HostPaths::default();
    for path in DENIED {
        let path = resolve(path);
        assert_eq!(rule(&path, &none), "host-path", "{path}");
        assert_eq!(
            rule(&format!("{path}/below/it"), &none),
            "host-path",
            "{path}"
        );
        assert_eq!(rule(&format!("{path}ing"), &none), "", "{path}ing");
    }
    for path in [
        "/",
        "/var",
        "/var/lib",
        "/opt",
        "/var/lib/daemon",
        "/run/containerd/containerd.sock",
    ] {
        assert_eq!(rule(path, &none), "host-path", "{path}");
    }
    for path in [
        "/srv/data",
        "/home/me",
        "/mnt/plain",
        "/tmp/etc",
        "/var/lib/other",
        "/var/lib/kubelet2",
    ] {
        assert_eq!(rule(path, &none), "", "{path}");
    }
}

#[test]
fn a_place_is_known_by_its_file_system_too() {
    let none = HostPaths::default();
    for path in [
        "/mnt/twice",
        "/mnt/twice/ssh",
        "/mnt/a part",
        "/mnt/a part/key",
    ] {
        assert_eq!(rule(path, &none), "host-path", "{path} is /etc");
    }
    // By what is mounted below, where that is shown.
    for path in ["/mnt", "/srv", "/srv/deep"] {
        assert_eq!(rule(path, &none), "host-path", "{path}");
    }
    let mut alone = spec();
    alone[0].flags.rbind = false;
    let lists = Lists::look_up(&none, &[], resolve);
    let mounts = Mounts::parse(MOUNTS);
    judge(&[source("/srv/deep")], &alone, (&none, &lists), &mounts).unwrap();
    // The same place by another name is what the list names, too.
    let deny = node("deny = [\"/srv/plain\"]");
    assert_eq!(rule("/mnt/plain/x", &deny), "host-path");
}

#[test]
fn sockets_are_refused_wherever_they_are() {
    let none = HostPaths::default();
    assert_eq!(rule("/srv/agent.sock", &none), "host-path-socket");
    assert_eq!(rule("/srv/agent.sock", &node("allow = [\"/srv\"]")), "");
}

#[test]
fn the_configuration_allows_denies_and_shows_read_only() {
    let allow = node("allow = [\"/etc/ssl\", \"/run/spire\", \"/srv/link\"]");
    for path in [
        "/etc/ssl",
        "/etc/ssl/certs",
        "/run/spire/agent.sock",
        "/srv/real",
    ] {
        assert_eq!(rule(path, &allow), "", "{path}");
    }
    for path in ["/etc", "/etc/sslx", "/run", "/run/x.sock"] {
        assert_eq!(rule(path, &allow), "host-path", "{path}");
    }
    let deny = node("allow = [\"/srv\"]\ndeny = [\"/srv/secret\"]");
    for path in ["/srv", "/srv/secret", "/srv/secret/x"] {
        assert_eq!(rule(path, &deny), "host-path", "deny goes first: {path}");
    }
    assert_eq!(rule("/srv/other", &deny), "");
    let only = node("allow = [\"/srv/a\"]\nonly_allowed = true");
    assert_eq!(rule("/srv/a/b", &only), "");
    for path in ["/srv/b", "/srv", "/tmp", "/etc/hosts"] {
        assert_eq!(rule(path, &only), "host-path-not-allowed", "{path}");
    }
    let read_only = node("read_only = [\"/srv/ro\"]");
    for path in ["/srv/ro", "/srv/ro/x"] {
        assert_eq!(rule(path, &read_only), "read-only", "{path}");
    }
    assert_eq!(
        rule("/usr/bin", &read_only),
        "",
        "the list is the node's own"
    );
    for path in [
        "/usr",
        "/usr/bin",
        "/lib/modules",
        "/var/log",
        "/var/log/pods/x",
        "/etc/hosts",
        "/etc/localtime",
        "/etc/ssl/certs",
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/ca-trust/extracted",
        "/etc/pki/tls/certs",
    ] {
        assert_eq!(rule(path, &HostPaths::default()), "read-only", "{path}");
    }
    // What is beside them, or has them in it.
    for path in [
        "/etc/ssl",
        "/etc/ssl/private",
        "/etc/ssl/certsx",
        "/etc/pki",
        "/etc/pki/tls",
        "/etc/pki/tls/private",
        "/etc/localtime2",
    ] {
        assert_eq!(rule(path, &HostPaths::default()), "host-path", "{path}");
    }
    let deny = node("deny = [\"/etc/ssl/certs\"]");
    assert_eq!(rule("/etc/ssl/certs/x.pem", &deny), "host-path");
}

#[test]
fn a_harmless_name_is_shown_where_it_usually_leads_and_nowhere_else() {
    let none = HostPaths::default();
    let with = |link: &'static str, target: &'static str, path: &str| {
        let lists = Lists::look_up(&none, &[], |name| {
            if name == link {
                target.to_owned()
            } else {
                resolve(name)
            }
        });
        let mounts = Mounts::parse(MOUNTS);
        judge(&[source(path)], &spec(), (&none, &lists), &mounts).map(|v| v.read_only.len())
    };
    for (link, target) in [
        ("/etc/localtime", "/usr/share/zoneinfo/Europe/Berlin"),
        ("/etc/resolv.conf", "/run/systemd/resolve/stub-resolv.conf"),
        ("/etc/ssl/certs", "/etc/pki/ca-trust/extracted/pem"),
        ("/etc/os-release", "/usr/lib/os-release"),
    ] {
        assert_eq!(with(link, target, target).unwrap(), 1, "{link} to {target}");
    }
    // The node's root may have it lead anywhere; that makes no secret public.
    for (link, target) in [
        ("/etc/localtime", "/etc/shadow"),
        ("/etc/localtime", "/root/zone"),
        ("/etc/ssl/certs", "/etc"),
        ("/etc/ssl/certs", "/etc/ssl/private"),
        ("/etc/resolv.conf", "/run/containerd/containerd.sock"),
    ] {
        let refusal = with(link, target, target).unwrap_err();
        assert_eq!(refusal.rule, "host-path", "{link} to {target}");
    }
}

#[test]
fn what_is_shown_read_only_is_so_with_all_below() {
    let found = verdict("/usr/share", &HostPaths::default()).unwrap();
    let mut mounts = spec();
    let notes = host_paths::apply(&found, &mut mounts);
    assert!(mounts[0].flags.attrs.ro && mounts[0].flags.recursive.ro);
    assert_eq!(notes.len(), 1);
    assert!(
        notes[0].contains("/v is read-only") && notes[0].contains("/usr"),
        "{notes:?}"
    );
    // Nothing to tell where it was asked for.
    assert!(host_paths::apply(&found, &mut mounts).is_empty());
}

fn owner() -> Owner {
    accepted(CRI_CONTAINER).owner
}

#[test]
fn of_the_kubelets_directory_a_pod_has_its_own_volumes_alone() {
    let kubelet = Named {
        name: "/var/lib/kubelet".into(),
        path: "/data/kubelet".into(),
    };
    assert_eq!(owner().uid.as_deref(), Some("6d5b"));
    for path in [
        "pods/6d5b/volumes/kubernetes.io~empty-dir/a",
        "pods/6d5b/volume-subpaths/v/c/0",
        "pods/6d5b/etc-hosts",
        "pods/6d5b/containers/web/1a2b",
    ] {
        let path = format!("/data/kubelet/{path}");
        assert_eq!(
            own(&source(&path), &owner(), &kubelet),
            Ok(Some(())),
            "{path}"
        );
    }
    for path in [
        "",
        "pods",
        "pods/6d5b",
        "pods/6d5b/plugins",
        "pods/6d5c/volumes/kubernetes.io~secret/a",
        "pods/6d5/volumes/a",
        "pods/6d5bb/volumes/a",
        "device-plugins",
        "pki",
        "volumes",
    ] {
        let path = format!("/data/kubelet/{path}");
        let refusal = own(&source(path.trim_end_matches('/')), &owner(), &kubelet).unwrap_err();
        assert_eq!(refusal.rule, "host-path-of-pod", "{path}");
        // Who isn't known has none.
        own(&source(&path), &Owner::default(), &kubelet).unwrap_err();
    }
    assert_eq!(own(&source("/srv/data"), &owner(), &kubelet), Ok(None));
}

#[test]
fn of_containerds_directory_a_pod_has_its_own_sandbox_alone() {
    let kubelet = Named {
        name: "/k".into(),
        path: "/k".into(),
    };
    let known = |path: &str, owner: &Owner| own(&source(path), owner, &kubelet).unwrap();
    for root in ["/run/containerd", "/var/lib/containerd", "/srv/d/root"] {
        for file in ["hostname", "hosts", "resolv.conf", "shm"] {
            let path = |id: &str| format!("{root}/io.containerd.grpc.v1.cri/sandboxes/{id}/{file}");
            assert_eq!(known(&path("8a1f"), &owner()), Some(()));
            assert_eq!(known(&path("8a1e"), &owner()), None);
            assert_eq!(known(&path("8a1f"), &Owner::default()), None);
        }
    }
    for path in [
        "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/8a1f",
        "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/8a1f/config.json",
        "/run/containerd/io.containerd.grpc.v1.cri/containers/8a1f/shm",
        "/run/containerd/other/sandboxes/8a1f/shm",
    ] {
        assert_eq!(known(path, &owner()), None, "{path}");
    }
}

#[test]
fn of_images_that_are_volumes_a_pod_has_its_own_alone() {
    let kubelet = Named {
        name: "/k".into(),
        path: "/k".into(),
    };
    let known = |path: &str, owner: &Owner| own(&source(path), owner, &kubelet).unwrap();
    let base = "/run/containerd/io.containerd.grpc.v1.cri/image-volumes";
    for path in ["8a1f/sha256:1", "8a1f/sha256:1/models/small"] {
        let path = format!("{base}/{path}");
        assert_eq!(known(&path, &owner()), Some(()), "{path}");
        assert_eq!(known(&path, &Owner::default()), None, "{path}");
    }
    for path in ["", "8a1f", "8a1f/", "8a1e/sha256:1", "x/8a1f/sha256:1"] {
        let path = format!("{base}/{path}");
        assert_eq!(known(&path, &owner()), None, "{path}");
    }
    let elsewhere = "/run/containerd/other/image-volumes/8a1f/sha256:1";
    assert_eq!(known(elsewhere, &owner()), None);
}

#[test]
fn a_pods_uid_is_found_where_containerd_doesnt_say_it() {
    let uid = |cgroup: &str, kind: &str| {
        let bytes = with(
            CRI_CONTAINER,
            &[
                ("/annotations/io.kubernetes.cri.sandbox-uid", "".into()),
                ("/annotations/io.kubernetes.cri.container-type", kind.into()),
                ("/linux/cgroupsPath", cgroup.into()),
            ],
        );
        accepted(&bytes).owner.uid
    };
    for cgroup in [
        "kubepods-besteffort-pod6d5b_1.slice:cri-containerd:8a1f",
        "kubepods-pod6d5b_1.slice:cri-containerd:8a1f",
        "/kubepods/besteffort/pod6d5b-1/8a1f",
    ] {
        assert_eq!(
            uid(cgroup, "container").as_deref(),
            Some("6d5b-1"),
            "{cgroup}"
        );
    }
    for cgroup in ["system.slice:x:y", "/a/b", "/kubepods/pod/8a1f"] {
        assert_eq!(uid(cgroup, "container"), None, "{cgroup}");
    }
    assert_eq!(uid("/kubepods/pod6d5b/8a1f", ""), None, "nobody's pod");
}

#[test]
fn every_rule_has_a_case() {
    let none = HostPaths::default();
    let kubelet = Named {
        name: "/k".into(),
        path: "/k".into(),
    };
    let seen: BTreeSet<&str> = [
        rule("/etc", &none),
        rule("/a.sock", &none),
        rule("/a", &node("only_allowed = true")),
        own(&source("/k/pods"), &owner(), &kubelet)
            .unwrap_err()
            .rule,
    ]
    .into();
    common::all_of("host-path", &seen);
}

//! `hostUsers: false`: ids that the kubelet chose.

use std::fs;
use std::os::unix::fs::MetadataExt;

use casemate_tests::generation::Generation;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, world};
use k8s_cri::v1::*;

use super::client::{Pod, directory};
use super::config::{self, container, mount, security};
use super::guard;
use super::volumes::introspected;
use super::{Cri, Test};

/// 1.7 leaves the namespaces to the runtime.
pub const ON_1_7: &[(&str, Test)] = &[
    ("c120_host_users_false", host_users_false),
    ("guard_of_a_pod_with_its_own_users", guarded),
];
/// 2.x makes them.
pub const SINCE_2: &[(&str, Test)] = &[
    ("c119_host_users_false", host_users_false),
    ("c119_c122_volume_of_a_pod_with_its_own_users", volume),
    ("guard_of_a_pod_with_its_own_users", guarded),
];

/// Ids that no other test run of this machine is likely to use.
fn range(cri: &Cri, name: &str) -> u32 {
    let seed = format!("{}{name}{}", cri.world.mark(), cri.generation.tag());
    let hash = seed
        .bytes()
        .fold(0u32, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    (12 + hash % 24_000) * 65536
}

fn users(first: u32) -> UserNamespace {
    let line = IdMapping {
        host_id: first,
        container_id: 0,
        length: 65536,
    };
    UserNamespace {
        mode: NamespaceMode::Pod as i32,
        uids: vec![line],
        gids: vec![line],
    }
}

fn pod<'a>(cri: &'a Cri, name: &str, first: u32) -> Result<Pod<'a>, Stop> {
    let mut config = config::pod(cri, name);
    config::pod_namespaces(&mut config).userns_options = Some(users(first));
    cri.pod_of(introspected(cri), config)
}

/// A container of such a pod: the kubelet says it for each again.
fn of(first: u32) -> impl Fn(&mut ContainerConfig) {
    move |c| {
        let namespaces = security(c).namespace_options.get_or_insert_default();
        namespaces.userns_options = Some(users(first));
    }
}

fn host_users_false(cri: &Cri) -> Outcome {
    let first = range(cri, "plain");
    let one = pod(cri, "users", first)?;
    let mut config = container("app", &["/bin/sh", "-c", "exec /bin/probe sleep"]);
    of(first)(&mut config);
    let id = one.run(config)?;
    let pid = one.pid(&id)?;
    for map in ["uid_map", "gid_map"] {
        let map = fs::read_to_string(format!("/proc/{pid}/{map}"))?;
        let fields: Vec<&str> = map.split_whitespace().collect();
        ensure_eq!(fields, ["0", &first.to_string(), "65536"], "mapping");
    }
    let script = "stat -c '%u %g' /bin/busybox; echo x > /file; stat -c %u /file; hostname";
    let out = one.exec_sh(&id, script)?;
    ensure_eq!(out, "0 0\n0\nusers\n", "owners inside");
    // The network works as in any pod, port 80 and ping included.
    let mut server = container(
        "server",
        &[
            "/bin/sh",
            "-c",
            "while :; do echo from-server | nc -l -p 80; done",
        ],
    );
    of(first)(&mut server);
    one.run(server)?;
    let address = one.ip()?;
    let other = cri.pod("other")?;
    let script = format!(
        "for n in 1 2 3 4 5 6 7 8; do nc -w 2 {address} 80 </dev/null && exit; sleep 0.5; done; exit 1"
    );
    let out = other.sh("client", &script, |_| ())?;
    ensure_eq!(out, "from-server\n", "over TCP");
    other.sh("ping", &format!("probe ping {address}"), |_| ())?;
    one.remove()?;
    other.remove()
}

/// Volumes are mapped, so that a file of id 1000 has id 1000 on disk.
fn volume(cri: &Cri) -> Outcome {
    let first = range(cri, "volume");
    let dir = directory(cri, "users")?;
    world::set_mode(&dir, 0o777)?;
    fs::write(dir.join("file"), "of the host\n")?;
    let pod = pod(cri, "user-volume", first)?;
    let out = pod.sh(
        "app",
        "cat /v/file; stat -c %u /v/file; echo x > /v/new",
        |c| {
            of(first)(c);
            c.mounts.push(Mount {
                uid_mappings: users(first).uids,
                gid_mappings: users(first).gids,
                ..mount(&dir, "/v")
            });
            security(c).run_as_user = Some(Int64Value { value: 1000 });
        },
    )?;
    ensure_eq!(out, "of the host\n0\n", "inside");
    let meta = fs::metadata(dir.join("new"))?;
    ensure!(meta.uid() == 1000, "owner on the host: {}", meta.uid());
    pod.remove()
}

/// The network belongs to a user namespace of its own, in which nobody is.
fn guarded(cri: &Cri) -> Outcome {
    let first = range(cri, "guard");
    let mut pod = pod(cri, "user-guard", first)?;
    let mut config = container("app", &["/bin/probe", "sleep"]);
    of(first)(&mut config);
    let id = pod.run(config)?;
    // It takes the guard away.
    pod.posture = false;
    guard::holds(cri, &pod, &id, 8101)?;
    pod.remove()
}

/// The tests for a generation.
pub fn tests(generation: Generation) -> &'static [(&'static str, Test)] {
    match generation {
        // It has no user namespaces.
        Generation::V1_6 => &[],
        Generation::V1_7 => ON_1_7,
        Generation::V2_1 | Generation::V2_3 => SINCE_2,
    }
}

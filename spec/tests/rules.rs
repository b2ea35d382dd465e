//! One case for each rule: the change, the rule and the field it names.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use std::collections::BTreeSet;

use casemate_spec::{Namespace, RULES, caps};
use common::{CRI_PAUSE, CTR_1_6, MAXIMAL, config, policy, refusal, with};
use serde_json::{Value, json};

/// The rule, the field it names, and what to change for it.
type Case = (&'static str, &'static str, Vec<(&'static str, Value)>);

fn namespaces_without(typ: &str) -> Value {
    let root: Value = serde_json::from_slice(CTR_1_6).unwrap();
    root["linux"]["namespaces"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|n| n["type"] != typ)
        .cloned()
        .collect()
}

fn namespaces_and(more: Value) -> Value {
    let mut list = namespaces_without("nothing");
    list.as_array_mut().unwrap().push(more);
    list
}

/// A user namespace with this mapping, of users and groups.
fn users(mapping: Value) -> Vec<(&'static str, Value)> {
    vec![
        ("/linux/namespaces", namespaces_and(json!({"type": "user"}))),
        ("/linux/uidMappings", mapping.clone()),
        ("/linux/gidMappings", mapping),
    ]
}

fn mount(destination: &str, typ: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": typ, "source": source, "options": options})
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn each_rule_refuses_and_names_its_field() {
    let device =
        |path, typ, major| json!([{"path": path, "type": typ, "major": major, "minor": 0}]);
    let idmap = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
    let all: Vec<&str> = caps::NAMES.to_vec();
    let cases: Vec<Case> = vec![
        (
            "host-network",
            "linux.namespaces",
            vec![("/linux/namespaces", namespaces_without("network"))],
        ),
        (
            "host-pid",
            "linux.namespaces",
            vec![("/linux/namespaces", namespaces_without("pid"))],
        ),
        (
            "host-ipc",
            "linux.namespaces",
            vec![("/linux/namespaces", namespaces_without("ipc"))],
        ),
        (
            "host-mount-namespace",
            "linux.namespaces",
            vec![("/linux/namespaces", namespaces_without("mount"))],
        ),
        (
            "cgroup-namespace-path",
            "linux.namespaces",
            vec![(
                "/linux/namespaces",
                namespaces_and(json!({"type": "cgroup", "path": "/proc/1/ns/cgroup"})),
            )],
        ),
        (
            "time-namespace",
            "linux.namespaces",
            vec![(
                "/linux/namespaces",
                namespaces_and(json!({"type": "time", "path": "/proc/1/ns/time"})),
            )],
        ),
        (
            "time-namespace",
            "linux.timeOffsets",
            vec![("/linux/timeOffsets", json!({"monotonic": {"secs": 1}}))],
        ),
        (
            "time-namespace",
            "linux.timeOffsets",
            vec![
                ("/linux/namespaces", namespaces_and(json!({"type": "time"}))),
                ("/linux/timeOffsets", json!({"realtime": {"secs": 1}})),
            ],
        ),
        (
            "namespace-list",
            "linux.namespaces",
            vec![("/linux/namespaces", namespaces_and(json!({"type": "pid"})))],
        ),
        (
            "user-namespace",
            "linux.uidMappings",
            vec![("/linux/namespaces", namespaces_and(json!({"type": "user"})))],
        ),
        (
            "user-namespace",
            "linux.uidMappings",
            vec![("/linux/uidMappings", idmap.clone())],
        ),
        (
            "user-namespace-ids",
            "linux.uidMappings",
            users(json!([{"containerID": 0, "hostID": 0, "size": 65536}])),
        ),
        (
            "privileged",
            "securityContext.privileged",
            vec![
                ("/process/capabilities/bounding", json!(all)),
                ("/linux/maskedPaths", json!([])),
            ],
        ),
        (
            "privileged",
            "securityContext.privileged",
            vec![
                ("/process/capabilities/bounding", json!(all)),
                (
                    "/linux/resources/devices",
                    json!([{"allow": true, "access": "rwm"}]),
                ),
            ],
        ),
        (
            "sysctl",
            "linux.sysctl",
            vec![("/linux/sysctl", json!({"kernel.core_pattern": "|/bin/sh"}))],
        ),
        (
            "sysctl",
            "linux.sysctl",
            vec![(
                "/linux/sysctl",
                json!({"net/../kernel/core_pattern": "|/bin/sh"}),
            )],
        ),
        (
            "sysctl",
            "linux.sysctl",
            vec![("/linux/sysctl", json!({"kernel.semaphore": "1"}))],
        ),
        (
            "sysctl-unsafe",
            "linux.sysctl",
            vec![("/linux/sysctl", json!({"net/ipv4/ip_forward": "1"}))],
        ),
        (
            "capability",
            "process.capabilities",
            vec![("/process/capabilities/ambient", json!(["CAP_NET_ADMIN"]))],
        ),
        (
            "rootfs-propagation",
            "linux.rootfsPropagation",
            vec![("/linux/rootfsPropagation", "rshared".into())],
        ),
        (
            "mount-propagation",
            "mounts[7].options",
            vec![(
                "/mounts/-",
                mount("/a", "bind", "/a", &["rbind", "rshared"]),
            )],
        ),
        (
            "device",
            "linux.devices[0]",
            vec![("/linux/devices", device("/dev/sda", "b", 8))],
        ),
        (
            "device",
            "linux.devices[0]",
            vec![("/linux/devices", device("/dev/null", "b", 1))],
        ),
        (
            "device",
            "linux.resources.devices",
            vec![(
                "/linux/resources/devices",
                json!([{"allow": true, "type": "a", "major": -1, "minor": -1, "access": "rwm"}]),
            )],
        ),
        (
            "hooks",
            "hooks.prestart[0]",
            vec![("/hooks", json!({"prestart": [{"path": "/bin/true"}]}))],
        ),
        (
            "hooks",
            "hooks.createContainer[0]",
            vec![(
                "/hooks",
                json!({"createContainer": [{"path": "/bin/true"}]}),
            )],
        ),
        (
            "hook-form",
            "hooks.startContainer[1]",
            vec![(
                "/hooks",
                json!({"startContainer": [{"path": "/bin/true"}, {"path": "true"}]}),
            )],
        ),
        (
            "hook-form",
            "hooks.startContainer[0]",
            vec![(
                "/hooks",
                json!({"startContainer": [{"path": "/bin/true", "timeout": 0}]}),
            )],
        ),
        (
            "hook-form",
            "hooks.startContainer[0]",
            vec![(
                "/hooks",
                json!({"startContainer": [{"path": "/bin/true", "env": ["PASSWORD"]}]}),
            )],
        ),
        (
            "hook-of-pause",
            "hooks",
            vec![
                (
                    "/annotations",
                    json!({"io.kubernetes.cri.container-type": "sandbox"}),
                ),
                ("/hooks", json!({"startContainer": [{"path": "/bin/true"}]})),
            ],
        ),
        (
            "apparmor",
            "process.apparmorProfile",
            vec![(
                "/process/apparmorProfile",
                "cri-containerd.apparmor.d".into(),
            )],
        ),
        (
            "selinux",
            "process.selinuxLabel",
            vec![("/process/selinuxLabel", "a:b:c".into())],
        ),
        (
            "selinux",
            "linux.mountLabel",
            vec![("/linux/mountLabel", "a:b:c".into())],
        ),
        (
            "scheduling",
            "process.scheduler.policy",
            vec![("/process/scheduler", json!({"policy": "SCHED_FIFO"}))],
        ),
        (
            "scheduling",
            "process.scheduler.nice",
            vec![(
                "/process/scheduler",
                json!({"policy": "SCHED_OTHER", "nice": -1}),
            )],
        ),
        (
            "scheduling",
            "process.scheduler.flags",
            vec![(
                "/process/scheduler",
                json!({"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_NEW"]}),
            )],
        ),
        (
            "scheduling",
            "process.scheduler.period",
            vec![(
                "/process/scheduler",
                json!({"policy": "SCHED_OTHER", "period": 9}),
            )],
        ),
        (
            "scheduling",
            "process.ioPriority.class",
            vec![(
                "/process/ioPriority",
                json!({"class": "IOPRIO_CLASS_RT", "priority": 0}),
            )],
        ),
        (
            "scheduling",
            "process.ioPriority.priority",
            vec![(
                "/process/ioPriority",
                json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
            )],
        ),
        (
            "scheduling",
            "process.execCPUAffinity.final",
            vec![("/process/execCPUAffinity", json!({"final": "3-1"}))],
        ),
        (
            "unsupported-field",
            "linux.intelRdt",
            vec![("/linux/intelRdt", json!({"closID": "x"}))],
        ),
        (
            "unsupported-field",
            "ociVersion",
            vec![("/ociVersion", "2.0.0".into())],
        ),
        (
            "other-platform",
            "windows",
            vec![("/windows", json!({"layerFolders": ["a"]}))],
        ),
        (
            "other-platform",
            "freebsd",
            vec![("/freebsd", json!({"jail": {"host": "new"}}))],
        ),
        (
            "personality",
            "linux.personality.domain",
            vec![("/linux/personality", json!({"domain": "LINUX32"}))],
        ),
        (
            "seccomp-listener",
            "linux.seccomp.listenerPath",
            vec![("/linux/seccomp", json!({"listenerPath": "/run/x"}))],
        ),
        (
            "mount-destination",
            "mounts[7].destination",
            vec![("/mounts/-", mount("a", "tmpfs", "t", &[]))],
        ),
        (
            "mount-destination",
            "mounts[7].destination",
            vec![("/mounts/-", mount("/a/../b", "tmpfs", "t", &[]))],
        ),
        (
            "mount-destination",
            "mounts[7].destination",
            vec![("/mounts/-", mount("/proc/sys", "bind", "/a", &["bind"]))],
        ),
        (
            "mount-destination",
            "mounts[7].destination",
            vec![("/mounts/-", mount("//proc/./", "tmpfs", "t", &[]))],
        ),
        (
            "mount-destination",
            "mounts[7].destination",
            vec![("/mounts/-", mount("/host/proc", "proc", "proc", &[]))],
        ),
        (
            "mount-destination",
            "mounts[7].destination",
            vec![("/mounts/-", mount("/", "tmpfs", "t", &[]))],
        ),
        (
            "mount-type",
            "mounts[7].type",
            vec![("/mounts/-", mount("/a", "ext4", "/dev/sda", &[]))],
        ),
        (
            "mount-source",
            "mounts[7].source",
            vec![("/mounts/-", mount("/a", "bind", "/", &["rbind"]))],
        ),
        (
            "mount-source",
            "mounts[7].source",
            vec![("/mounts/-", mount("/a", "bind", "//proc/1", &["rbind"]))],
        ),
        (
            "mount-source",
            "mounts[7].source",
            vec![("/mounts/-", mount("/a", "bind", "rel", &["rbind"]))],
        ),
        (
            "mount-option",
            "mounts[7].options",
            vec![("/mounts/-", mount("/a", "tmpfs", "t", &["context=x"]))],
        ),
        (
            "mount-option",
            "mounts[7].options",
            vec![("/mounts/-", mount("/a", "tmpfs", "t", &["uid=65536"]))],
        ),
        (
            "mount-option",
            "mounts[7].options",
            vec![("/mounts/-", mount("/a", "tmpfs", "t", &["size=lots"]))],
        ),
        (
            "mount-option",
            "mounts[7].options",
            vec![(
                "/mounts/-",
                mount("/a", "bind", "/a", &["bind", "upperdir=/x"]),
            )],
        ),
        (
            "mount-idmap",
            "mounts[7].uidMappings",
            vec![(
                "/mounts/-",
                json!({"destination": "/a", "type": "tmpfs", "uidMappings": idmap}),
            )],
        ),
        (
            "mount-idmap",
            "mounts[7].options",
            vec![("/mounts/-", mount("/a", "tmpfs", "t", &["ridmap"]))],
        ),
        (
            "path",
            "root.path",
            vec![("/root/path", "../rootfs".into())],
        ),
        (
            "path",
            "linux.maskedPaths[0]",
            vec![("/linux/maskedPaths", json!(["/a/../b"]))],
        ),
        (
            "path",
            "linux.readonlyPaths[1]",
            vec![("/linux/readonlyPaths", json!(["/a", "b"]))],
        ),
        (
            "path",
            "linux.cgroupsPath",
            vec![("/linux/cgroupsPath", "/a/../../b".into())],
        ),
        (
            "id",
            "process.user.uid",
            vec![("/process/user/uid", 65536.into())],
        ),
        (
            "id",
            "process.user.gid",
            vec![("/process/user/gid", 100_000.into())],
        ),
        (
            "id",
            "process.user.additionalGids[1]",
            vec![(
                "/process/user/additionalGids",
                json!([0, 4_294_967_295_u32]),
            )],
        ),
        (
            "process",
            "process.cwd",
            vec![("/process/cwd", "tmp".into())],
        ),
        (
            "process",
            "process.env[0]",
            vec![("/process/env", json!(["PASSWORD"]))],
        ),
        (
            "process",
            "process.rlimits[0]",
            vec![(
                "/process/rlimits",
                json!([{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}]),
            )],
        ),
        (
            "resources",
            "linux.resources.unified",
            vec![("/linux/resources/unified", json!({"../x.y": "1"}))],
        ),
        (
            "resources",
            "linux.resources.unified",
            vec![("/linux/resources/unified", json!({"cgroup.procs": "1"}))],
        ),
        (
            "resources",
            "linux.resources.memory.disableOOMKiller",
            vec![("/linux/resources/memory", json!({"disableOOMKiller": true}))],
        ),
        (
            "learn",
            "annotations[casemate.io/profile]",
            vec![("/annotations", json!({"casemate.io/profile": "learn"}))],
        ),
    ];
    let mut seen = BTreeSet::new();
    for (rule, field, changes) in cases {
        let refusal = refusal(&with(CTR_1_6, &changes));
        assert_eq!(
            (refusal.rule, refusal.field.as_str()),
            (rule, field),
            "{changes:?}: {refusal}"
        );
        let text = refusal.to_string();
        assert!(
            text.starts_with("casemate: ") && text.ends_with('.') && !text.contains('\n'),
            "{text}"
        );
        assert!(!text.contains("PASSWORD"), "{text}");
        seen.insert(rule);
    }
    let elsewhere = |id: &str| common::ELSEWHERE.iter().any(|p| id.starts_with(p));
    let all: BTreeSet<&str> = RULES
        .iter()
        .map(|r| r.id)
        .filter(|r| !elsewhere(r))
        .collect();
    assert_eq!(seen, all, "every rule has a case");
}

#[test]
fn the_message_is_what_where_and_the_way_out() {
    let refusal = refusal(&with(CTR_1_6, &[("/process/user/uid", 70000.into())]));
    assert_eq!(
        refusal.to_string(),
        "casemate: this id is out of range: 70000 (process.user.uid). \
         Use an id below 65536 (securityContext.runAsUser, runAsGroup, supplementalGroups)."
    );
}

#[test]
fn somebody_elses_text_stays_on_one_line() {
    let refusal = refusal(&with(
        CTR_1_6,
        &[("/mounts/-", mount("/a\nb", "x\u{1b}[2J", "s", &[]))],
    ));
    assert!(!refusal.to_string().contains(char::is_control), "{refusal}");
}

#[test]
fn the_hosts_network_alone_is_given_where_the_node_allows_it_by_name() {
    let without_network = with(
        CTR_1_6,
        &[(
            "/linux/namespaces",
            json!([{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}]),
        )],
    );
    assert_eq!(refusal(&without_network).rule, "host-network");
    let allow = config("[sandbox]\nallow_host_network = true");
    let namespaces = policy(&without_network, &allow).unwrap().namespaces;
    assert_eq!(namespaces.network, Namespace::Host);
    assert_eq!(
        namespaces.uts,
        Namespace::New,
        "the host's name is never worth it"
    );
    // And then its sysctls would be the node's.
    let sysctl = with(
        &without_network,
        &[("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}))],
    );
    assert_eq!(policy(&sysctl, &allow).unwrap_err().rule, "sysctl");
    for (kind, rule) in [("pid", "host-pid"), ("ipc", "host-ipc")] {
        let host = with(CTR_1_6, &[("/linux/namespaces", namespaces_without(kind))]);
        assert_eq!(policy(&host, &allow).unwrap_err().rule, rule);
    }
}

#[test]
fn the_maximal_configuration_is_refused_and_not_half_applied() {
    assert_eq!(refusal(MAXIMAL).rule, "unsupported-field");
    assert_eq!(
        refusal(&with(
            CRI_PAUSE,
            &[("/hooks", json!({"poststop": [{"path": "/x"}]}))]
        ))
        .rule,
        "hooks"
    );
}

//! What containerd writes passes, and comes out as tight as it should.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use casemate_spec::{
    Atime, How, Kind, MountKind, Namespace, PropagationKind, Rlimit, caps, load, load_process,
    tighten_process,
};
use common::{CONTEXT, CRI_CONTAINER, CRI_PAUSE, CTR_1_6, CTR_2_1, accepted, config, policy, with};
use serde_json::json;

const POLICY: [&str; 10] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
];

#[test]
fn what_ctr_writes_passes_and_loses_four_capabilities() {
    for bytes in [CTR_1_6, CTR_2_1] {
        let tightened = accepted(bytes);
        assert_eq!(caps::names(tightened.process.caps.bounding), POLICY);
        assert_eq!(
            tightened.process.caps.effective,
            tightened.process.caps.bounding
        );
        assert_eq!(tightened.process.caps.ambient, 0);
        let dropped = "CAP_NET_RAW, CAP_MKNOD, CAP_AUDIT_WRITE, CAP_SETFCAP";
        assert_eq!(
            tightened.warnings,
            [format!(
                "process.capabilities: beyond the policy, dropped: {dropped}"
            )]
        );
        assert_eq!(
            tightened.process.rlimits,
            [Rlimit {
                resource: 7,
                soft: 1024,
                hard: 1024
            }]
        );
        assert!(tightened.process.no_new_privs);
        assert_eq!(tightened.pod.kind, Kind::Single);
        assert_eq!(tightened.pod.pod_id, None);
        assert_eq!(tightened.namespaces.network, Namespace::New);
        assert_eq!(tightened.cgroups_path, "/default/c1");
        assert!(tightened.masked_paths.iter().any(|p| p == "/proc/kcore"));
        assert!(
            tightened
                .masked_paths
                .iter()
                .any(|p| p == "/proc/interrupts"),
            "added where containerd is old"
        );
        let devpts = tightened
            .mounts
            .iter()
            .find(|m| m.destination == "/dev/pts")
            .unwrap();
        assert_eq!(devpts.kind, MountKind::Devpts);
        assert!(
            devpts
                .flags
                .data
                .contains(&("ptmxmode".into(), Some("0666".into())))
        );
        let dev = tightened
            .mounts
            .iter()
            .find(|m| m.destination == "/dev")
            .unwrap();
        assert_eq!(dev.flags.attrs.atime, Some(Atime::Strict));
        // The default devices only, and no right to make any other.
        let rules = tightened.resources.unwrap().devices().clone().unwrap();
        let numbers: std::collections::BTreeSet<_> = rules
            .iter()
            .filter(|r| r.allow())
            .map(|r| (r.major(), r.minor()))
            .collect();
        assert_eq!(numbers.len(), 9, "{numbers:?}");
        assert!(rules.iter().all(|r| !r.allow() || r.major().is_some()));
    }
}

#[test]
fn a_pod_of_the_kubelet_passes() {
    let pause = accepted(CRI_PAUSE);
    assert_eq!(pause.pod.kind, Kind::Sandbox);
    assert_eq!(pause.pod.pod_id.as_deref(), Some("8a1f"));
    assert_eq!(pause.pod.pod_name.as_deref(), Some("web-0"));
    assert_eq!(
        pause.namespaces.network,
        Namespace::Path("/var/run/netns/cni-5b0e".into())
    );
    assert_eq!(pause.process.oom_score_adj, Some(-998));
    assert_eq!(pause.sysctl.len(), 2);
    assert_eq!(pause.hostname.as_deref(), Some("web-0"));
    assert!(pause.readonly_rootfs);
    let profile = pause.seccomp.unwrap();
    assert_eq!(
        profile["architectures"][3], "SCMP_ARCH_LOONGARCH128",
        "kept as written"
    );

    let web = accepted(CRI_CONTAINER);
    assert_eq!(web.pod.kind, Kind::Container);
    assert_eq!(web.pod.container_name.as_deref(), Some("web"));
    assert_eq!(
        web.namespaces.ipc,
        Namespace::Path("/proc/4242/ns/ipc".into())
    );
    assert_eq!(web.namespaces.pid, Namespace::New);
    assert!(
        web.process.no_new_privs,
        "in spite of allowPrivilegeEscalation"
    );
    assert!(
        web.decisions
            .iter()
            .any(|d| d.field == "process.noNewPrivileges" && d.how == How::Stricter)
    );
    let mount = |d: &str| web.mounts.iter().find(|m| m.destination == d).unwrap();
    assert!(mount("/sys/fs/cgroup").flags.attrs.ro);
    let hosts = &mount("/etc/hosts").flags;
    assert!(
        hosts.rbind
            && !hosts.attrs.ro
            && hosts.attrs.nodev
            && hosts.attrs.nosuid
            && hosts.recursive.nodev
    );
    assert_eq!(
        hosts.propagation.map(|p| (p.kind, p.recursive)),
        Some((PropagationKind::Private, true))
    );
    let token = &mount("/var/run/secrets/kubernetes.io/serviceaccount").flags;
    // Whatever was asked for (`rro` alone): a volume with a secret.
    assert!(token.recursive.ro && token.attrs.ro && token.attrs.noexec);
    assert_eq!(
        web.cgroups_path,
        "kubepods-besteffort-pod6d5b.slice:cri-containerd:8a1f"
    );
}

#[test]
fn compat_honours_what_the_pod_asks_about_privileges() {
    let compat = config("profile = \"compat\"");
    assert!(!policy(CRI_CONTAINER, &compat).unwrap().process.no_new_privs);
    assert!(
        policy(CTR_1_6, &compat).unwrap().process.no_new_privs,
        "asked for"
    );
    assert!(
        policy(CRI_CONTAINER, &config("profile = \"strict\""))
            .unwrap()
            .process
            .no_new_privs
    );
}

#[test]
fn every_capability_is_cut_to_the_policy_and_only_that() {
    let all = json!(caps::NAMES.to_vec());
    let bytes = with(
        CTR_1_6,
        &[
            ("/process/capabilities/bounding", all.clone()),
            ("/process/capabilities/ambient", all.clone()),
            ("/process/capabilities/inheritable", all),
        ],
    );
    let drop = config("[capabilities]\nbeyond = \"drop\"");
    let caps = policy(&bytes, &drop).unwrap().process.caps;
    assert_eq!(caps::names(caps.bounding), POLICY);
    assert_eq!(caps::names(caps.ambient), POLICY);
    let only = config("[capabilities]\nallow = [\"chown\", \"CAP_SYS_ADMIN\"]\nbeyond = \"drop\"");
    let caps = policy(&bytes, &only).unwrap().process.caps;
    assert_eq!(caps::names(caps.bounding), ["CAP_CHOWN", "CAP_SYS_ADMIN"]);
    assert_eq!(
        caps::names(caps.permitted),
        ["CAP_CHOWN"],
        "of which the specification named one"
    );
}

#[test]
fn no_realtime_is_what_nerdctl_asks_for() {
    let asking = |period: u64| {
        let cpu = json!({"shares": 2, "realtimeRuntime": 0, "realtimePeriod": period});
        policy(
            &with(CTR_1_6, &[("/linux/resources/cpu", cpu)]),
            &config(""),
        )
    };
    asking(0).unwrap();
    let refusal = asking(1).unwrap_err().to_string();
    assert!(refusal.contains("cpu.realtimePeriod"), "{refusal}");
}

#[test]
fn what_kubectl_debug_asks_for_is_dropped_and_what_goes_beyond_is_refused() {
    let asking = |names: &[&str]| {
        let bytes = with(
            CTR_1_6,
            &[
                ("/process/capabilities/bounding", json!(names)),
                ("/process/capabilities/effective", json!(names)),
                ("/process/capabilities/permitted", json!(names)),
            ],
        );
        policy(&bytes, &config(""))
    };
    let tightened = asking(&["CAP_CHOWN", "CAP_SYS_PTRACE"]).unwrap();
    assert_eq!(caps::names(tightened.process.caps.bounding), ["CAP_CHOWN"]);
    assert_eq!(
        tightened.warnings,
        ["process.capabilities: beyond the policy, dropped: CAP_SYS_PTRACE"]
    );
    let refusal = asking(&["CAP_SYS_PTRACE", "CAP_SYS_ADMIN"]).unwrap_err();
    assert!(
        refusal.to_string().contains(": CAP_SYS_ADMIN ("),
        "{refusal}"
    );
}

#[test]
fn a_capability_of_a_later_kernel_is_dropped_with_a_warning() {
    let bytes = with(
        CTR_1_6,
        &[(
            "/process/capabilities/bounding",
            json!(["CAP_KILL", "CAP_TIME_TRAVEL"]),
        )],
    );
    let tightened = accepted(&bytes);
    assert_eq!(caps::names(tightened.process.caps.bounding), ["CAP_KILL"]);
    assert!(
        tightened
            .warnings
            .iter()
            .any(|w| w.contains("CAP_TIME_TRAVEL")),
        "{:?}",
        tightened.warnings
    );
}

#[test]
fn unmasked_proc_is_masked_all_the_same() {
    let tightened = accepted(&with(
        CTR_1_6,
        &[
            ("/linux/maskedPaths", json!([])),
            ("/linux/readonlyPaths", json!(null)),
        ],
    ));
    assert!(tightened.masked_paths.iter().any(|p| p == "/proc/kcore"));
    assert!(tightened.readonly_paths.iter().any(|p| p == "/proc/sys"));
    assert_eq!(
        tightened
            .warnings
            .iter()
            .filter(|w| w.contains("usual paths"))
            .count(),
        2
    );
}

#[test]
fn the_cgroup_has_a_default_place() {
    let tightened = accepted(&with(CTR_1_6, &[("/linux/cgroupsPath", "".into())]));
    assert_eq!(tightened.cgroups_path, "/casemate/c1");
    let nameless = casemate_spec::Context {
        id: "../x",
        ..CONTEXT
    };
    let loaded = load(&with(CTR_1_6, &[("/linux/cgroupsPath", "".into())])).unwrap();
    assert_eq!(
        casemate_spec::tighten(loaded, &config(""), &nameless)
            .unwrap_err()
            .rule,
        "path"
    );
}

#[test]
fn runc_group_names_the_pod_before_the_sandbox_id() {
    let bytes = with(
        CRI_PAUSE,
        &[("/annotations/io.containerd.runc.v2.group", "g1".into())],
    );
    assert_eq!(load(&bytes).unwrap().pod.pod_id.as_deref(), Some("g1"));
}

#[test]
fn secrets_are_not_printed() {
    let bytes = with(
        CTR_1_6,
        &[
            ("/process/env", json!(["K=hunter2"])),
            ("/process/args", json!(["x", "hunter2"])),
        ],
    );
    let loaded = load(&bytes).unwrap();
    assert!(!format!("{loaded:?}").contains("hunter2"));
    assert!(!format!("{:?}", accepted(&bytes)).contains("hunter2"));
    let wrong = load(&with(CTR_1_6, &[("/process/env", json!("hunter2"))]))
        .unwrap_err()
        .to_string();
    assert!(
        wrong.contains("process.env") && !wrong.contains("hunter2"),
        "{wrong}"
    );
    let wrong = load(&with(CTR_1_6, &[("/process/env", json!(["a", 12_345]))]))
        .unwrap_err()
        .to_string();
    assert!(
        wrong.contains("process.env[1]") && !wrong.contains("12345"),
        "{wrong}"
    );
}

#[test]
fn an_error_names_the_field_and_its_value() {
    let error = load(&with(CTR_1_6, &[("/process/user/uid", "root".into())]))
        .unwrap_err()
        .to_string();
    assert!(error.contains("process.user.uid = \"root\""), "{error}");
    let error = load(&with(CTR_1_6, &[("/mounts/3/options", "ro".into())]))
        .unwrap_err()
        .to_string();
    assert!(error.contains("mounts[3].options"), "{error}");
    assert!(
        load(&vec![b' '; 11 << 20])
            .unwrap_err()
            .to_string()
            .contains("11534336 bytes")
    );
}

fn exec(process: serde_json::Value) -> Vec<u8> {
    serde_json::to_vec(&process).unwrap()
}

#[test]
fn an_exec_gets_no_more_than_its_container() {
    let few = with(
        CTR_1_6,
        &[
            ("/process/capabilities/bounding", json!(["CAP_KILL"])),
            ("/process/oomScoreAdj", 500.into()),
        ],
    );
    let container = accepted(&few);
    let config = config("profile = \"compat\"");
    let asked = exec(json!({
        "args": ["sh"], "env": ["A=b"], "cwd": "/", "user": {"uid": 0, "gid": 0},
        "capabilities": {"bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_CHOWN"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
        "noNewPrivileges": false, "oomScoreAdj": -900, "terminal": true, "consoleSize": {"height": 24, "width": 80}
    }));
    let process =
        tighten_process(load_process(&asked).unwrap(), &container, &config, false).unwrap();
    assert_eq!(caps::names(process.caps.bounding), ["CAP_KILL"]);
    assert_eq!(process.caps.effective, 0);
    assert!(process.no_new_privs, "the container has it");
    assert_eq!(process.oom_score_adj, Some(500));
    assert_eq!(
        process.rlimits[0],
        Rlimit {
            resource: 7,
            soft: 1024,
            hard: 1024
        }
    );
    // No core dumps, as the configuration has it.
    assert_eq!(process.rlimits.len(), 1);
    assert_eq!(process.console_size, Some((24, 80)));
    assert!(process.warnings.iter().any(|w| w.contains("CAP_CHOWN")));

    let plain = exec(json!({"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}}));
    let process =
        tighten_process(load_process(&plain).unwrap(), &container, &config, false).unwrap();
    assert_eq!(
        process.caps, container.process.caps,
        "the container's, where it names none"
    );

    for (key, value, rule) in [
        ("apparmorProfile", json!("other"), "apparmor"),
        ("selinuxLabel", json!("a:b"), "selinux"),
        ("scheduler", json!({"policy": "SCHED_FIFO"}), "scheduling"),
        ("args", json!([]), "process"),
        ("user", json!({"uid": 70000, "gid": 0}), "id"),
    ] {
        let mut process = json!({"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        process[key] = value;
        let loaded = load_process(&exec(process)).unwrap();
        assert_eq!(
            tighten_process(loaded, &container, &config, false)
                .unwrap_err()
                .rule,
            rule
        );
    }
}

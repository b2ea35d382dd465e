//! What a specification gets by leave of the node's configuration, or within it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use casemate_spec::{Config, Context, Lsm, NodeDevice, load, tighten};
use common::{CONTEXT, CTR_1_6, accepted, config, policy, refusal, with};
use serde_json::{Value, json};

#[test]
fn a_device_of_the_node_is_let_out_by_its_numbers() {
    let fuse = NodeDevice {
        block: false,
        major: 10,
        minor: 229,
    };
    let node = Context {
        devices: &[fuse],
        ..CONTEXT
    };
    let asked = |path: &str, minor: u32| {
        let bytes = with(
            CTR_1_6,
            &[
                (
                    "/linux/devices",
                    json!([{"path": path, "type": "c", "major": 10, "minor": minor,
                        "fileMode": 0o660, "uid": 1000, "gid": 5}]),
                ),
                (
                    "/linux/resources/devices",
                    json!([{"allow": false, "access": "rwm"},
                        {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                        {"allow": true, "type": "c", "major": 10, "minor": 228, "access": "rw"}]),
                ),
            ],
        );
        tighten(load(&bytes).unwrap(), &Config::default(), &node)
    };
    let tightened = asked("/dev/a/fuse", 229).unwrap();
    let device = &tightened.devices[0];
    assert_eq!(
        (device.path.as_str(), device.mode, device.uid, device.gid),
        ("a/fuse", 0o660, 1000, 5)
    );
    let rules = tightened.resources.unwrap().devices().clone().unwrap();
    let allowed = |minor| {
        rules
            .iter()
            .any(|r| r.allow() && (r.major(), r.minor()) == (Some(10), Some(minor)))
    };
    assert!(allowed(229) && !allowed(228));
    for (path, minor) in [
        ("/dev/fuse", 228),
        ("/srv/fuse", 229),
        ("/dev/../fuse", 229),
        ("/dev/null", 229),
        ("/dev/pts/fuse", 229),
        ("/dev", 229),
    ] {
        assert_eq!(asked(path, minor).unwrap_err().rule, "device", "{path}");
    }
}

#[test]
fn hooks_are_let_in_by_their_path() {
    let config = config("[hooks]\nallow = [\"/opt/a\", \"/opt/hooks/\"]\ntimeout = 7\n");
    let hooks = |path: &str| {
        let hooks = json!({"createRuntime": [{"path": path, "timeout": 100}]});
        policy(&with(CTR_1_6, &[("/hooks", hooks)]), &config)
    };
    for path in ["/opt/a", "/opt//hooks/./b", "/opt/hooks/c/d"] {
        let hooks = hooks(path).unwrap().hooks;
        let hook = &hooks.before_init[0];
        assert_eq!((hook.timeout, hook.args.len()), (7, 1), "{path}");
    }
    for path in ["/opt/b", "/opt/ab", "/opt/hooks", "/opt/a/b"] {
        assert_eq!(hooks(path).unwrap_err().rule, "hooks", "{path}");
    }
    assert_eq!(hooks("/opt/hooks/../a").unwrap_err().rule, "hook-form");
}

#[test]
fn an_exec_is_scheduled_no_better_than_its_container() {
    let container = accepted(&with(
        CTR_1_6,
        &[
            (
                "/process/scheduler",
                json!({"policy": "SCHED_BATCH", "nice": 5}),
            ),
            (
                "/process/ioPriority",
                json!({"class": "IOPRIO_CLASS_BE", "priority": 6}),
            ),
            ("/process/execCPUAffinity", json!({"final": "1"})),
        ],
    ));
    let exec = |fields: Value| {
        let mut process = json!({"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"});
        for (key, value) in fields.as_object().unwrap() {
            process[key] = value.clone();
        }
        let bytes = serde_json::to_vec(&process).unwrap();
        let loaded = casemate_spec::load_process(&bytes).unwrap();
        casemate_spec::tighten_process(loaded, &container, &Config::default(), false)
            .unwrap()
            .schedule
    };
    let own = exec(json!({}));
    assert_eq!(own, container.process.schedule);
    assert_eq!(own.exec_cpus, [1]);
    let better = exec(json!({"scheduler": {"policy": "SCHED_OTHER", "nice": 0},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 0}}));
    assert_eq!(better, own);
    let worse = exec(json!({"scheduler": {"policy": "SCHED_IDLE"},
        "ioPriority": {"class": "IOPRIO_CLASS_IDLE"}, "execCPUAffinity": {"final": "0"}}));
    assert_eq!(worse.scheduler, Some((5, 0)));
    assert_eq!(worse.io_priority, Some(3 << 13));
    assert_eq!(worse.exec_cpus, [0]);
}

#[test]
fn the_profile_strict_has_no_scheduling() {
    let strict = config("profile = \"strict\"\n");
    for (field, value) in [
        ("scheduler", json!({"policy": "SCHED_IDLE"})),
        ("ioPriority", json!({"class": "IOPRIO_CLASS_IDLE"})),
    ] {
        let bytes = with(CTR_1_6, &[(&format!("/process/{field}"), value)]);
        let refusal = policy(&bytes, &strict).unwrap_err();
        assert_eq!(refusal.field, format!("process.{field}"));
    }
}

#[test]
fn labels_pass_where_the_node_has_them() {
    let bytes = with(
        CTR_1_6,
        &[
            (
                "/process/apparmorProfile",
                "cri-containerd.apparmor.d".into(),
            ),
            ("/linux/mountLabel", "a:b".into()),
        ],
    );
    let node = Context {
        apparmor: Lsm::Takes,
        selinux: Lsm::Takes,
        ..CONTEXT
    };
    let tightened = tighten(load(&bytes).unwrap(), &Config::default(), &node).unwrap();
    assert_eq!(
        tightened.process.apparmor_profile.as_deref(),
        Some("cri-containerd.apparmor.d")
    );
    let unconfined = accepted(&with(
        CTR_1_6,
        &[("/process/apparmorProfile", "unconfined".into())],
    ));
    assert_eq!(unconfined.process.apparmor_profile, None);
}

#[test]
fn a_section_with_nothing_in_it_asks_for_nothing() {
    accepted(&with(
        CTR_1_6,
        &[
            ("/hooks", json!({"prestart": [], "poststop": null})),
            ("/linux/intelRdt", json!({})),
        ],
    ));
    let moved = refusal(&with(
        CTR_1_6,
        &[("/linux/netDevices", json!({"eth0": {}}))],
    ));
    assert_eq!(moved.field, "linux.netDevices", "a device by its own name");
}

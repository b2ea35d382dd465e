//! Execs: whether there may be one, and what it may ask for.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use casemate_spec::{Config, ProcessSpec, Refusal, caps, load_process, tighten_process};
use common::{CTR_1_6, config, policy, with};
use serde_json::{Value, json};

/// An exec in ctr's container, with this in its document.
fn exec(more: Value, node: &Config, terminal: bool) -> Result<ProcessSpec, Refusal> {
    in_container(CTR_1_6, more, node, terminal)
}

fn in_container(
    bytes: &[u8],
    more: Value,
    node: &Config,
    terminal: bool,
) -> Result<ProcessSpec, Refusal> {
    let container = policy(bytes, node).unwrap();
    let mut process = json!({"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"});
    for (key, value) in more.as_object().unwrap() {
        process[key] = value.clone();
    }
    let bytes = serde_json::to_vec(&process).unwrap();
    tighten_process(load_process(&bytes).unwrap(), &container, node, terminal)
}

#[test]
fn every_rule_refuses_and_names_its_field() {
    let none = Config::default();
    let deny = config("[exec]\npolicy = \"deny\"");
    let alone = config("[exec]\nusers = \"container\"");
    let plain = config("[exec]\nterminal = false");
    let cases = [
        ("exec-denied", "exec.policy", exec(json!({}), &deny, false)),
        (
            "exec-denied",
            "annotations[casemate.io/exec]",
            in_container(
                &with(
                    CTR_1_6,
                    &[("/annotations", json!({"casemate.io/exec": "deny"}))],
                ),
                json!({}),
                &none,
                false,
            ),
        ),
        (
            "exec-capabilities",
            "process.capabilities",
            exec(
                json!({"capabilities": {"bounding": ["CAP_SYS_ADMIN"]}}),
                &none,
                false,
            ),
        ),
        (
            "exec-capabilities",
            "process.capabilities",
            exec(
                json!({"capabilities": {"ambient": ["CAP_BPF"]}}),
                &none,
                false,
            ),
        ),
        (
            "exec-user",
            "process.user.uid",
            exec(json!({"user": {"uid": 7, "gid": 0}}), &alone, false),
        ),
        (
            "exec-user",
            "process.user.gid",
            exec(json!({"user": {"uid": 0, "gid": 7}}), &alone, false),
        ),
        (
            "exec-user",
            "process.user.additionalGids",
            exec(
                json!({"user": {"uid": 0, "gid": 0, "additionalGids": [0, 7]}}),
                &alone,
                false,
            ),
        ),
        (
            "exec-terminal",
            "exec.terminal",
            exec(json!({}), &plain, true),
        ),
    ];
    let mut seen = std::collections::BTreeSet::new();
    for (rule, field, outcome) in cases {
        let refusal = outcome.unwrap_err();
        assert_eq!((refusal.rule, &*refusal.field), (rule, field), "{refusal}");
        seen.insert(rule);
    }
    common::all_of("exec-", &seen);
}

/// containerd's own execs: the container's document once more.
#[test]
fn an_exec_that_asks_for_what_its_container_asked_for_is_fine_and_gets_what_that_got() {
    let document: Value = serde_json::from_slice(CTR_1_6).unwrap();
    let process = document["process"].clone();
    for node in [
        "",
        "[exec]\nusers = \"container\"\nterminal = false\npolicy = \"record\"",
    ] {
        let node = config(node);
        let container = policy(CTR_1_6, &node).unwrap();
        let asked = container.asked_capabilities;
        assert_ne!(asked, container.process.caps.bounding, "four are dropped");
        let own = exec(process.clone(), &node, false).unwrap();
        assert_eq!(own.caps, container.process.caps);
        assert!(!own.terminal);
    }
    let other = exec(
        json!({"user": {"uid": 7, "gid": 7, "additionalGids": [9]}}),
        &config(""),
        true,
    );
    let other = other.unwrap();
    assert_eq!(
        (other.uid, other.gid),
        (7, 7),
        "any user, unless told otherwise"
    );
    assert!(other.terminal, "the request has the last word");
    assert_eq!(caps::names(other.caps.bounding).len(), 10);
}

#[test]
fn an_annotation_that_narrows_holds_for_execs() {
    let narrow = with(
        CTR_1_6,
        &[(
            "/annotations",
            json!({"casemate.io/capabilities": "CAP_KILL"}),
        )],
    );
    let document: Value = serde_json::from_slice(CTR_1_6).unwrap();
    let own = in_container(
        &narrow,
        document["process"].clone(),
        &Config::default(),
        false,
    )
    .unwrap();
    assert_eq!(caps::names(own.caps.union()), ["CAP_KILL"]);
}

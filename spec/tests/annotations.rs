//! `casemate.io/…`: what they say, and that they only tighten.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use std::collections::BTreeMap;

use casemate_spec::annotations::{Key, NodeProfile, ProfileName};
use casemate_spec::config::{ExecPolicy, Profile};
use casemate_spec::{Annotations, Config, Context, RULES, Refusal, Tightened, load, tighten};
use common::{CONTEXT, CRI_CONTAINER, CRI_PAUSE, CTR_1_6, accepted, config, policy, with};

/// `bytes` with these annotations of ours.
fn annotated(bytes: &[u8], ours: &[(&str, &str)]) -> Vec<u8> {
    let mut root: serde_json::Value = serde_json::from_slice(bytes).unwrap();
    for (key, value) in ours {
        root["annotations"][format!("casemate.io/{key}")] = (*value).into();
    }
    serde_json::to_vec(&root).unwrap()
}

fn ctr(ours: &[(&str, &str)], config: &Config) -> Result<Tightened, Refusal> {
    policy(&annotated(CTR_1_6, ours), config)
}

/// A container with these, in a pod with those.
fn in_pod(
    ours: &[(&str, &str)],
    pods: &[(&str, &str)],
    config: &Config,
) -> Result<Tightened, Refusal> {
    let pod = policy(&annotated(CRI_PAUSE, pods), config)?;
    let node = Context {
        pod: Some(&pod.asked),
        ..CONTEXT
    };
    tighten(
        load(&annotated(CRI_CONTAINER, ours)).unwrap(),
        config,
        &node,
    )
}

#[test]
fn each_is_read_and_others_are_nobodys_business() {
    let all = accepted(&annotated(
        CTR_1_6,
        &[
            ("profile", "strict"),
            ("exec", "deny"),
            ("service-account-token", "withhold"),
            ("egress", " 10.0.0.0/8:443 "),
            ("ingress", "none"),
            ("capabilities", "chown, CAP_KILL"),
        ],
    ));
    assert_eq!(
        all.asked,
        Annotations {
            profile: Some(ProfileName::Shipped(Profile::Strict)),
            exec: Some(ExecPolicy::Deny),
            withhold_token: true,
            egress: Some("10.0.0.0/8:443".into()),
            ingress: Some("none".into()),
            capabilities: Some(1 | 1 << 5),
        }
    );
    assert_eq!(all.effective.profile, Profile::Strict);
    assert_eq!(all.effective.profile_name, "strict");
    assert_eq!(all.effective.exec, ExecPolicy::Deny);
    assert_eq!(all.process.caps.bounding, 1 | 1 << 5, "the list narrows");
    let none = accepted(&with(
        CTR_1_6,
        &[(
            "/annotations",
            serde_json::json!({"example.com/exec": "deny", "casemate.iox/a": ""}),
        )],
    ));
    assert_eq!(none.asked, Annotations::default());
    assert_eq!(none.effective.profile_name, "default");
    assert_eq!(
        none.effective.capabilities,
        Config::default().capabilities.allow
    );
    let bare = accepted(&annotated(CTR_1_6, &[("capabilities", "none")]));
    assert_eq!(bare.process.caps.union(), 0);
}

#[test]
fn an_unknown_one_is_refused_by_name_with_those_that_exist() {
    for wrong in ["exce", "", "Exec", "exec/x"] {
        let refusal = ctr(&[(wrong, "deny")], &Config::default()).unwrap_err();
        assert_eq!(refusal.rule, "annotation-unknown");
        let text = refusal.to_string();
        assert!(text.contains(&format!("casemate.io/{wrong}")), "{text}");
        for key in Key::ALL {
            assert!(text.contains(key.name()), "{text} lacks {key}");
        }
    }
}

#[test]
fn a_value_that_makes_no_sense_is_refused_with_the_accepted_form() {
    for (key, value, form) in [
        ("profile", "Strict", "strict, default, compat"),
        ("profile", "../x", "strict, default, compat"),
        ("profile", "web", "no profile of this node"),
        ("exec", "no", "allow, record or deny"),
        ("exec", "", "\"\" is not allow, record or deny"),
        ("service-account-token", "mount", "withhold"),
        ("egress", " ", "not empty"),
        ("ingress", "", "not empty"),
        ("capabilities", "", "none, or names"),
        ("capabilities", "CAP_FLY", "none, or names"),
        ("capabilities", "none,CAP_KILL", "none, or names"),
    ] {
        let refusal = ctr(&[(key, value)], &Config::default()).unwrap_err();
        assert_eq!(refusal.rule, "annotation-value", "{key}={value}");
        assert_eq!(refusal.field, format!("annotations[casemate.io/{key}]"));
        assert!(refusal.to_string().contains(form), "{refusal}");
    }
    let long = "1".repeat(8193);
    let refusal = ctr(&[("egress", &long)], &Config::default()).unwrap_err();
    assert!(refusal.to_string().len() < 400, "{refusal}");
}

#[test]
fn the_node_is_loosened_only_by_leave_for_that_key() {
    let tight =
        "profile = \"strict\"\n[exec]\npolicy = \"deny\"\n[capabilities]\nallow = [\"CAP_KILL\"]\n";
    for (key, tighter, looser) in [
        ("profile", "strict", "default"),
        ("profile", "strict", "compat"),
        ("exec", "deny", "record"),
        ("exec", "deny", "allow"),
        ("capabilities", "CAP_KILL", "CAP_KILL,CAP_CHOWN"),
        ("capabilities", "none", "CAP_SYS_ADMIN"),
    ] {
        let refusal = ctr(&[(key, looser)], &config(tight)).unwrap_err();
        assert_eq!(refusal.rule, "annotation-loosens", "{key}={looser}");
        assert_eq!(refusal.field, format!("annotations[casemate.io/{key}]"));
        ctr(&[(key, tighter)], &config(tight)).unwrap();
        let leave = config(&format!("{tight}[annotations]\nallow = [\"{key}\"]\n"));
        let loose = ctr(&[(key, looser)], &leave).unwrap();
        assert_ne!(
            loose.effective,
            accepted_under(&config(tight)).effective,
            "{key}"
        );
        // And no other key by the same leave.
        let others = Key::ALL.into_iter().filter(|k| k.name() != key);
        let names: Vec<String> = others.map(|k| format!("\"{}\"", k.name())).collect();
        let leave = config(&format!(
            "{tight}[annotations]\nallow = [{}]\n",
            names.join(",")
        ));
        let refusal = ctr(&[(key, looser)], &leave).unwrap_err();
        assert_eq!(refusal.rule, "annotation-loosens", "{key}={looser}");
    }
}

fn accepted_under(config: &Config) -> Tightened {
    policy(CTR_1_6, config).unwrap()
}

#[test]
fn a_container_says_no_less_than_its_pod() {
    let leave = config("[annotations]\nallow = [\"profile\", \"exec\", \"capabilities\"]\n");
    for (key, pods, own) in [
        ("profile", "strict", "default"),
        ("profile", "default", "compat"),
        ("exec", "deny", "record"),
        ("exec", "record", "allow"),
        ("capabilities", "CAP_KILL", "CAP_CHOWN"),
        ("capabilities", "none", "CAP_CHOWN"),
    ] {
        let refusal = in_pod(&[(key, own)], &[(key, pods)], &leave).unwrap_err();
        assert_eq!(refusal.rule, "annotation-loosens", "{key} {pods} {own}");
        // The other way round is a container that is tighter than its pod.
        in_pod(&[(key, own)], &[(key, own)], &leave).unwrap();
    }
    let own = in_pod(
        &[],
        &[
            ("profile", "strict"),
            ("exec", "deny"),
            ("capabilities", "CAP_KILL"),
        ],
        &leave,
    )
    .unwrap();
    assert_eq!(own.effective.profile, Profile::Strict);
    assert_eq!(own.effective.exec, ExecPolicy::Deny);
    assert_eq!(own.process.caps.bounding, 1 << 5);
    let tighter = in_pod(
        &[("profile", "strict"), ("exec", "deny")],
        &[("profile", "default"), ("exec", "record")],
        &leave,
    )
    .unwrap();
    assert_eq!(tighter.effective.profile, Profile::Strict);
    assert_eq!(tighter.effective.exec, ExecPolicy::Deny);
    assert!(
        in_pod(&[], &[("service-account-token", "withhold")], &leave)
            .unwrap()
            .asked
            .withhold_token
    );
}

#[test]
fn learning_takes_leave_and_changes_nothing_else() {
    for name in ["strict", "default", "compat"] {
        let without = config(&format!("profile = \"{name}\"\n"));
        let refusal = ctr(&[("profile", "learn")], &without).unwrap_err();
        assert_eq!(refusal.rule, "learn");
        assert_eq!(refusal.field, "annotations[casemate.io/profile]");
        assert!(
            refusal.to_string().contains("learn.allow = true"),
            "{refusal}"
        );
        // Leave to loosen is none to learn.
        let loose = config(&format!(
            "profile = \"{name}\"\n[annotations]\nallow = [\"profile\"]\n"
        ));
        assert_eq!(
            ctr(&[("profile", "learn")], &loose).unwrap_err().rule,
            "learn"
        );

        let with = config(&format!("profile = \"{name}\"\n[learn]\nallow = true\n"));
        let learning = ctr(&[("profile", "learn")], &with).unwrap();
        let plain = accepted_under(&with);
        assert!(learning.effective.learn && !plain.effective.learn);
        let as_plain = Tightened {
            effective: plain.effective.clone(),
            asked: plain.asked.clone(),
            annotations: plain.annotations.clone(),
            // That there is an annotation is told.
            decisions: plain.decisions.clone(),
            ..learning.clone()
        };
        assert_eq!(format!("{as_plain:?}"), format!("{plain:?}"), "{name}");
        assert_eq!(learning.effective.profile_name, name);
    }
}

#[test]
fn a_pod_is_learned_from_as_a_whole_or_by_container() {
    let leave = config("[learn]\nallow = true\n");
    let learns = |own: &[(&str, &str)], pods: &[(&str, &str)]| {
        in_pod(own, pods, &leave).map(|done| done.effective.learn)
    };
    let learn = ("profile", "learn");
    assert_eq!(learns(&[], &[learn]), Ok(true));
    assert_eq!(learns(&[learn], &[learn]), Ok(true));
    assert_eq!(learns(&[learn], &[]), Ok(true));
    assert_eq!(learns(&[], &[]), Ok(false));
    // What the pod says holds: no container gets the node's profile instead.
    for (own, pods) in [("learn", "strict"), ("strict", "learn")] {
        let refusal = learns(&[("profile", own)], &[("profile", pods)]).unwrap_err();
        assert_eq!(refusal.rule, "annotation-loosens", "{own} in {pods}");
    }
}

#[test]
fn the_network_is_the_pods() {
    let none = Config::default();
    for key in ["egress", "ingress"] {
        let refusal = in_pod(&[(key, "none")], &[], &none).unwrap_err();
        assert_eq!(refusal.rule, "annotation-of-pod");
        let refusal = in_pod(&[(key, "none")], &[(key, "10.0.0.0/8:443")], &none).unwrap_err();
        assert_eq!(refusal.rule, "annotation-of-pod");
        // containerd gives the pod's to its containers as well.
        in_pod(&[(key, "none")], &[(key, "none")], &none).unwrap();
    }
    let own = in_pod(&[], &[("egress", "none")], &none).unwrap();
    assert_eq!(own.asked.egress.as_deref(), Some("none"));
}

#[test]
fn a_profile_of_the_node_counts_as_the_shipped_one_around_it() {
    let profiles = [
        NodeProfile {
            name: "web".into(),
            within: Profile::Strict,
        },
        NodeProfile {
            name: "old".into(),
            within: Profile::Compat,
        },
    ];
    let node = Context {
        profiles: &profiles,
        ..CONTEXT
    };
    let asked = |name: &str| {
        tighten(
            load(&annotated(CTR_1_6, &[("profile", name)])).unwrap(),
            &Config::default(),
            &node,
        )
    };
    let web = asked("web").unwrap();
    assert_eq!(
        (web.effective.profile, web.effective.profile_name.as_str()),
        (Profile::Strict, "web")
    );
    assert_eq!(asked("old").unwrap_err().rule, "annotation-loosens");
    assert_eq!(asked("new").unwrap_err().rule, "annotation-value");
    // Whether another one is within it can't be known.
    let pod = |own: ProfileName| {
        let read = |profile| Annotations {
            profile: Some(profile),
            ..Annotations::default()
        };
        read(own).within(&read(ProfileName::Named("web".into())))
    };
    pod(ProfileName::Named("web".into())).unwrap();
    pod(ProfileName::Named("old".into())).unwrap_err();
    pod(ProfileName::Shipped(Profile::Strict)).unwrap_err();
}

#[test]
fn every_rule_has_a_case() {
    let none = Config::default();
    let seen = [
        ctr(&[("x", "")], &none),
        ctr(&[("exec", "")], &none),
        ctr(&[("profile", "compat")], &none),
        in_pod(&[("egress", "none")], &[], &none),
    ];
    let seen = seen.map(|refused| refused.unwrap_err().rule);
    common::all_of("annotation-", &seen.into());
}

#[test]
fn the_way_out_names_every_key() {
    let rule = RULES.iter().find(|r| r.id == "annotation-unknown").unwrap();
    for key in Key::ALL {
        assert!(rule.way_out.contains(key.name()), "{key}");
    }
    let read = Annotations::read(&BTreeMap::new()).unwrap();
    assert_eq!(read, Annotations::default());
}

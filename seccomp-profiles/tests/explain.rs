//! Every refusal of the shipped profiles names its rule, and the listener's form
//! asks about those that are worth asking about.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;

use common::{calls, explained, notified, verdict};
use seccomp_profiles::interp::SeccompData;
use seccomp_profiles::{
    Action, Explainer, Form, Hash, Profile, Program, explain, reference, shipped,
    shipped_explainer, shipped_names, shipped_program, shipped_program_as, table,
};

fn call(name: &str, args: [u64; 6]) -> SeccompData {
    SeccompData::x86_64(table::number(name).unwrap(), args)
}

#[test]
fn every_refusal_names_its_rule() {
    for name in shipped_names() {
        let profile = shipped(name).unwrap();
        let explainer = shipped_explainer(name).unwrap();
        assert_eq!(explainer.rules(), explain::rules(&profile), "{name}");
        for data in calls(&profile) {
            explained(&profile, &explainer, &data).unwrap();
        }
    }
}

#[test]
fn the_listener_hears_of_errors_that_are_not_quiet() {
    for name in shipped_names() {
        let profile = shipped(name).unwrap();
        let rules = explain::rules(&profile);
        let notify = Program::from_bytes(shipped_program_as(name, Form::Notify).unwrap()).unwrap();
        for data in calls(&profile) {
            let want = notified(&rules[reference::rule(&profile, &data)]);
            assert_eq!(verdict(&notify, &data), want, "{name}: {data:x?}");
        }
    }
    let notify = Program::from_bytes(shipped_program_as("default", Form::Notify).unwrap()).unwrap();
    let ask = |name, args| verdict(&notify, &call(name, args));
    assert_eq!(ask("mount", [0; 6]), Action::Notify);
    assert_eq!(ask("clone3", [0; 6]), Action::Errno(38));
    assert_eq!(ask("read", [0; 6]), Action::Allow);
    let i386 = SeccompData {
        arch: common::FOREIGN[0],
        ..call("read", [0; 6])
    };
    assert_eq!(verdict(&notify, &i386), Action::KillProcess);
}

#[test]
fn ids_are_unique_and_every_rule_has_a_reason() {
    for name in shipped_names() {
        let explainer = shipped_explainer(name).unwrap();
        let mut ids = BTreeSet::new();
        for rule in explainer.rules() {
            assert!(ids.insert(rule.id.clone()), "{} twice", rule.id);
            assert!(rule.id.starts_with(&format!("{name}/")), "{}", rule.id);
            assert!(rule.reason.len() > 3, "{}: {}", rule.id, rule.reason);
            assert_eq!(explainer.rule(&rule.id), Some(rule));
        }
    }
    let default = shipped_explainer("default").unwrap();
    let id = |name, args| &default.explain(&call(name, args)).unwrap().id;
    assert_eq!(id("mount", [0; 6]), "default/refused/1");
    assert_eq!(id("clone3", [0; 6]), "default/left-out/1");
    assert_eq!(
        id("ioctl", [0, 0x5412, 0, 0, 0, 0]),
        "default/terminal-and-listener/1"
    );
    let newer = default.explain(&SeccompData::x86_64(471, [0; 6])).unwrap();
    assert_eq!(newer.id, "default/unknown");
    assert_eq!(default.explain(&call("read", [0; 6])), None);
}

#[test]
fn groups_with_one_id_are_refused() {
    let text = |group: &str| {
        format!(
            "name = \"x\"\ndescription = \"\"\ndefault = \"errno(ENOSYS)\"\n\
             [[group]]\nname = \"A b\"\naction = \"allow\"\n\
             [[group.rule]]\nsyscalls = [\"read\"]\nreason = \"r\"\n\
             [[group]]\nname = \"{group}\"\naction = \"allow\"\n\
             [[group.rule]]\nsyscalls = [\"write\"]\nreason = \"r\"\n"
        )
    };
    for group in ["a-b", "Left out"] {
        let error = Profile::from_toml(&text(group)).unwrap_err().to_string();
        assert!(error.contains(&format!("\"{group}\"")), "{error}");
    }
    let profile = Profile::from_toml(&text("a c")).unwrap();
    let explainer = Explainer::of(&profile).unwrap();
    let refused = explainer.explain(&call("open", [0; 6])).unwrap();
    assert_eq!(
        (refused.id.as_ref(), refused.action),
        ("x/default", Action::Errno(38))
    );
}

#[test]
fn a_hash_is_of_the_bytes() {
    let bytes = shipped_program("default").unwrap();
    let program = Program::from_bytes(bytes).unwrap();
    assert_eq!(Hash::of(bytes), program.hash());
    assert_ne!(
        program.hash(),
        Hash::of(shipped_program("strict").unwrap()),
        "two profiles"
    );
    // SHA-256 of nothing, from FIPS 180-4's test vectors.
    assert_eq!(
        Hash::of(&[]).to_string(),
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    );
}

//! What was observed, and the profiles made of it: within the node's, complete, and
//! the same in every form.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{calls, calls_of, nr, server, verdict};
use proptest::prelude::*;
use seccomp_profiles::interp::SeccompData;
use seccomp_profiles::oci::{self, OciSeccomp};
use seccomp_profiles::surface::{Abi, reachable};
use seccomp_profiles::{
    Action, Kind, Observed, Profile, check, compile, diff, export, file, minimal, reference,
    shipped, table,
};

const WORKLOADS: [&str; 3] = ["compat", "default", "strict"];

fn runs(action: Action) -> bool {
    matches!(action, Action::Allow | Action::Log)
}

#[test]
fn a_kind_is_what_a_profile_may_decide_by() {
    let seen = server();
    let lines: Vec<String> = seen.kinds().map(ToString::to_string).collect();
    assert!(lines.contains(&"socket(family 2, type 1, protocol 6)".to_owned()));
    assert!(lines.contains(&"setsockopt(level 6, option 9)".to_owned()));
    assert!(lines.contains(&"ioctl(request 0x5421)".to_owned()));
    assert!(lines.contains(&"accept4".to_owned()));
    assert_eq!(seen.calls(), 13);
    let mut none = Observed::default();
    assert!(!none.add(999, &[0; 6]));
    for request in 0..10_000 {
        none.add(nr("ioctl"), &[0, request, 0, 0, 0, 0]);
    }
    assert_eq!(none.kinds().count(), Observed::KINDS);
}

#[test]
fn the_least_profile_allows_what_was_seen_and_little_else() {
    let node = shipped("default").unwrap();
    let least = minimal("web", &server(), &node);
    let program = compile(&least).unwrap();
    let ask = |name: &str, args: [u64; 6]| {
        let data = SeccompData::x86_64(nr(name), args);
        verdict(&program, &data)
    };
    assert_eq!(ask("socket", [2, 1, 6, 0, 0, 0]), Action::Allow);
    assert_eq!(ask("socket", [2, 0o2_004_001, 6, 0, 0, 0]), Action::Allow);
    assert_eq!(ask("socket", [2, 2, 17, 0, 0, 0]), Action::Errno(93));
    assert_eq!(ask("socket", [1, 1, 0, 0, 0, 0]), Action::Errno(97));
    assert_eq!(ask("setsockopt", [3, 6, 9, 0, 0, 0]), Action::Allow);
    assert_eq!(ask("setsockopt", [3, 6, 2, 0, 0, 0]), Action::Errno(92));
    assert_eq!(ask("setsockopt", [3, 1, 9, 0, 0, 0]), Action::Errno(92));
    assert_eq!(ask("inotify_init", [0; 6]), Action::Errno(38));
    assert_eq!(ask("mount", [0; 6]), Action::Errno(1));
    assert_eq!(ask("clone", [0x1000_0011, 0, 0, 0, 0, 0]), Action::Errno(1));
    assert!(check(&least, &server()).unwrap().is_empty());
    let count = reachable(&[&program], Abi::X86_64).len();
    let base = compile(&minimal("base", &Observed::default(), &node)).unwrap();
    let base = reachable(&[&base], Abi::X86_64).len();
    println!("base {base}, web {count}");
    assert!(base <= 44 && count <= 70, "base {base}, web {count}");
}

#[test]
fn what_the_node_refuses_stays_refused() {
    let mut seen = server();
    seen.add(nr("mount"), &[0; 6]);
    seen.add(nr("seccomp"), &[1, 8, 0, 0, 0, 0]);
    seen.add(nr("socket"), &[38, 5, 0, 0, 0, 0]);
    seen.add(nr("inotify_init"), &[0; 6]);
    for (name, denied) in [("default", 3), ("strict", 4), ("compat", 3)] {
        let node = shipped(name).unwrap();
        let least = minimal("least", &seen, &node);
        let by_node = check(&node, &seen).unwrap();
        let by_least = check(&least, &seen).unwrap();
        let kinds = |denials: &[seccomp_profiles::compare::Denial]| -> Vec<Kind> {
            denials.iter().map(|denial| denial.kind).collect()
        };
        assert_eq!(kinds(&by_node), kinds(&by_least), "{name}");
        assert_eq!(by_node.len(), denied, "{name}: {by_node:?}");
    }
    let by_default = check(&shipped("default").unwrap(), &seen).unwrap();
    let lines: Vec<String> = by_default.iter().map(ToString::to_string).collect();
    assert!(
        lines[0].starts_with("socket(family 38, type 5, protocol 0): errno(EAFNOSUPPORT) by default/wrong-arguments-family/1: VSOCK"),
        "{lines:?}"
    );
    assert!(
        lines.contains(
            &"mount: errno(EPERM) by default/refused/1: the mount table is the agent's".to_owned()
        ),
        "{lines:?}"
    );
}

#[test]
fn a_difference_is_a_line() {
    let (strict, default) = (shipped("strict").unwrap(), shipped("default").unwrap());
    assert!(diff(&strict, &strict).is_empty());
    let lines: Vec<String> = diff(&strict, &default)
        .iter()
        .map(ToString::to_string)
        .collect();
    for line in [
        "+ inotify_init: allow, was errno(ENOSYS)",
        "+ socket(family 2, type 2, protocol 1): allow, was errno(EPROTONOSUPPORT)",
        "+ setsockopt(level 6, option 13): allow, was errno(ENOPROTOOPT)",
        "~ mlockall: allow, was errno(EPERM)",
    ] {
        let line = line.replace("~ mlockall", "+ mlockall");
        assert!(lines.contains(&line), "{line} is missing: {lines:#?}");
    }
    // Each is within the next: nothing is lost.
    assert!(!lines.iter().any(|line| line.starts_with('-')), "{lines:?}");
    let back = diff(&default, &strict);
    assert!(back.iter().any(|d| d.to_string().starts_with("- splice: ")));
}

#[test]
fn toml_is_read_back() {
    let mut all: Vec<Profile> = seccomp_profiles::shipped_names()
        .map(|name| shipped(name).unwrap())
        .collect();
    for name in WORKLOADS {
        all.push(minimal("web", &server(), &shipped(name).unwrap()));
    }
    let mut odd = shipped("pause").unwrap();
    odd.description = "a \"quoted\" \\ line\nand \u{1}another".to_owned();
    all.push(odd);
    for profile in all {
        let text = export::toml(&profile);
        assert_eq!(Profile::from_toml(&text).unwrap(), profile, "{text}");
    }
}

#[test]
fn a_file_that_is_no_profile_is_named() {
    let dir = std::env::temp_dir().join(format!("profile-file-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let path = dir.join("web.toml");
    let wrong = |text: &str| {
        std::fs::write(&path, text).unwrap();
        let error = file::read(&path).unwrap_err().to_string();
        assert!(
            error.contains(path.to_str().unwrap()) && !error.contains('\n'),
            "{error}"
        );
        error
    };
    let node = minimal("web", &server(), &shipped("default").unwrap());
    let text = export::toml(&node);
    assert!(wrong(&text.replace("\"accept4\"", "\"accept5\"")).contains("\"accept5\""));
    assert!(wrong(&text.replacen("reason", "raison", 1)).contains("raison"));
    assert!(wrong(&"#".repeat(1 << 21)).contains("longer than"));
    std::fs::write(&path, &text).unwrap();
    assert_eq!(file::read(&path).unwrap(), node);
    std::fs::remove_dir_all(&dir).unwrap();
    let gone = file::read(Path::new("/nowhere/x.toml")).unwrap_err();
    assert!(gone.to_string().contains("/nowhere/x.toml"), "{gone}");
}

/// What `casemate why` says to put into a file allows that kind of call and no other.
#[test]
fn what_a_profile_lacks_can_be_put_before_its_groups() {
    let mut least = minimal("web", &server(), &shipped("default").unwrap());
    least.left_out.clear();
    let text = export::toml(&least);
    for (name, args, others) in [
        ("symlinkat", [0; 6], [1; 6]),
        ("socket", [1, 2, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]),
        ("socket", [16, 3, 0, 0, 0, 0], [16, 3, 1, 0, 0, 0]),
        ("setsockopt", [3, 1, 9, 7, 4, 0], [3, 1, 8, 7, 4, 0]),
        ("ioctl", [3, 0x5413, 0, 0, 0, 0], [3, 0x5410, 0, 0, 0, 0]),
        ("prctl", [15, 7, 0, 0, 0, 0], [16, 7, 0, 0, 0, 0]),
    ] {
        let kind = Kind::of(nr(name), &args);
        let lines = export::lines_to_allow(&kind);
        let wider = text.replacen("[[group]]", &format!("{lines}\n[[group]]"), 1);
        let wider = Profile::from_toml(&wider).unwrap();
        let other = if name == "symlinkat" { "symlink" } else { name };
        let call = |profile: &Profile, name: &str, args| {
            runs(reference::decide(
                profile,
                &SeccompData::x86_64(nr(name), args),
            ))
        };
        assert!(!call(&least, name, args), "{kind}");
        assert!(call(&wider, name, args), "{kind}: {lines}");
        assert!(!call(&wider, other, others), "beside {kind}: {lines}");
        let denied = check(&wider, &server()).unwrap();
        assert!(denied.is_empty(), "{denied:?}");
        let differ = diff(&least, &wider).len();
        assert_eq!(differ, 1, "{kind}");
    }
}

/// `exported` lets run what `profile` lets run, and refuses whole calls as it does.
fn same(
    profile: &Profile,
    exported: &OciSeccomp,
    calls: &[SeccompData],
) -> Result<(), TestCaseError> {
    let json = serde_json::to_string(exported).unwrap();
    let read: OciSeccomp = serde_json::from_str(&json).unwrap();
    let compiled = oci::compile(&read).unwrap();
    prop_assert!(compiled.warnings.is_empty(), "{:?}", compiled.warnings);
    for data in calls {
        let own = reference::decide(profile, data);
        let theirs = verdict(&compiled.program, data);
        prop_assert_eq!(runs(own), runs(theirs), "{:x?}: {} {}", data, own, theirs);
        let named = common::conditions(profile, table::name(data.nr).unwrap_or_default());
        if named.is_empty() && !runs(own) {
            prop_assert_eq!(own, theirs, "{:x?}", data);
        }
    }
    Ok(())
}

#[test]
fn exports_are_the_profile() {
    for name in WORKLOADS {
        let node = shipped(name).unwrap();
        let least = minimal("web", &server(), &node);
        // compat allows all requests of ioctl but some, for which there are no words.
        let whole = export::oci(&node).map_err(|error| error.to_string());
        assert_eq!(whole.is_ok(), name != "compat", "{whole:?}");
        let profiles = if whole.is_ok() {
            vec![node, least]
        } else {
            vec![least]
        };
        for profile in profiles {
            let calls = calls(&profile);
            same(&profile, &export::oci(&profile).unwrap(), &calls).unwrap();
            let resource = export::resource(&profile, "web", Some("shop")).unwrap();
            let json = serde_json::to_value(&resource).unwrap();
            assert_eq!(
                json["apiVersion"],
                "security-profiles-operator.x-k8s.io/v1beta1"
            );
            assert_eq!(json["kind"], "SeccompProfile");
            assert_eq!(json["metadata"]["namespace"], "shop");
            assert_eq!(json["spec"]["defaultAction"], "SCMP_ACT_ERRNO");
            assert!(json["spec"].get("defaultErrnoRet").is_none());
            let spec: OciSeccomp = serde_json::from_value(json["spec"].clone()).unwrap();
            // Numbers that are no call have no name to say their answer by.
            let named = |data: &&SeccompData| table::name(data.nr).is_some();
            let calls: Vec<SeccompData> = calls.iter().filter(named).copied().collect();
            same(&profile, &spec, &calls).unwrap();
        }
    }
}

#[test]
fn what_oci_has_no_words_for_is_an_error() {
    let text = "name = \"x\"\ndescription = \"\"\ndefault = \"errno(ENOSYS)\"\n\
                [[group]]\nname = \"some\"\naction = \"allow\"\n\
                [[group.rule]]\nsyscalls = [\"ioctl\"]\n\
                args = [{ index = 1, op = \"lt\", value = 5 }]\nreason = \"r\"\n";
    let profile = Profile::from_toml(text).unwrap();
    let error = export::oci(&profile).unwrap_err().to_string();
    assert!(
        error.contains("\"some\"") && error.contains("ioctl"),
        "{error}"
    );
}

fn an_observation() -> impl Strategy<Value = Observed> {
    let call = (0..table::SYSCALLS.len(), any::<[u64; 6]>(), 0usize..400);
    prop::collection::vec((call, any::<bool>()), 0..40).prop_map(|calls| {
        let default = shipped("default").unwrap();
        let mut seen = Observed::default();
        for ((at, args, pick), near) in calls {
            let number = table::SYSCALLS[at].0;
            // Half of them on what the profile asks about.
            let known = near.then(|| calls_of(&default, number));
            let args = known.map_or(args, |calls| calls[pick % calls.len()].args);
            seen.add(number, &args);
        }
        seen
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_least_profile_is_within_the_nodes(seen in an_observation(), node in 0usize..3) {
        let node = shipped(WORKLOADS[node]).unwrap();
        let least = minimal("least", &seen, &node);
        let program = compile(&least).unwrap();
        for &(number, _) in table::SYSCALLS {
            for data in common::some_calls_of(&least, number, 200)
                .into_iter()
                .chain(common::some_calls_of(&node, number, 200))
            {
                let (own, nodes) = (verdict(&program, &data), reference::decide(&node, &data));
                prop_assert!(!runs(own) || runs(nodes), "{:x?}: {}, node {}", data, own, nodes);
            }
        }
        for kind in seen.kinds() {
            let data = kind.call();
            prop_assert_eq!(
                runs(verdict(&program, &data)),
                runs(reference::decide(&node, &data)),
                "{}", kind
            );
        }
        let some: Vec<SeccompData> = table::SYSCALLS
            .iter()
            .flat_map(|(number, _)| common::some_calls_of(&least, *number, 60))
            .collect();
        same(&least, &export::oci(&least).unwrap(), &some)?;
        prop_assert_eq!(Profile::from_toml(&export::toml(&least)).unwrap(), least);
    }
}

//! No field of the specification is ignored in silence.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use std::collections::BTreeSet;

use casemate_spec::coverage::{present, row};
use casemate_spec::{How, RULES, coverage, load, tighten};
use common::{CONTEXT, CTR_1_6, MAXIMAL};
use serde_json::{Map, Value};

/// The maximal configuration sets every field that oci-spec has: `Debug`
/// shows one that it doesn't as `None`. A new version of oci-spec with a new
/// field fails here until the field has a row.
#[test]
fn the_maximal_configuration_sets_every_field_of_linux() {
    let mut root: Value = serde_json::from_slice(MAXIMAL).unwrap();
    for namespace in root["linux"]["namespaces"].as_array_mut().unwrap() {
        namespace["path"] = "/run/netns/a".into();
    }
    // oci-spec spells these otherwise than the specification; they are
    // refused from the document itself.
    let rdt = root["linux"]["intelRdt"].as_object_mut().unwrap();
    for (right, wrong) in [("enableCMT", "enableCmt"), ("enableMBM", "enableMbm")] {
        let value = rdt.remove(right).unwrap();
        rdt.insert(wrong.into(), value);
    }
    let spec: oci_spec::runtime::Spec = serde_json::from_value(root.clone()).unwrap();
    let shown = format!("{spec:#?}");
    let unset: Vec<&str> = shown
        .lines()
        .map(str::trim)
        .filter(|l| l.contains(": None"))
        .collect();
    // Sections of other platforms, and two that oci-spec itself calls errors.
    let expected = [
        "solaris",
        "windows",
        "vm",
        "zos",
        "uid_mappings",
        "gid_mappings",
    ];
    assert_eq!(unset, expected.map(|f| format!("{f}: None,")));

    // And nothing in it is lost on the way: what oci-spec writes has all.
    let written = serde_json::to_value(&spec).unwrap();
    assert_eq!(present(&root), present(&written));
}

#[test]
fn every_field_of_the_maximal_configuration_has_a_row_and_every_row_a_field() {
    let root: Value = serde_json::from_slice(MAXIMAL).unwrap();
    let paths = present(&root);
    let mut used = BTreeSet::new();
    for path in &paths {
        used.insert(
            row(path)
                .unwrap_or_else(|| panic!("{path} has no row"))
                .field,
        );
    }
    let platforms = ["solaris", "windows", "freebsd", "vm", "zos"];
    let all: BTreeSet<&str> = coverage()
        .iter()
        .map(|r| r.field)
        .filter(|f| !platforms.contains(f))
        .collect();
    assert_eq!(used, all);
    for row in coverage() {
        assert_eq!(
            coverage().iter().filter(|r| r.field == row.field).count(),
            1,
            "{} is there twice",
            row.field
        );
        assert!(
            row.how != How::Refused || row.rule.is_some(),
            "{} is refused for no reason",
            row.field
        );
    }
}

/// The value of `field` in `maximal`, put alone into `base`.
fn graft(base: &Value, maximal: &Value, field: &str) -> Value {
    fn put(base: &mut Value, maximal: &Value, path: &[&str]) {
        let Some((first, rest)) = path.split_first() else {
            *base = maximal.clone();
            return;
        };
        if !base.is_object() {
            *base = Value::Object(Map::new());
        }
        let key = first.trim_end_matches("[]");
        // A list, or a map with free keys: the whole of it.
        let whole = first.ends_with("[]") || rest.first() == Some(&"*");
        put(
            &mut base[key],
            &maximal[key],
            if whole { &[] } else { rest },
        );
    }
    let mut changed = base.clone();
    put(&mut changed, maximal, &field.split('.').collect::<Vec<_>>());
    changed
}

/// The table isn't a promise but what happens.
#[test]
fn each_row_says_what_is_done() {
    let base: Value = serde_json::from_slice(CTR_1_6).unwrap();
    let mut maximal: Value = serde_json::from_slice(MAXIMAL).unwrap();
    for platform in ["solaris", "windows", "freebsd", "vm", "zos"] {
        maximal[platform] = serde_json::json!({ "kernel": { "path": "/k" }, "x": "y" });
    }
    // Refused by value, and tested with the rules.
    maximal["process"]["selinuxLabel"] = "".into();
    maximal["linux"]["mountLabel"] = "".into();
    maximal["linux"]["personality"]["flags"] = serde_json::json!([]);
    let idmapped = maximal["mounts"].clone();
    let config = common::config("[hooks]\nallow = [\"/bin/hook\"]\n");
    for row in coverage() {
        maximal["mounts"] = idmapped.clone();
        let maps = row.field.contains("idMappings");
        if !maps {
            maximal["mounts"][0]
                .as_object_mut()
                .unwrap()
                .retain(|k, _| !k.ends_with("Mappings"));
        }
        let bytes = match row.field {
            f if f.starts_with("linux.seccomp.listener") => graft(&base, &maximal, f),
            "linux.seccomp" => {
                let mut quiet = maximal.clone();
                quiet["linux"]["seccomp"]
                    .as_object_mut()
                    .unwrap()
                    .retain(|k, _| !k.starts_with("listener"));
                graft(&base, &quiet, "linux.seccomp")
            }
            // Only a time namespace has clocks of its own.
            "linux.timeOffsets.*" => {
                let mut timed = graft(&base, &maximal, row.field);
                let namespaces = timed["linux"]["namespaces"].as_array_mut().unwrap();
                namespaces.push(serde_json::json!({ "type": "time" }));
                timed
            }
            // A policy must come along.
            f if f.starts_with("process.scheduler") => {
                let mut asked = maximal.clone();
                if row.how != How::Refused {
                    let scheduler = asked["process"]["scheduler"].as_object_mut();
                    scheduler.unwrap().remove("flags");
                }
                graft(&base, &asked, "process.scheduler")
            }
            // A domain must come along.
            f if f.starts_with("linux.personality") => graft(&base, &maximal, "linux.personality"),
            f if f.starts_with("process.consoleSize") => {
                graft(&base, &maximal, "process.consoleSize")
            }
            // A mapping is the pod's, and the pod's needs a namespace.
            f if maps => {
                let both = graft(&base, &maximal, "linux.uidMappings");
                let mut both = graft(&both, &maximal, "linux.gidMappings");
                let list = both["linux"]["namespaces"].as_array_mut().unwrap();
                list.push(serde_json::json!({"type": "user", "path": "/run/u"}));
                graft(&both, &maximal, f)
            }
            f => graft(&base, &maximal, f),
        };
        let bytes = serde_json::to_vec(&bytes).unwrap();
        let result = load(&bytes).map(|l| tighten(l, &config, &CONTEXT));
        match (row.how, result) {
            (How::Refused, Ok(Err(refusal))) => {
                assert!(RULES.iter().any(|r| r.id == refusal.rule));
                let text = refusal.to_string();
                assert!(
                    text.starts_with("casemate: ") && !text.contains('\n'),
                    "{text}"
                );
                assert_eq!(Some(refusal.rule), row.rule.map(|r| r.id), "{}", row.field);
            }
            (How::Applied | How::Stricter, Ok(Ok(tightened))) => {
                // What asks for nothing is no field that is set.
                let nothing = [
                    "process.selinuxLabel",
                    "linux.mountLabel",
                    "linux.personality.flags",
                ];
                assert!(
                    nothing.contains(&row.field)
                        || tightened.decisions.iter().any(|d| d.field == row.field),
                    "{}: {:?}",
                    row.field,
                    tightened.decisions
                );
            }
            (How::IgnoredWithWarning, Ok(Ok(tightened))) => {
                assert!(
                    tightened.warnings.iter().any(|w| w.starts_with(row.field)),
                    "{}",
                    row.field
                );
            }
            (how, result) => panic!("{} is {how} by its row, but: {result:?}", row.field),
        }
    }
}

#[test]
fn a_field_nobody_knows_is_a_warning() {
    let bytes = common::with(
        CTR_1_6,
        &[
            ("/linux/quantum", serde_json::json!({"a": 1})),
            ("/process/user/shoe", 43.into()),
            ("/later", "x".into()),
        ],
    );
    let tightened = common::accepted(&bytes);
    for field in ["linux.quantum", "process.user.shoe", "later"] {
        assert!(
            tightened
                .warnings
                .iter()
                .any(|w| w.starts_with(&format!("{field}: "))),
            "{field}"
        );
        assert!(
            tightened
                .decisions
                .iter()
                .any(|d| d.field == field && d.how == How::IgnoredWithWarning),
            "{field}"
        );
    }
}

//! Nothing that a client can write makes this crate panic.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use std::fs;
use std::path::Path;

use casemate_spec::{Config, load, load_process, tighten, tighten_process};
use common::{CONTEXT, CRI_CONTAINER, CRI_PAUSE, CTR_1_6, MAXIMAL};
use proptest::prelude::*;
use serde_json::Value;

/// One line, or `None` when the document is accepted.
fn outcome(bytes: &[u8]) -> Option<String> {
    match load(bytes) {
        Err(e) => Some(e.to_string()),
        Ok(loaded) => tighten(loaded, &Config::default(), &CONTEXT)
            .err()
            .map(|e| e.to_string()),
    }
}

#[test]
fn each_seed_is_an_error_of_one_line() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/seeds");
    let mut seeds = 0;
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let text = outcome(&fs::read(&path).unwrap())
            .unwrap_or_else(|| panic!("{} is accepted", path.display()));
        assert!(
            !text.contains(char::is_control) && text.len() < 600,
            "{}: {text}",
            path.display()
        );
        seeds += 1;
    }
    assert!(seeds > 50, "{seeds} seeds");
}

/// Places of a document, in a fixed order.
fn places(value: &Value, here: String, all: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (k, v) in map {
                places(
                    v,
                    format!("{here}/{}", k.replace('~', "~0").replace('/', "~1")),
                    all,
                );
            }
        }
        Value::Array(list) => list
            .iter()
            .enumerate()
            .for_each(|(i, v)| places(v, format!("{here}/{i}"), all)),
        _ => {}
    }
    all.push(here);
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        "[/.a-z:=\\-]{0,24}".prop_map(Value::from),
        prop::collection::vec("[/.a-z=]{0,8}".prop_map(Value::from), 0..3).prop_map(Value::from),
        Just(serde_json::json!({})),
        Just(serde_json::json!({"path": "/x", "type": "c", "options": ["rbind"], "names": [1]})),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_documents_are_answered(
        base in prop::sample::select(vec![CTR_1_6, CRI_PAUSE, CRI_CONTAINER, MAXIMAL]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), value()), 1..5),
    ) {
        let mut root: Value = serde_json::from_slice(base).unwrap();
        for (at, new) in changes {
            let mut all = Vec::new();
            places(&root, String::new(), &mut all);
            if let Some(place) = root.pointer_mut(&all[at.index(all.len())]) {
                *place = new;
            }
        }
        let bytes = serde_json::to_vec(&root).unwrap();
        if let Some(text) = outcome(&bytes) {
            prop_assert!(!text.contains(char::is_control), "{text}");
        } else {
            // What is accepted holds what the launch relies on.
            let tightened = tighten(load(&bytes).unwrap(), &Config::default(), &CONTEXT).unwrap();
            let allow = Config::default().capabilities.allow;
            prop_assert!(tightened.process.no_new_privs && !tightened.process.args.is_empty());
            prop_assert_eq!(tightened.process.caps.union() & !allow, 0);
            prop_assert!(tightened.process.uid < 65536 && tightened.process.gid < 65536);
            for path in tightened.mounts.iter().map(|m| &m.destination).chain(&tightened.masked_paths) {
                prop_assert!(path.starts_with('/') && !path.split('/').any(|p| p == ".."), "{path}");
            }
            if let Some(process) = root.get("process") {
                let loaded = load_process(&serde_json::to_vec(process).unwrap()).unwrap();
                let exec = tighten_process(loaded, &tightened, &Config::default(), false).unwrap();
                prop_assert_eq!(exec.caps.union() & !tightened.process.caps.bounding, 0);
            }
        }
    }

    #[test]
    fn cut_and_flipped_bytes_are_answered(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut bytes = CRI_CONTAINER.to_vec();
        let i = at.index(bytes.len());
        if cut { bytes.truncate(i) } else { bytes[i] = byte }
        let _ = outcome(&bytes);
        let _ = load_process(&bytes);
    }
}

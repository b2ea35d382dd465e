//! Specifications as containerd writes them, and changes to them.
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeSet;

use casemate_spec::{Config, Context, Lsm, RULES, Refusal, Tightened, load, tighten};
use serde_json::Value;

/// Rules that begin so have their cases in test programs of their own.
pub const ELSEWHERE: [&str; 5] = [
    "annotation-",
    "exec-",
    "host-path",
    "image-",
    "network-list",
];

/// Fails unless `seen` are all rules that begin with `prefix`.
pub fn all_of(prefix: &str, seen: &BTreeSet<&str>) {
    assert!(ELSEWHERE.contains(&prefix));
    let all = RULES.iter().map(|r| r.id).filter(|r| r.starts_with(prefix));
    assert_eq!(*seen, all.collect(), "every rule has a case");
}

pub const CTR_1_6: &[u8] = include_bytes!("../data/ctr-1.6.json");
pub const CTR_2_1: &[u8] = include_bytes!("../data/ctr-2.1.json");
pub const CRI_PAUSE: &[u8] = include_bytes!("../data/cri-pause.json");
pub const CRI_CONTAINER: &[u8] = include_bytes!("../data/cri-container.json");
pub const MAXIMAL: &[u8] = include_bytes!("../data/maximal.json");

pub const CONTEXT: Context<'static> = Context {
    id: "c1",
    apparmor: Lsm::Missing,
    selinux: Lsm::Missing,
    devices: &[],
    pod: None,
    profiles: &[],
};

/// `bytes` with the value at each pointer (RFC 6901) replaced or added.
pub fn with(bytes: &[u8], changes: &[(&str, Value)]) -> Vec<u8> {
    let mut root: Value = serde_json::from_slice(bytes).unwrap();
    for (pointer, value) in changes {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        match root
            .pointer_mut(parent)
            .unwrap_or_else(|| panic!("{parent} is not there"))
        {
            Value::Object(map) => {
                map.insert(key.to_owned(), value.clone());
            }
            Value::Array(list) if key == "-" => list.push(value.clone()),
            Value::Array(list) => list[key.parse::<usize>().unwrap()] = value.clone(),
            other => panic!("{parent} is {other}"),
        }
    }
    serde_json::to_vec(&root).unwrap()
}

pub fn policy(bytes: &[u8], config: &Config) -> Result<Tightened, Refusal> {
    tighten(load(bytes).unwrap(), config, &CONTEXT)
}

/// Under the default configuration.
pub fn accepted(bytes: &[u8]) -> Tightened {
    policy(bytes, &Config::default()).unwrap()
}

/// Under the default configuration.
pub fn refusal(bytes: &[u8]) -> Refusal {
    policy(bytes, &Config::default()).unwrap_err()
}

pub fn config(text: &str) -> Config {
    Config::parse("test.toml".as_ref(), text).unwrap()
}

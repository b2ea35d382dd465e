//! What must not leave the node: values that workloads were given. What is
//! gathered has none of them by its making; this looks once more.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

/// What stands in place of a value.
pub const REDACTED: &str = "[redacted]";
/// Shorter values are words that anything may have.
const SHORTEST: usize = 8;
/// A specification that is longer is not read.
const LONGEST: u64 = 16 * 1024 * 1024;
/// Annotations that are names and ids, which a report is about.
const NAMES: [&str; 3] = [
    "io.kubernetes.cri.",
    "io.kubernetes.container.",
    "casemate.io/",
];
/// Those of them that are lists of places.
const LISTS: [&str; 2] = ["casemate.io/egress", "casemate.io/ingress"];
/// Keys whose values are left out wherever they are.
const KEYS: [&str; 6] = [
    "argv",
    "args",
    "env",
    "annotations",
    "annotation",
    "password",
];

/// Values that a report must not have.
#[derive(Debug, Default)]
pub struct Secrets(BTreeSet<String>);

impl Secrets {
    fn add(&mut self, value: &Value) {
        let Some(text) = value.as_str() else { return };
        if text.len() >= SHORTEST && !text.starts_with('/') {
            self.0.insert(text.to_owned());
        }
    }

    /// Those of a container's specification; what can't be read has been seen by
    /// nobody here.
    pub fn of_bundle(&mut self, bundle: &Path) {
        let path = bundle.join("config.json");
        let is_small = fs::symlink_metadata(&path).is_ok_and(|m| m.is_file() && m.len() <= LONGEST);
        let text = is_small.then(|| fs::read(&path).ok()).flatten();
        if let Some(spec) = text.and_then(|t| serde_json::from_slice::<Value>(&t).ok()) {
            self.of_specification(&spec);
        }
    }

    fn of_specification(&mut self, spec: &Value) {
        let process = &spec["process"];
        for arg in process["args"].as_array().into_iter().flatten() {
            self.add(arg);
        }
        for pair in process["env"].as_array().into_iter().flatten() {
            let value = pair.as_str().and_then(|pair| pair.split_once('='));
            if let Some((_, value)) = value {
                self.add(&value.into());
            }
        }
        for (key, value) in spec["annotations"].as_object().into_iter().flatten() {
            // Rules of the guard are called after their entries.
            if LISTS.contains(&key.as_str()) {
                let text = value.as_str().unwrap_or_default();
                for entry in text.split([',', ' ', '\n']) {
                    self.add(&entry.into());
                }
            }
            if !NAMES.iter().any(|prefix| key.starts_with(prefix)) {
                self.add(value);
            }
        }
    }

    /// The text without them.
    pub fn scrub(&self, text: &str) -> String {
        // The longest first: one may be a part of another.
        let mut all: Vec<&String> = self.0.iter().collect();
        all.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        all.into_iter().fold(text.to_owned(), |text, secret| {
            match text.contains(secret.as_str()) {
                true => text.replace(secret.as_str(), REDACTED),
                false => text,
            }
        })
    }
}

/// Takes out what keys say that it is a workload's.
pub fn strip(value: &mut Value) {
    match value {
        Value::Object(all) => {
            for (key, value) in all {
                match KEYS.contains(&key.as_str()) && !value.is_null() {
                    true => *value = REDACTED.into(),
                    false => strip(value),
                }
            }
        }
        Value::Array(all) => all.iter_mut().for_each(strip),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_of_a_specification_are_found_and_taken_out() {
        let mut secrets = Secrets::default();
        secrets.of_specification(&json!({
            "process": { "args": ["sh", "-c", "echo hunter2secret"], "env": ["A=alongvalue", "B=1"] },
            "annotations": { "x/y": "annotated-value", "casemate.io/egress": "none, 192.0.2.7:443", "io.kubernetes.cri.sandbox-id": "0123456789ab" },
        }));
        let text = "a alongvalue b echo hunter2secret c annotated-value d 0123456789ab 1 sh e 192.0.2.7:443";
        assert_eq!(
            secrets.scrub(text),
            "a [redacted] b [redacted] c [redacted] d 0123456789ab 1 sh e [redacted]"
        );
    }

    #[test]
    fn keys_of_workloads_are_taken_out_at_any_depth() {
        let mut value = json!({ "a": [{ "argv": ["x"], "kind": "exec" }], "env": { "k": "v" } });
        strip(&mut value);
        assert_eq!(
            value,
            json!({ "a": [{ "argv": REDACTED, "kind": "exec" }], "env": REDACTED })
        );
    }
}

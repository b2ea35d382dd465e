//! The configuration as a JSON schema, made of what its types accept: the
//! defaults give keys and kinds, and what a wrong word is answered gives the words.

use serde_json::{Map, Value, json};

use super::Config;

/// No word that anything accepts.
const WRONG: &str = "no such word";

/// The schema (JSON Schema, draft 2020-12).
#[must_use]
pub fn schema() -> Value {
    let defaults = serde_json::to_value(Config::default()).unwrap_or_default();
    let mut schema = object(&defaults, &mut Vec::new());
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!("/etc/casemate/config.toml");
    schema
}

fn object(defaults: &Value, path: &mut Vec<String>) -> Value {
    let mut properties = Map::new();
    for (key, value) in defaults.as_object().into_iter().flatten() {
        path.push(key.clone());
        let mut property = match value {
            Value::Object(_) => object(value, path),
            Value::Bool(_) => json!({"type": "boolean"}),
            Value::Number(_) => json!({"type": "integer", "minimum": 0, "maximum": u32::MAX}),
            Value::Array(_) => json!({"type": "array", "items": word(path, true)}),
            _ => word(path, false),
        };
        if !value.is_object() && !value.is_null() {
            property["default"] = value.clone();
        }
        properties.insert(key.clone(), property);
        path.pop();
    }
    json!({"type": "object", "additionalProperties": false, "properties": properties})
}

/// A text, and which ones if not all.
fn word(path: &[String], within_list: bool) -> Value {
    let leaf = if within_list {
        json!([WRONG])
    } else {
        json!(WRONG)
    };
    let document = path
        .iter()
        .rev()
        .fold(leaf, |value, key| json!({ key: value }));
    let said = match serde_json::from_value::<Config>(document) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    // Of serde's "unknown variant `x`, expected one of `a`, `b`": the quoted.
    let words: Vec<&str> = match said.split_once(", expected ") {
        Some((_, words)) => words.split('`').skip(1).step_by(2).collect(),
        None => Vec::new(),
    };
    if words.is_empty() {
        json!({"type": "string"})
    } else {
        json!({"type": "string", "enum": words})
    }
}

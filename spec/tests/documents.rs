//! The pages of `docs/` that are made of tables in the code.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

use std::fs;
use std::path::Path;

use casemate_spec::{FAILURES, RULES, TIGHTENINGS, coverage, document};

/// Set to write the pages instead of comparing them: `make docs-tables`.
const WRITE: &str = "CASEMATE_WRITE_DOCS";

#[test]
fn the_pages_are_what_the_code_says() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    for (name, page) in [
        ("oci-coverage.md", document::coverage_page()),
        ("refusals.md", document::refusals_page()),
        ("config.schema.json", schema()),
    ] {
        let path = docs.join(name);
        if std::env::var_os(WRITE).is_some() {
            fs::write(&path, &page).unwrap();
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == page,
            "docs/{name} is not what the code says: run `make docs-tables` and commit it"
        );
    }
}

/// All of a directory's sources as one text, strings over several lines as the compiler
/// reads them.
fn sources(dir: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            text += &sources(&path);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let source = fs::read_to_string(&path).unwrap();
            let mut parts = source.split("\\\n");
            text += parts.next().unwrap_or_default();
            text.extend(parts.map(str::trim_start));
        }
    }
    text
}

#[test]
fn what_fails_is_told_in_these_words() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let said = sources(&root.join("shim/src")) + &sources(&root.join("sandbox-agent/src"));
    for row in FAILURES {
        // A name may stand between.
        let parts = row.words.split("{}");
        for part in parts {
            assert!(said.contains(part), "nobody says {part:?}");
        }
    }
}

fn schema() -> String {
    serde_json::to_string_pretty(&casemate_spec::config::schema()).unwrap() + "\n"
}

#[test]
fn the_schema_knows_kinds_and_words() {
    let schema = casemate_spec::config::schema();
    let at = |path: &str| {
        schema
            .pointer(&path.replace(':', "/properties/"))
            .unwrap()
            .clone()
    };
    assert_eq!(
        at(":profile")["enum"],
        serde_json::json!(["strict", "default", "compat"])
    );
    assert_eq!(
        at(":exec:policy")["enum"],
        serde_json::json!(["deny", "record", "allow"])
    );
    assert_eq!(at(":annotations:allow")["items"]["enum"][0], "profile");
    assert_eq!(at(":ids:base")["type"], "integer");
    assert_eq!(at(":sandbox:agent_path")["type"], "string");
    assert_eq!(at(":sandbox")["additionalProperties"], false);
    assert!(at(":host_paths:allow")["items"]["enum"].is_null());
}

#[test]
fn every_row_is_on_its_page() {
    let (fields, rules) = (document::coverage_page(), document::refusals_page());
    for row in coverage() {
        assert_eq!(
            fields.matches(&format!("| `{}`", row.field)).count(),
            1,
            "{}",
            row.field
        );
    }
    for rule in RULES {
        assert_eq!(
            rules.matches(&format!("| `{}` |", rule.id)).count(),
            1,
            "{}",
            rule.id
        );
    }
    for row in TIGHTENINGS {
        // What is changed is what the other page says can be.
        let field = format!("| `{}` |", row.field);
        assert!(rules.contains(&field), "{}", row.field);
        let known = |row_of: &casemate_spec::Coverage| row_of.field.starts_with(row.field);
        assert!(coverage().iter().any(known), "{}", row.field);
    }
    for page in [fields, rules] {
        for line in page.lines().filter(|l| l.starts_with('|')) {
            let columns = line.replace("\\|", "").matches('|').count();
            assert!((4..=6).contains(&columns), "{line}");
        }
    }
}

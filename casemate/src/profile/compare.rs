//! `casemate profile diff`, `check`, `list` and `show`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use seccomp_profiles::node::{self, WORKLOADS};
use seccomp_profiles::{Profile, export, shipped};
use serde_json::{Value, json};

use super::export::in_reach;
use super::{print, source};
use crate::error::RunError;

/// Help text.
pub const DIFF_EXAMPLES: &str = "\
Examples:
  casemate profile diff default web          from a shipped profile to one of the node's
  casemate profile diff web ./web-new.toml   and to one in a file

+ is what the second one lets run and the first doesn't, - the other way, ~ what is
refused by both in other words. Exit status: 0 if nothing differs, 1 if something
does, 125 if that can't be told.";

/// Help text.
pub const CHECK_EXAMPLES: &str = "\
Examples:
  casemate profile check web web-0                         a living pod that is learned from
  casemate profile check ./web.toml /var/lib/casemate/learned
  casemate profile check --container app strict a.json b.json

Exit status: 0 if the profile would have refused nothing that was recorded, 1 if
something, 125 if that can't be told.";

type Directory<'a> = &'a dyn Fn() -> Result<PathBuf, RunError>;

/// Which two.
#[derive(Debug, Args)]
pub struct Diff {
    /// A shipped profile, one of the node's, or a file
    first: String,
    /// The other one
    second: String,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints what differs; 1 if something does.
pub fn diff(options: &Diff, directory: Directory<'_>) -> Result<i32, RunError> {
    let first = source::profile(&options.first, directory)?;
    let second = source::profile(&options.second, directory)?;
    let found = seccomp_profiles::diff(&first, &second);
    let text = if options.json {
        let list: Vec<Value> = found
            .iter()
            .map(|d| {
                json!({
                    "call": d.kind.to_string(),
                    "first": d.first.to_string(),
                    "second": d.second.to_string(),
                })
            })
            .collect();
        let all = json!({ "first": first.name, "second": second.name, "differences": list });
        format!("{all}\n")
    } else {
        found.iter().map(|d| format!("{d}\n")).collect()
    };
    print(&text)?;
    Ok(i32::from(!found.is_empty()))
}

/// Which profile, and what it is to let run.
#[derive(Debug, Args)]
pub struct Check {
    /// A shipped profile, one of the node's, or a file
    profile: String,
    /// Pods, or files or directories of recordings
    #[arg(required = true, value_name = "POD|PATH")]
    sources: Vec<String>,
    /// Of this container alone
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints what would have been refused; 1 if something would.
pub fn check(options: &Check, directory: Directory<'_>) -> Result<i32, RunError> {
    let profile = source::profile(&options.profile, directory)?;
    let mut denials = Vec::new();
    let mut looked = 0;
    for source in &options.sources {
        for recording in source::recordings(source)? {
            for (name, container) in recording.containers() {
                if options.container.as_deref().is_some_and(|c| c != name) {
                    continue;
                }
                looked += 1;
                let found = seccomp_profiles::check(&profile, &container.observed())
                    .map_err(|e| RunError::Refused(e.to_string()))?;
                for denial in found {
                    let one = (name.to_owned(), denial);
                    if !denials.contains(&one) {
                        denials.push(one);
                    }
                }
            }
        }
    }
    if looked == 0 {
        return Err(RunError::Refused(
            "check a profile: nothing of such a container was recorded; leave --container out"
                .into(),
        ));
    }
    let text = if options.json {
        let list: Vec<Value> = denials
            .iter()
            .map(|(container, denial)| {
                json!({
                    "container": container,
                    "call": denial.kind.to_string(),
                    "rule": denial.rule.id,
                    "answer": denial.rule.action.to_string(),
                    "reason": denial.rule.reason,
                })
            })
            .collect();
        let all = json!({ "profile": profile.name, "containers": looked, "denials": list });
        format!("{all}\n")
    } else {
        denials
            .iter()
            .map(|(container, denial)| format!("{container}: {denial}\n"))
            .collect()
    };
    print(&text)?;
    Ok(i32::from(!denials.is_empty()))
}

/// How.
#[derive(Debug, Args)]
pub struct List {
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints all profiles; 1 if one of the node's can't be used.
pub fn list(options: &List, directory: &Path) -> Result<i32, RunError> {
    let mut rows: Vec<Value> = Vec::new();
    for name in WORKLOADS {
        let Some(profile) = shipped(name) else {
            continue;
        };
        rows.push(row(&profile, "shipped"));
    }
    let names = node::names(directory).map_err(|e| RunError::Refused(e.to_string()))?;
    let mut bad = false;
    for name in names {
        let path = directory.join(format!("{name}.toml"));
        let read = node::parse(directory, &name);
        match read.and_then(|profile| node::check(&profile, &name, &path).map(|_| profile)) {
            Ok(profile) => rows.push(row(&profile, &path.display().to_string())),
            Err(error) => {
                bad = true;
                rows.push(json!({
                    "name": name,
                    "from": path.display().to_string(),
                    "error": error.to_string(),
                }));
            }
        }
    }
    let text = if options.json {
        format!("{}\n", json!({ "profiles": rows }))
    } else {
        table(&rows)
    };
    print(&text)?;
    Ok(i32::from(bad))
}

fn row(profile: &Profile, from: &str) -> Value {
    json!({
        "name": profile.name,
        "within": profile.within,
        "calls": in_reach(profile),
        "from": from,
        "description": profile.description,
    })
}

fn table(rows: &[Value]) -> String {
    let mut text = String::from("NAME                 WITHIN   CALLS  FROM\n");
    for row in rows {
        let word = |key: &str| row[key].as_str().unwrap_or("-").to_owned();
        let calls = row["calls"].as_u64().map_or("-".into(), |n| n.to_string());
        let _infallible = writeln!(
            text,
            "{:<20} {:<8} {calls:>5}  {}",
            word("name"),
            word("within"),
            row["error"].as_str().unwrap_or(&word("from"))
        );
    }
    text
}

/// Which one.
#[derive(Debug, Args)]
pub struct Show {
    /// A shipped profile, one of the node's, or a file
    profile: String,
}

/// Prints it.
pub fn show(options: &Show, directory: Directory<'_>) -> Result<i32, RunError> {
    let profile = source::profile(&options.profile, directory)?;
    print(&export::toml(&profile))?;
    Ok(0)
}

//! `casemate ps`: living pods and their containers.

use std::io::Write;

use clap::Args;
use serde_json::{Value, json};

use crate::clock;
use crate::error::RunError;
use crate::operator::{self, Pod};
use crate::out;
use crate::paint::plain;

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate ps           pods and containers of this node
  casemate ps -o wide   the same, with profile, user, processes, shim, agent and release
  casemate ps --json    all that their shims say
  casemate ps -q        ids of pods alone, for a script
  for pod in $(casemate ps -q); do casemate posture $pod; done

A pod whose shim doesn't answer within five seconds has the state unknown, and the
reason is told on standard error. A container that has ended has its exit status
behind the state. MEMORY is what the container's cgroup counts, DENIED the calls that
its profile has refused (casemate why has which). Exit status: 0, or 125 if casemate
itself failed.";

/// What to list, and how.
#[derive(Debug, Args)]
pub struct Ps {
    /// As one JSON array
    #[arg(long, conflicts_with = "output")]
    json: bool,
    /// How much of each
    #[arg(short, long, value_name = "HOW")]
    output: Option<Output>,
    /// Only the pods' ids, one a line; no shim is asked
    #[arg(short, long, conflicts_with_all = ["json", "output"])]
    quiet: bool,
}

/// How much is told of each container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// More columns
    Wide,
}

/// Lists them.
pub fn run(options: &Ps) -> Result<i32, RunError> {
    operator::needs_root("ps")?;
    let pods = operator::pods()?;
    if options.quiet {
        let lines: String = pods.iter().map(|pod| plain(&pod.id) + "\n").collect();
        out::say(lines)?;
        return Ok(0);
    }
    let mut found = operator::block_on(async { Ok(operator::inspected(pods).await) })?;
    // One that has ended meanwhile is no living pod, and nothing is wrong with it.
    found.retain(|(pod, said)| said.is_ok() || pod.is_there());
    let text = if options.json {
        let all: Vec<Value> = found.iter().map(|(pod, said)| as_json(pod, said)).collect();
        format!("{}\n", Value::Array(all))
    } else {
        table(&found, options.output == Some(Output::Wide))
    };
    out::say(text)?;
    for (_, said) in found.iter().filter(|_| !options.json) {
        if let Err(error) = said {
            let _lost = writeln!(std::io::stderr(), "casemate: {}", plain(&error.to_string()));
        }
    }
    Ok(0)
}

fn as_json(pod: &Pod, said: &Result<Value, RunError>) -> Value {
    let mut value = match said {
        Ok(value) => value.clone(),
        Err(error) => json!({
            "namespace": pod.namespace, "pod": pod.id, "shim": { "pid": pod.shim },
            "since": pod.since, "error": error.to_string(),
        }),
    };
    if let Some((namespace, name)) = &pod.kubernetes {
        value["kubernetes"] = json!({ "namespace": namespace, "name": name });
    }
    value
}

const COLUMNS: [&str; 9] = [
    "NAMESPACE",
    "POD",
    "CONTAINER",
    "PID",
    "STATE",
    "IDS",
    "MEMORY",
    "DENIED",
    "AGE",
];
const MORE: [&str; 6] = ["PROFILE", "USER", "PROCESSES", "SHIM", "AGENT", "RELEASE"];

/// Cells of [`MORE`]; of no container, the pod's alone.
fn more(pod: &Pod, said: &Value, container: &Value) -> Vec<String> {
    let word = |value: &Value| match value {
        Value::String(text) => plain(text),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let sandbox = &container["sandbox"];
    vec![
        word(&sandbox["profile"]),
        word(&sandbox["user"]),
        word(&sandbox["usage"]["processes"]),
        pod.shim.to_string(),
        word(&said["sandbox"]["agent"]["pid"]),
        word(&said["version"]),
    ]
}

fn table(found: &[(Pod, Result<Value, RunError>)], wide: bool) -> String {
    let head = COLUMNS.iter().chain(MORE.iter().filter(|_| wide));
    let mut rows = vec![head.map(|&name| name.to_owned()).collect::<Vec<_>>()];
    for (pod, said) in found {
        let name = match &pod.kubernetes {
            Some((namespace, name)) => format!("{namespace}/{name} ({})", short(&pod.id)),
            None => short(&pod.id),
        };
        let name = plain(&name);
        let age = age(&pod.since);
        let nothing = Value::Null;
        let (said, silent) = match said {
            Ok(said) => (said, false),
            Err(_) => (&nothing, true),
        };
        let ids = said["sandbox"]["ids"]["root"]
            .as_u64()
            .map_or("-".to_owned(), |first| first.to_string());
        let empty = Vec::new();
        let containers = said["containers"].as_array().unwrap_or(&empty);
        let mut some = false;
        for container in containers.iter().filter(|c| c["pause"] != true) {
            some = true;
            let usage = &container["sandbox"]["usage"]["memory"];
            let mut row = vec![
                pod.namespace.clone(),
                name.clone(),
                short(container["id"].as_str().unwrap_or_default()),
                container["pid"].to_string(),
                state(container),
                ids.clone(),
                usage.as_u64().map_or("-".to_owned(), bytes),
                container["denied"]
                    .as_u64()
                    .map_or("-".to_owned(), |n| n.to_string()),
                age.clone(),
            ];
            if wide {
                row.extend(more(pod, said, container));
            }
            rows.push(row);
        }
        if !some {
            let mut row = vec![pod.namespace.clone(), name];
            row.resize(4, "-".to_owned());
            row.push(if silent { "unknown" } else { "-" }.to_owned());
            row.extend([ids, "-".to_owned(), "-".to_owned(), age]);
            if wide {
                row.extend(more(pod, said, &Value::Null));
            }
            rows.push(row);
        }
    }
    aligned(&rows)
}

/// What a container does: one that has ended with its exit status.
pub fn state(container: &Value) -> String {
    let state = container["state"].as_str().unwrap_or("-");
    match container["exit"].as_u64() {
        Some(status) => format!("{state} ({status})"),
        None if state == "running" && container["paused"] == true => "paused".to_owned(),
        None => plain(state),
    }
}

/// Columns as wide as their widest cell.
pub fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|i| {
            rows.iter()
                .filter_map(|row| row.get(i))
                .map(|cell| cell.chars().count())
                .max()
        })
        .map(Option::unwrap_or_default)
        .collect();
    let mut text = String::new();
    for row in rows {
        let line: String = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}  "))
            .collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// As much of an id as people read.
fn short(id: &str) -> String {
    let is_hash = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    id.chars().take(if is_hash { 13 } else { 64 }).collect()
}

/// A size, as people say it.
#[allow(clippy::cast_precision_loss)]
pub fn bytes(n: u64) -> String {
    let mib = n as f64 / f64::from(1u32 << 20);
    format!("{mib:.1}M")
}

/// How long ago that was, as people say it.
fn age(since: &str) -> String {
    let Some(age) = clock::seconds(since).map(|then| clock::now().saturating_sub(then)) else {
        return "-".to_owned();
    };
    match age {
        0..120 => format!("{age}s"),
        120..7200 => format!("{}m", age / 60),
        7200..172_800 => format!("{}h", age / 3600),
        _ => format!("{}d", age / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_says_what_there_is_to_know_of_it() {
        let of = |state: &str, exit: Value, paused: bool| {
            super::state(&json!({ "state": state, "exit": exit, "paused": paused }))
        };
        assert_eq!(of("running", Value::Null, false), "running");
        assert_eq!(of("running", Value::Null, true), "paused");
        assert_eq!(of("stopped", 137.into(), true), "stopped (137)");
        assert_eq!(of("created", Value::Null, false), "created");
    }

    #[test]
    fn a_pod_that_does_not_answer_keeps_its_row_as_narrow_as_others() {
        let silent = RunError::Refused("a long reason that is not for a column".to_owned());
        let lost = json!({ "sandbox": { "error": "the agent has ended" }, "containers": [] });
        let found = [
            (Pod::of_test("silent"), Err(silent)),
            (Pod::of_test("lost"), Ok(lost)),
        ];
        for wide in [false, true] {
            let text = table(&found, wide);
            assert!(!text.contains("a long reason"), "{text}");
            assert!(!text.contains("null"), "{text}");
            let row = text.lines().find(|line| line.contains("silent"));
            assert!(row.is_some_and(|row| row.contains(" unknown ")), "{text}");
        }
    }

    #[test]
    fn columns_are_aligned_and_lines_have_no_blanks_at_their_end() {
        let rows = [
            vec!["a".into(), "b".into()],
            vec!["long".into(), String::new()],
        ];
        assert_eq!(aligned(&rows), "a     b\nlong\n");
    }
}

//! `casemate ps`: living pods and their containers.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::{Value, json};

use crate::error::{RunError, Step};
use crate::operator::{self, Operator, Pod};

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate ps           pods and containers of this node
  casemate ps --json    the same, with all that their shims say

A shim that doesn't answer within five seconds is listed with the reason.";

/// What to list, and how.
#[derive(Debug, Args)]
pub struct Ps {
    /// As one JSON array
    #[arg(long)]
    json: bool,
}

/// Lists them.
pub fn run(options: &Ps) -> Result<i32, RunError> {
    operator::needs_root("ps")?;
    let pods = operator::pods()?;
    let found = operator::block_on(async {
        let mut found = Vec::new();
        for pod in pods {
            let said = match Operator::connect(&pod).await {
                Ok(shim) => shim.inspect().await,
                Err(error) => Err(error),
            };
            found.push((pod, said));
        }
        Ok(found)
    })?;
    let text = if options.json {
        let all: Vec<Value> = found.iter().map(|(pod, said)| as_json(pod, said)).collect();
        format!("{}\n", Value::Array(all))
    } else {
        table(&found)
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .step("write to", "standard output")?;
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

fn table(found: &[(Pod, Result<Value, RunError>)]) -> String {
    let mut rows = vec![
        [
            "NAMESPACE",
            "POD",
            "CONTAINER",
            "PID",
            "STATE",
            "IDS",
            "MEMORY",
            "DENIED",
            "AGE",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for (pod, said) in found {
        let name = match &pod.kubernetes {
            Some((namespace, name)) => format!("{namespace}/{name} ({})", short(&pod.id)),
            None => short(&pod.id),
        };
        let said = match said {
            Ok(said) => said,
            Err(error) => {
                let why = error.to_string();
                let mut row = vec![pod.namespace.clone(), name, format!("({why})")];
                row.resize(9, "-".to_owned());
                rows.push(row);
                continue;
            }
        };
        let age = age(&pod.since);
        let ids = said["sandbox"]["ids"]["root"].to_string();
        let empty = Vec::new();
        let containers = said["containers"].as_array().unwrap_or(&empty);
        let mut some = false;
        for container in containers.iter().filter(|c| c["pause"] != true) {
            some = true;
            let usage = &container["sandbox"]["usage"]["memory"];
            rows.push(vec![
                pod.namespace.clone(),
                name.clone(),
                short(container["id"].as_str().unwrap_or_default()),
                container["pid"].to_string(),
                container["state"].as_str().unwrap_or("-").to_owned(),
                ids.clone(),
                usage.as_u64().map_or("-".to_owned(), bytes),
                container["denied"]
                    .as_u64()
                    .map_or("-".to_owned(), |n| n.to_string()),
                age.clone(),
            ]);
        }
        if !some {
            let mut row = vec![pod.namespace.clone(), name];
            row.resize(5, "-".to_owned());
            row.extend([ids, "-".to_owned(), "-".to_owned(), age]);
            rows.push(row);
        }
    }
    aligned(&rows)
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

#[allow(clippy::cast_precision_loss)]
fn bytes(n: u64) -> String {
    let mib = n as f64 / f64::from(1u32 << 20);
    format!("{mib:.1}M")
}

/// Seconds since the epoch of an RFC 3339 time in UTC.
fn seconds(text: &str) -> Option<u64> {
    let part = |range: std::ops::Range<usize>| text.get(range)?.parse::<u64>().ok();
    let (year, month, day) = (part(0..4)?, part(5..7)?, part(8..10)?);
    let (hour, minute, second) = (part(11..13)?, part(14..16)?, part(17..19)?);
    // Years that begin on 1 March, so that the odd day comes last.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year.checked_sub(1)?, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    Some((days.checked_sub(719_468)?) * 86_400 + hour * 3_600 + minute * 60 + second)
}

fn age(since: &str) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let Some(age) = seconds(since).map(|then| now.as_secs().saturating_sub(then)) else {
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
    fn a_time_is_read_back() {
        for (text, want) in [
            ("1970-01-01T00:00:00.000000007Z", 0),
            ("2000-02-29T00:00:00.000000007Z", 951_782_400),
            ("2024-02-29T23:59:59.000000007Z", 1_709_251_199),
            ("2024-12-31T23:59:59.000000007Z", 1_735_689_599),
        ] {
            assert_eq!(seconds(text), Some(want), "{text}");
        }
        assert_eq!(seconds("yesterday"), None);
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

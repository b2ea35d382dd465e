//! The table on the terminal, the bars, and the JSON.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::peer::{NAMES, OURS};
use super::phases::{ALONE, AMONG, CREATE_START, EXEC, WHOLE};
use super::samples::{Row, Samples, quantile};

/// What a runtime's column says when it has no figures.
pub type Absent = BTreeMap<&'static str, String>;

/// What a bar is held against.
enum Against {
    /// This runtime's median of the same row.
    Peer(&'static str),
    /// A figure in the row's unit.
    Figure,
}

struct Bar {
    row: &'static str,
    against: Against,
    limit: f64,
}

/// What casemate promises.
const BARS: [Bar; 11] = [
    Bar {
        row: CREATE_START,
        against: Against::Peer("crun"),
        limit: 0.25,
    },
    Bar {
        row: WHOLE,
        against: Against::Peer("crun"),
        limit: 0.25,
    },
    Bar {
        row: EXEC,
        against: Against::Peer("crun"),
        limit: 0.2,
    },
    Bar {
        row: ALONE,
        against: Against::Figure,
        limit: 4.0,
    },
    Bar {
        row: AMONG,
        against: Against::Figure,
        limit: 0.8,
    },
    Bar {
        row: "inside: getpid",
        against: Against::Peer("runc"),
        limit: 1.05,
    },
    Bar {
        row: "inside: open+close",
        against: Against::Peer("runc"),
        limit: 1.2,
    },
    Bar {
        row: "inside: stat",
        against: Against::Peer("runc"),
        limit: 1.05,
    },
    Bar {
        row: "inside: pread",
        against: Against::Peer("runc"),
        limit: 1.05,
    },
    Bar {
        row: "inside: fork+exec",
        against: Against::Peer("runc"),
        limit: 1.05,
    },
    Bar {
        row: "inside: refused call",
        against: Against::Figure,
        limit: 10_000.0,
    },
];

struct Verdict {
    row: &'static str,
    text: String,
    passed: Option<bool>,
    got: Option<f64>,
    limit: f64,
}

fn verdicts(samples: &Samples) -> Vec<Verdict> {
    BARS.iter()
        .map(|bar| {
            let row = samples.row(bar.row);
            let ours = row.and_then(|r| r.median(OURS));
            let (got, what) = match bar.against {
                Against::Figure => (ours, row.map_or("", |r| r.unit.name()).to_owned()),
                Against::Peer(peer) => {
                    let theirs = row.and_then(|r| r.median(peer));
                    let ratio = ours.zip(theirs).map(|(o, t)| o / t);
                    (ratio, format!("x {peer}"))
                }
            };
            let passed = got.map(|got| got <= bar.limit);
            let shown = got.map_or("not measured".to_owned(), |got| format!("{got:.2}"));
            Verdict {
                row: bar.row,
                text: format!("{shown} {what}, bar {}", bar.limit),
                passed,
                got,
                limit: bar.limit,
            }
        })
        .collect()
}

/// Whether every bar was measured and held.
pub fn held(samples: &Samples) -> bool {
    verdicts(samples).iter().all(|v| v.passed == Some(true))
}

fn cell(row: &Row, peer: &str, absent: &Absent) -> String {
    let values = row.of(peer);
    let Some((median, tail)) = quantile(values, 0.5).zip(quantile(values, 0.99)) else {
        return absent
            .get(peer)
            .map_or("failed", |reason| short(reason))
            .to_owned();
    };
    let digits = usize::from(median < 1000.0) + usize::from(median < 10.0);
    let own = format!("{median:.digits$} / {tail:.digits$}");
    match row.median(OURS).filter(|_| peer != OURS && median > 0.0) {
        Some(ours) => format!("{own} ({:.2})", ours / median),
        None => own,
    }
}

fn short(reason: &str) -> &str {
    match reason {
        "not installed" => reason,
        reason if reason.starts_with("left out") => "-",
        _ => "failed",
    }
}

/// One table: median / p99, and in brackets casemate's median through the peer's.
pub fn table(samples: &Samples, absent: &Absent, failures: &[String]) -> String {
    let mut text = format!("{:36} {:>5}", "median / p99 (casemate : peer)", "");
    for name in NAMES {
        text.push_str(&format!(" {name:>24}"));
    }
    text.push('\n');
    for row in &samples.rows {
        text.push_str(&format!("{:36} {:>5}", row.name, row.unit.name()));
        for name in NAMES {
            text.push_str(&format!(" {:>24}", cell(row, name, absent)));
        }
        text.push('\n');
    }
    text.push('\n');
    for verdict in verdicts(samples) {
        let word = match verdict.passed {
            Some(true) => "PASS",
            Some(false) => "FAIL",
            None => "????",
        };
        text.push_str(&format!("{word}  {:36} {}\n", verdict.row, verdict.text));
    }
    for (name, reason) in absent {
        text.push_str(&format!("{name}: {reason}\n"));
    }
    for failure in failures {
        text.push_str(&format!("failed: {failure}\n"));
    }
    text
}

/// The same as data, with every single figure.
pub fn json(samples: &Samples, absent: &Absent, failures: &[String], about: Value) -> Value {
    let rows: Vec<Value> = samples
        .rows
        .iter()
        .map(|row| {
            let runtimes: BTreeMap<&str, Value> = NAMES
                .iter()
                .filter(|name| !row.of(name).is_empty())
                .map(|name| {
                    let values = row.of(name);
                    let ratio = row.median(OURS).zip(row.median(name)).map(|(o, t)| o / t);
                    let figures = json!({
                        "p25": quantile(values, 0.25),
                        "median": quantile(values, 0.5),
                        "p99": quantile(values, 0.99),
                        "count": values.len(),
                        "casemate_to_this": ratio,
                        "values": values,
                    });
                    (*name, figures)
                })
                .collect();
            json!({"name": row.name, "unit": row.unit.name(), "runtimes": runtimes})
        })
        .collect();
    let bars: Vec<Value> = verdicts(samples)
        .into_iter()
        .map(|v| json!({"row": v.row, "got": v.got, "limit": v.limit, "passed": v.passed}))
        .collect();
    json!({
        "about": about,
        "rows": rows,
        "bars": bars,
        "absent": absent,
        "failures": failures,
    })
}

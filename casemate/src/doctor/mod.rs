//! `casemate doctor`: whether this node can run pods, and what to do about what
//! it lacks. It changes nothing.

mod attempt;
mod check;
mod config;
mod containerd;
mod kernel;
mod node;
mod policy;

use std::fmt::Write as _;
use std::path::PathBuf;

use casemate_spec::config::DEFAULT_PATH;
use clap::Args;
use serde_json::{Value, json};

use crate::error::{RunError, one_line};
use crate::install::Places;
use crate::operator;
use crate::out;
use crate::paint::Paint;
use check::{CHECKS, Check, Level, Verdict};
use node::Node;

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate doctor                             the whole node
  casemate doctor --json                      for programs
  casemate doctor --strict                    what is optional or advisory counts, too
  casemate doctor --containerd-config FILE    of another containerd
  casemate doctor --config                    only /etc/casemate/config.toml and its drop-ins
  casemate doctor --config ./config.toml      another file, and config.d beside it

Nothing is changed: what the kernel can do is tried by children that end at once.
docs/doctor.md has all checks. Exit status: 0 if no required check fails, 1 if one
does, 2 with --strict if another does, 125 if casemate itself failed.";

/// Something is wrong with the node.
const UNWELL: i32 = 1;
/// Nothing that is required.
const NOT_PERFECT: i32 = 2;

/// What to look at.
#[derive(Debug, Args)]
pub struct Doctor {
    /// The configuration alone: this file, and config.d beside it
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = DEFAULT_PATH)]
    config: Option<PathBuf>,
    /// As one JSON object
    #[arg(long)]
    json: bool,
    /// Exit with 2 if an optional or advisory check fails
    #[arg(long, conflicts_with = "config")]
    strict: bool,
    #[command(flatten)]
    at: At,
}

/// Where to look, if not at the usual places.
#[derive(Debug, Args)]
pub struct At {
    /// containerd's program [default: the one in PATH, or k3s's or rke2's]
    #[arg(long, value_name = "PROGRAM")]
    containerd: Option<PathBuf>,
    /// containerd's configuration [default: /etc/containerd/config.toml]
    #[arg(long, value_name = "FILE")]
    containerd_config: Option<PathBuf>,
    /// containerd's socket [default: /run/containerd/containerd.sock]
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Name of the runtime handler
    #[arg(long, value_name = "NAME", default_value = "casemate")]
    handler: String,
}

/// Looks, and tells.
pub fn run(options: &Doctor) -> Result<i32, RunError> {
    let (text, status) = match &options.config {
        Some(path) => config::look(path, options.json)?,
        None => whole(options)?,
    };
    out::say(text)?;
    Ok(status)
}

impl At {
    fn places(&self) -> Places {
        Places {
            program: self.containerd.clone(),
            config: self.containerd_config.clone(),
            address: self.address.clone(),
        }
    }
}

type Findings = Vec<(&'static Check, Verdict)>;

fn judge(node: &Node) -> Findings {
    CHECKS
        .iter()
        .map(|check| (check, (check.look)(node)))
        .collect()
}

/// Where casemate's configuration is.
pub fn config_path() -> PathBuf {
    node::config_path()
}

/// The findings, and which releases there are. The caller must have one thread.
pub fn whole_json(at: &At) -> (Value, Value) {
    let node = Node::look(at.places(), &at.handler);
    let programs = match containerd::versions(&node) {
        Ok(both) => json!(both.map(|(path, version)| json!({ "path": path, "version": version }))),
        Err(error) => error.into(),
    };
    let facts = node.containerd.as_ref().map(|facts| {
        let handler = facts
            .effective
            .as_ref()
            .ok()
            .and_then(|e| e.handler(&at.handler));
        json!({
            "program": facts.program, "release": facts.release.text,
            "config": facts.config, "config_exists": facts.config.exists(),
            "handler": handler.map(|h| json!({
                "runtime_type": h.kind, "runtime_path": h.path, "pod_annotations": h.annotations,
            })),
        })
    });
    let releases = json!({
        "casemate": env!("CARGO_PKG_VERSION"),
        "shim_and_agent": programs,
        "containerd": facts.unwrap_or_else(|error| error.to_string().into()),
    });
    (as_json(&judge(&node)), releases)
}

fn whole(options: &Doctor) -> Result<(String, i32), RunError> {
    operator::root_only(
        "doctor",
        "it tries what the kernel can do (--config alone needs none)",
    )?;
    let found = judge(&Node::look(options.at.places(), &options.at.handler));
    let status = status(&found, options.strict);
    let text = match options.json {
        true => format!("{}\n", as_json(&found)),
        false => table(&found, Paint::stdout()),
    };
    Ok((text, status))
}

fn failing(found: &Findings, level: Level) -> usize {
    found
        .iter()
        .filter(|(check, verdict)| check.level == level && matches!(verdict, Verdict::Bad { .. }))
        .count()
}

fn status(found: &Findings, strict: bool) -> i32 {
    if failing(found, Level::Required) > 0 {
        return UNWELL;
    }
    let others = failing(found, Level::Optional) + failing(found, Level::Advisory);
    if strict && others > 0 { NOT_PERFECT } else { 0 }
}

fn as_json(found: &Findings) -> Value {
    let checks: Vec<Value> = found
        .iter()
        .map(|(check, verdict)| {
            let (result, text, mend) = match verdict {
                Verdict::Good(found) => ("ok", found, None),
                Verdict::Bad { found, mend } => ("failed", found, Some(mend)),
                Verdict::Skipped(why) => ("skipped", why, None),
            };
            json!({
                "id": check.id, "level": check.level, "result": result, "found": text,
                "asks": check.asks, "without": check.without, "mend": mend,
            })
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ok": failing(found, Level::Required) == 0,
        "failed": {
            "required": failing(found, Level::Required),
            "optional": failing(found, Level::Optional),
            "advisory": failing(found, Level::Advisory),
        },
        "checks": checks,
    })
}

fn table(found: &Findings, paint: Paint) -> String {
    let width = CHECKS.iter().map(|c| c.id.len()).max().unwrap_or(0);
    let mut text = String::new();
    let mut level = None;
    // Writing to a String doesn't fail.
    for (check, verdict) in found {
        if level.replace(check.level) != Some(check.level) {
            let _ = writeln!(text, "{}", paint.strong(check.level.name()));
        }
        let (word, what) = match verdict {
            Verdict::Good(found) => (paint.good("ok  "), found),
            Verdict::Skipped(why) => ("-   ".to_owned(), why),
            Verdict::Bad { found, .. } if check.level == Level::Required => {
                (paint.bad("FAIL"), found)
            }
            Verdict::Bad { found, .. } => (paint.doubt("warn"), found),
        };
        let _ = writeln!(text, "  {word}  {:width$}  {}", check.id, one_line(what));
        if let Verdict::Bad { mend, .. } = verdict {
            let _ = writeln!(
                text,
                "{:indent$}without: {}",
                "",
                check.without,
                indent = 10 + width
            );
            let _ = writeln!(text, "{:indent$}mend:    {mend}", "", indent = 10 + width);
        }
    }
    let [required, others] = [
        failing(found, Level::Required),
        failing(found, Level::Optional) + failing(found, Level::Advisory),
    ];
    let _ = match (required, others) {
        (0, 0) => writeln!(text, "{}", paint.good("this node can run pods")),
        (0, n) => writeln!(text, "this node can run pods; {n} more to know of"),
        (n, _) => writeln!(
            text,
            "{}",
            paint.bad(&format!(
                "this node can't run pods: {n} required check(s) failed"
            ))
        ),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/doctor.md, from the checks.
    fn page() -> String {
        let mut text = String::from(
            "# What `casemate doctor` asks of a node\n\n\
             Made from the code by `make docs-tables`.\n\n\
             `casemate doctor` looks and changes nothing; `--json` is for programs: `ok`, and\n\
             of each check `id`, `level`, `result` (`ok`, `failed`, `skipped`), `found`,\n\
             `asks`, `without` and `mend`, a command or what else to do.\n\n\
             Exit status: 0 if no required check fails, 1 if one does, 2 with `--strict` if an\n\
             optional or advisory one does, 125 if casemate itself failed.\n",
        );
        for level in [Level::Required, Level::Optional, Level::Advisory] {
            text += &format!(
                "\n## {}\n\n| check | asks for | without it |\n| --- | --- | --- |\n",
                level.name()
            );
            for check in CHECKS.iter().filter(|check| check.level == level) {
                text += &format!("| `{}` | {} | {} |\n", check.id, check.asks, check.without);
            }
        }
        text
    }

    #[test]
    fn the_page_is_that_of_the_checks() {
        crate::pages::same("doctor.md", &page());
    }

    #[test]
    fn the_status_follows_from_levels() {
        let of = |level: Level, verdict: Verdict| {
            let check = CHECKS.iter().find(|c| c.level == level).unwrap();
            (check, verdict)
        };
        let good = || Verdict::Good("x".into());
        let bad = || check::bad("x", "y");
        let all = [Level::Required, Level::Optional, Level::Advisory];
        let fine: Findings = all.iter().map(|l| of(*l, good())).collect();
        assert_eq!((status(&fine, false), status(&fine, true)), (0, 0));
        let warned = vec![of(Level::Required, good()), of(Level::Advisory, bad())];
        assert_eq!((status(&warned, false), status(&warned, true)), (0, 2));
        let broken = vec![of(Level::Required, bad()), of(Level::Advisory, bad())];
        assert_eq!((status(&broken, false), status(&broken, true)), (1, 1));
        let skipped = vec![of(Level::Required, Verdict::Skipped("x".into()))];
        assert_eq!(status(&skipped, true), 0);
        let text = table(&broken, Paint::stdout());
        assert!(
            text.contains("FAIL") && text.contains("mend:    y"),
            "{text}"
        );
    }
}

//! `casemate doctor`: whether this node can run pods. Today: whether its
//! configuration is one.

use std::io::Write;
use std::path::PathBuf;

use casemate_spec::config::{DEFAULT_PATH, Diagnosis, diagnose};
use clap::Args;

use crate::error::{RunError, Step};

pub const EXAMPLES: &str = "\
Examples:
  casemate doctor --config                    /etc/casemate/config.toml and its drop-ins
  casemate doctor --config ./config.toml      another file, and config.d beside it
  casemate doctor --config --json             for programs

The exit status is 0 if nothing is wrong, 1 if something is, 125 if casemate
itself failed. A file that doesn't exist is the defaults.";

/// Something is wrong with the node.
const UNWELL: i32 = 1;

/// What to look at.
#[derive(Debug, Args)]
pub struct Doctor {
    /// The configuration: this file, and config.d beside it
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = DEFAULT_PATH, required = true)]
    config: PathBuf,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Looks, and tells.
pub fn run(options: &Doctor) -> Result<i32, RunError> {
    let mut found = diagnose(&options.config);
    found
        .problems
        .extend(crate::profile::problems(&options.config));
    let text = if options.json {
        let object = serde_json::to_string(&found).map_err(std::io::Error::from);
        object.step("write", "the findings")? + "\n"
    } else {
        table(options, &found)
    };
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .step("write", "standard output")?;
    Ok(if found.problems.is_empty() { 0 } else { UNWELL })
}

fn table(options: &Doctor, found: &Diagnosis) -> String {
    let mut text = String::new();
    for problem in &found.problems {
        text += &problem.file.display().to_string();
        if let Some(line) = problem.line {
            text += &format!(":{line}");
        }
        text += ": ";
        if !problem.key.is_empty() {
            text += &problem.key;
            if !problem.value.is_empty() {
                text += &format!(" = {}", problem.value);
            }
            text += ": ";
        }
        text += &format!("{}. {}\n", problem.reason, problem.way_out);
    }
    if found.problems.is_empty() {
        text += &match found.files.len() {
            0 => format!(
                "config: ok: {} doesn't exist, so the defaults hold\n",
                options.config.display()
            ),
            1 => "config: ok: 1 file\n".to_owned(),
            n => format!("config: ok: {n} files\n"),
        };
    }
    text
}

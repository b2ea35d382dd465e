//! `casemate doctor --config`: whether the configuration is one.

use std::path::Path;

use casemate_spec::config::{DEFAULT_PATH, Diagnosis, Problem, diagnose};

use super::UNWELL;
use crate::error::{RunError, Step};

/// The text to print, and the exit status.
pub fn look(path: &Path, json: bool) -> Result<(String, i32), RunError> {
    let mut found = diagnose(path);
    found.problems.extend(crate::profile::problems(path));
    // The usual one need not exist; one that was named is meant.
    if path != Path::new(DEFAULT_PATH) && !path.exists() {
        found.problems.push(Problem {
            file: path.to_owned(),
            line: None,
            key: String::new(),
            value: String::new(),
            reason: "there is no such file".to_owned(),
            way_out: format!("Correct the name; without one it is {DEFAULT_PATH}."),
        });
    }
    let text = if json {
        let object = serde_json::to_string(&found).map_err(std::io::Error::from);
        object.step("write", "the findings")? + "\n"
    } else {
        table(path, &found)
    };
    let status = if found.problems.is_empty() { 0 } else { UNWELL };
    Ok((text, status))
}

fn table(path: &Path, found: &Diagnosis) -> String {
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
                path.display()
            ),
            1 => "config: ok: 1 file\n".to_owned(),
            n => format!("config: ok: {n} files\n"),
        };
    }
    text
}

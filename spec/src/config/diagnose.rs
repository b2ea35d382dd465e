//! All that is wrong with a configuration, and not the first of it alone: for
//! people who correct one. Pods go by [`Config::read`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Config, drop_ins, merge, typed};
use crate::error::{ConfigError, one_line};

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// The line in it, counted from 1, where it is known.
    pub line: Option<usize>,
    /// The key, as in `ids.base`; empty if the file as a whole is wrong.
    pub key: String,
    /// Its value; empty if there is none.
    pub value: String,
    /// Why that is wrong.
    pub reason: String,
    /// What to do about it.
    pub way_out: String,
}

/// What was read, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Diagnosis {
    /// Files that exist, in the order in which they count.
    pub files: Vec<PathBuf>,
    /// Nothing, if pods can start.
    pub problems: Vec<Problem>,
}

/// More than anybody reads, and an end to every loop.
const MOST: usize = 100;

/// Looks at `path` and the drop-ins beside it, as [`Config::read`] does.
#[must_use]
pub fn diagnose(path: &Path) -> Diagnosis {
    let mut found = Diagnosis::default();
    let mut paths = vec![path.to_owned()];
    match drop_ins(&path.with_file_name("config.d")) {
        Ok(more) => paths.extend(more),
        Err(error) => found.whole(&path.with_file_name("config.d"), &error.to_string()),
    }
    let mut texts: Vec<(PathBuf, String, toml::Table)> = Vec::new();
    for path in paths {
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => {
                found.whole(&path, &e.to_string());
                continue;
            }
        };
        found.files.push(path.clone());
        let mut table: toml::Table = match toml::from_str(&text) {
            Ok(table) => table,
            Err(error) => {
                let error: toml::de::Error = error;
                let before = error.span().and_then(|s| text.get(..s.start));
                found.problems.push(Problem {
                    line: before.map(|b| b.matches('\n').count() + 1),
                    ..whole(&path, error.message())
                });
                continue;
            }
        };
        // What is wrong is told and taken out, and then the rest is looked at.
        while let Err(ConfigError::Parse { field, reason, .. }) = typed(&path, table.clone()) {
            let value = take(&mut table, &field);
            found.problems.push(Problem {
                file: path.clone(),
                line: line_of(&text, &field),
                key: field,
                value: value.as_ref().map(shown).unwrap_or_default(),
                reason: one_line_of(&reason),
                way_out: "Correct the key or its value, or remove it; docs/config.md has all keys."
                    .into(),
            });
            if value.is_none() || found.problems.len() >= MOST {
                return found;
            }
        }
        texts.push((path, text, table));
    }
    found.together(path, &texts);
    found
}

impl Diagnosis {
    fn whole(&mut self, file: &Path, reason: &str) {
        self.problems.push(whole(file, reason));
    }

    /// What the files come to.
    fn together(&mut self, path: &Path, texts: &[(PathBuf, String, toml::Table)]) {
        let mut merged = toml::Table::new();
        for (_, _, table) in texts {
            merge(&mut merged, table.clone());
        }
        while self.problems.len() < MOST {
            let checked = typed(path, merged.clone()).and_then(|config: Config| config.check());
            let Err(ConfigError::Invalid {
                field,
                value,
                reason,
            }) = checked
            else {
                return;
            };
            // The last file that has it is the one that counts.
            let has = |t: &&(PathBuf, String, toml::Table)| take(&mut t.2.clone(), field).is_some();
            let from = texts.iter().rev().find(has);
            let (reason, way_out) = match reason.split_once("; ") {
                Some((reason, way_out)) => (reason.to_owned(), way_out.to_owned()),
                None => (reason, "choose another value".to_owned()),
            };
            self.problems.push(Problem {
                file: from.map_or(path, |(file, ..)| file).to_owned(),
                line: from.and_then(|(_, text, _)| line_of(text, field)),
                key: field.to_owned(),
                value,
                reason,
                way_out,
            });
            if take(&mut merged, field).is_none() {
                return;
            }
        }
    }
}

fn whole(file: &Path, reason: &str) -> Problem {
    Problem {
        file: file.to_owned(),
        line: None,
        key: String::new(),
        value: String::new(),
        reason: one_line_of(reason),
        way_out: "Correct the file, or remove it: without it the defaults hold.".into(),
    }
}

/// The way out is in there: not cut.
fn one_line_of(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

fn shown(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => one_line(&format!("{text:?}")),
        other => one_line(&other.to_string()),
    }
}

/// Takes the value at a path such as `hooks.allow[1]` out: the key alone, or the
/// nearest above that there is.
fn take(table: &mut toml::Table, path: &str) -> Option<toml::Value> {
    let path = path.split('[').next().unwrap_or_default();
    match path.split_once('.') {
        None => table.remove(path),
        Some((first, rest)) => match table.get_mut(first) {
            Some(toml::Value::Table(below)) => take(below, rest),
            Some(_) => table.remove(first),
            None => None,
        },
    }
}

/// Where the key is written, as far as simple means find it.
fn line_of(text: &str, path: &str) -> Option<usize> {
    let path = path.split('[').next().unwrap_or_default();
    let mut header = String::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.split(']').next()) {
            header = format!("{}.", name.trim());
            if name.trim() == path {
                return Some(number + 1);
            }
        } else if let Some((key, _)) = line.split_once('=')
            && format!("{}{}", header, key.trim().trim_matches('"')) == path
        {
            return Some(number + 1);
        }
    }
    None
}

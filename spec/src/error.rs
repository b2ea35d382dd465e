//! The three ways this crate says no. Every text is one line.

use thiserror::Error;

use crate::rules::Rule;

/// A `config.json` or an exec's process that can't be read at all.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpecError {
    /// More bytes than any producer writes.
    #[error(
        "reading the OCI configuration: {size} bytes is more than the {limit} allowed; make it smaller"
    )]
    TooLarge {
        /// Bytes given.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// Not JSON.
    #[error(
        "reading the OCI configuration: not valid JSON at line {line}, column {column}: {reason}; check what wrote it"
    )]
    Syntax {
        /// 1-based line.
        line: usize,
        /// 1-based column.
        column: usize,
        /// What the parser says.
        reason: String,
    },
    /// JSON, but a field has the wrong type or a value outside its set.
    #[error("reading the OCI configuration: {field} = {value}: {reason}; check what wrote it")]
    Field {
        /// Path, as in `process.user.uid`.
        field: String,
        /// The offending value, shortened.
        value: String,
        /// What was expected.
        reason: String,
    },
}

/// A configuration of casemate that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("reading configuration {path}: {reason}; make it readable by root, or remove it")]
    Read {
        /// The file or directory.
        path: String,
        /// The system's reason.
        reason: String,
    },
    /// Not TOML, a key that doesn't exist or a value of the wrong type.
    #[error("reading configuration {path}: {field}: {reason}")]
    Parse {
        /// The file.
        path: String,
        /// Key path, or `line N`.
        field: String,
        /// What was expected.
        reason: String,
    },
    /// Well-formed, but the value makes no sense.
    #[error("checking configuration: {field} = {value}: {reason}")]
    Invalid {
        /// Key path, as in `ids.base`.
        field: &'static str,
        /// The value.
        value: String,
        /// Why not, and what would do.
        reason: String,
    },
}

/// A specification that is understood and refused.
///
/// Displays as `casemate: <what> (<field>). <way out>`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("casemate: {what} ({field}). {way_out}")]
pub struct Refusal {
    /// The rule, for tables and metrics: see [`crate::rules::RULES`].
    pub rule: &'static str,
    /// What is refused, with the value.
    pub what: String,
    /// The field, as in `linux.namespaces`.
    pub field: String,
    /// What the reader can do about it.
    pub way_out: String,
}

impl Refusal {
    /// A refusal by `rule`, of `field`, with `detail` (a value or a reason)
    /// after the rule's own text when not empty.
    pub(crate) fn new(
        rule: &'static Rule,
        field: impl Into<String>,
        detail: impl AsRef<str>,
    ) -> Self {
        let detail = one_line(detail.as_ref());
        Self {
            rule: rule.id,
            what: if detail.is_empty() {
                rule.what.to_owned()
            } else {
                format!("{}: {detail}", rule.what)
            },
            field: one_line(&field.into()),
            way_out: rule.way_out.to_owned(),
        }
    }
}

/// At most this many bytes of somebody else's text go into a message.
const SHOWN: usize = 120;

/// `text` on one line, without control characters, cut to a readable length.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(SHOWN));
    for c in text.chars() {
        if line.len() >= SHOWN {
            line.push('…');
            break;
        }
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

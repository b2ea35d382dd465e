//! `[exec]`.

use serde::{Deserialize, Serialize};

/// What becomes of execs, and what they may ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Exec {
    /// Allowed, allowed and recorded, or denied.
    pub policy: ExecPolicy,
    /// As whom.
    pub users: ExecUsers,
    /// With a terminal.
    pub terminal: bool,
    /// Records have arguments, and not their hash alone.
    pub record_argv: bool,
}

impl Default for Exec {
    fn default() -> Self {
        Self {
            policy: ExecPolicy::default(),
            users: ExecUsers::default(),
            terminal: true,
            record_argv: false,
        }
    }
}

/// What becomes of an exec; the tightest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExecPolicy {
    /// It is refused.
    Deny,
    /// It runs, and there is a record of it.
    Record,
    /// It runs.
    #[default]
    Allow,
}

impl ExecPolicy {
    /// As the configuration has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Record => "record",
            Self::Allow => "allow",
        }
    }

    /// The one of that name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        [Self::Deny, Self::Record, Self::Allow]
            .into_iter()
            .find(|p| p.name() == name)
    }
}

/// As whom an exec may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExecUsers {
    /// Anybody of the container.
    #[default]
    Any,
    /// As the container's own process, or with less.
    Container,
}

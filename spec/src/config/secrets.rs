//! `[secrets]`.

use serde::{Deserialize, Serialize};

/// Volumes with secrets, and the memory that holds them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Secrets {
    /// Whether containers get the token of their service account.
    pub service_account_token: Token,
    /// Nothing in volumes of secrets can be executed.
    pub noexec: bool,
    /// Specifications may ask for core dumps (`RLIMIT_CORE`).
    pub core_dumps: bool,
}

impl Default for Secrets {
    fn default() -> Self {
        Self {
            service_account_token: Token::Allow,
            noexec: true,
            core_dumps: false,
        }
    }
}

/// Whether containers get the token of their service account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Token {
    /// Those that have it mounted, unless their annotation says otherwise.
    #[default]
    Allow,
    /// None: they find an empty directory.
    Withhold,
}

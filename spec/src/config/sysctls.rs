//! `[sysctls]`.

use serde::{Deserialize, Serialize};

/// Sysctls that a pod may set beside the safe ones.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sysctls {
    /// Names; one that ends with `*` stands for all that begin so.
    pub allow: Vec<String>,
}

impl Sysctls {
    /// Whether `name`, with dots, is let in.
    #[must_use]
    pub fn allows(&self, name: &str) -> bool {
        self.allow.iter().any(|a| match a.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => a == name,
        })
    }
}

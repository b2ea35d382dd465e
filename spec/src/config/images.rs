//! `[images]`.

use serde::{Deserialize, Serialize};

/// Which images may run, by the name that CRI says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Images {
    /// Only names with a digest.
    pub require_digest: bool,
    /// Only of these registries, or repositories of them; empty: of any.
    pub registries: Vec<String>,
}

//! `[learn]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Recordings of what pods do, for profiles of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Learn {
    /// Pods may be learned from (`casemate.io/profile: learn`).
    pub allow: bool,
    /// Where recordings are kept.
    pub directory: PathBuf,
}

impl Default for Learn {
    fn default() -> Self {
        Self {
            allow: false,
            directory: PathBuf::from("/var/lib/casemate/learned"),
        }
    }
}

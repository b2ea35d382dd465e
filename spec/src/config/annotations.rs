//! `[annotations]`.

use serde::{Deserialize, Serialize};

use crate::annotations::Key;

/// What annotations of pods may do.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Annotations {
    /// Those that may loosen what the node says, without `casemate.io/`.
    pub allow: Vec<Key>,
}

//! `[broker]`.

use serde::{Deserialize, Serialize};

/// What becomes of calls that a profile refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Broker {
    /// They are answered by the pod's agent, with the error that the profile has,
    /// and counted. False: by the kernel, and nobody is told.
    pub enabled: bool,
}

impl Default for Broker {
    fn default() -> Self {
        Self { enabled: true }
    }
}

//! `[profiles]`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{ConfigError, one_line};

/// Profiles that the node has beside the shipped ones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Profiles {
    /// Where they are, `NAME.toml` each. Root's, and nobody else may write there.
    pub directory: PathBuf,
}

impl Default for Profiles {
    fn default() -> Self {
        Self {
            directory: Path::new(super::DEFAULT_PATH).with_file_name("profiles"),
        }
    }
}

impl Profiles {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.directory.is_absolute() {
            return Ok(());
        }
        Err(ConfigError::Invalid {
            field: "profiles.directory",
            value: one_line(&self.directory.display().to_string()),
            reason: "not an absolute path; start it with /".into(),
        })
    }
}

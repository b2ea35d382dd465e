//! The node's configuration, as it counts for this pod.

use std::path::PathBuf;
use std::sync::OnceLock;

use casemate_spec::{Class, Config};

use super::SandboxError;

/// Environment variable with another path for config.toml.
const CONFIG_VARIABLE: &str = "CASEMATE_CONFIG";

/// The pod's, which its shim has for as long as it lives.
static CLASS: OnceLock<Class> = OnceLock::new();

/// Says which class the pod of this shim is of, before it is made.
pub fn set_class(class: Class) {
    // The first word holds.
    let _set = CLASS.set(class);
}

/// Whether the node's configuration has the sandbox API on.
pub fn has_api() -> Result<bool, SandboxError> {
    read_config().map(|config| config.sandbox.api)
}

/// Reads it, and has the class of the pod change it.
pub fn read_config() -> Result<Config, SandboxError> {
    let path = std::env::var_os(CONFIG_VARIABLE).map_or_else(
        || PathBuf::from(casemate_spec::config::DEFAULT_PATH),
        PathBuf::from,
    );
    let config = Config::read(&path).map_err(|e| SandboxError::Invalid(e.to_string()))?;
    Ok(CLASS.get().copied().unwrap_or_default().applied_to(config))
}

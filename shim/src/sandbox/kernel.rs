//! What a pod needs of the kernel.

use casemate_spec::Config;

use super::SandboxError;

/// Whether to use Landlock: always, unless the kernel lacks it and the
/// configuration lets pods start without.
pub fn landlock(config: &Config) -> Result<bool, SandboxError> {
    if casemate_sys::landlock::abi() > 0 {
        return Ok(true);
    }
    if config.fallback.without_landlock {
        log::warn!("this kernel has no Landlock; starting without (fallback.without_landlock)");
        return Ok(false);
    }
    Err(SandboxError::Failed(
        "this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK and lsm=landlock); \
         enable it, or set fallback.without_landlock = true in config.toml"
            .into(),
    ))
}

//! What the shim reads: specifications, under the node's configuration.

use std::path::Path;

use casemate_spec::{Annotations, Config, Context, Tightened};

use super::SandboxError;
use super::profiles::Profiles;
use crate::host::{Step, dev, lsm};

/// What a document is read under: the node's configuration, for a container of a pod
/// that pod's own annotations, and the profiles there are.
pub type Under<'a> = (&'a Config, Option<&'a Annotations>, &'a Profiles);

/// What becomes of `config.json` in a bundle.
pub fn read_spec(bundle: &Path, id: &str, under: Under<'_>) -> Result<Tightened, SandboxError> {
    let path = bundle.join("config.json");
    let bytes = std::fs::read(&path).step("read", path.display().to_string())?;
    tightened(&bytes, id, under)
}

/// As [`read_spec`], of a document.
pub fn tightened(bytes: &[u8], id: &str, under: Under<'_>) -> Result<Tightened, SandboxError> {
    let (config, pod, profiles) = under;
    let invalid = |e: String| SandboxError::Invalid(e);
    let loaded = casemate_spec::load(bytes).map_err(|e| invalid(e.to_string()))?;
    let devices = dev::at(&config.devices.allow);
    let answers = lsm::Answers::to(&casemate_spec::label::asked(&loaded.spec));
    let named = profiles.asked(&loaded.annotations, pod)?;
    let context = Context {
        id,
        profiles: &named,
        devices: &devices,
        pod,
        apparmor: answers.apparmor(),
        selinux: answers.selinux(),
    };
    let spec = casemate_spec::tighten(loaded, config, &context)?;
    for warning in &spec.warnings {
        log::warn!("container {id}: {warning}");
    }
    Ok(spec)
}

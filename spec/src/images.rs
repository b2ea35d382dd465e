//! Which images may run, by the name that CRI says of a container's.

use crate::config::Images;
use crate::error::Refusal;
use crate::load::{Kind, PodIdentity};
use crate::rules::{IMAGE_DIGEST, IMAGE_REGISTRY, IMAGE_UNKNOWN};

const FIELD: &str = "annotations[io.kubernetes.cri.image-name]";

/// Checks the image of a container; of the sandbox container nothing runs.
pub(crate) fn check(pod: &PodIdentity, config: &Images) -> Result<(), Refusal> {
    let rules = config.require_digest || !config.registries.is_empty();
    if !rules || pod.kind == Kind::Sandbox {
        return Ok(());
    }
    let Some(image) = pod.image.as_deref() else {
        return Err(Refusal::new(&IMAGE_UNKNOWN, FIELD, "no name is given"));
    };
    // An id: older kubelets say nothing else.
    if image.starts_with("sha256:") && !image.contains('/') {
        return Err(Refusal::new(&IMAGE_UNKNOWN, FIELD, image));
    }
    if config.require_digest && !has_digest(image) {
        return Err(Refusal::new(&IMAGE_DIGEST, FIELD, image));
    }
    let repository = repository(image);
    let known = |entry: &String| {
        repository
            .strip_prefix(entry.trim_end_matches('/'))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if !(config.registries.is_empty() || config.registries.iter().any(known)) {
        return Err(Refusal::new(&IMAGE_REGISTRY, FIELD, image));
    }
    Ok(())
}

/// `…@sha256:` and 64 digits, or the longer ones of sha512.
fn has_digest(image: &str) -> bool {
    let Some((_, digest)) = image.rsplit_once('@') else {
        return false;
    };
    let length = match digest.split_once(':') {
        Some(("sha256", hex)) => (hex, 64),
        Some(("sha512", hex)) => (hex, 128),
        _ => return false,
    };
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    length.0.len() == length.1 && length.0.bytes().all(hex)
}

/// Without tag and digest, and with what a short name leaves out, as container
/// engines read it: `nginx` is `docker.io/library/nginx`.
fn repository(image: &str) -> String {
    let name = image.split('@').next().unwrap_or_default();
    let name = match name.rsplit_once(':') {
        // Not a registry's port.
        Some((name, tag)) if !tag.contains('/') => name,
        _ => name,
    };
    let (registry, rest) = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
        _ => ("docker.io", name),
    };
    match registry {
        "docker.io" | "index.docker.io" if !rest.contains('/') => {
            format!("docker.io/library/{rest}")
        }
        "index.docker.io" => format!("docker.io/{rest}"),
        registry => format!("{registry}/{rest}"),
    }
}

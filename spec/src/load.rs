//! Reading `config.json` and an exec's process: tolerant of unknown names,
//! strict about types.

use std::collections::BTreeMap;
use std::fmt;

use oci_spec::runtime::{Process, Spec};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::caps;
use crate::coverage::{self, Fields};
use crate::error::{SpecError, one_line};

/// Largest document read, in bytes.
pub const MAX_BYTES: usize = 10 << 20;

/// A `config.json` that was understood. Nothing has been decided yet.
#[derive(Clone)]
pub struct Loaded {
    /// Everything but `linux.seccomp` and capabilities that don't exist.
    pub spec: Spec,
    /// `linux.seccomp` as written: its architectures, flags and actions are
    /// open sets, which oci-spec's enums are not.
    pub seccomp: Option<Value>,
    /// `annotations`, in order.
    pub annotations: BTreeMap<String, String>,
    /// What was dropped, one line each.
    pub warnings: Vec<String>,
    /// What the document sets, seen before any typed reading.
    pub fields: Fields,
    /// Which pod this belongs to, and as what.
    pub pod: PodIdentity,
}

/// An exec's `process` that was understood.
#[derive(Clone)]
pub struct LoadedProcess {
    /// The process.
    pub process: Process,
    /// What was dropped, one line each.
    pub warnings: Vec<String>,
    /// What the document sets, seen before any typed reading.
    pub fields: Fields,
}

// Environments and arguments hold secrets: `{:?}` must not print them.
impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded")
            .field("pod", &self.pod)
            .field("warnings", &self.warnings)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for LoadedProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadedProcess")
            .field("warnings", &self.warnings)
            .finish_non_exhaustive()
    }
}

/// What the CRI plugin's annotations say about the place of a container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodIdentity {
    /// `io.containerd.runc.v2.group`, else `io.kubernetes.cri.sandbox-id`.
    pub pod_id: Option<String>,
    /// From `io.kubernetes.cri.container-type`.
    pub kind: Kind,
    /// `io.kubernetes.cri.sandbox-name`.
    pub pod_name: Option<String>,
    /// `io.kubernetes.cri.sandbox-namespace`.
    pub namespace: Option<String>,
    /// `io.kubernetes.cri.sandbox-uid`.
    pub pod_uid: Option<String>,
    /// `io.kubernetes.cri.container-name`.
    pub container_name: Option<String>,
    /// `io.kubernetes.cri.image-name`.
    pub image: Option<String>,
}

/// What a container is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// The pod's pause container.
    Sandbox,
    /// A container of a pod.
    Container,
    /// Alone: not started by the CRI plugin.
    #[default]
    Single,
}

impl PodIdentity {
    fn new(annotations: &BTreeMap<String, String>) -> Self {
        let get = |key: &str| annotations.get(key).filter(|v| !v.is_empty()).cloned();
        Self {
            pod_id: get("io.containerd.runc.v2.group")
                .or_else(|| get("io.kubernetes.cri.sandbox-id")),
            kind: match get("io.kubernetes.cri.container-type").as_deref() {
                Some("sandbox") => Kind::Sandbox,
                Some("container") => Kind::Container,
                _ => Kind::Single,
            },
            pod_name: get("io.kubernetes.cri.sandbox-name"),
            namespace: get("io.kubernetes.cri.sandbox-namespace"),
            pod_uid: get("io.kubernetes.cri.sandbox-uid"),
            container_name: get("io.kubernetes.cri.container-name"),
            image: get("io.kubernetes.cri.image-name"),
        }
    }
}

/// Reads a `config.json` (config.md of the OCI runtime specification).
///
/// # Errors
/// When it is too large, not JSON, or a field has the wrong type.
pub fn load(bytes: &[u8]) -> Result<Loaded, SpecError> {
    let mut root = parse(bytes)?;
    let mut warnings = Vec::new();
    must_be_object(&root)?;
    if let Some(process) = root.get_mut("process") {
        drop_unknown_capabilities(process, "process", &mut warnings);
    }
    let fields = fields(&mut root, &mut warnings);
    let seccomp = root
        .get_mut("linux")
        .and_then(Value::as_object_mut)
        .and_then(|l| l.remove("seccomp"));
    let seccomp = match seccomp {
        None | Some(Value::Null) => None,
        Some(v @ Value::Object(_)) => Some(v),
        Some(other) => return Err(field_error("linux.seccomp", &other, "expected an object")),
    };
    let spec: Spec = typed(&root, "")?;
    let annotations: BTreeMap<String, String> = spec
        .annotations()
        .iter()
        .flatten()
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    let pod = PodIdentity::new(&annotations);
    Ok(Loaded {
        spec,
        seccomp,
        annotations,
        warnings,
        fields,
        pod,
    })
}

/// Reads the process of an exec, as containerd's `ExecProcessRequest` has it.
///
/// # Errors
/// As [`load()`].
pub fn load_process(bytes: &[u8]) -> Result<LoadedProcess, SpecError> {
    let mut root = parse(bytes)?;
    let mut warnings = Vec::new();
    must_be_object(&root)?;
    drop_unknown_capabilities(&mut root, "process", &mut warnings);
    let mut root = serde_json::json!({ "process": root });
    let fields = fields(&mut root, &mut warnings);
    let process = typed(&root["process"], "process.")?;
    Ok(LoadedProcess {
        process,
        warnings,
        fields,
    })
}

fn fields(root: &mut Value, warnings: &mut Vec<String>) -> Fields {
    let fields = Fields::of(root);
    warnings.extend(fields.unknown.iter().map(|f| {
        format!("{f}: not a field of the OCI runtime specification that casemate knows; ignored")
    }));
    coverage::strip_refused(root);
    fields
}

fn parse(bytes: &[u8]) -> Result<Value, SpecError> {
    if bytes.len() > MAX_BYTES {
        return Err(SpecError::TooLarge {
            size: bytes.len(),
            limit: MAX_BYTES,
        });
    }
    serde_json::from_slice(bytes).map_err(|e| {
        let text = e.to_string();
        let reason = text.split(" at line ").next().unwrap_or_default();
        SpecError::Syntax {
            line: e.line(),
            column: e.column(),
            reason: one_line(reason),
        }
    })
}

fn must_be_object(root: &Value) -> Result<(), SpecError> {
    if root.is_object() {
        Ok(())
    } else {
        Err(field_error("the document", root, "expected an object"))
    }
}

fn typed<T: DeserializeOwned>(root: &Value, prefix: &str) -> Result<T, SpecError> {
    serde_path_to_error::deserialize(root).map_err(|e| {
        let path = e.path().to_string();
        let value = e.path().iter().try_fold(root, |v, segment| match segment {
            serde_path_to_error::Segment::Seq { index } => v.get(index),
            serde_path_to_error::Segment::Map { key } => v.get(key),
            _ => None,
        });
        let reason = e.inner().to_string();
        field_error(
            &format!("{prefix}{path}"),
            value.unwrap_or(&Value::Null),
            &reason,
        )
    })
}

fn field_error(field: &str, value: &Value, reason: &str) -> SpecError {
    // An environment may hold secrets: containers of values are named by kind
    // only, and so is each of its entries.
    let value = match value {
        Value::Object(_) => "{…}".to_owned(),
        Value::Array(_) => "[…]".to_owned(),
        _ if hidden(field) => "…".to_owned(),
        other => one_line(&other.to_string()),
    };
    let reason = if hidden(field) {
        "wrong type".to_owned()
    } else {
        one_line(reason)
    };
    SpecError::Field {
        field: one_line(field),
        value,
        reason,
    }
}

/// Fields whose values never reach a message.
fn hidden(field: &str) -> bool {
    ["process.env", "process.args", "annotations"]
        .iter()
        .any(|h| field.starts_with(h))
}

/// Names the specification may gain later, or kernels may lack, are dropped:
/// a capability that isn't granted is never the dangerous side.
fn drop_unknown_capabilities(process: &mut Value, path: &str, warnings: &mut Vec<String>) {
    let Some(sets) = process
        .get_mut("capabilities")
        .and_then(Value::as_object_mut)
    else {
        return;
    };
    for (set, list) in sets {
        let Some(list) = list.as_array_mut() else {
            continue;
        };
        let mut dropped = 0_usize;
        list.retain_mut(|name| {
            // Not text: left in place, so that the typed reading names it.
            let Some(text) = name.as_str() else {
                return true;
            };
            match caps::number(text).and_then(|n| caps::NAMES.get(usize::from(n))) {
                Some(known) => {
                    *name = Value::from(*known);
                    true
                }
                None => {
                    dropped += 1;
                    // The list is somebody else's, and as long as they like.
                    if dropped <= 16 {
                        let text = one_line(text);
                        warnings.push(format!(
                            "{path}.capabilities.{set}: {text} is not a known capability; dropped"
                        ));
                    }
                    false
                }
            }
        });
    }
}

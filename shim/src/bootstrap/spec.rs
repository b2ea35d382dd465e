//! The few facts of `config.json` that bootstrap and the pod need. Planning a
//! container reads the whole document; this doesn't.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use serde::Deserialize;

use super::registry::Kubernetes;

/// The document's name in a bundle.
pub const CONFIG: &str = "config.json";

const GROUP: &str = "io.containerd.runc.v2.group";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";

/// `config.json`, cut down.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    oci_version: String,
    annotations: HashMap<String, String>,
    linux: Linux,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Linux {
    namespaces: Vec<Namespace>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    r#type: String,
    #[serde(default)]
    path: String,
}

impl Spec {
    /// Reads `<bundle>/config.json`.
    pub fn read(bundle: &Path) -> io::Result<Spec> {
        let path = bundle.join(CONFIG);
        let text = std::fs::read(&path).map_err(|error| {
            io::Error::new(error.kind(), format!("read {}: {error}", path.display()))
        })?;
        serde_json::from_slice(&text)
            .map_err(|error| io::Error::other(format!("parse {}: {error}", path.display())))
    }

    /// Stands for the document where there is none: containerd's sandbox API
    /// writes none, and there is no such API before 2.0.
    pub fn of_sandbox_api() -> Spec {
        Spec {
            oci_version: "1.2.0".to_owned(),
            ..Spec::default()
        }
    }

    /// Containers with the same group share a shim.
    pub fn group<'a>(&'a self, id: &'a str) -> &'a str {
        self.annotation(GROUP)
            .or_else(|| self.annotation(SANDBOX_ID))
            .unwrap_or(id)
    }

    /// The pod's id: the CRI sandbox's, or the container's own.
    pub fn pod_id<'a>(&'a self, id: &'a str) -> &'a str {
        self.annotation(SANDBOX_ID).unwrap_or(id)
    }

    /// What Kubernetes calls the pod, if it is one of its.
    pub fn kubernetes(&self) -> Option<Kubernetes> {
        let get = |name: &str| {
            let value = self.annotation(&format!("io.kubernetes.cri.sandbox-{name}"));
            value.unwrap_or_default().to_owned()
        };
        self.annotation(SANDBOX_ID).map(|_| Kubernetes {
            namespace: get("namespace"),
            name: get("name"),
            uid: get("uid"),
        })
    }

    /// Whether this is CRI's sandbox container, which nothing runs in.
    pub fn is_pause(&self) -> bool {
        self.annotation(CONTAINER_TYPE) == Some("sandbox")
    }

    /// Whether init is pid 1 of a pid namespace of its own, so that the
    /// kernel kills everything else when it goes.
    pub fn has_private_pids(&self) -> bool {
        self.linux
            .namespaces
            .iter()
            .any(|namespace| namespace.r#type == "pid" && namespace.path.is_empty())
    }

    /// Whether the daemon that wrote this speaks version 3 of the shim
    /// protocol, as far as this tells: 2.0 and later stamp 1.2.0 and more, and
    /// so does 1.7 where it is built with newer libraries ([`super::daemon`]).
    pub fn is_from_containerd_2(&self) -> bool {
        let mut numbers = self
            .oci_version
            .split(['.', '-', '+'])
            .map_while(|part| part.parse::<u32>().ok());
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (1, 2)
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_group_annotation_wins_over_the_sandbox_id() {
        let both = spec(
            r#"{"annotations":{"io.containerd.runc.v2.group":"g","io.kubernetes.cri.sandbox-id":"s"}}"#,
        );
        assert_eq!(both.group("i"), "g");
        assert_eq!(both.pod_id("i"), "s");
        let none = spec("{}");
        assert_eq!((none.group("i"), none.pod_id("i")), ("i", "i"));
    }

    #[test]
    fn version_3_is_for_specs_of_containerd_2() {
        for (version, expected) in [
            ("1.0.2-dev", false),
            ("1.1.0", false),
            ("1.2.0", true),
            ("1.2.0-rc.1", true),
            ("1.3.0", true),
            ("2.0", true),
            ("", false),
            ("x", false),
        ] {
            let spec = spec(&format!(r#"{{"ociVersion":"{version}"}}"#));
            assert_eq!(spec.is_from_containerd_2(), expected, "{version:?}");
        }
    }

    #[test]
    fn a_pid_namespace_with_a_path_is_not_private() {
        let of = |entry: &str| spec(&format!(r#"{{"linux":{{"namespaces":[{entry}]}}}}"#));
        assert!(of(r#"{"type":"pid"}"#).has_private_pids());
        assert!(!of(r#"{"type":"pid","path":"/proc/1/ns/pid"}"#).has_private_pids());
        assert!(!of("").has_private_pids());
    }
}

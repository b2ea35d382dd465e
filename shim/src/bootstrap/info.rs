//! `-info`: what this runtime offers. Fixed when it is built, as the OCI
//! features document wants it; needs no privileges, bundle or environment.

use std::io::{self, IsTerminal, Read, Write};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;

/// The runtime's name in containerd's configuration.
pub const RUNTIME: &str = "io.containerd.casemate.v2";

const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
const STDIN_MAX: u64 = 10 << 20;

/// Prints one `containerd.types.RuntimeInfo`.
pub fn run() -> Result<(), String> {
    let mut stdin = Vec::new();
    if !io::stdin().is_terminal() {
        // Options are only echoed: none that can be read is none.
        let _none = io::stdin().lock().take(STDIN_MAX).read_to_end(&mut stdin);
    }
    let info = info(&stdin).map_err(|error| format!("encode the runtime info: {error}"))?;
    io::stdout()
        .write_all(&info)
        .map_err(|error| format!("print the runtime info: {error}"))
}

fn info(stdin: &[u8]) -> protobuf::Result<Vec<u8>> {
    let options = Any::parse_from_bytes(stdin)
        .ok()
        .filter(|any| !any.type_url.is_empty());
    RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        options: options.into(),
        features: MessageField::some(Any {
            type_url: FEATURES.to_owned(),
            value: features().to_string().into_bytes(),
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    }
    .write_to_bytes()
}

/// The OCI features structure (runtime-spec, features.md, features-linux.md).
fn features() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "mountOptions": [
            "bind", "rbind", "ro", "rw", "rro", "nosuid", "suid", "nodev", "dev", "noexec",
            "exec", "noatime", "atime", "relatime", "norelatime", "strictatime",
            "nostrictatime", "nodiratime", "diratime", "private", "rprivate", "slave",
            "rslave", "idmap", "ridmap", "nosymfollow", "symfollow", "defaults"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "capabilities": casemate_spec::caps::NAMES.as_slice(),
            "cgroup": {
                "v1": true, "v2": true, "systemd": true, "systemdUser": false, "rdma": false
            },
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL",
                    "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG",
                    "SCMP_ACT_TRAP"
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE",
                    "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"
                ],
                "archs": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"]
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": true},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}}
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_containerd_looks_for_is_there() {
        let info = RuntimeInfo::parse_from_bytes(&info(&[]).unwrap()).unwrap();
        assert_eq!(info.name, RUNTIME);
        assert!(info.options.is_none());
        assert_eq!(info.features.type_url, FEATURES);
        let json: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        let has = |list: &serde_json::Value, word: &str| {
            list.as_array().unwrap().iter().any(|item| item == word)
        };
        assert!(has(&json["mountOptions"], "rro"));
        assert!(has(&json["linux"]["namespaces"], "user"));
        assert_eq!(json["linux"]["mountExtensions"]["idmap"]["enabled"], true);
        // The official structure takes it too.
        let typed: oci_spec::runtime::Features = serde_json::from_value(json).unwrap();
        assert!(typed.linux().is_some());
    }

    #[test]
    fn options_on_stdin_are_echoed() {
        let options = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: vec![8, 1],
            ..Any::default()
        };
        let bytes = info(&options.write_to_bytes().unwrap()).unwrap();
        let info = RuntimeInfo::parse_from_bytes(&bytes).unwrap();
        assert_eq!(*info.options, options);
    }
}

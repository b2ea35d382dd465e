//! What holds a container and why, for an operator: what the specification's
//! fields came to, and where each of the policy's settings is from. Nothing that
//! the workload was given: no arguments, environment, values of annotations.

use casemate_spec::annotations::Key;
use casemate_spec::tighten::{Namespace, Namespaces};
use casemate_spec::{MountAttrs, MountKind, MountSpec, caps};
use serde_json::{Value, json};

use super::Container;

/// Rows of any one list: a specification may be a megabyte long.
const MOST: usize = 512;

impl Container {
    /// All of it.
    pub fn explain(&self) -> Value {
        let (spec, effective) = (&self.spec, &self.spec.effective);
        let asked = &spec.asked;
        let from = |key: Key, is_asked: bool, or: &str| match is_asked {
            true => format!("annotation {key}"),
            false => or.to_owned(),
        };
        let setting = |value: Value, from: String| json!({ "value": value, "from": from });
        let process = &spec.process;
        let no_new_privs = match effective.profile.forces_no_new_privs() {
            true => format!("profile {}", effective.profile_name),
            false => "specification".to_owned(),
        };
        let decisions: Vec<Value> = spec
            .decisions
            .iter()
            .take(MOST)
            .map(|d| json!({ "field": d.field, "how": d.how.to_string(), "note": d.note }))
            .collect();
        json!({
            "id": self.id,
            "init": self.init_pid,
            "policy": {
                "profile": setting(
                    effective.profile_name.clone().into(),
                    from(Key::Profile, asked.profile.is_some(), "config profile"),
                ),
                "exec": setting(
                    effective.exec.name().into(),
                    from(Key::Exec, asked.exec.is_some(), "config exec.policy"),
                ),
                "capabilities_allowed": setting(
                    caps::names(effective.capabilities).into(),
                    from(
                        Key::Capabilities,
                        asked.capabilities.is_some(),
                        "config capabilities.allow",
                    ),
                ),
                "capabilities": setting(
                    caps::names(process.caps.bounding).into(),
                    "specification, within what is allowed".to_owned(),
                ),
                "no_new_privs": setting(process.no_new_privs.into(), no_new_privs),
                "service_account_token": setting(
                    if asked.withhold_token { "withheld" } else { "as config secrets says" }.into(),
                    from(Key::ServiceAccountToken, asked.withhold_token, "config secrets"),
                ),
                "egress": setting(
                    asked.egress.is_some().into(),
                    from(Key::Egress, asked.egress.is_some(), "config network"),
                ),
                "ingress": setting(
                    asked.ingress.is_some().into(),
                    from(Key::Ingress, asked.ingress.is_some(), "config network"),
                ),
                "broker": setting(
                    self.config.broker.enabled.into(),
                    "config broker.enabled".to_owned(),
                ),
                "own_filter": setting(
                    (!self.filters.written.is_empty()).into(),
                    "specification linux.seccomp".to_owned(),
                ),
                "readonly_root": setting(
                    spec.readonly_rootfs.into(),
                    "specification root.readonly".to_owned(),
                ),
            },
            "namespaces": namespaces(&spec.namespaces),
            "mounts": spec.mounts.iter().take(MOST).map(mount).collect::<Vec<_>>(),
            "masked": spec.masked_paths.iter().take(MOST).collect::<Vec<_>>(),
            "readonly": spec.readonly_paths.iter().take(MOST).collect::<Vec<_>>(),
            "sysctls": spec.sysctl.keys().take(MOST).collect::<Vec<_>>(),
            "devices": spec.devices.iter().take(MOST).map(|d| d.path.clone()).collect::<Vec<_>>(),
            "decisions": decisions,
            "warnings": spec.warnings.iter().take(MOST).collect::<Vec<_>>(),
        })
    }
}

fn namespaces(all: &Namespaces) -> Value {
    let shown = |namespace: &Namespace| match namespace {
        Namespace::New => "own".to_owned(),
        Namespace::Path(path) => path.clone(),
        Namespace::Host => "host".to_owned(),
    };
    json!({
        "user": "own", "mount": "own", "cgroup": "own",
        "network": shown(&all.network), "pid": shown(&all.pid),
        "ipc": shown(&all.ipc), "uts": shown(&all.uts),
    })
}

fn mount(mount: &MountSpec) -> Value {
    let kind = match mount.kind {
        MountKind::Proc => "proc",
        MountKind::Sysfs => "sysfs",
        MountKind::Tmpfs => "tmpfs",
        MountKind::Devpts => "devpts",
        MountKind::Mqueue => "mqueue",
        MountKind::Bind => "bind",
        MountKind::Cgroup => "cgroup",
    };
    let mut flags = names(&mount.flags.attrs, "");
    flags.extend(names(&mount.flags.recursive, "r"));
    json!({
        "target": mount.destination,
        "kind": kind,
        "source": (mount.kind == MountKind::Bind).then_some(&mount.source),
        "flags": flags,
        "later_mounts": mount.receives(),
    })
}

fn names(attrs: &MountAttrs, prefix: &str) -> Vec<String> {
    [
        ("ro", attrs.ro),
        ("nosuid", attrs.nosuid),
        ("nodev", attrs.nodev),
        ("noexec", attrs.noexec),
        ("nosymfollow", attrs.nosymfollow),
    ]
    .into_iter()
    .filter(|(_, set)| *set)
    .map(|(name, _)| format!("{prefix}{name}"))
    .collect()
}

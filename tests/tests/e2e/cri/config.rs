//! Configurations of pods and containers, as the kubelet fills them in.

use std::fs;
use std::path::Path;

use casemate_tests::image::catalog;
use casemate_tests::world::PODS;
use k8s_cri::v1::*;

use super::Cri;

/// What the kubelet masks in a container with `procMount: Default`.
const MASKED: [&str; 8] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/scsi",
    "/sys/firmware",
];
/// What it makes read-only there.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// `RuntimeDefault`, `Unconfined`, or `Localhost` with a file.
pub fn profile(kind: security_profile::ProfileType, file: &Path) -> Option<SecurityProfile> {
    Some(SecurityProfile {
        profile_type: kind as i32,
        localhost_ref: file.display().to_string(),
    })
}

fn namespaces() -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Pod as i32,
        pid: NamespaceMode::Container as i32,
        ipc: NamespaceMode::Pod as i32,
        ..Default::default()
    }
}

/// A pod with a network of its own and nothing special.
pub fn pod(cri: &Cri, name: &str) -> PodSandboxConfig {
    let uid = cri.world.id(name);
    let logs = cri.world.dir().join("logs").join(&uid);
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: uid.clone(),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        hostname: name.replace('_', "-"),
        log_directory: logs.display().to_string(),
        dns_config: Some(DnsConfig {
            servers: vec!["192.0.2.53".to_owned()],
            searches: vec!["test.invalid".to_owned()],
            options: vec!["ndots:5".to_owned()],
        }),
        linux: Some(LinuxPodSandboxConfig {
            // The mark of test runs must not be in it: the parent outlives pods.
            cgroup_parent: format!("/{PODS}/{}", uid.trim_start_matches("cmt")),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                seccomp: profile(security_profile::ProfileType::RuntimeDefault, Path::new("")),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The pod's security context, to be changed.
pub fn pod_security(config: &mut PodSandboxConfig) -> &mut LinuxSandboxSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

/// The pod's namespaces, to be changed.
pub fn pod_namespaces(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    pod_security(config)
        .namespace_options
        .get_or_insert_default()
}

/// A container of the base image that runs `args`.
pub fn container(name: &str, args: &[&str]) -> ContainerConfig {
    let list = |paths: &[&str]| paths.iter().map(|p| (*p).to_owned()).collect();
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: catalog::BASE.to_owned(),
            ..Default::default()
        }),
        command: args.iter().map(|a| (*a).to_owned()).collect(),
        envs: vec![KeyValue {
            key: "KUBERNETES_PORT".to_owned(),
            value: "tcp://192.0.2.1:443".to_owned(),
        }],
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                cpu_shares: 102,
                oom_score_adj: 1000,
                ..Default::default()
            }),
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                masked_paths: list(&MASKED),
                readonly_paths: list(&READ_ONLY),
                seccomp: profile(security_profile::ProfileType::RuntimeDefault, Path::new("")),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

/// A container's security context, to be changed.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

/// A container's limits, to be changed.
pub fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config
        .linux
        .get_or_insert_default()
        .resources
        .get_or_insert_default()
}

/// A volume of the host's path `from` at `to`.
pub fn mount(from: &Path, to: &str) -> Mount {
    Mount {
        host_path: from.display().to_string(),
        container_path: to.to_owned(),
        ..Default::default()
    }
}

/// Directories of a pod's cgroup in all hierarchies.
pub fn cgroups(config: &PodSandboxConfig) -> Vec<std::path::PathBuf> {
    let Some(linux) = &config.linux else {
        return Vec::new();
    };
    let parent = linux.cgroup_parent.trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    let mut all = vec![root.join(parent)];
    if let Ok(hierarchies) = fs::read_dir(root) {
        all.extend(hierarchies.flatten().map(|h| h.path().join(parent)));
    }
    all.retain(|dir| dir.is_dir());
    all
}

/// Removes the pod's own cgroup, as the kubelet does at the end.
pub fn remove_cgroups(config: &PodSandboxConfig) {
    for dir in cgroups(config) {
        let _ = fs::remove_dir(dir);
    }
}

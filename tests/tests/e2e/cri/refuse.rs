//! What is refused, with a text that an operator can act on.

use std::fs;
use std::path::Path;

use casemate_tests::skip::Outcome;
use casemate_tests::{ensure, ensure_eq};
use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::*;

use super::Cri;
use super::config::{self, container, profile, security};

crate::cri_tests![
    privileged_pod,
    privileged_container,
    c118_host_network,
    c118_host_pid,
    c118_host_ipc,
    c130_apparmor_without_it,
    device,
    sysctl_of_the_node,
];

/// Fails unless the refusal says all of that.
fn says(why: &str, parts: &[&str]) -> Outcome {
    for part in parts {
        ensure!(why.contains(part), "no {part:?} in {why}");
    }
    Ok(())
}

fn privileged_pod(cri: &Cri) -> Outcome {
    let mut config = config::pod(cri, "privileged");
    config::pod_security(&mut config).privileged = true;
    match cri.pod_with(config) {
        // A sandbox's own specification has little that shows it; then the
        // container is what is refused.
        Ok(pod) => {
            let mut config = container("app", &["/bin/true"]);
            security(&mut config).privileged = true;
            let why = pod.refusal(config)?;
            says(&why, &["privileged", "RuntimeClass"])?;
            pod.remove()
        }
        Err(casemate_tests::skip::Stop::Fail(why)) => says(&why, &["privileged", "RuntimeClass"]),
        Err(other) => Err(other),
    }
}

/// In a pod that is not: the daemon's own rule.
fn privileged_container(cri: &Cri) -> Outcome {
    let pod = cri.pod("privileged-container")?;
    let mut config = container("app", &["/bin/true"]);
    security(&mut config).privileged = true;
    says(&pod.refusal(config)?, &["privileged"])?;
    ensure_eq!(pod.sh("next", "echo fine", |_| ())?, "fine\n", "the pod");
    pod.remove()
}

fn c118_host_network(cri: &Cri) -> Outcome {
    let mut config = config::pod(cri, "host-network");
    config::pod_namespaces(&mut config).network = NamespaceMode::Node as i32;
    says(
        &cri.refusal(config)?,
        &["host's network", "allow_host_network"],
    )
}

fn c118_host_pid(cri: &Cri) -> Outcome {
    let mut config = config::pod(cri, "host-pid");
    config::pod_namespaces(&mut config).pid = NamespaceMode::Node as i32;
    says(
        &cri.refusal(config)?,
        &["host's processes", "Remove hostPID"],
    )
}

fn c118_host_ipc(cri: &Cri) -> Outcome {
    let mut config = config::pod(cri, "host-ipc");
    config::pod_namespaces(&mut config).ipc = NamespaceMode::Node as i32;
    says(
        &cri.refusal(config)?,
        &["host's shared memory", "Remove hostIPC"],
    )
}

/// Where the node has no AppArmor (or the daemon was told so), a profile by
/// name is an error, not a container without it.
fn c130_apparmor_without_it(cri: &Cri) -> Outcome {
    let pod = cri.pod("apparmor")?;
    let mut config = container("app", &["/bin/true"]);
    security(&mut config).apparmor = profile(ProfileType::Localhost, Path::new("some-profile"));
    let why = pod.refusal(config)?.to_lowercase();
    says(&why, &["apparmor"])?;
    pod.remove()
}

fn device(cri: &Cri) -> Outcome {
    let pod = cri.pod("device")?;
    let mut config = container("app", &["/bin/true"]);
    config.devices.push(Device {
        container_path: "/dev/kmsg".to_owned(),
        host_path: "/dev/kmsg".to_owned(),
        permissions: "rwm".to_owned(),
    });
    says(&pod.refusal(config)?, &["device", "/dev/kmsg"])?;
    pod.remove()
}

fn sysctl_of_the_node(cri: &Cri) -> Outcome {
    let path = "/proc/sys/vm/swappiness";
    let before = fs::read_to_string(path)?;
    let mut config = config::pod(cri, "sysctl");
    let linux = config.linux.get_or_insert_default();
    linux
        .sysctls
        .insert("vm.swappiness".to_owned(), "7".to_owned());
    says(&cri.refusal(config)?, &["sysctl", "vm.swappiness"])?;
    ensure_eq!(fs::read_to_string(path)?, before, "on the node");
    Ok(())
}

//! Learning from pods, as the kubelet makes them.

use std::fs;

use casemate_tests::ensure_eq;
use casemate_tests::skip::{Outcome, Stop};
use k8s_cri::v1::PodSandboxConfig;
use seccomp_profiles::Recording;

use super::Cri;
use super::config::{self, container};
use crate::common::casemate_only;

crate::cri_tests![learn_from_pods_and_containers];

const KEY: &str = "casemate.io/profile";

fn learning(cri: &Cri, name: &str) -> PodSandboxConfig {
    let mut config = config::pod(cri, name);
    config
        .annotations
        .insert(KEY.to_owned(), "learn".to_owned());
    config
}

fn learn_from_pods_and_containers(cri: &Cri) -> Outcome {
    casemate_only()?;
    let recorded = |id: &str| -> Result<Recording, Stop> {
        let file = cri.node.daemon.learned().join(format!("k8s.io_{id}.json"));
        let text = fs::read_to_string(&file)?;
        Recording::parse(&text).map_err(|e| Stop::Fail(e.to_string()))
    };

    let pod = cri.pod_with(learning(cri, "learned"))?;
    let id = pod.sleeper("app")?;
    let ran = pod.exec(&id, &["/bin/probe", "deeds", "7007"])?;
    ensure_eq!(ran.code, 0, "exit code");
    // The kubelet starts it anew, by the same name.
    pod.stop_container(&id, 0)?;
    pod.remove_container(&id)?;
    let again = pod.sleeper("app2")?;
    ensure_eq!(
        pod.exec(&again, &["/bin/probe", "deeds", "7017"])?.code,
        0,
        "exit code"
    );
    let sandbox = pod.id.clone();
    pod.remove()?;
    let all = recorded(&sandbox)?;
    let names: Vec<&str> = all.containers().map(|(name, _)| name).collect();
    ensure_eq!(names, ["app", "app2"], "containers");
    for (name, port) in [("app", 7007), ("app2", 7017)] {
        let ports = all.container(name).map(|one| one.ports_bound().clone());
        ensure_eq!(ports, Some([port].into()), "ports of {name}");
    }
    let pods: Vec<_> = all
        .pods()
        .map(|p| (p.namespace.as_str(), p.name.as_str()))
        .collect();
    ensure_eq!(pods, [("default", "learned")], "pods");

    // A container's own annotation, in a pod that says nothing.
    let pod = cri.pod("of-one")?;
    let mut config = container("own", &["/bin/probe", "sleep"]);
    config
        .annotations
        .insert(KEY.to_owned(), "learn".to_owned());
    let id = pod.run(config)?;
    let other = pod.sleeper("other")?;
    for id in [&id, &other] {
        ensure_eq!(
            pod.exec(id, &["/bin/probe", "deeds", "7007"])?.code,
            0,
            "exit code"
        );
    }
    let sandbox = pod.id.clone();
    pod.remove()?;
    let all = recorded(&sandbox)?;
    let names: Vec<&str> = all.containers().map(|(name, _)| name).collect();
    ensure_eq!(names, ["own"], "containers");
    Ok(())
}

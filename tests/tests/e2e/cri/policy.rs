//! Policy at the door, as the kubelet meets it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_tests::operator::lines;
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq};
use k8s_cri::v1::*;
use serde_json::Value;

use super::Cri;
use super::config::{self, container, mount};

crate::cri_tests![
    policy_annotations_of_pod_and_container,
    policy_execs_are_recorded,
    policy_volumes_of_the_kubelet,
    policy_host_paths,
];

fn annotated(cri: &Cri, name: &str, key: &str, value: &str) -> PodSandboxConfig {
    let mut config = config::pod(cri, name);
    let key = format!("casemate.io/{key}");
    config.annotations.insert(key, value.to_owned());
    config
}

fn policy_annotations_of_pod_and_container(cri: &Cri) -> Outcome {
    let why = cri.refusal(annotated(cri, "unknown-key", "exce", "deny"))?;
    ensure!(why.contains("casemate.io/exce"), "{why}");
    let why = cri.refusal(annotated(cri, "loosens", "profile", "compat"))?;
    ensure!(why.contains("annotations.allow"), "{why}");

    let pod = cri.pod_with(annotated(cri, "denied", "exec", "deny"))?;
    let id = pod.sleeper("app")?;
    let why = match pod.exec(&id, &["/bin/true"]) {
        Ok(ran) => return casemate_tests::skip::fail(format!("exec ran: {ran:?}")),
        Err(error) => error.to_string(),
    };
    ensure!(why.contains("execs are refused in this container"), "{why}");
    // A container can't say otherwise.
    let mut looser = container("looser", &["/bin/true"]);
    let key = "casemate.io/exec".to_owned();
    looser.annotations.insert(key.clone(), "allow".to_owned());
    let why = pod.refusal(looser)?;
    ensure!(why.contains("would loosen"), "{why}");
    pod.remove()?;

    // A container's own, in a pod that says nothing.
    let pod = cri.pod("of-container")?;
    let mut tighter = container("tighter", &["/bin/probe", "sleep"]);
    tighter.annotations.insert(key, "deny".to_owned());
    let id = pod.run(tighter)?;
    ensure!(pod.exec(&id, &["/bin/true"]).is_err(), "exec ran");
    let other = pod.sleeper("other")?;
    ensure_eq!(pod.exec(&other, &["/bin/true"])?.code, 0, "its neighbour");
    pod.remove()
}

fn policy_execs_are_recorded(cri: &Cri) -> Outcome {
    let pod = cri.pod_with(annotated(cri, "recorded", "exec", "record"))?;
    let id = pod.sleeper("app")?;
    ensure_eq!(pod.exec(&id, &["/bin/sh", "-c", "exit 3"])?.code, 3, "exit");
    let mut seen: Vec<Value> = Vec::new();
    until("records", Duration::from_secs(10), || {
        seen = lines(&["events", &pod.id]).unwrap_or_default();
        seen.iter().any(|r| r["kind"] == "exec_end")
    })?;
    let of = |kind: &str| seen.iter().find(|r| r["kind"] == kind).cloned();
    let (exec, end) = (
        of("exec").unwrap_or_default(),
        of("exec_end").unwrap_or_default(),
    );
    ensure_eq!(exec["container"], id.as_str(), "container of {exec}");
    ensure_eq!(exec["pod"], pod.id.as_str(), "pod of {exec}");
    ensure_eq!(exec["kubernetes"]["pod"], "recorded", "{exec}");
    ensure_eq!(exec["kubernetes"]["namespace"], "default", "{exec}");
    ensure_eq!(exec["kubernetes"]["container"], "app", "{exec}");
    ensure!(exec["argv"].is_null(), "{exec}");
    ensure_eq!(
        (&end["exec"], &end["status"]),
        (&exec["exec"], &3.into()),
        "end"
    );
    pod.remove()
}

/// A directory below the kubelet's, as it is on nodes; what was made goes.
struct Kubelet {
    made: Vec<PathBuf>,
    dir: PathBuf,
}

impl Kubelet {
    fn of(uid: &str) -> Result<Self, Stop> {
        let dir = Path::new("/var/lib/kubelet/pods")
            .join(uid)
            .join("volumes/kubernetes.io~empty-dir/data");
        let mut made: Vec<PathBuf> = dir
            .ancestors()
            .take_while(|a| !a.exists())
            .map(Path::to_owned)
            .collect();
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("file"), format!("of {uid}\n"))?;
        made.insert(0, dir.join("file"));
        Ok(Self { made, dir })
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        for path in &self.made {
            // Deepest first; what somebody else uses by now stays.
            let _ = fs::remove_file(path).or_else(|_| fs::remove_dir(path));
        }
    }
}

fn policy_volumes_of_the_kubelet(cri: &Cri) -> Outcome {
    // As uids are: the cgroup's name, by which 1.6 is understood, has it too.
    let own = cri.world.id("uid").trim_start_matches("cmt").to_owned();
    let mut config = config::pod(cri, "kubelet");
    if let Some(metadata) = &mut config.metadata {
        metadata.uid.clone_from(&own);
    }
    if let Some(linux) = &mut config.linux {
        let parent = format!("/{}/pod{own}", casemate_tests::world::PODS);
        linux.cgroup_parent = parent;
    }
    let mine = Kubelet::of(&own)?;
    let theirs = Kubelet::of(&format!("{own}-other"))?;
    let pod = cri.pod_with(config)?;
    let out = pod.sh("own", "cat /v/file", |c| {
        c.mounts.push(mount(&mine.dir, "/v"));
    })?;
    ensure_eq!(out, format!("of {own}\n"), "its own volume");
    for (name, dir) in [
        ("other", theirs.dir.as_path()),
        ("all", Path::new("/var/lib/kubelet/pods")),
    ] {
        let mut other = container(name, &["/bin/true"]);
        other.mounts.push(mount(dir, "/v"));
        let why = pod.refusal(other)?;
        ensure!(why.contains("isn't this pod's"), "{why}");
    }
    pod.remove()
}

fn policy_host_paths(cri: &Cri) -> Outcome {
    let pod = cri.pod("host-paths")?;
    let daemon = cri.node.daemon.address().to_owned();
    let state = daemon.with_file_name("state");
    for (number, (path, says)) in [
        (Path::new("/etc"), "path of the node is refused"),
        (Path::new("/var"), "path of the node is refused"),
        (daemon.as_path(), "a socket of the node"),
        (state.as_path(), "path of the node is refused"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut config = container(&format!("app{number}"), &["/bin/true"]);
        config.mounts.push(mount(path, "/v"));
        let why = pod.refusal(config)?;
        ensure!(why.contains(says), "{}: {why}", path.display());
    }
    pod.remove()
}

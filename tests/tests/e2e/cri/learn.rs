//! Learning from pods, as the kubelet makes them.

use std::fs;

use casemate_tests::operator::casemate;
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq};
use k8s_cri::v1::PodSandboxConfig;
use seccomp_profiles::Recording;
use serde_json::Value;

use super::Cri;
use super::config::{self, container};
use crate::common::{LONG, casemate_only};

crate::cri_tests![learn_from_pods_and_containers, learn_then_lock_then_widen,];

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

/// A profile's text with what `casemate why` says to put in and to take out.
fn widened(text: &str, denial: &Value) -> Result<String, Stop> {
    let lines = denial["lines"].as_str().unwrap_or_default();
    let name = format!("\"{}\"", denial["syscall"].as_str().unwrap_or_default());
    let (head, groups) = text
        .split_once("[[group]]")
        .ok_or_else(|| Stop::Fail(text.to_owned()))?;
    let (groups, left_out) = groups.split_once("[[left_out]]").unwrap_or((groups, ""));
    let left_out = left_out.replace(&format!("{name}, "), "");
    let left_out = left_out.replace(&format!(", {name}"), "");
    Ok(format!(
        "{head}{lines}\n[[group]]{groups}[[left_out]]{left_out}"
    ))
}

/// The whole way of an operator: a pod is learned from, another one is locked into what
/// that made, is refused what is new, and a third may do it by what `why` says.
fn learn_then_lock_then_widen(cri: &Cri) -> Outcome {
    casemate_only()?;
    const WORK: &str = "cat /etc/passwd >/dev/null; [ -d /etc ] && echo works";
    const NEW: &[&str] = &["/bin/ln", "-s", "x", "/link"];
    let work = |pod: &super::client::Pod<'_>| -> Result<String, Stop> {
        let id = pod.sleeper("app")?;
        ensure_eq!(pod.exec_sh(&id, WORK)?.trim(), "works", "what it says");
        Ok(id)
    };
    let name = format!("learned-{}", cri.generation.tag());
    let pod = cri.pod_with(learning(cri, "to-learn-from"))?;
    work(&pod)?;
    let file = format!("k8s.io_{}.json", pod.id);
    pod.remove()?;
    let recording = cri.node.daemon.learned().join(file);
    let recording = recording.display().to_string();
    let profile = cri.node.daemon.profiles().join(format!("{name}.toml"));
    let path = profile.display().to_string();
    let args = [
        "profile", "export", "--name", &name, "-o", &path, &recording,
    ];
    ensure_eq!(casemate(&args)?.ok()?.err(), "", "warnings");

    let locked = |of: &str| {
        let mut config = config::pod(cri, of);
        config.annotations.insert(KEY.to_owned(), name.clone());
        cri.pod_with(config)
    };
    let pod = locked("locked")?;
    let id = work(&pod)?;
    let denials = || -> Result<Vec<Value>, Stop> {
        let said = casemate(&["why", "--json", &pod.id])?.ok()?.out();
        let said: Value = serde_json::from_str(&said).map_err(|e| Stop::Fail(e.to_string()))?;
        Ok(said["denials"].as_array().cloned().unwrap_or_default())
    };
    let before = denials()?;
    ensure!(before.is_empty(), "refused what was learned: {before:?}");
    let refused = pod.exec(&id, NEW)?;
    ensure!(refused.code != 0, "a link can be made");
    let link = || {
        let of = |d: &Value| {
            d["syscall"]
                .as_str()
                .is_some_and(|s| s.starts_with("symlink"))
        };
        denials().ok()?.into_iter().find(of)
    };
    until("a denial", LONG, || link().is_some())?;
    let link = link().unwrap_or_default();
    ensure_eq!(link["profile"], name.as_str(), "profile of {link}");
    let why = casemate(&["why", &pod.id])?.ok()?.out();
    for part in [
        &format!("before the first [[group]] of {path} put")[..],
        "[[group.rule]]",
        "out of its [[left_out]]",
        "it was not seen",
    ] {
        ensure!(why.contains(part), "{part:?} is not in {why}");
    }
    pod.remove()?;

    let text = widened(&fs::read_to_string(&profile)?, &link)?;
    fs::write(&profile, &text)?;
    let pod = locked("widened")?;
    let id = work(&pod)?;
    let made = pod.exec(&id, NEW)?;
    ensure_eq!(made.code, 0, "by what why says: {} {text}", made.err);
    // Nothing else: not another spelling of a name for a file.
    ensure!(
        pod.exec(&id, &["/bin/ln", "/link", "/hard"])?.code != 0,
        "a hard link can be made"
    );
    pod.remove()?;
    fs::remove_file(&profile)?;
    Ok(())
}

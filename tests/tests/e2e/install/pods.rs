//! The proof by pods of CRI, on nodes that have run pods.

use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use casemate_tests::ctr::Ctr;
use casemate_tests::generation::Generation;
use casemate_tests::image::{Image, catalog};
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{World, ensure, ensure_eq, procs, world};
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::*;
use rustix::process::Signal;

use super::node::{Node, same};
use crate::cri::client::connected;
use crate::trials;

trials! {
    install_proves_by_pods,
    install_proves_by_pods_once_their_image_is_there,
    install_goes_back_when_pods_fail,
    install_proves_although_pods_are_ended,
    install_killed_while_a_pod_proves,
    install_killed_while_a_pod_is_made,
}

/// Brings an image to where CRI looks.
fn bring(node: &Node, image: &Image) -> Outcome {
    let ctr = Ctr::new(&node.socket(), "k8s.io");
    Ok(ctr.import(image, World::get()?.dir())?)
}

/// What containerd begins pods with: a program that sleeps.
fn pause(node: &Node) -> Outcome {
    bring(node, &catalog::pause(Some(&world::probe()?))?)
}

fn pods(node: &Node) -> Result<Vec<String>, Stop> {
    let said = connected(&node.socket(), "ListPodSandbox", async |channel| {
        let request = ListPodSandboxRequest { filter: None };
        RuntimeServiceClient::new(channel)
            .list_pod_sandbox(request)
            .await
    })?;
    Ok(said.items.into_iter().map(|pod| pod.id).collect())
}

/// Ends and removes a pod, as the kubelet does with those that it doesn't know.
fn end(node: &Node, pod_sandbox_id: &str) -> Outcome {
    let id = pod_sandbox_id.to_owned();
    connected(&node.socket(), "StopPodSandbox", async |channel| {
        let request = StopPodSandboxRequest { pod_sandbox_id: id };
        RuntimeServiceClient::new(channel)
            .stop_pod_sandbox(request)
            .await
    })?;
    Ok(())
}

fn install_proves_by_pods() -> Outcome {
    for generation in Generation::ALL {
        let node = Node::with_pods(generation)?;
        pause(&node)?;
        let before = node.tree();
        let said = node.must("install", &[])?;
        for handler in ["casemate", "casemate-strict"] {
            let line = format!("proof: a pod of handler {handler} ran by CRI, and is held");
            ensure!(
                said.contains(&line),
                "{generation:?}: no {line:?} in {said}"
            );
        }
        ensure_eq!(pods(&node)?, Vec::<String>::new(), "pods afterwards");
        // A kubelet that removes a container without a log's path removes what is in its
        // working directory.
        let log = std::fs::read_to_string(node.dir.join("log"))?;
        ensure!(
            log.contains("StartContainer for") && !log.contains("Logging will be disabled"),
            "{generation:?}: the proof's container has no log"
        );
        node.must("uninstall", &[])?;
        same("after uninstall", &before, &node.tree())?;
    }
    Ok(())
}

fn install_proves_by_pods_once_their_image_is_there() -> Outcome {
    let node = Node::with_pods(Generation::V2_1)?;
    let said = node.must("install", &[])?;
    ensure!(
        said.contains("proof: a container of class strict ran")
            && said.contains("proof: no pod by CRI yet:")
            && said.contains("isn't here yet"),
        "without the image: {said}"
    );
    pause(&node)?;
    until("a proof by a pod", Duration::from_secs(20), || {
        node.must("install", &[])
            .is_ok_and(|said| said.contains("a pod of handler casemate-strict ran by CRI"))
    })?;
    node.must("uninstall", &[])?;
    Ok(())
}

/// The image's program is none: containers run, and pods don't.
fn install_goes_back_when_pods_fail() -> Outcome {
    let node = Node::with_pods(Generation::V1_7)?;
    bring(&node, &catalog::pause(None)?)?;
    let before = node.tree();
    node.refuses(
        "install",
        &[],
        &[
            "prove: start a pod's container",
            catalog::PAUSE_PROGRAM,
            "5 pods of handler casemate were tried",
            "the node is as it was, and containerd runs",
        ],
    )?;
    ensure_eq!(pods(&node)?, Vec::<String>::new(), "pods afterwards");
    same("after it", &before, &node.tree())
}

/// Somebody ends the first pods, as a kubelet may: that is no fault of the installation.
fn install_proves_although_pods_are_ended() -> Outcome {
    let node = Node::with_pods(Generation::V2_1)?;
    pause(&node)?;
    let ended = AtomicUsize::new(0);
    let mut child = node
        .command("install", &[])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let done = until("the installation's end", Duration::from_secs(60), || {
        // It may have been quicker.
        if ended.load(Ordering::Relaxed) < 2
            && let Ok(Some(pod)) = pods(&node).map(|pods| pods.first().cloned())
            && end(&node, &pod).is_ok()
        {
            ended.fetch_add(1, Ordering::Relaxed);
        }
        child.try_wait().is_ok_and(|status| status.is_some())
    });
    if done.is_err() {
        let _ = child.kill();
    }
    let output = child.wait_with_output()?;
    done?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && said.contains("a pod of handler casemate-strict ran by CRI"),
        "{} pods were ended: {said}",
        ended.load(Ordering::Relaxed)
    );
    ensure_eq!(pods(&node)?, Vec::<String>::new(), "pods afterwards");
    node.must("uninstall", &[])?;
    Ok(())
}

fn install_killed_while_a_pod_proves() -> Outcome {
    let node = Node::with_pods(Generation::V2_1)?;
    pause(&node)?;
    let before = node.tree();
    for verb in ["install", "uninstall"] {
        let mut child = node
            .command("install", &[])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let mut seen = Vec::new();
        until("a pod of the proof", Duration::from_secs(30), || {
            seen = pods(&node).unwrap_or_default();
            !seen.is_empty()
        })?;
        child.kill()?;
        child.wait()?;
        let said = node.must(verb, &[])?;
        ensure!(said.contains("was cut short"), "{verb}: {said}");
        ensure_eq!(pods(&node)?, Vec::<String>::new(), "pods after {verb}");
        for pod in seen {
            until("the pod's shim to end", Duration::from_secs(20), || {
                procs::with_command(&pod).is_empty()
            })?;
        }
        if verb == "install" {
            node.must("uninstall", &[])?;
        }
        same(&format!("killed, then {verb}"), &before, &node.tree())?;
    }
    Ok(())
}

/// CRI lists no pod that it is still making: what the killed one has asked for comes, or
/// is given up, later. Stopped at the shim's `start`, or after it.
fn install_killed_while_a_pod_is_made() -> Outcome {
    let node = Node::with_pods(Generation::V2_1)?;
    pause(&node)?;
    let before = node.tree();
    let programs = node.dir.display().to_string();
    let shims = |at: &str| -> Vec<u32> {
        let of_it = |pid: &u32| {
            let line = procs::command_line(*pid);
            line.contains("-namespace k8s.io") && line.contains(&programs) && line.contains(at)
        };
        procs::all().into_iter().filter(of_it).collect()
    };
    for (at, verb) in [(" serve", "install"), (" start", "uninstall")] {
        let mut child = node
            .command("install", &[])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let limit = Instant::now() + Duration::from_secs(60);
        let mut seen = shims(at);
        while seen.is_empty() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(1));
            seen = shims(at);
        }
        for pid in &seen {
            procs::signal(*pid, Signal::STOP);
        }
        child.kill()?;
        child.wait()?;
        ensure!(!seen.is_empty(), "no{at} of a pod's shim was seen");
        let said = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_secs(1));
                for pid in &seen {
                    procs::signal(*pid, Signal::CONT);
                }
            });
            node.must(verb, &[])
        })?;
        ensure!(said.contains("was cut short"), "{verb}: {said}");
        ensure_eq!(shims(""), Vec::<u32>::new(), "shims after {verb}");
        ensure_eq!(pods(&node)?, Vec::<String>::new(), "pods after {verb}");
        if verb == "install" {
            node.must("uninstall", &[])?;
        }
        same(
            &format!("killed, then {verb}: {said}"),
            &before,
            &node.tree(),
        )?;
    }
    Ok(())
}

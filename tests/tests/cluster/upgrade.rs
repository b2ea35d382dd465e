//! The DaemonSet gets another image while pods run: a good one, and one whose shim is
//! broken.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use casemate_tests::image::installer;
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop, trial};
use casemate_tests::{ensure, ensure_eq, world};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::installer::{SYSTEM, label, labelled, restart, rolled_out, same, told, tree};
use crate::kube::{Class, Cluster, SLOW};
use crate::node::Node;
use crate::nodes::{installer_on, named, placed, refused, two};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("cluster_upgrade_under_living_pods", under_living_pods),
        trial("cluster_upgrade_to_a_broken_one_stops", to_a_broken_one),
    ]
}

const DAEMONSET: &str = "daemonset/casemate-installer";

/// Takes an image of our programs in, one of them changed; its name.
fn image(
    cluster: &Cluster,
    tag: &str,
    program: &str,
    change: impl FnOnce(Vec<u8>) -> Vec<u8>,
) -> Result<String, Stop> {
    let dir = tempfile::tempdir()?;
    let mut change = Some(change);
    for name in installer::PROGRAMS {
        let mut bytes = fs::read(world::binaries().join(name))?;
        if let Some(change) = change.take_if(|_| name == program) {
            bytes = change(bytes);
        }
        let path = dir.path().join(name);
        fs::write(&path, bytes)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let mut image = installer::image(dir.path(), 0)?;
    let (name, _) = image.name.rsplit_once(':').unwrap_or_default();
    image.name = format!("{name}:{tag}");
    cluster.registry.push(&image)?;
    Ok(image.name)
}

fn set_image(cluster: &Cluster, image: &str) -> Outcome {
    let containers = ["install", "metrics"].map(|name| format!("{name}={image}"));
    let args = ["-n", SYSTEM, "set", "image", DAEMONSET];
    let args = [&args[..], &containers.each_ref().map(String::as_str)].concat();
    cluster.must(&args, "").map(drop)
}

/// What is installed on a node, by its annotation.
fn version(cluster: &Cluster, node: &str) -> Result<String, Stop> {
    let node = cluster.object("", "node", node)?;
    let version = &node["metadata"]["annotations"]["casemate.io/version"];
    Ok(version.as_str().unwrap_or_default().to_owned())
}

/// Those in /opt.
fn versions(node: &Node) -> Result<Vec<String>, Stop> {
    let script = "cd /opt/casemate && find . -mindepth 1 -maxdepth 1 -type d -printf '%f\\n'";
    let said = node.must(&["sh", "-c", script])?;
    let mut all: Vec<String> = said.lines().map(str::to_owned).collect();
    all.sort();
    Ok(all)
}

/// The version that a pod's shim runs.
fn of_pod(node: &Node, pod: &str) -> Result<String, Stop> {
    let all: Value = serde_json::from_str(&node.must(&["casemate", "ps", "--json"])?)?;
    let all = all.as_array().cloned().unwrap_or_default();
    let found = all.iter().find(|p| p["kubernetes"]["name"] == pod);
    let pid = found.map_or(&Value::Null, |p| &p["shim"]["pid"]);
    let program = node.must(&["readlink", &format!("/proc/{pid}/exe")])?;
    let below = program.strip_prefix("/opt/casemate/").unwrap_or_default();
    Ok(below.split('/').next().unwrap_or_default().to_owned())
}

/// The label of all nodes, as it changes.
struct Watch {
    child: Child,
    file: PathBuf,
    _dir: tempfile::TempDir,
}

impl Watch {
    fn new(cluster: &Cluster) -> Result<Self, Stop> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("labels");
        let line = "jsonpath={.metadata.name} {.metadata.labels.casemate\\.io/ready}{\"\\n\"}";
        let child = cluster
            .command(&["get", "nodes", "--watch", "-o", line])
            .stdout(fs::File::create(&file)?)
            .stderr(Stdio::null())
            .spawn()?;
        let watch = Self {
            child,
            file,
            _dir: dir,
        };
        until("the watch to see all nodes", SLOW, || {
            ["node1", "node2"].iter().all(|n| !watch.seen(n).is_empty())
        })?;
        Ok(watch)
    }

    /// What a node's was, one after the other.
    fn seen(&self, node: &str) -> Vec<String> {
        let text = fs::read_to_string(&self.file).unwrap_or_default();
        let own = text.lines().filter_map(|line| line.split_once(' '));
        let mut seen: Vec<String> = own
            .filter(|(name, _)| *name == node)
            .map(|(_, label)| label.to_owned())
            .collect();
        seen.dedup();
        seen
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Takes pods away, and waits until the node has nothing of theirs.
fn end(cluster: &Cluster, node: &Node, pod: &str) -> Outcome {
    cluster.delete(Class::Casemate, pod)?;
    until("the sandbox to end", SLOW, || {
        let said = node.must(&["casemate", "ps"]);
        said.is_ok_and(|said| !said.contains(&format!("casemate/{pod} ")))
    })?;
    Ok(())
}

fn under_living_pods() -> Outcome {
    let (cluster, second) = two()?;
    let nodes = [&cluster.node, &*second];
    let pods = |age: &str| nodes.map(|node| (node, format!("{age}-{}", node.host)));
    let begin = |age: &str| -> Outcome {
        for (node, pod) in pods(age) {
            cluster.apply(Class::Casemate, &named(&pod, Some(&node.host)))?;
        }
        for (node, pod) in pods(age) {
            ensure_eq!(placed(&cluster, &pod)?, node.host, "the node of {pod}");
        }
        Ok(())
    };
    // Left by whoever came first, or not.
    let all = ["-n", "casemate", "delete", "pods", "--all", "--wait"];
    cluster.must(&all, "")?;
    begin("old")?;
    let before = version(&cluster, "node1")?;
    let starts = nodes.map(|node| node.starts("containerd"));
    let watch = Watch::new(&cluster)?;

    // Another build: a byte more in one program.
    let image = image(&cluster, "next", "casemate-agent", |mut bytes| {
        bytes.push(0);
        bytes
    })?;
    set_image(&cluster, &image)?;
    rolled_out(&cluster)?;
    let next = version(&cluster, "node1")?;
    ensure!(next != before, "still the version {before}");
    begin("new")?;
    for ((node, old), (_, new)) in pods("old").into_iter().zip(pods("new")) {
        let host = &node.host;
        ensure_eq!(version(&cluster, host)?, next, "the version of {host}");
        ensure_eq!(
            watch.seen(host),
            ["true", "false", "true"],
            "the label of {host}"
        );
        ensure_eq!(of_pod(node, &old)?, before, "the version of {old}");
        ensure_eq!(of_pod(node, &new)?, next, "the version of {new}");
        ensure_eq!(versions(node)?.len(), 2, "versions on {host}");
        for pod in [&old, &new] {
            let said = cluster.exec_ok(Class::Casemate, pod, "echo here")?;
            ensure_eq!(said, "here\n", "exec in {pod}");
            node.must(&["casemate", "posture", pod])?;
        }
    }
    drop(watch);
    // The old version goes when its pods have, at the next run.
    for (node, old) in pods("old") {
        end(&cluster, node, &old)?;
    }
    restart(&cluster)?;
    for (node, new) in pods("new") {
        ensure_eq!(
            versions(node)?,
            [next.as_str()],
            "versions on {}",
            node.host
        );
        let said = cluster.exec_ok(Class::Casemate, &new, "echo here")?;
        ensure_eq!(said, "here\n", "exec in {new}");
        end(&cluster, node, &new)?;
    }
    let now = nodes.map(|node| node.starts("containerd"));
    ensure_eq!(now, starts, "starts of containerd");
    Ok(())
}

/// A shim that says its version, and can't do more.
const BROKEN: &str = "#!/bin/sh
[ \"$1\" != -v ] || { echo 'containerd-shim-casemate-v2 broken'; exit 0; }
echo 'no such luck' >&2
exit 3
";

fn to_a_broken_one() -> Outcome {
    let (cluster, second) = two()?;
    let nodes = [&cluster.node, &*second];
    let starts = nodes.map(|node| node.starts("containerd"));
    let before = nodes.map(tree);
    let living = nodes.map(|node| (node, format!("living-{}", node.host)));
    for (node, pod) in &living {
        cluster.apply(Class::Casemate, &named(pod, Some(&node.host)))?;
    }
    for (_, pod) in &living {
        placed(&cluster, pod)?;
    }
    let good = version(&cluster, "node1")?;
    let shim = "containerd-shim-casemate-v2";
    let image = image(&cluster, "broken", shim, |_| BROKEN.as_bytes().to_vec())?;
    let has_it = |pod: &Value| pod["spec"]["initContainers"][0]["image"] == image.as_str();
    set_image(&cluster, &image)?;

    // It comes to one node, fails there again and again, and goes no further.
    let mut hit = 0;
    until("an installer to fail three times", SLOW, || {
        (0..2).any(|n| {
            hit = n;
            let pod = installer_on(&cluster, &nodes[n].host).unwrap_or_default();
            let status = &pod["status"]["initContainerStatuses"][0];
            has_it(&pod) && status["restartCount"].as_u64() >= Some(3)
        })
    })
    .map_err(|e| Stop::Fail(format!("{e}: {}", told(&cluster))))?;
    let (bad, other) = (nodes[hit], nodes[1 - hit]);
    let as_it_was = "the node is as it was";
    let words = ["no such luck", as_it_was, &good, "rollout undo"];
    refused(&cluster, &bad.host, &words)?;
    let pod = installer_on(&cluster, &other.host)?;
    ensure!(!has_it(&pod), "the rollout went on to {}", other.host);
    ensure!(
        crate::kube::is_ready(&pod),
        "{}: {}",
        other.host,
        pod["status"]
    );

    // Both nodes are what they were, and say so; between two tries, the bad one, too.
    for node in nodes {
        let host = &node.host;
        ensure_eq!(version(&cluster, host)?, good, "the version of {host}");
        let pod = format!("during-{host}");
        cluster.apply(Class::Casemate, &named(&pod, Some(host)))?;
        ensure_eq!(placed(&cluster, &pod)?, *host, "the node of {pod}");
        ensure_eq!(of_pod(node, &pod)?, good, "the version of {pod}");
        node.must(&["casemate", "posture", &pod])?;
    }
    labelled(&cluster, &bad.host)?;
    ensure_eq!(label(&cluster, &other.host)?, "true", "of {}", other.host);
    for (_, pod) in &living {
        let said = cluster.exec_ok(Class::Casemate, pod, "echo here")?;
        ensure_eq!(said, "here\n", "exec in {pod}");
    }

    // The way back.
    let args = ["-n", SYSTEM, "rollout", "undo", DAEMONSET];
    cluster.must(&args, "")?;
    rolled_out(&cluster)?;
    for (node, before) in nodes.into_iter().zip(before) {
        ensure_eq!(label(&cluster, &node.host)?, "true", "of {}", node.host);
        same(&before?, &tree(node)?)?;
        for age in ["living", "during"] {
            end(&cluster, node, &format!("{age}-{}", node.host))?;
        }
    }
    let now = nodes.map(|node| node.starts("containerd"));
    ensure_eq!(now, starts, "starts of containerd");
    Ok(())
}

//! The DaemonSet of `runtimeclass/` as it comes: the kubelet runs it, it installs on the
//! node that it finds, restarts its containerd, proves and labels; and the way back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop, trial};
use casemate_tests::{ensure, ensure_eq};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::kube::{Class, Cluster, SLOW, alone, cluster, last, steady};
use crate::node::Node;
use crate::nodes::{installer_on, named};

crate::cluster_trials![
    pods_wait_until_the_installer_is_done,
    installer_serves_metrics,
    installer_again_changes_nothing,
];

/// What comes when everything else has ended.
pub fn last_trials() -> Vec<Trial> {
    vec![trial(
        "cluster_uninstall_leaves_the_node_as_it_was",
        uninstall,
    )]
}

pub const SYSTEM: &str = "casemate-system";

/// Each node's /etc, /opt and /usr/local, before anybody installed there.
static BEFORE: Mutex<BTreeMap<String, BTreeSet<String>>> = Mutex::new(BTreeMap::new());

/// Keeps what is there of a node that nobody has installed on.
pub fn keep(node: &Node) -> Outcome {
    let mut before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    before.insert(node.host.clone(), tree(node)?);
    Ok(())
}

/// Tells what is on a node that an installer could change. Of what others have in
/// /usr/local, names do.
pub const TREE: &str = "find /etc /opt /var/lib/casemate -path /opt/cni -prune -o -type f \
                        -exec sha256sum {} + 2>/dev/null; \
                        find /opt /usr/local -path /opt/cni -prune -o -printf '%y %p %l\\n'; \
                        find / -mindepth 1 -maxdepth 1 -printf '%y %p %l\\n'";

/// That of a node.
pub fn tree(node: &Node) -> Result<BTreeSet<String>, Stop> {
    Ok(lines(&node.must(&["sh", "-c", TREE])?))
}

/// What [`TREE`] has said, without the lock, which stays, as files that are locked have to.
pub fn lines(said: &str) -> BTreeSet<String> {
    let lines = said.lines().filter(|line| !line.contains("install/lock"));
    lines.map(str::to_owned).collect()
}

/// The cluster with casemate on its node, by the DaemonSet; once in a run. What was
/// seen on the way is what its trial is about.
pub fn installed() -> Result<std::sync::Arc<Cluster>, Stop> {
    static DONE: Mutex<Option<Result<(), String>>> = Mutex::new(None);
    let cluster = cluster()?;
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    match &*done {
        Some(Ok(())) => return Ok(cluster),
        Some(Err(why)) => return casemate_tests::skip::fail(format!("no casemate here: {why}")),
        None => {}
    }
    let installed = install(&cluster);
    *done = Some(match &installed {
        Ok(()) => Ok(()),
        Err(Stop::Fail(why) | Stop::Skip(why)) => Err(why.clone()),
    });
    drop(done);
    installed.map(|()| cluster)
}

pub const FIRST: &str = "
apiVersion: v1
kind: Pod
metadata: {name: first}
spec:
  CLASS
  terminationGracePeriodSeconds: 0
  containers:
  - {name: c, image: IMAGE, command: [sleep, infinity]}
";

/// The label of a node that says that casemate holds there.
pub fn label(cluster: &Cluster, node: &str) -> Result<Value, Stop> {
    let node = cluster.object("", "node", node)?;
    Ok(node["metadata"]["labels"]["casemate.io/ready"].clone())
}

/// Waits until it is `true`.
pub fn labelled(cluster: &Cluster, node: &str) -> Outcome {
    until("the node's label", SLOW, || {
        label(cluster, node).is_ok_and(|label| label == "true")
    })
    .map_err(|e| Stop::Fail(format!("{e}: {}", told(cluster))))?;
    Ok(())
}

/// Waits until it is said that no node is right for a pod.
pub fn unschedulable(cluster: &Cluster, name: &str) -> Outcome {
    let pod = cluster.pod(Class::Casemate, name, "unschedulable", |pod| {
        let all = pod["status"]["conditions"].as_array();
        all.is_some_and(|all| all.iter().any(|c| c["reason"] == "Unschedulable"))
    });
    pod.map(drop)
}

fn install(cluster: &Cluster) -> Outcome {
    keep(&cluster.node)?;
    ensure_eq!(cluster.node.starts("containerd"), 1, "starts of containerd");
    for part in ["namespace", "classes"] {
        let dir = format!("runtimeclass/{part}");
        cluster.must(&["apply", "--server-side", "-k", &dir], "")?;
    }
    cluster.apply(Class::Casemate, FIRST)?;
    unschedulable(cluster, "first")?;
    // The rest of it: installer, policies, default class.
    cluster.must(&["apply", "--server-side", "-k", "runtimeclass"], "")?;
    labelled(cluster, "node1")?;
    // Under a kubelet, which ends pods that it doesn't know.
    let said = told(cluster);
    for handler in ["casemate", "casemate-strict"] {
        let line = format!("a pod of handler {handler} ran by CRI");
        ensure!(said.contains(&line), "no {line:?} in {said}");
    }
    Ok(())
}

/// What the installer has said, and what is said of it.
pub fn told(cluster: &Cluster) -> String {
    let said = |args: &[&str]| {
        let args = [&["-n", SYSTEM][..], args].concat();
        let said = cluster.kubectl(&args);
        said.map(|said| last(&(said.out() + &said.err())))
            .unwrap_or_default()
    };
    let pods = "app.kubernetes.io/name=casemate";
    format!(
        "{} {}",
        said(&["logs", "-l", pods, "--all-containers"]),
        said(&["describe", "pods", "-l", pods])
    )
}

fn pods_wait_until_the_installer_is_done() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    let pod = cluster.ready(Class::Casemate, "first")?;
    ensure_eq!(pod["spec"]["overhead"]["memory"], "3Mi", "overhead");
    // It really runs in a sandbox, which is as promised.
    cluster.node.must(&["casemate", "posture", "first"])?;
    let pods = cluster.node.must(&["casemate", "ps"])?;
    ensure!(pods.contains("casemate/first"), "casemate ps: {pods}");
    cluster.node.must(&["casemate", "doctor"])?;
    // containerd was really restarted, once, with the node's own command.
    ensure_eq!(cluster.node.starts("containerd"), 2, "starts of containerd");
    let said = told(&cluster);
    ensure!(
        said.contains("label"),
        "the installer says no label: {said}"
    );
    cluster.delete(Class::Casemate, "first")
}

pub fn rolled_out(cluster: &Cluster) -> Outcome {
    let args = [
        "-n",
        SYSTEM,
        "rollout",
        "status",
        "daemonset/casemate-installer",
        "--timeout=50s",
    ];
    until("the DaemonSet to be rolled out", SLOW, || {
        cluster.kubectl(&args).is_ok_and(|said| said.code() == 0)
    })
    .map_err(|e| Stop::Fail(format!("{e}: {}", told(cluster))))?;
    Ok(())
}

fn installer_serves_metrics() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    rolled_out(&cluster)?;
    let text = FIRST.replace("first", "counted");
    cluster.apply(Class::Casemate, &text)?;
    cluster.ready(Class::Casemate, "counted")?;
    let installer = installer_on(&cluster, &cluster.node.host)?;
    let name = installer["metadata"]["name"].as_str().unwrap_or_default();
    let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{name}:9464/proxy/metrics");
    let said = cluster.must(&["get", "--raw", &path], "")?;
    ensure!(
        said.lines()
            .any(|line| line.contains("pod=\"counted\"") || line.contains("counted")),
        "the pod isn't in the metrics: {said}"
    );
    cluster.delete(Class::Casemate, "counted")
}

/// Has the DaemonSet make its pods anew.
pub fn restart(cluster: &Cluster) -> Outcome {
    let args = [
        "-n",
        SYSTEM,
        "rollout",
        "restart",
        "daemonset/casemate-installer",
    ];
    cluster.must(&args, "")?;
    rolled_out(cluster)
}

/// A new pod of the DaemonSet, as after an upgrade to the same.
fn installer_again_changes_nothing() -> Outcome {
    let cluster = installed()?;
    let _alone = alone();
    rolled_out(&cluster)?;
    let (starts, before) = (cluster.node.starts("containerd"), tree(&cluster.node)?);
    restart(&cluster)?;
    ensure_eq!(
        cluster.node.starts("containerd"),
        starts,
        "starts of containerd"
    );
    same(&before, &tree(&cluster.node)?)?;
    ensure_eq!(label(&cluster, "node1")?, "true", "the label");
    Ok(())
}

pub fn same(before: &BTreeSet<String>, after: &BTreeSet<String>) -> Outcome {
    let differ: Vec<&String> = before.symmetric_difference(after).collect();
    ensure!(differ.is_empty(), "not as it was: {differ:?}");
    Ok(())
}

/// As `runtimeclass/job/uninstall.yaml` says in its head.
pub fn job(cluster: &Cluster, node: &str, end: &str) -> Result<String, Stop> {
    let path = crate::kube::here().join(Path::new("runtimeclass/job/uninstall.yaml"));
    let text = fs::read_to_string(path)?.replace("NODE", node);
    cluster.must(&["apply", "--server-side", "-f", "-"], &text)?;
    let name = format!("casemate-uninstall-{node}");
    until("the job's end", SLOW, || {
        let job = cluster.object(SYSTEM, "job", &name).unwrap_or_default();
        let all = job["status"]["conditions"].as_array();
        all.is_some_and(|all| {
            all.iter()
                .any(|c| c["type"] == end && c["status"] == "True")
        })
    })
    .map_err(|e| Stop::Fail(format!("{end}: {e}: {}", told(cluster))))?;
    let job = format!("job/{name}");
    let said = cluster.must(&["-n", SYSTEM, "logs", &job], "")?;
    cluster.must(&["-n", SYSTEM, "delete", &job, "--wait"], "")?;
    Ok(said)
}

fn uninstall() -> Outcome {
    let cluster = installed()?;
    let _alone = alone();
    let second = cluster
        .second
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let nodes: Vec<&Node> = [Some(&cluster.node), second.as_deref()]
        .into_iter()
        .flatten()
        .collect();
    let pods: Vec<String> = nodes.iter().map(|n| format!("stays-{}", n.host)).collect();
    for (node, pod) in nodes.iter().zip(&pods) {
        cluster.apply(Class::Casemate, &named(pod, Some(&node.host)))?;
    }
    for pod in &pods {
        cluster.ready(Class::Casemate, pod)?;
    }
    let delete = ["-n", SYSTEM, "delete", "daemonset", "casemate-installer"];
    cluster.must(&[&delete[..], &["--wait"]].concat(), "")?;
    // Without it the pods go on, and others come: they are as safe as before.
    let late = "late-node1";
    cluster.apply(Class::Casemate, &named(late, Some("node1")))?;
    cluster.ready(Class::Casemate, late)?;
    for pod in &pods {
        cluster.exec_ok(Class::Casemate, pod, "true")?;
    }
    for node in &nodes {
        let labels = ["casemate.io/ready-", "casemate.io/compat-"];
        let unlabel = [&["label", "node", node.host.as_str()], &labels[..]].concat();
        cluster.must(&unlabel, "")?;
        // Not while somebody's sandbox runs; what it says is one line.
        let said = job(&cluster, &node.host, "Failed")?;
        ensure!(
            said.lines().count() == 1
                && said.starts_with("casemate: check: ")
                && said.contains("sandboxes run (process ")
                && said.contains("end their pods"),
            "the job says: {said}"
        );
    }
    for pod in &pods {
        cluster.exec_ok(Class::Casemate, pod, "true")?;
    }
    let args = ["-n", "casemate", "delete", "pods", "--all", "--wait"];
    cluster.must(&args, "")?;
    for node in &nodes {
        // A pod without a grace period is gone from the API before it is from the node.
        until("the node's last sandbox to end", SLOW, || {
            let said = node.must(&["casemate", "ps"]);
            said.is_ok_and(|said| !said.contains("k8s.io"))
        })?;
        let starts = node.starts("containerd");
        job(&cluster, &node.host, "Complete")?;
        ensure_eq!(
            node.starts("containerd"),
            starts + 1,
            "starts of containerd"
        );
        let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = before.get(&node.host).cloned().unwrap_or_default();
        same(&before, &tree(node)?)?;
    }
    // Pods of the class wait again; others run.
    let text = FIRST.replace("first", "late");
    cluster.apply(Class::Casemate, &text)?;
    unschedulable(&cluster, "late")?;
    cluster.apply(Class::Runc, &text)?;
    cluster.ready(Class::Runc, "late")?;
    Ok(())
}

//! A second node, for what one can't show: where install doesn't work, pods go elsewhere;
//! an installer's token is its own node's; and pods of two nodes talk to each other.

use std::fs;
use std::sync::{Arc, PoisonError};

use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop, trial};
use casemate_tests::{ensure, ensure_eq};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::installer::{
    FIRST, SYSTEM, installed, keep, label, labelled, rolled_out, same, told, tree, unschedulable,
};
use crate::kube::{Class, Cluster, SLOW, programs};
use crate::node::Node;
use crate::services::fill;

/// In this order: the first finds no second node yet.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("cluster_nodes_without_install_get_no_pods", without_install),
        trial("cluster_nodes_tokens_are_their_own", tokens),
        trial("cluster_nodes_pods_talk", pods_talk),
    ]
}

/// The second node, where only containerd runs yet.
fn begin(cluster: &Cluster) -> Result<Arc<Node>, Stop> {
    let ca = fs::read(cluster.node.path("/etc/kubernetes/pki/apiserver.crt"))?;
    let node = Node::start(2, cluster.generation, &programs(), |at| {
        fill(at, cluster.generation, 2)?;
        let pki = at.join("etc/kubernetes/pki");
        fs::create_dir_all(&pki)?;
        Ok(fs::write(pki.join("apiserver.crt"), ca)?)
    })?;
    cluster.node.join(&node)?;
    cluster.registry.serve(node.netns.path())?;
    node.containerd()?;
    keep(&node)?;
    Ok(Arc::new(node))
}

/// It joins the cluster, and stays.
fn join(cluster: &Cluster, node: &Arc<Node>) -> Outcome {
    let mut second = cluster
        .second
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    *second = Some(node.clone());
    drop(second);
    node.systemctl("start", "kubelet")?;
    cluster.node_ready(node)
}

/// The cluster with a second node, and casemate on both.
pub fn two() -> Result<(Arc<Cluster>, Arc<Node>), Stop> {
    let cluster = installed()?;
    let second = cluster
        .second
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let node = match second {
        Some(node) => node,
        None => {
            let node = begin(&cluster)?;
            join(&cluster, &node)?;
            node
        }
    };
    labelled(&cluster, &node.host)?;
    rolled_out(&cluster)?;
    Ok((cluster, node))
}

/// A pod's name and, if it minds, its node, in the specification of the plain one.
pub fn named(name: &str, node: Option<&str>) -> String {
    let on = node.map_or(String::new(), |node| {
        format!("  nodeSelector: {{kubernetes.io/hostname: {node}}}\n")
    });
    FIRST.replace("first", name) + &on
}

/// The installer's pod on a node.
pub fn installer_on(cluster: &Cluster, node: &str) -> Result<Value, Stop> {
    let on = format!("spec.nodeName={node}");
    let labels = "app.kubernetes.io/component=installer";
    let args = [
        "-n",
        SYSTEM,
        "get",
        "pods",
        "-l",
        labels,
        "--field-selector",
        &on,
        "-o",
        "json",
    ];
    let pods: Value = serde_json::from_str(&cluster.must(&args, "")?)?;
    let all = pods["items"].as_array().cloned().unwrap_or_default();
    // Not the one that just goes.
    let stays = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
    Ok(all.iter().find(stays).cloned().unwrap_or_default())
}

/// Waits until the installer on that node has failed with these words, which must all be
/// in its one line.
pub fn refused(cluster: &Cluster, node: &str, words: &[&str]) -> Outcome {
    let mut said = String::new();
    until("the installer to refuse", SLOW, || {
        let pod = installer_on(cluster, node).unwrap_or_default();
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        let args = ["-n", SYSTEM, "logs", name, "-c", "install"];
        said = cluster.kubectl(&args).map(|s| s.out()).unwrap_or_default();
        words.iter().all(|word| said.contains(word))
    })
    .map_err(|e| Stop::Fail(format!("{e}: {words:?} in {said} {}", told(cluster))))?;
    let lines: Vec<&str> = said.lines().filter(|l| l.starts_with("casemate")).collect();
    let [line] = lines[..] else {
        return casemate_tests::skip::fail(format!("not one line: {said}"));
    };
    for word in words {
        ensure!(line.contains(word), "no {word:?} in {line:?}");
    }
    Ok(())
}

/// Takes the installer's pod on that node away: the next one has no back-off to wait for.
fn again(cluster: &Cluster, node: &str) -> Outcome {
    let pod = installer_on(cluster, node)?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let args = ["-n", SYSTEM, "delete", "pod", name, "--wait"];
    cluster.must(&args, "").map(drop)
}

/// On which node a pod of casemate's is that is ready.
pub fn placed(cluster: &Cluster, name: &str) -> Result<String, Stop> {
    let pod = cluster.ready(Class::Casemate, name)?;
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    Ok(node.to_owned())
}

fn without_install() -> Outcome {
    let cluster = installed()?;
    rolled_out(&cluster)?;
    let node = begin(&cluster)?;
    let (before, host) = (tree(&node)?, node.host.clone());
    // As on a system whose image is read-only.
    let frozen =
        "mount --rbind /opt /opt && mount -o remount,bind,ro /opt && mount -o remount,bind,ro /usr";
    node.must(&["sh", "-c", frozen])?;
    join(&cluster, &node)?;
    let as_it_was = "the node is as it was";
    let words = [
        "/opt/casemate",
        "Read-only file system",
        "--prefix",
        as_it_was,
    ];
    refused(&cluster, &host, &words)?;
    same(&before, &tree(&node)?)?;
    for name in ["one", "other"] {
        cluster.apply(Class::Casemate, &named(name, None))?;
    }
    cluster.apply(Class::Casemate, &named("picky", Some(&host)))?;
    for name in ["one", "other"] {
        ensure_eq!(placed(&cluster, name)?, "node1", "the node of {name}");
    }
    unschedulable(&cluster, "picky")?;
    ensure!(label(&cluster, &host)? != "true", "{host} is called ready");

    // One reason gone, and another found.
    for dir in ["/usr", "/opt"] {
        node.must(&["mount", "-o", "remount,bind,rw", dir])?;
    }
    let broken =
        "cp /etc/containerd/config.toml /root/ && echo 'broken = [' >>/etc/containerd/config.toml";
    node.must(&["sh", "-c", broken])?;
    let with_broken = tree(&node)?;
    again(&cluster, &host)?;
    let words = ["containerd can't read it", "config.toml", as_it_was];
    refused(&cluster, &host, &words)?;
    same(&with_broken, &tree(&node)?)?;
    ensure!(label(&cluster, &host)? != "true", "{host} is called ready");
    ensure_eq!(node.starts("containerd"), 1, "starts of containerd");
    unschedulable(&cluster, "picky")?;

    node.must(&["cp", "/root/config.toml", "/etc/containerd/config.toml"])?;
    again(&cluster, &host)?;
    labelled(&cluster, &host)?;
    ensure_eq!(placed(&cluster, "picky")?, host, "the node of picky");
    ensure_eq!(node.starts("containerd"), 2, "starts of containerd");
    node.must(&["casemate", "posture", "picky"])?;
    for name in ["one", "other", "picky"] {
        cluster.delete(Class::Casemate, name)?;
    }
    Ok(())
}

/// The token that the installer's pod on a node has.
fn token(node: &Node) -> Result<String, Stop> {
    let script = "cat /var/lib/kubelet/pods/*/volumes/kubernetes.io~projected/token/token";
    node.must(&["sh", "-c", script])
}

/// What a node's installer may, another's may not: whoever owns a node has its token.
fn tokens() -> Outcome {
    let (cluster, second) = two()?;
    let nodes = [&cluster.node, &*second];
    for (own, other) in [(nodes[0], nodes[1]), (nodes[1], nodes[0])] {
        let token = token(own)?;
        let with = |args: &[&str]| {
            let with = [&["--token", &token], args].concat();
            cluster.kubectl(&with)
        };
        let who = with(&[
            "auth",
            "whoami",
            "-o",
            "jsonpath={.status.userInfo.username}",
        ])?;
        let expected = format!("system:serviceaccount:{SYSTEM}:casemate-installer");
        ensure_eq!(who.ok()?.out(), expected, "who {} asks as", own.host);
        for (node, key, refusal) in [
            (&own.host, "casemate.io/tried", None),
            (
                &other.host,
                "casemate.io/tried",
                Some("may not change the node"),
            ),
            (
                &own.host,
                "tried",
                Some("only changes labels and annotations"),
            ),
        ] {
            let said = with(&["annotate", "node", node, &format!("{key}=1")])?;
            let told = format!("{} of {node} {key}: {}", own.host, said.err());
            match refusal {
                None => ensure_eq!(said.code(), 0, "{told}"),
                Some(why) => ensure!(said.code() == 1 && said.err().contains(why), "{told}"),
            }
            let now = cluster.object("", "node", node)?;
            let has = now["metadata"]["annotations"].get(key).is_some();
            ensure_eq!(has, refusal.is_none(), "annotated: {told}");
        }
        let label = ["label", "node", &other.host, "casemate.io/ready=false"];
        let said = with(&[&label[..], &["--overwrite"]].concat())?;
        ensure!(
            said.err().contains("may not change the node") && said.code() == 1,
            "{} unlabels {}: {}",
            own.host,
            other.host,
            said.err()
        );
        let said = with(&["get", "pods", "--all-namespaces"])?;
        ensure!(said.err().contains("forbidden"), "pods: {}", said.out());
        with(&["annotate", "node", &own.host, "casemate.io/tried-"])?.ok()?;
    }
    Ok(())
}

fn pods_talk() -> Outcome {
    let (cluster, second) = two()?;
    let hosts = [cluster.node.host.clone(), second.host.clone()];
    let web = "[sh, -c, 'cd /tmp; hostname >who; exec httpd -f -p 8080 -h /tmp']";
    let mut at = Vec::new();
    for host in &hosts {
        let name = format!("web-{host}");
        let text = named(&name, Some(host)).replace("[sleep, infinity]", web);
        cluster.apply(Class::Casemate, &text)?;
        let pod = cluster.ready(Class::Casemate, &name)?;
        ensure_eq!(pod["spec"]["nodeName"], host.as_str(), "the node of {name}");
        let ip = pod["status"]["podIP"].as_str().unwrap_or_default();
        at.push((name, ip.to_owned()));
    }
    for (from, to) in [(0, 1), (1, 0)] {
        let script = format!("wget -qO- http://{}:8080/who", at[to].1);
        let mut said = String::new();
        until("a pod of the other node to answer", SLOW, || {
            let ran = cluster.exec(Class::Casemate, &at[from].0, &script);
            said = ran.map(|ran| ran.out() + &ran.err()).unwrap_or_default();
            said.trim() == at[to].0
        })
        .map_err(|e| Stop::Fail(format!("{e}: {script}: {said}")))?;
    }
    for (name, _) in &at {
        cluster.delete(Class::Casemate, name)?;
    }
    Ok(())
}

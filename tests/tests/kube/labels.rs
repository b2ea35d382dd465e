//! `casemate install --node` and `uninstall`: labels come after the proof and go
//! before anything else, and a node that can't be labelled is left as it was.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use casemate_tests::generation::Generation;
use casemate_tests::run::run;
use casemate_tests::skip::{Outcome, Stop, skip};
use casemate_tests::world::set_mode;
use casemate_tests::{ensure, ensure_eq, world};
use serde_json::{Value, json};

use crate::node::{Node, same};
use crate::server::{Api, api};

crate::kube_trials![
    install_labels_its_node_after_the_proof,
    install_that_fails_leaves_the_labels,
    install_whose_proof_fails_takes_the_label,
    install_refuses_what_it_cannot_label,
    uninstall_works_without_an_api_server,
];

const MACHINE: &str = "0123456789abcdef0123456789abcdef";

/// A node with its containerd, and the node of that name in Kubernetes.
struct Both {
    api: Api,
    node: Node,
    name: &'static str,
    config: String,
}

impl Both {
    fn new(name: &'static str) -> Result<Self, Stop> {
        if !rustix::process::geteuid().is_root() {
            return skip("needs root");
        }
        let api = api()?;
        let mut bare = Command::new(world::binaries().join("casemate"));
        bare.args(["install", "--node", "n", "--kubeconfig", "/nowhere"]);
        let said = run(&mut bare, &[], Duration::from_secs(20))?.err();
        if said.contains("built without Kubernetes") {
            return skip("casemate was built without its feature kubernetes: make kube-test");
        }
        api.with_manifests()?;
        let node = Node::running(Generation::V1_7)?;
        fs::write(node.dir.join("etc/machine-id"), format!("{MACHINE}\n"))?;
        known(&api, name, MACHINE)?;
        let token = api.installer_token(name)?;
        let config = kubeconfig(&api, &node.dir, name, &api.url, &token)?;
        Ok(Self {
            api,
            node,
            name,
            config: config.display().to_string(),
        })
    }

    fn args<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["--node", self.name, "--kubeconfig", &self.config];
        args.extend(more);
        args
    }

    /// Its labels and annotations that are casemate's.
    fn marks(&self) -> Result<Vec<(String, String)>, Stop> {
        let args = ["get", "node", self.name, "-o", "json"];
        let object: Value = serde_json::from_str(&self.api.must(&args, "")?)?;
        let mut marks = Vec::new();
        for place in ["labels", "annotations"] {
            for (key, value) in object["metadata"][place].as_object().into_iter().flatten() {
                if key.starts_with("casemate.io/") {
                    let value = value.as_str().unwrap_or_default().to_owned();
                    marks.push((key.clone(), value));
                }
            }
        }
        Ok(marks)
    }

    fn labels(&self) -> Result<Vec<(String, String)>, Stop> {
        let mut marks = self.marks()?;
        marks.retain(|(key, _)| key != "casemate.io/version");
        Ok(marks)
    }
}

/// The node in Kubernetes, as its kubelet tells of it.
fn known(api: &Api, name: &str, machine: &str) -> Outcome {
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
    api.must(&["apply", "--server-side", "-f", "-"], &object.to_string())?;
    let status = json!({"status": {"nodeInfo": {"machineID": machine}}}).to_string();
    let args = [
        "patch",
        "node",
        name,
        "--subresource=status",
        "--type=merge",
        "-p",
        &status,
    ];
    api.must(&args, "").map(drop)
}

fn kubeconfig(api: &Api, dir: &Path, name: &str, url: &str, token: &str) -> Result<PathBuf, Stop> {
    let path = dir.join(format!("kubeconfig-{name}"));
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "t",
        "clusters": [{"name": "t", "cluster": {
            "server": url, "certificate-authority": api.ca,
        }}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "t", "context": {"cluster": "t", "user": "u"}}],
    });
    fs::write(&path, config.to_string())?;
    Ok(path)
}

fn label(key: &str, value: &str) -> (String, String) {
    (format!("casemate.io/{key}"), value.to_owned())
}

fn install_labels_its_node_after_the_proof() -> Outcome {
    let both = Both::new("labelled")?;
    let before = both.node.tree();
    both.node.must("install", &both.args(&["--dry-run"]))?;
    ensure_eq!(both.marks()?, [], "after a dry run");

    let said = both.node.must("install", &both.args(&[]))?;
    let at = |text: &str| said.find(text).unwrap_or(usize::MAX);
    let order = [
        at("casemate.io/ready=false"),
        at("binaries: "),
        at("proof: a container of class strict"),
        at("casemate.io/ready=true"),
    ];
    ensure!(
        order.is_sorted() && order[3] < usize::MAX,
        "not in order: {said}"
    );
    ensure!(
        both.node.dump()?.contains("runtimes.casemate-strict]"),
        "ready without its handlers"
    );
    ensure_eq!(both.labels()?, [label("ready", "true")], "labels");
    ensure!(
        both.marks()?
            .iter()
            .any(|(key, value)| key == "casemate.io/version"
                && value.starts_with(env!("CARGO_PKG_VERSION"))),
        "no version: {:?}",
        both.marks()?
    );

    let said = both.node.must("install", &both.args(&[]))?;
    ensure!(
        said.contains("label: node labelled: unchanged"),
        "again: {said}"
    );
    // Somebody's mistake is mended by the next run.
    both.api
        .must(&["label", "node", both.name, "casemate.io/ready-"], "")?;
    both.node.must("install", &both.args(&["--compat"]))?;
    let expected = [label("compat", "true"), label("ready", "true")];
    ensure_eq!(both.labels()?, expected, "labels with --compat");
    both.node.must("install", &both.args(&[]))?;
    ensure_eq!(
        both.labels()?,
        [label("ready", "true")],
        "labels without it"
    );

    let said = both.node.must("uninstall", &both.args(&[]))?;
    ensure!(
        said.contains("label: node labelled: casemate's are gone"),
        "{said}"
    );
    ensure_eq!(both.marks()?, [], "labels after uninstall");
    same("after uninstall", &before, &both.node.tree())
}

fn install_that_fails_leaves_the_labels() -> Outcome {
    let both = Both::new("failing")?;
    let before = both.node.tree();
    // Its containerd doesn't start with the new configuration.
    fs::write(both.node.dir.join("refuse"), "")?;
    let args = both.args(&["--timeout", "2"]);
    both.node
        .refuses("install", &args, &["the node is as it was"])?;
    ensure_eq!(both.marks()?, [], "labels of a node that had none");
    same("after a failure", &before, &both.node.tree())?;

    // One that is ready, and fails with the change to another set of handlers, is
    // ready as before.
    fs::remove_file(both.node.dir.join("refuse"))?;
    both.node.up()?;
    both.node.must("install", &both.args(&[]))?;
    let marks = both.marks()?;
    fs::write(both.node.dir.join("refuse"), "")?;
    let args = both.args(&["--compat", "--timeout", "2"]);
    both.node.refuses("install", &args, &["as it was"])?;
    ensure_eq!(both.marks()?, marks, "labels of a node that was ready");
    Ok(())
}

/// Nothing is to be done, and yet no sandbox comes: the label was true once.
fn install_whose_proof_fails_takes_the_label() -> Outcome {
    let both = Both::new("unproven")?;
    both.node.must("install", &both.args(&[]))?;
    ensure_eq!(both.labels()?, [label("ready", "true")], "labels");
    let bin = both.node.dir.join("opt/casemate/current/bin");
    let shim = bin.join("containerd-shim-casemate-v2");
    let kept = bin.join("kept");
    fs::rename(&shim, &kept)?;
    fs::write(
        &shim,
        "#!/bin/sh\n[ \"$1\" = -v ] && exec echo containerd-shim-casemate-v2\nexit 1\n",
    )?;
    set_mode(&shim, 0o755)?;
    let args = both.args(&[]);
    let parts = ["prove: ", "has the label casemate.io/ready=false now"];
    both.node.refuses("install", &args, &parts)?;
    ensure_eq!(both.labels()?, [label("ready", "false")], "labels");
    fs::rename(&kept, &shim)?;
    both.node.must("install", &both.args(&[]))?;
    ensure_eq!(
        both.labels()?,
        [label("ready", "true")],
        "labels at the end"
    );
    Ok(())
}

fn install_refuses_what_it_cannot_label() -> Outcome {
    let both = Both::new("refused")?;
    let (node, api) = (&both.node, &both.api);
    let before = node.tree();
    known(api, "another-machine", "ffffffffffffffffffffffffffffffff")?;
    known(api, "silent", "")?;
    known(api, "same-machine", MACHINE)?;
    let closed = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
    let token = api.installer_token(both.name)?;
    let at = |name: &str, url: &str, token: &str| -> Result<String, Stop> {
        Ok(kubeconfig(api, &node.dir, name, url, token)?
            .display()
            .to_string())
    };
    let away = at("away", &format!("https://{closed}"), &token)?;
    let wrong = at("wrong", &api.url, "no-token-at-all")?;
    let missing = node.dir.join("nothing").display().to_string();
    for (name, config, parts) in [
        (
            "refused",
            away.as_str(),
            ["check --node refused", "can't be asked"],
        ),
        (
            "refused",
            wrong.as_str(),
            ["check --node refused", "doesn't take the token"],
        ),
        ("refused", missing.as_str(), ["--kubeconfig", "nothing"]),
        (
            "renamed",
            both.config.as_str(),
            ["no node of that name", "was it renamed?"],
        ),
        (
            "another-machine",
            both.config.as_str(),
            ["it is the machine ffff", "nothing is done"],
        ),
        (
            "silent",
            both.config.as_str(),
            ["hasn't told its machine id", "nothing is done"],
        ),
        // The token of the pod on one node is good for that node alone.
        (
            "same-machine",
            both.config.as_str(),
            ["may not change the node", "as it was"],
        ),
    ] {
        let args = ["--node", name, "--kubeconfig", config];
        node.refuses("install", &args, &parts)?;
        same(&format!("after {name}"), &before, &node.tree())?;
    }
    ensure_eq!(node.starts(), 1, "starts of containerd");
    // No account and no file.
    node.refuses(
        "install",
        &["--node", "refused"],
        &["no pod with an account"],
    )?;
    same("without an account", &before, &node.tree())?;
    ensure_eq!(both.marks()?, [], "labels");
    Ok(())
}

fn uninstall_works_without_an_api_server() -> Outcome {
    let both = Both::new("lonely")?;
    let before = both.node.tree();
    both.node.must("install", &both.args(&[]))?;
    let closed = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
    let url = format!("https://{closed}");
    let away = kubeconfig(&both.api, &both.node.dir, "away", &url, "t")?;
    let away = away.display().to_string();
    let said = both.node.must("uninstall", &["--kubeconfig", &away])?;
    ensure!(
        said.contains("can't be asked")
            && said.contains("kubectl label node lonely casemate.io/ready- casemate.io/compat-"),
        "uninstall: {said}"
    );
    same("after uninstall", &before, &both.node.tree())?;
    ensure_eq!(both.labels()?, [label("ready", "true")], "stale labels");
    // It is told which are stale when it can be asked again.
    let said = both.node.must("uninstall", &both.args(&[]))?;
    ensure!(
        said.contains("casemate's are gone"),
        "second uninstall: {said}"
    );
    ensure_eq!(both.marks()?, [], "labels at the end");
    same("after all", &before, &both.node.tree())
}

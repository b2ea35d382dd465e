//! The quick start with a real kubeadm: `init` on one node, `casemate install` by hand,
//! the page's RuntimeClass and first pod; then a node that joins.
//!
//! Its control plane's images are made of the programs that `scripts/apiserver.sh` has
//! built, and come from the trials' registry. What is left out is said where it is.

use std::fs;
use std::path::Path;

use casemate_tests::generation::Generation;
use casemate_tests::image::layer::{Layer, mode};
use casemate_tests::image::{Image, catalog, installer};
use casemate_tests::run::{Output, run, until};
use casemate_tests::skip::{Outcome, Stop, fail, skip, trial};
use casemate_tests::{ensure, ensure_eq, world};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::kube::{self, SLOW, last};
use crate::node::{Node, host, pods};
use crate::registry::Registry;
use crate::services::{base, kubelet, kubelet_as, unit};

pub fn trials() -> Vec<Trial> {
    vec![trial("cluster_kubeadm_quick_start", quick_start)]
}

/// Where the control plane's images are said to be.
const REPOSITORY: &str = "registry.test";
/// With etcd's first start, and images of a hundred megabytes.
const ADMIN: &str = "/etc/kubernetes/admin.conf";

/// What kubeadm looks for and this machine lacks, all of it the test bed's: version 1 of
/// cgroups, kernel modules to load, more memory, programs of Debian's packages.
const LACKS: &str = "SystemVerification,Mem,NumCPU,Swap,FileExisting-crictl,FileExisting-ethtool,\
    FileExisting-tc,FileExisting-conntrack,FileExisting-iptables,FileExisting-socat,\
    FileExisting-ebtables,FileExisting-nft,Service-Kubelet,Hostname,FileContent--proc-sys-net-ipv4-ip_forward";

/// A node as kubeadm wants to find it: containerd, CNI, and a kubelet whose service is as
/// its package has it.
fn node(generation: Generation, number: u8) -> Result<Node, Stop> {
    let node = Node::start(number, generation, &kube::programs(), |at| {
        base(at, generation, number)?;
        let kubelet = kubelet_as(&format!(
            "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf \
             --kubeconfig=/etc/kubernetes/kubelet.conf --config=/var/lib/kubelet/config.yaml \
             $KUBELET_KUBEADM_ARGS --node-ip={}",
            crate::node::address(number)
        ));
        let flags = "[ ! -e /var/lib/kubelet/kubeadm-flags.env ] || {\n\
                     . /var/lib/kubelet/kubeadm-flags.env; export KUBELET_KUBEADM_ARGS; }\n";
        unit(at, "kubelet", &format!("{flags}{kubelet}"))
    })?;
    node.must(&[
        "sh",
        "-c",
        "ln -s /srv/kube/kube* /usr/bin/; echo 1 >/proc/sys/net/ipv4/ip_forward",
    ])?;
    Ok(node)
}

/// A program that needs nothing, as an image.
fn of_program(name: &str, program: &Path) -> Result<Image, Stop> {
    let mut layer = Layer::default();
    let file = program.file_name().unwrap_or_default().to_string_lossy();
    for dir in ["usr", "usr/local", "usr/local/bin"] {
        layer.dir(dir, mode(0o755))?;
    }
    let at = format!("usr/local/bin/{file}");
    layer.file(&at, mode(0o755), &fs::read(program)?)?;
    Ok(Image {
        name: name.to_owned(),
        layers: vec![layer.finish()?],
        entrypoint: vec![format!("/{at}")],
        cmd: Vec::new(),
    })
}

/// The images that kubeadm asks for, as it lists them, and the page's.
fn push(registry: &Registry, node: &Node) -> Outcome {
    let args = [
        "kubeadm",
        "config",
        "images",
        "list",
        "--config",
        "/root/kubeadm.yaml",
    ];
    let listed = node.must(&args)?;
    let probe = world::probe()?;
    for name in listed.lines() {
        let program = name
            .rsplit('/')
            .next()
            .and_then(|name| name.split(':').next());
        let mut image = match program {
            Some("pause") => catalog::pause(Some(&probe))?,
            Some(program) => of_program(name, &kube::programs().join(program))?,
            None => return fail(format!("an image without a name: {listed}")),
        };
        name.clone_into(&mut image.name);
        registry.push(&image)?;
    }
    registry.push(&catalog::pause(Some(&probe))?)?;
    let mut alpine = catalog::base(Some(&probe))?;
    alpine.name = "docker.io/library/alpine:3".to_owned();
    registry.push(&alpine)
}

fn configuration(number: u8) -> String {
    let documents = [
        json!({
            "apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "InitConfiguration",
            "localAPIEndpoint": {"advertiseAddress": crate::node::address(number)},
            "nodeRegistration": {"name": host(number)},
        }),
        // Both are addons that the quick start does without: kube-proxy wants iptables
        // of the machine's, and CoreDNS isn't one of the programs that are built.
        json!({
            "apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "ClusterConfiguration",
            "kubernetesVersion": "VERSION", "imageRepository": REPOSITORY,
            "networking": {"podSubnet": pods(number), "serviceSubnet": "10.96.0.0/24"},
            "dns": {"disabled": true}, "proxy": {"disabled": true},
        }),
        kubelet_without_authentication(),
    ];
    documents.map(|d| d.to_string()).join("\n---\n")
}

/// Who may ask the kubelet is kubeadm's to say.
fn kubelet_without_authentication() -> Value {
    let mut kubelet = kubelet();
    if let Some(kubelet) = kubelet.as_object_mut() {
        for name in ["authentication", "authorization", "clusterDNS"] {
            kubelet.remove(name);
        }
    }
    kubelet
}

fn kubeadm(node: &Node, args: &[&str]) -> Result<String, Stop> {
    let ran = run(
        &mut node.command(&[&["kubeadm"], args].concat()),
        &[],
        SLOW * 2,
    )?;
    if ran.code() == 0 {
        return Ok(ran.out());
    }
    let said = ran.out() + &ran.err();
    fail(format!(
        "kubeadm {}: {} kubelet: {}",
        args.join(" "),
        last(&said),
        last(&node.log("kubelet"))
    ))
}

/// `kubectl` on the node, as its administrator.
fn kubectl(node: &Node, args: &[&str], input: &str) -> Result<Output, Stop> {
    let all = [&["kubectl", "--kubeconfig", ADMIN], args].concat();
    Ok(run(&mut node.command(&all), input.as_bytes(), SLOW)?)
}

/// Waits until that says so.
fn says(node: &Node, what: &str, args: &[&str], words: &str) -> Outcome {
    let mut said = String::new();
    until(what, SLOW, || {
        let ran = kubectl(node, args, "");
        said = ran.map(|ran| ran.out() + &ran.err()).unwrap_or_default();
        said == words
    })
    .map_err(|e| {
        let all = ["describe", "nodes,pods"];
        let all = kubectl(node, &all, "").map(|ran| ran.out());
        Stop::Fail(format!("{e}: {said}: {}", last(&all.unwrap_or_default())))
    })?;
    Ok(())
}

/// The page's YAML: the RuntimeClass and the first pod.
fn of_the_page() -> Result<[String; 2], Stop> {
    let text = fs::read_to_string(kube::here().join("docs/quick-start.md"))?;
    let (_, section) = text
        .split_once("## Kubernetes on one node")
        .unwrap_or_default();
    let all: Vec<String> = section
        .split("```yaml\n")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once("\n```")?.0.to_owned()))
        .collect();
    match <[String; 2]>::try_from(all) {
        Ok(both) => Ok(both),
        Err(all) => fail(format!(
            "the page has {} blocks of YAML, not two",
            all.len()
        )),
    }
}

/// From nodes without casemate to the page's first pod, with the page's commands.
fn quick_start() -> Outcome {
    let generation = kube::prepared()?;
    if !kube::programs().join("kubeadm").exists() {
        return skip("no kubeadm: scripts/apiserver.sh builds it");
    }
    let [class, pod] = of_the_page()?;
    let first = node(generation, 3)?;
    let registry = Registry::default();
    registry.serve(first.netns.path())?;
    let version = first.must(&["kubeadm", "version", "-o", "short"])?;
    let text = configuration(3).replace("VERSION", version.trim());
    fs::write(first.path("/root/kubeadm.yaml"), text)?;
    push(&registry, &first)?;
    first.containerd()?;
    let ignored = format!("--ignore-preflight-errors={LACKS}");
    kubeadm(
        &first,
        &["init", "--config", "/root/kubeadm.yaml", &ignored],
    )?;
    // The one node has pods, too.
    let taint = "node-role.kubernetes.io/control-plane-";
    kubectl(&first, &["taint", "node", &first.host, taint], "")?.ok()?;

    let to = ["--node", &first.host, "--kubeconfig", ADMIN];
    install(&first, &to)?;
    let labels = "jsonpath={.metadata.labels.casemate\\.io/ready}";
    let label = ["get", "node", &first.host, "-o", labels];
    says(&first, "the node's label", &label, "true")?;
    kubectl(&first, &["apply", "-f", "-"], &class)?.ok()?;
    runs(&first, &first, "first", &pod)?;

    // Another node joins, as kubeadm says; there is no administrator's file there.
    let second = node(generation, 4)?;
    first.join(&second)?;
    registry.serve(second.netns.path())?;
    second.containerd()?;
    let said = kubeadm(&first, &["token", "create", "--print-join-command"])?;
    let mut args: Vec<&str> = said.split_whitespace().skip(1).collect();
    args.extend(["--node-name", &second.host, &ignored]);
    kubeadm(&second, &args)?;
    install(&second, &[])?;
    let on = format!(
        "\n  nodeSelector: {{kubernetes.io/hostname: {}}}\n",
        second.host
    );
    runs(
        &first,
        &second,
        "second",
        &(pod.replace("name: first", "name: second") + &on),
    )?;

    let all = ["delete", "pods", "--all", "--now", "--wait"];
    kubectl(&first, &all, "")?.ok()?;
    until("the node's last sandbox to end", SLOW, || {
        let said = first.must(&["casemate", "ps"]);
        said.is_ok_and(|said| !said.contains("k8s.io"))
    })?;
    first.must(&["casemate", "uninstall", "--kubeconfig", ADMIN])?;
    says(&first, "no label", &label, "")
}

/// `casemate install` by a release's one file.
fn install(node: &Node, more: &[&str]) -> Outcome {
    let dist = node.path("/root/dist");
    fs::create_dir_all(&dist)?;
    let program = dist.join("casemate");
    fs::write(&program, installer::whole(&world::binaries())?)?;
    world::set_mode(&program, 0o755)?;
    let starts = node.starts("containerd");
    let args = [&["/root/dist/casemate", "install"], more].concat();
    let said = run(&mut node.command(&args), &[], SLOW)?.ok()?.out();
    ensure!(said.contains("held as promised"), "install: {said}");
    ensure_eq!(
        node.starts("containerd"),
        starts + 1,
        "starts of containerd"
    );
    Ok(())
}

/// The page's pod is Running on that node, in its sandbox.
fn runs(first: &Node, node: &Node, name: &str, text: &str) -> Outcome {
    // Made by a controller a moment after its namespace.
    let account = ["get", "serviceaccount", "default", "-o", "name"];
    says(
        first,
        "the pods' account",
        &account,
        "serviceaccount/default\n",
    )?;
    kubectl(first, &["apply", "-f", "-"], text)?.ok()?;
    let phase = "jsonpath={.status.phase} {.spec.nodeName}";
    let wanted = format!("Running {}", node.host);
    says(
        first,
        "the pod to run",
        &["get", "pod", name, "-o", phase],
        &wanted,
    )?;
    let said = kubectl(first, &["exec", name, "--", "id", "-u"], "")?;
    ensure_eq!(said.ok()?.out(), "0\n", "id in {name}");
    let said = kubectl(first, &["logs", name], "")?.ok()?.out();
    ensure!(said.starts_with("uid=0(root)"), "its log: {said}");
    node.must(&["casemate", "posture", name]).map(drop)
}

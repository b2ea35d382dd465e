//! The cluster on the node: its services, what they are told, and `kubectl`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use casemate_tests::generation::Generation;
use casemate_tests::image::{catalog, installer};
use casemate_tests::run::{Output, run, until};
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::world;
use serde_json::Value;

use crate::node::{LIMIT, Node};
use crate::registry::Registry;
use crate::services::{fill, kubeconfig};

/// Environment variable that names the directory of `scripts/apiserver.sh`.
const KUBE_VARIABLE: &str = "CASEMATE_TEST_KUBE";
/// Environment variable with containerd's version: 2.1, or another of the test bed.
const CONTAINERD_VARIABLE: &str = "CASEMATE_TEST_CLUSTER";
/// For what takes seconds, and longer on a busy machine.
pub const SLOW: Duration = Duration::from_secs(180);
/// The image of pods here: busybox and `probe`.
pub const BUSYBOX: &str = "docker.io/library/busybox:stable";

/// The root of the tree.
pub fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub fn programs() -> PathBuf {
    std::env::var_os(KUBE_VARIABLE).map_or_else(|| here().join("target/kube"), PathBuf::from)
}

/// By what a pod is run. Each has a namespace of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    Runc,
    Casemate,
}

impl Class {
    pub const BOTH: [Self; 2] = [Self::Runc, Self::Casemate];

    /// Its namespace.
    pub fn namespace(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Casemate => "casemate",
        }
    }

    /// Its line in a pod's spec.
    fn line(self) -> &'static str {
        match self {
            Self::Runc => "enableServiceLinks: true",
            Self::Casemate => "runtimeClassName: casemate",
        }
    }
}

/// The cluster, up, with casemate on its node.
pub struct Cluster {
    pub node: Node,
    pub registry: Registry,
    pub generation: Generation,
    dir: tempfile::TempDir,
    /// Another node, if there is one already.
    pub second: Mutex<Option<Arc<Node>>>,
}

/// What is made once in a run, or why it couldn't be.
pub type Kept<T> = Mutex<Option<Result<Arc<T>, String>>>;

/// That, made at the first call; `what` is said where it had failed before.
pub fn kept<T>(
    slot: &Kept<T>,
    what: &str,
    make: impl FnOnce() -> Result<T, Stop>,
) -> Result<Arc<T>, Stop> {
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    match &*slot {
        Some(Ok(made)) => return Ok(made.clone()),
        Some(Err(why)) => return fail(format!("{what}: {why}")),
        None => {}
    }
    match make() {
        Ok(made) => {
            let made = Arc::new(made);
            *slot = Some(Ok(made.clone()));
            Ok(made)
        }
        Err(Stop::Skip(why)) => skip(why),
        Err(Stop::Fail(why)) => {
            *slot = Some(Err(why.clone()));
            fail(why)
        }
    }
}

static CLUSTER: Kept<Cluster> = Mutex::new(None);

/// It, started at the first call; skips where its programs aren't there.
pub fn cluster() -> Result<Arc<Cluster>, Stop> {
    kept(&CLUSTER, "the cluster didn't start", Cluster::start)
}

/// Ends it.
pub fn close() {
    let mut slot = CLUSTER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(Ok(cluster)) = slot.take()
        && let Ok(dir) = std::env::var("CASEMATE_TEST_KEEP")
        && !dir.is_empty()
    {
        // What its services have said, for whoever looks for a reason.
        let second = cluster
            .second
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for node in second.iter().map(|node| &**node).chain([&cluster.node]) {
            let to = Path::new(&dir).join(&node.host);
            let _ = fs::create_dir_all(&to);
            for entry in fs::read_dir(node.path("/var/log")).into_iter().flatten() {
                let path = entry.map(|entry| entry.path()).unwrap_or_default();
                let name = path.file_name().unwrap_or_default();
                let _ = fs::copy(&path, to.join(name));
            }
        }
    }
}

/// Services of the node must stay up while a trial looks at its pods.
static SERVICES: RwLock<()> = RwLock::new(());

/// While this lives, they do.
pub fn steady() -> RwLockReadGuard<'static, ()> {
    SERVICES.read().unwrap_or_else(PoisonError::into_inner)
}

/// While this lives, no other trial minds when they are restarted.
pub fn alone() -> RwLockWriteGuard<'static, ()> {
    SERVICES.write().unwrap_or_else(PoisonError::into_inner)
}

/// The containerd to take; skips where something is missing that clusters are made of.
pub fn prepared() -> Result<Generation, Stop> {
    let kube = programs();
    for program in [
        "etcd",
        "kube-apiserver",
        "kube-controller-manager",
        "kube-scheduler",
        "kubelet",
        "kubectl",
    ] {
        if !kube.join(program).exists() {
            let place = kube.display();
            return skip(format!(
                "no {program} in {place}: scripts/apiserver.sh builds it"
            ));
        }
    }
    if !rustix::process::geteuid().is_root() {
        return skip("needs root");
    }
    if !Path::new("/sys/fs/cgroup/memory").is_dir() {
        return skip("the node's cgroups are made for version 1, which isn't here");
    }
    let wanted = std::env::var(CONTAINERD_VARIABLE).unwrap_or_else(|_| "2.1".to_owned());
    let generation = Generation::ALL.into_iter().find(|g| g.version() == wanted);
    let Some(generation) = generation else {
        return fail(format!(
            "{CONTAINERD_VARIABLE}: no containerd {wanted} in the test bed"
        ));
    };
    let with_kubernetes = run(
        Command::new(world::binaries().join("casemate")).args([
            "install",
            "--node",
            "n",
            "--kubeconfig",
            "/nowhere",
        ]),
        &[],
        LIMIT,
    )?;
    if with_kubernetes.err().contains("built without Kubernetes") {
        return skip("casemate was built without its feature kubernetes: make cluster-test");
    }
    Ok(generation)
}

impl Cluster {
    fn start() -> Result<Self, Stop> {
        let generation = prepared()?;
        let kube = programs();
        let dir = tempfile::tempdir()?;
        let node = Node::start(1, generation, &kube, |at| fill(at, generation, 1))?;
        let registry = Registry::default();
        registry.serve(node.netns.path())?;
        let cluster = Self {
            node,
            registry,
            generation,
            dir,
            second: Mutex::default(),
        };
        cluster.push_images()?;
        cluster.up()?;
        Ok(cluster)
    }

    /// Those that everybody uses.
    fn push_images(&self) -> Outcome {
        let probe = world::probe()?;
        let mut busybox = catalog::base(Some(&probe))?;
        busybox.name = BUSYBOX.to_owned();
        self.registry.push(&busybox)?;
        self.registry.push(&catalog::pause(Some(&probe))?)?;
        self.registry
            .push(&installer::image(&world::binaries(), 0)?)
    }

    fn up(&self) -> Outcome {
        for service in ["containerd", "etcd", "kube-apiserver"] {
            self.node.systemctl("start", service)?;
        }
        let certificate = self.node.path("/etc/kubernetes/pki/apiserver.crt");
        until("the API server's certificate", SLOW, || {
            certificate.exists()
        })?;
        fs::copy(&certificate, self.dir.path().join("ca"))?;
        let config = kubeconfig("admin", &self.dir.path().join("ca").display().to_string());
        fs::write(self.dir.path().join("admin"), config)?;
        until("the API server to be ready", SLOW, || {
            let ready = self.kubectl(&["get", "--raw", "/readyz"]);
            ready.is_ok_and(|said| said.code() == 0)
        })?;
        for service in ["kube-controller-manager", "kube-scheduler", "kubelet"] {
            self.node.systemctl("start", service)?;
        }
        self.node_ready(&self.node)?;
        for class in Class::BOTH {
            self.must(&["create", "namespace", class.namespace()], "")?;
            // Made by a controller a moment later.
            until("the account of pods", SLOW, || {
                let args = ["-n", class.namespace(), "get", "serviceaccount", "default"];
                self.kubectl(&args).is_ok_and(|said| said.code() == 0)
            })?;
        }
        Ok(())
    }

    /// Waits until a node whose kubelet runs is ready.
    pub fn node_ready(&self, node: &Node) -> Outcome {
        let status = "jsonpath={.status.conditions[?(@.type=='Ready')].status}";
        let ready = ["get", "node", &node.host, "-o", status];
        until("the node to be ready", SLOW, || {
            self.kubectl(&ready).is_ok_and(|said| said.out() == "True")
        })
        .map_err(|e| Stop::Fail(format!("{e}: {}", last(&node.log("kubelet")))))?;
        Ok(())
    }

    /// The command `kubectl`, as the administrator, in the tree's root.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.node.beside(&programs().join("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(self.dir.path().join("admin"))
            .args(args)
            // Its cache of what the server has.
            .env("HOME", self.dir.path())
            .current_dir(here());
        command
    }

    pub fn kubectl(&self, args: &[&str]) -> Result<Output, Stop> {
        self.kubectl_with(args, "")
    }

    /// With this on its standard input.
    pub fn kubectl_with(&self, args: &[&str], input: &str) -> Result<Output, Stop> {
        Ok(run(&mut self.command(args), input.as_bytes(), LIMIT)?)
    }

    /// It must work; what it said.
    pub fn must(&self, args: &[&str], input: &str) -> Result<String, Stop> {
        Ok(self.kubectl_with(args, input)?.ok()?.out())
    }

    /// Makes what is in these YAML documents, in the namespace of that class: `CLASS` is
    /// its line in a pod's spec, `IMAGE` the image.
    pub fn apply(&self, class: Class, text: &str) -> Outcome {
        let text = text
            .replace("CLASS", class.line())
            .replace("IMAGE", BUSYBOX);
        let args = ["-n", class.namespace(), "apply", "-f", "-"];
        self.must(&args, &text).map(drop)
    }

    /// An object.
    pub fn object(&self, namespace: &str, kind: &str, name: &str) -> Result<Value, Stop> {
        let said = self.must(&["-n", namespace, "get", kind, name, "-o", "json"], "")?;
        Ok(serde_json::from_str(&said)?)
    }

    /// Waits until a pod is as `is` says; the pod.
    pub fn pod(
        &self,
        class: Class,
        name: &str,
        what: &str,
        is: impl Fn(&Value) -> bool,
    ) -> Result<Value, Stop> {
        let mut pod = Value::Null;
        let came = until(&format!("the pod {name} to be {what}"), SLOW, || {
            pod = self
                .object(class.namespace(), "pod", name)
                .unwrap_or_default();
            let is = is(&pod);
            if !is {
                // kubectl is a heavy program to ask with.
                std::thread::sleep(Duration::from_millis(200));
            }
            is
        });
        match came {
            Ok(_) => Ok(pod),
            Err(e) => {
                let args = ["-n", class.namespace(), "describe", "pod", name];
                let told = self
                    .kubectl(&args)
                    .map(|said| said.out())
                    .unwrap_or_default();
                fail(format!("{class:?}: {e}: {} {}", pod["status"], last(&told)))
            }
        }
    }

    /// Waits until all containers of a pod are ready.
    pub fn ready(&self, class: Class, name: &str) -> Result<Value, Stop> {
        self.pod(class, name, "ready", is_ready)
    }

    /// Waits until a pod has ended; how.
    pub fn ended(&self, class: Class, name: &str) -> Result<Value, Stop> {
        self.pod(class, name, "at its end", |pod| {
            let phase = pod["status"]["phase"].as_str().unwrap_or_default();
            ["Succeeded", "Failed"].contains(&phase)
        })
    }

    /// What a container has said.
    pub fn logs(&self, class: Class, pod: &str, container: &str) -> Result<String, Stop> {
        self.must(&["-n", class.namespace(), "logs", pod, "-c", container], "")
    }

    /// `kubectl exec` of a shell's script; what came of it.
    pub fn exec(&self, class: Class, pod: &str, script: &str) -> Result<Output, Stop> {
        let args = [
            "-n",
            class.namespace(),
            "exec",
            pod,
            "--",
            "sh",
            "-c",
            script,
        ];
        self.kubectl(&args)
    }

    /// It must work; what it said.
    pub fn exec_ok(&self, class: Class, pod: &str, script: &str) -> Result<String, Stop> {
        Ok(self.exec(class, pod, script)?.ok()?.out())
    }

    /// Takes a pod away, and waits until it has gone.
    pub fn delete(&self, class: Class, name: &str) -> Outcome {
        let args = ["-n", class.namespace(), "delete", "pod", name, "--wait"];
        self.must(&args, "").map(drop)
    }
}

/// Whether all containers of a pod are.
pub fn is_ready(pod: &Value) -> bool {
    let all = pod["status"]["conditions"].as_array();
    all.is_some_and(|all| {
        all.iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True")
    })
}

/// The state of a pod's container of that name.
pub fn status<'a>(pod: &'a Value, name: &str) -> &'a Value {
    let lists = [
        "containerStatuses",
        "initContainerStatuses",
        "ephemeralContainerStatuses",
    ];
    lists
        .iter()
        .filter_map(|list| pod["status"][list].as_array())
        .flatten()
        .find(|status| status["name"] == name)
        .unwrap_or(&Value::Null)
}

/// The id of a pod's container of that name, without the runtime's; empty if it has none.
pub fn container_id<'a>(pod: &'a Value, name: &str) -> &'a str {
    let id = status(pod, name)["containerID"].as_str();
    id.and_then(|id| id.rsplit_once("//"))
        .map_or("", |(_, id)| id)
}

/// The last lines of a text.
pub fn last(text: &str) -> String {
    let mut lines: Vec<&str> = text.lines().rev().take(8).collect();
    lines.reverse();
    lines.join(" | ")
}

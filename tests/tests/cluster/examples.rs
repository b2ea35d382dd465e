//! The examples that people copy, as they are, images pulled from a registry.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_tests::image::layer::{Layer, mode};
use casemate_tests::image::{Image, catalog};
use casemate_tests::run::{run, until};
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::{ensure, ensure_eq, world};
use serde_json::Value;

use crate::installer::installed;
use crate::kube::{Class, Cluster, SLOW, here, last, steady};

crate::cluster_trials![examples_run];

/// A root of Debian's packages, where `make compat` has made one.
fn debian() -> Option<PathBuf> {
    ["some", "all", "learned"]
        .iter()
        .map(|set| here().join(format!("target/compat/{set}/root")))
        .find(|root| root.join("usr/bin/python3").exists() && root.join("usr/sbin/nginx").exists())
}

/// The images that the examples name: of Debian's python3 and nginx.
fn push(cluster: &Cluster, root: &Path) -> Outcome {
    let packed = run(
        Command::new("tar").arg("-C").arg(root).args([
            "--numeric-owner",
            "--exclude=./usr/share/doc",
            "--exclude=./usr/share/locale",
            "--exclude=./usr/lib/jvm",
            "--exclude=./usr/lib/gcc",
            "-cf",
            "-",
            ".",
        ]),
        &[],
        SLOW,
    )?
    .ok()?
    .stdout;
    let image = |name: &str, layers: Vec<Vec<u8>>, cmd: &[&str]| Image {
        name: name.to_owned(),
        layers,
        entrypoint: Vec::new(),
        cmd: cmd.iter().map(|word| (*word).to_owned()).collect(),
    };
    let mut own = Layer::default();
    own.dir("srv", mode(0o755))?;
    own.file("srv/index.html", mode(0o644), b"a page\n")?;
    let conf = b"pid /tmp/pid; error_log stderr; events {}\n\
        http { access_log off; client_body_temp_path /tmp/c; proxy_temp_path /tmp/p;\n\
        fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;\n\
        server { listen 8080; location / { root /srv; } } }\n";
    own.file("srv/nginx.conf", mode(0o644), conf)?;
    let nginx = ["nginx", "-c", "/srv/nginx.conf", "-g", "daemon off;"];
    let web = "docker.io/nginxinc/nginx-unprivileged:stable";
    let layers = vec![packed.clone(), own.finish()?];
    cluster.registry.push(&image(web, layers, &nginx))?;
    let python = "docker.io/library/python:3-slim";
    cluster
        .registry
        .push(&image(python, vec![packed], &["python3"]))?;
    let mut busybox = catalog::base(Some(&world::probe()?))?;
    busybox.name = "docker.io/library/busybox:stable".to_owned();
    cluster.registry.push(&busybox)
}

fn apply(cluster: &Cluster, name: &str) -> Outcome {
    let path = format!("runtimeclass/examples/{name}.yaml");
    cluster.must(&["apply", "-f", &path], "").map(drop)
}

/// Waits until that is said of an object; what it was last.
fn wait(cluster: &Cluster, object: &[&str], is: impl Fn(&Value) -> bool) -> Result<Value, Stop> {
    let mut seen = Value::Null;
    let args = [&["get", "-o", "json"][..], object].concat();
    let came = until(&format!("{object:?}"), SLOW, || {
        let said = cluster.must(&args, "").unwrap_or_default();
        seen = serde_json::from_str(&said).unwrap_or_default();
        is(&seen)
    });
    match came {
        Ok(_) => Ok(seen),
        Err(e) => {
            let args = [&["describe"][..], &object[..3]].concat();
            let told = cluster.must(&args, "").unwrap_or_default();
            fail(format!("{e}: {} {}", seen["status"], last(&told)))
        }
    }
}

fn ready(pod: &Value) -> bool {
    let all = pod["status"]["conditions"].as_array();
    all.is_some_and(|all| {
        all.iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True")
    })
}

fn examples_run() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    let Some(root) = debian() else {
        return skip("no root with python3 and nginx in target/compat: make compat makes one");
    };
    push(&cluster, &root)?;
    cluster.must(&["apply", "-f", "runtimeclass/examples/namespace.yaml"], "")?;

    // A web server: the namespace gives it its class; its probe finds it ready.
    apply(&cluster, "web-server")?;
    wait(&cluster, &["-n", "tenant", "deployment", "web"], |web| {
        web["status"]["readyReplicas"] == 2
    })?;
    let pods = cluster.must(
        &["-n", "tenant", "get", "pods", "-l", "app=web", "-o", "json"],
        "",
    )?;
    let pods: Value = serde_json::from_str(&pods)?;
    for pod in pods["items"].as_array().into_iter().flatten() {
        ensure_eq!(
            pod["spec"]["runtimeClassName"],
            "casemate",
            "class of {pod}"
        );
        let ip = pod["status"]["podIP"].as_str().unwrap_or_default();
        let page = cluster.node.curl(&[&format!("http://{ip}:8080/")])?;
        ensure_eq!(page.out(), "a page\n", "page: {}", page.err());
    }

    // A computation under strict.
    apply(&cluster, "batch-job")?;
    wait(&cluster, &["-n", "tenant", "job", "digits"], |job| {
        job["status"]["succeeded"] == 1
    })?;
    let said = cluster.must(&["-n", "tenant", "logs", "job/digits"], "")?;
    ensure_eq!(said.trim(), "13561", "digits of 2^10000, added up");

    // Two containers that share a volume, one of them a sidecar.
    apply(&cluster, "several-containers")?;
    wait(&cluster, &["-n", "tenant", "pod", "several"], ready)?;
    let follows = || {
        let said = cluster.must(&["-n", "tenant", "logs", "several", "-c", "follow"], "");
        said.is_ok_and(|said| said.lines().filter(|line| line.contains("UTC")).count() >= 2)
    };
    until("the sidecar to see the other's log", SLOW, follows)?;

    // Code of somebody else's: it reaches its mirror, were there one, and nothing else.
    apply(&cluster, "code-runner")?;
    wait(&cluster, &["-n", "agents", "pod", "code-runner"], ready)?;
    let python = |code: &str| {
        let args = [
            "-n",
            "agents",
            "exec",
            "code-runner",
            "--",
            "python3",
            "-c",
            code,
        ];
        cluster.kubectl(&args)
    };
    let said = python("open('f','w').write('x'); import os; print(os.getuid(), os.listdir())")?;
    ensure_eq!(said.out().trim(), "1000 ['f']", "{}", said.err());
    let connect = |host: &str, port: u16| {
        python(&format!(
            "import socket\ns=socket.socket(); s.settimeout(3)\ntry: s.connect(('{host}',{port}))\n\
             except Exception as e: print(type(e).__name__, e)\nelse: print('connected')"
        ))
    };
    // The API server is there, and the node's kubelet: both answer who may reach them.
    let control = "
apiVersion: v1
kind: Pod
metadata: {name: reaches}
spec:
  CLASS
  terminationGracePeriodSeconds: 0
  containers:
  - {name: c, image: IMAGE, command: [sleep, infinity]}
";
    cluster.apply(Class::Casemate, control)?;
    cluster.ready(Class::Casemate, "reaches")?;
    for host in ["10.96.0.1:443", "192.0.2.1:10250"] {
        // They want TLS, and say so.
        let script = format!("wget -qO- http://{host}/ 2>&1 | grep -o 400");
        let said = cluster.exec_ok(Class::Casemate, "reaches", &script)?;
        ensure_eq!(said.trim(), "400", "control: {host}");
    }
    cluster.delete(Class::Casemate, "reaches")?;
    for (host, port) in [("10.96.0.1", 443), ("192.0.2.1", 10250)] {
        let said = connect(host, port)?.out();
        ensure!(
            !said.contains("connected") && !said.trim().is_empty(),
            "{host}: {said}"
        );
    }
    let said = cluster.node.must(&["casemate", "network", "code-runner"])?;
    ensure!(
        said.contains("10.96.0.1"),
        "casemate network doesn't name it: {said}"
    );
    let said = cluster.node.must(&["casemate", "events", "code-runner"])?;
    ensure!(said.contains("exec"), "execs aren't on record: {said}");

    // And who is refused reads why.
    let said = cluster.kubectl(&["apply", "-f", "runtimeclass/examples/refused.yaml"])?;
    let text = fs::read_to_string(here().join("runtimeclass/examples/refused.yaml"))?;
    let line = text.lines().next().unwrap_or_default();
    let (_, message) = line.split_once("refused: ").unwrap_or(("", "no such line"));
    ensure!(
        said.code() != 0 && said.err().contains(message),
        "refused: {said:?}"
    );
    for namespace in ["tenant", "agents"] {
        cluster.must(&["delete", "namespace", namespace, "--wait"], "")?;
    }
    Ok(())
}

//! An API server and its etcd, alone on this machine's loopback, ended with the run.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use casemate_tests::run::{Output, run, until};
use casemate_tests::skip::{Stop, fail, skip};
use serde_json::Value;

/// Environment variable that names the directory of `scripts/apiserver.sh`.
const KUBE_VARIABLE: &str = "CASEMATE_TEST_KUBE";
/// For one command.
const LIMIT: Duration = Duration::from_secs(60);
/// For the server to be there and to have read what it was given: seconds, but
/// minutes on a machine that is busy with something else.
const SLOW: Duration = Duration::from_secs(300);

/// The root of the tree.
pub fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub fn programs() -> PathBuf {
    std::env::var_os(KUBE_VARIABLE).map_or_else(|| here().join("target/kube"), PathBuf::from)
}

struct Running {
    api: Child,
    etcd: Child,
    dir: tempfile::TempDir,
    port: u16,
}

static SERVER: Mutex<Option<Running>> = Mutex::new(None);

/// Who asks, as the server knows them by their tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// All rights.
    Admin,
    /// Who has no token but the one that the command line names.
    Nobody,
    /// The kubelet of node n1.
    Kubelet,
    /// Who has rights over nodes, and none over casemate's labels.
    Editor,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Nobody => "nobody",
            Self::Kubelet => "kubelet",
            Self::Editor => "editor",
        }
    }
}

/// The server, once it answers.
#[derive(Debug, Clone)]
pub struct Api {
    dir: PathBuf,
    /// `https://127.0.0.1:PORT`.
    pub url: String,
    /// File with the certificate of who signed the server's.
    pub ca: PathBuf,
}

/// It, started at the first call; skips where it hasn't been built.
pub fn api() -> Result<Api, Stop> {
    for program in ["etcd", "kube-apiserver", "kubectl"] {
        if !programs().join(program).exists() {
            return skip(format!(
                "no {program} in {}: scripts/apiserver.sh builds it",
                programs().display()
            ));
        }
    }
    let mut server = SERVER.lock().unwrap_or_else(PoisonError::into_inner);
    if server.is_none() {
        let running = start()?;
        let api = Api::of(&running);
        *server = Some(running);
        let ready = || {
            let ready = api.kubectl(&["get", "--raw", "/readyz"]);
            ready.is_ok_and(|said| said.code() == 0)
        };
        until("the API server to be ready", SLOW, ready)?;
    }
    match server.as_ref() {
        Some(running) => Ok(Api::of(running)),
        None => fail("the API server has gone"),
    }
}

/// The settings of the policies, which are one for all trials.
static SETTINGS: RwLock<()> = RwLock::new(());

/// While this lives, they are as they come.
pub fn steady() -> RwLockReadGuard<'static, ()> {
    SETTINGS.read().unwrap_or_else(PoisonError::into_inner)
}

/// While this lives, they are the caller's to change.
pub fn changing() -> RwLockWriteGuard<'static, ()> {
    SETTINGS.write().unwrap_or_else(PoisonError::into_inner)
}

/// Ends it.
pub fn close() {
    let mut server = SERVER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(mut running) = server.take() {
        for child in [&mut running.api, &mut running.etcd] {
            // They have nothing to lose.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn start() -> Result<Running, Stop> {
    let dir = tempfile::Builder::new()
        .prefix("casemate-kube-")
        .tempdir()?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (client, peer, port) = (free_port()?, free_port()?, free_port()?);
    let (client, peer) = (
        format!("http://127.0.0.1:{client}"),
        format!("http://127.0.0.1:{peer}"),
    );
    fs::write(
        at("tokens.csv"),
        "admin,admin,1,\"system:masters\"\n\
         editor,editor,2,\n\
         kubelet,system:node:n1,3,\"system:nodes\"\n",
    )?;
    let mut openssl = Command::new("openssl");
    run(
        openssl.args(["genrsa", "-out", &at("sa.key"), "2048"]),
        &[],
        LIMIT,
    )?
    .ok()?;
    let spawn = |program: &str, args: &[String]| -> Result<Child, Stop> {
        let log = fs::File::create(at(&format!("{program}.log")))?;
        Ok(Command::new(programs().join(program))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?)
    };
    let etcd = spawn(
        "etcd",
        &[
            format!("--data-dir={}", at("etcd")),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
            "--unsafe-no-fsync".to_owned(),
        ],
    )?;
    let api = spawn(
        "kube-apiserver",
        &[
            format!("--etcd-servers={client}"),
            format!("--cert-dir={}", at("certs")),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={port}"),
            format!("--service-account-key-file={}", at("sa.key")),
            format!("--service-account-signing-key-file={}", at("sa.key")),
            "--service-account-issuer=https://casemate.test".to_owned(),
            format!("--token-auth-file={}", at("tokens.csv")),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            // No controller makes the accounts that it asks for.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--allow-privileged=true".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/24".to_owned(),
        ],
    )?;
    for who in ["admin", "nobody", "kubelet", "editor"] {
        let user = match who {
            "nobody" => serde_json::json!({}),
            token => serde_json::json!({"token": token}),
        };
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "t",
            "clusters": [{"name": "t", "cluster": {
                "server": format!("https://127.0.0.1:{port}"),
                "certificate-authority": at("certs/apiserver.crt"),
            }}],
            "users": [{"name": who, "user": user}],
            "contexts": [{"name": "t", "context": {"cluster": "t", "user": who}}],
        });
        fs::write(at(who), config.to_string())?;
    }
    Ok(Running {
        api,
        etcd,
        dir,
        port,
    })
}

impl Api {
    fn of(running: &Running) -> Self {
        Self {
            dir: running.dir.path().to_owned(),
            url: format!("https://127.0.0.1:{}", running.port),
            ca: running.dir.path().join("certs/apiserver.crt"),
        }
    }

    /// kubectl, as the administrator, in the tree's root.
    pub fn kubectl(&self, args: &[&str]) -> Result<Output, Stop> {
        self.kubectl_as(Who::Admin, args, "")
    }

    /// kubectl, as somebody, with this on standard input.
    pub fn kubectl_as(&self, who: Who, args: &[&str], input: &str) -> Result<Output, Stop> {
        let mut command = Command::new(programs().join("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(self.dir.join(who.name()))
            .args(args)
            // Its cache of what the server has.
            .env("HOME", &self.dir)
            .current_dir(here());
        Ok(run(&mut command, input.as_bytes(), LIMIT)?)
    }

    /// It must work; what it said.
    pub fn must(&self, args: &[&str], input: &str) -> Result<String, Stop> {
        Ok(self.kubectl_as(Who::Admin, args, input)?.ok()?.out())
    }

    /// The objects of a text of YAML documents.
    pub fn objects(&self, text: &str) -> Result<Vec<Value>, Stop> {
        let args = ["create", "--dry-run=client", "-o", "json", "-f", "-"];
        let said = self.must(&args, text)?;
        // One document after the other, or a list of them.
        let mut all = Vec::new();
        for object in serde_json::Deserializer::from_str(&said).into_iter::<Value>() {
            let object = object?;
            match object["items"].as_array() {
                Some(items) => all.extend(items.iter().cloned()),
                None => all.push(object),
            }
        }
        Ok(all)
    }

    /// What the server says of an object that somebody would make: the object as it
    /// would be, or why not.
    pub fn would_make(&self, who: Who, object: &Value) -> Result<Result<Value, String>, Stop> {
        let args = ["create", "--dry-run=server", "-o", "json", "-f", "-"];
        let said = self.kubectl_as(who, &args, &object.to_string())?;
        if said.code() == 0 {
            return Ok(Ok(serde_json::from_str(&said.out())?));
        }
        Ok(Err(said.err().trim().to_owned()))
    }

    /// Everything that is for a cluster, the installer but for its DaemonSet's pods
    /// too; once in a run. Policies take a moment to be in force.
    pub fn with_manifests(&self) -> Result<(), Stop> {
        static DONE: Mutex<bool> = Mutex::new(false);
        let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
        if *done {
            return Ok(());
        }
        self.must(&["apply", "--server-side", "-k", "runtimeclass"], "")?;
        // What each refuses, tried until it does: the server reads policies by itself.
        let pod = |spec: &str| {
            format!(
                "{{\"apiVersion\":\"v1\",\"kind\":\"Pod\",\"metadata\":{{\"name\":\"wait\",\"namespace\":\"kube-wait\"}},\"spec\":{spec}}}"
            )
        };
        let ns = "{\"apiVersion\":\"v1\",\"kind\":\"Namespace\",\"metadata\":{\"name\":\"kube-wait\",\
                  \"labels\":{\"casemate.io/tenancy\":\"multi\",\"casemate.io/require\":\"casemate\"}}}";
        self.must(&["apply", "--server-side", "-f", "-"], ns)?;
        // Each by that policy alone: of several that refuse, one is told.
        let container = |pull: &str| {
            format!(
                "\"containers\":[{{\"name\":\"c\",\"image\":\"i\",\"imagePullPolicy\":\"{pull}\"}}]"
            )
        };
        let (always, never) = (container("Always"), container("Never"));
        for (spec, policy) in [
            (
                format!("{{{always},\"runtimeClassName\":\"casemate\",\"hostPID\":true}}"),
                "casemate-pods",
            ),
            (format!("{{{always}}}"), "casemate-require-class"),
            (
                format!("{{{never},\"runtimeClassName\":\"casemate\"}}"),
                "casemate-pull-always",
            ),
        ] {
            let refuses = || {
                let args = ["create", "--dry-run=server", "-f", "-"];
                let said = self.kubectl_as(Who::Admin, &args, &pod(&spec));
                said.is_ok_and(|said| said.err().contains(policy))
            };
            until(&format!("{policy} to be in force"), SLOW, refuses)?;
        }
        *done = true;
        Ok(())
    }

    /// A token of the installer's account.
    pub fn token(&self, more: &[&str]) -> Result<String, Stop> {
        let args = [
            "create",
            "token",
            "-n",
            "casemate-system",
            "casemate-installer",
        ];
        let said = self.must(&[args.as_slice(), more].concat(), "")?;
        Ok(said.trim().to_owned())
    }

    /// A token as its pod on that node has it.
    pub fn installer_token(&self, node: &str) -> Result<String, Stop> {
        let args = ["get", "node", node, "-o", "jsonpath={.metadata.uid}"];
        let uid = self.must(&args, "")?;
        self.token(&[
            "--bound-object-kind=Node",
            &format!("--bound-object-name={node}"),
            &format!("--bound-object-uid={}", uid.trim()),
        ])
    }

    /// A namespace with these labels.
    pub fn namespace(&self, name: &str, labels: &Value) -> Result<(), Stop> {
        let object = serde_json::json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": labels},
        });
        let args = ["apply", "--server-side", "-f", "-"];
        self.must(&args, &object.to_string()).map(drop)
    }
}

/// helm, if it has been built.
pub fn helm(args: &[&str]) -> Result<String, Stop> {
    let helm = programs().join("helm");
    if !helm.exists() {
        return skip("no helm: scripts/apiserver.sh builds it");
    }
    let mut command = Command::new(helm);
    command.args(args).current_dir(here());
    Ok(run(&mut command, &[], LIMIT)?.ok()?.out())
}

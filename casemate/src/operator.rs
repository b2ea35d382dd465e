//! Living pods as the node knows them: the registry of their shims, and the
//! service by which each shim answers its operator.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixStream;
use ttrpc::r#async::Client;

use crate::error::{RunError, Step, rpc};

/// Where shims enter their pods.
const REGISTRY: &str = "/run/casemate/pods";
/// Where refusals are kept whose pods have gone, oldest first.
const REFUSED: [&str; 2] = [
    "/run/casemate/refused/log.jsonl.1",
    "/run/casemate/refused/log.jsonl",
];
const SERVICE: &str = "casemate.operator.v1.Operator";
/// For an answer that waits for nothing.
const SOON: Duration = Duration::from_secs(5);
/// The most bytes that a file of ours has.
const LARGEST: u64 = 1024 * 1024;

/// One entry of the registry.
#[derive(Debug, Clone)]
pub struct Pod {
    /// containerd namespace.
    pub namespace: String,
    /// Pod id.
    pub id: String,
    /// Kubernetes' namespace and name.
    pub kubernetes: Option<(String, String)>,
    /// Since when, RFC 3339.
    pub since: String,
    /// Host pid of its shim.
    pub shim: u32,
    socket: PathBuf,
}

#[cfg(test)]
impl Pod {
    /// One that nobody answers for.
    pub fn of_test(name: &str) -> Self {
        Self {
            namespace: "k8s.io".to_owned(),
            id: name.to_owned(),
            kubernetes: Some((name.to_owned(), name.to_owned())),
            since: "2024-02-29T23:59:59Z".to_owned(),
            shim: 0,
            socket: PathBuf::new(),
        }
    }
}

/// What is refused without root, before anything is tried.
pub fn needs_root(command: &str) -> Result<(), RunError> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(RunError::Refused(format!(
        "{command}: needs root, as pods answer nobody else: use sudo"
    )))
}

/// An event loop for one command.
pub fn block_on<T>(body: impl Future<Output = Result<T, RunError>>) -> Result<T, RunError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .step("make", "the event loop")?
        .block_on(body)
}

/// Living pods, in order of namespace and id.
pub fn pods() -> Result<Vec<Pod>, RunError> {
    let entries = match fs::read_dir(REGISTRY) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.step("read", REGISTRY)?,
    };
    let mut pods: Vec<Pod> = entries
        .flatten()
        .filter_map(|entry| read(&entry.path()))
        .collect();
    pods.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    Ok(pods)
}

/// An entry, if its shim lives.
fn read(path: &Path) -> Option<Pod> {
    let entry: Value = serde_json::from_slice(&small(path)?).ok()?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let shim = u32::try_from(entry["shim"].as_u64()?).ok()?;
    let kubernetes = &entry["kubernetes"];
    let pod = Pod {
        namespace: text(&entry["namespace"]),
        id: text(&entry["pod"]),
        kubernetes: kubernetes
            .is_object()
            .then(|| (text(&kubernetes["namespace"]), text(&kubernetes["name"]))),
        since: text(&entry["since"]),
        shim,
        socket: PathBuf::from(text(&entry["socket"])),
    };
    (started(shim)? == entry["start_time"].as_u64()?).then_some(pod)
}

fn small(path: &Path) -> Option<Vec<u8>> {
    let size = fs::symlink_metadata(path).ok()?.len();
    (size <= LARGEST).then(|| fs::read(path).ok()).flatten()
}

/// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)).
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    // One that has ended and waits for its parent is no shim any more.
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(22 - 4)?.parse().ok()
}

/// The one living pod that `name` means: its id or the beginning of it, or
/// Kubernetes' name, `NAMESPACE/NAME` where that is needed.
pub fn find(name: &str) -> Result<Pod, RunError> {
    let pods = pods()?;
    if let Some(exact) = pods.iter().find(|pod| pod.id == name) {
        return Ok(exact.clone());
    }
    let is_named = |pod: &&Pod| {
        let kubernetes = pod.kubernetes.as_ref();
        let by_name = kubernetes
            .is_some_and(|(namespace, own)| own == name || format!("{namespace}/{own}") == name);
        by_name || (!name.is_empty() && pod.id.starts_with(name))
    };
    let found: Vec<&Pod> = pods.iter().filter(is_named).collect();
    match found[..] {
        [one] => Ok(one.clone()),
        [] => Err(RunError::Refused(format!(
            "find pod {name:?}: no living pod has this id or name; casemate ps lists them"
        ))),
        _ => Err(RunError::Refused(format!(
            "find pod {name:?}: {} pods are meant by it; give more of the id, or NAMESPACE/NAME",
            found.len()
        ))),
    }
}

/// Refusals of pods that may be gone, oldest first.
pub fn refusals() -> Vec<Value> {
    REFUSED
        .iter()
        .filter_map(|path| small(Path::new(path)))
        .flat_map(|bytes| {
            let lines: Vec<Value> = bytes
                .split(|byte| *byte == b'\n')
                .filter_map(|line| serde_json::from_slice(line).ok())
                .collect();
            lines
        })
        .collect()
}

/// A connection to a pod's shim.
pub struct Operator(Client);

impl Operator {
    /// Connects.
    pub async fn connect(pod: &Pod) -> Result<Operator, RunError> {
        let socket = pod.socket.display();
        let stream = tokio::time::timeout(SOON, UnixStream::connect(&pod.socket))
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))
            .and_then(|connected| connected)
            .step("connect to the shim at", socket)?;
        Ok(Operator(Client::new(stream.into())))
    }

    async fn ask(
        &self,
        method: &'static str,
        ask: &Value,
        wait: Duration,
    ) -> Result<Value, RunError> {
        let request = ttrpc::Request {
            service: SERVICE.to_owned(),
            method: method.to_owned(),
            timeout_nano: i64::try_from((SOON + wait).as_nanos()).unwrap_or(i64::MAX),
            payload: ask.to_string().into_bytes(),
            ..ttrpc::Request::default()
        };
        let response = self.0.request(request).await.map_err(rpc(method))?;
        serde_json::from_slice(&response.payload).map_err(|error| RunError::Shim {
            step: method,
            reason: format!(
                "the answer is not understood ({error}): install shim and casemate of one release"
            ),
        })
    }

    /// What the pod is.
    pub async fn inspect(&self) -> Result<Value, RunError> {
        self.ask("Inspect", &json!({}), Duration::ZERO).await
    }

    /// What holds its containers, and where that is from.
    pub async fn explain(&self) -> Result<Value, RunError> {
        self.ask("Explain", &json!({}), Duration::ZERO).await
    }

    /// What its processes were promised to be.
    pub async fn promise(&self) -> Result<Value, RunError> {
        self.ask("Promise", &json!({}), Duration::ZERO).await
    }

    /// Records from number `since` on; waits for one as long as `wait`.
    pub async fn records(&self, since: u64, wait: Duration) -> Result<Value, RunError> {
        let ask = json!({
            "since": since,
            "wait_ms": u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
        });
        self.ask("Records", &ask, wait).await
    }

    /// What was learned from it; null where nothing is.
    pub async fn recording(&self) -> Result<Value, RunError> {
        self.ask("Recording", &json!({}), Duration::ZERO).await
    }

    /// Counts of refused calls.
    pub async fn denials(&self) -> Result<Value, RunError> {
        self.ask("Denials", &json!({}), Duration::ZERO).await
    }
}

//! Living pods as the node knows them: the registry of their shims, and the
//! service by which each shim answers its operator.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::stream::{self, StreamExt};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use ttrpc::r#async::Client;

use crate::error::{RunError, Step, one_line, rpc};

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
/// Shims that are asked at a time.
pub const AT_ONCE: usize = 16;
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

impl Pod {
    /// What people call it: Kubernetes' name where there is one, else its id.
    pub fn name(&self) -> String {
        match &self.kubernetes {
            Some((namespace, name)) => format!("{namespace}/{name}"),
            None => self.id.clone(),
        }
    }

    /// Whether it still is there, and not another one of its name.
    pub fn is_there(&self) -> bool {
        pods().is_ok_and(|all| {
            let mut all = all.iter();
            all.any(|pod| pod.id == self.id && pod.shim == self.shim && pod.since == self.since)
        })
    }

    /// Why its shim hasn't answered, and what to do.
    fn unanswered(&self, reason: &str) -> RunError {
        let (name, shim) = (one_line(&self.name()), self.shim);
        let way = match stat(shim).as_ref().and_then(|fields| fields.first()) {
            None => "it has ended: casemate ps lists those that live".to_owned(),
            Some(state) if matches!(state.as_str(), "T" | "t") => {
                format!("it is stopped, by a signal or a debugger: kill -CONT {shim}")
            }
            Some(_) => format!(
                "it lives: try again, and if it stays so look at /proc/{shim}/stack, the node's \
                 load and containerd's log"
            ),
        };
        RunError::Refused(format!(
            "ask the shim of pod {name}, pid {shim}: {reason}; {way}"
        ))
    }
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
    root_only(command, "pods answer nobody else")
}

/// The same, with another reason.
pub fn root_only(command: &str, reason: &str) -> Result<(), RunError> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(RunError::Refused(format!(
        "{command}: needs root, as {reason}: use sudo"
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

/// The fields of `/proc/PID/stat` from the third on, the state (proc_pid_stat(5)).
fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    Some(rest.split_ascii_whitespace().map(str::to_owned).collect())
}

/// When it began: field 22.
fn started(pid: u32) -> Option<u64> {
    let fields = stat(pid)?;
    // One that has ended and waits for its parent is no shim any more.
    if matches!(fields.first()?.as_str(), "Z" | "X") {
        return None;
    }
    fields.get(22 - 3)?.parse().ok()
}

/// The one living pod that `name` means: its id or the beginning of it, or
/// Kubernetes' name; `NAMESPACE/` before either, of Kubernetes or of containerd,
/// where that is needed. Or the id of one of its containers, as `kubectl describe`
/// and `crictl` have it.
pub fn find(name: &str) -> Result<Pod, RunError> {
    let name = name.strip_prefix("containerd://").unwrap_or(name);
    let pods = pods()?;
    let mut found: Vec<&Pod> = pods.iter().filter(|pod| pod.id == name).collect();
    if found.is_empty() {
        found = pods.iter().filter(|pod| is_named(pod, name)).collect();
    }
    let inside;
    if found.is_empty() && !name.is_empty() {
        inside = with_container(&pods, name);
        found = inside.iter().collect();
    }
    match found[..] {
        [one] => Ok(one.clone()),
        [] => Err(RunError::Refused(format!(
            "find pod {name:?}: no living pod has this id or name, nor has a container of one; \
             casemate ps lists them"
        ))),
        _ => {
            let each = found.iter().take(4).map(|pod| match &pod.kubernetes {
                Some(_) => format!("{} ({})", one_line(&pod.name()), one_line(&pod.id)),
                None => format!("{}/{}", pod.namespace, one_line(&pod.id)),
            });
            let each: Vec<String> = each.collect();
            Err(RunError::Refused(format!(
                "find pod {name:?}: {} pods are meant by it, {}{}: give more of the id, or \
                 NAMESPACE/NAME",
                found.len(),
                each.join(", "),
                if found.len() > each.len() { "…" } else { "" },
            )))
        }
    }
}

fn is_named(pod: &Pod, name: &str) -> bool {
    let by_kubernetes = pod.kubernetes.as_ref().is_some_and(|(namespace, own)| {
        own == name || name.strip_suffix(own.as_str()) == Some(&format!("{namespace}/"))
    });
    let in_namespace = name.split_once('/').is_some_and(|(namespace, id)| {
        pod.namespace == namespace && !id.is_empty() && pod.id.starts_with(id)
    });
    by_kubernetes || in_namespace || (!name.is_empty() && pod.id.starts_with(name))
}

/// Pods with a container whose id is this, or begins so.
fn with_container(pods: &[Pod], name: &str) -> Vec<Pod> {
    // Of its own, as whoever calls may be in an event loop.
    let told = std::thread::scope(|scope| {
        let asked = scope.spawn(|| block_on(async { Ok(inspected(pods.to_vec()).await) }));
        asked.join().ok().and_then(Result::ok)
    });
    let has = |said: &Value| {
        let mut all = said["containers"].as_array().into_iter().flatten();
        all.any(|one| one["id"].as_str().is_some_and(|id| id.starts_with(name)))
    };
    let told = told.unwrap_or_default().into_iter();
    told.filter(|(_, said)| said.as_ref().is_ok_and(has))
        .map(|(pod, _)| pod)
        .collect()
}

/// What the shims of all these pods say, in their order; one that is stuck holds up
/// no other.
pub async fn inspected(pods: Vec<Pod>) -> Vec<(Pod, Result<Value, RunError>)> {
    stream::iter(pods)
        .map(|pod| async {
            let said = match Operator::connect(&pod).await {
                Ok(shim) => shim.inspect().await,
                Err(error) => Err(error),
            };
            (pod, said)
        })
        .buffered(AT_ONCE)
        .collect()
        .await
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
pub struct Operator {
    client: Client,
    pod: Pod,
}

impl Operator {
    /// Connects.
    pub async fn connect(pod: &Pod) -> Result<Operator, RunError> {
        let stream = tokio::time::timeout(SOON, UnixStream::connect(&pod.socket))
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))
            .and_then(|connected| connected)
            .map_err(|error| {
                pod.unanswered(&format!("connect to {}: {error}", pod.socket.display()))
            })?;
        Ok(Operator {
            client: Client::new(stream.into()),
            pod: pod.clone(),
        })
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
        let answer = self.client.request(request).await;
        let response = answer.map_err(|error| match error {
            ttrpc::Error::RpcStatus(_) => rpc(method)(error),
            other => self.pod.unanswered(&one_line(&other.to_string())),
        })?;
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

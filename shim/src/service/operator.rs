//! `casemate.operator.v1.Operator`: what the `casemate` command asks a living
//! pod, on the shim's own socket and so by root alone. Requests and answers are
//! JSON. Nothing here changes anything or waits for a lock that is held for
//! long; who waits for records is counted, and there is room for a few.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::{Code, Request, Response, Status, get_status};

use crate::error::ShimError;
use crate::pod::Pod;
use crate::pod::process::Process;
use crate::pod::state::Phase;
use crate::pod::task::Task;

/// Name of the service.
const NAME: &str = "casemate.operator.v1.Operator";
/// The longest request, in bytes.
const LONGEST: usize = 1024;
/// Who may wait for records at a time.
const WAITING: usize = 8;
/// How long a request for records may wait for one.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Records in one answer.
const PAGE: usize = 256;
/// Processes named of a container.
const PROCESSES: usize = 256;

/// The service.
pub fn services(pod: Arc<Pod>) -> HashMap<String, Service> {
    let methods: [(&str, Box<dyn MethodHandler + Send + Sync>); 6] = [
        ("Inspect", Box::new(Inspect { pod: pod.clone() })),
        ("Explain", Box::new(Explain { pod: pod.clone() })),
        ("Promise", Box::new(Promise { pod: pod.clone() })),
        ("Denials", Box::new(Denials { pod: pod.clone() })),
        ("Recording", Box::new(Recording { pod: pod.clone() })),
        (
            "Records",
            Box::new(Records {
                pod,
                room: Semaphore::new(WAITING),
            }),
        ),
    ];
    let service = Service {
        methods: methods
            .into_iter()
            .map(|(name, method)| (name.to_owned(), method))
            .collect(),
        streams: HashMap::new(),
    };
    HashMap::from([(NAME.to_owned(), service)])
}

fn parse<T: DeserializeOwned + Default>(request: &Request) -> Result<T, ShimError> {
    let payload = &request.payload;
    if payload.is_empty() {
        return Ok(T::default());
    }
    if payload.len() > LONGEST {
        return Err(ShimError::InvalidArgument(format!(
            "{}: the request has more than {LONGEST} bytes",
            request.method
        )));
    }
    serde_json::from_slice(payload)
        .map_err(|error| ShimError::InvalidArgument(format!("{}: {error}", request.method)))
}

fn answer(body: &Value) -> Response {
    let mut response = Response::new();
    response.set_status(get_status(Code::OK, String::new()));
    response.payload = body.to_string().into_bytes();
    response
}

fn status(error: ShimError) -> Status {
    get_status(error.code(), error.to_string())
}

/// An error as an answer: what a handler returns otherwise loses its code.
fn refusal(status: Status) -> Response {
    let mut response = Response::new();
    response.set_status(status);
    response
}

struct Inspect {
    pod: Arc<Pod>,
}

#[async_trait]
impl MethodHandler for Inspect {
    async fn handler(&self, _ctx: TtrpcContext, _request: Request) -> ttrpc::Result<Response> {
        Ok(answer(&inspect(&self.pod)))
    }
}

/// What holds each container, and where that is from.
struct Explain {
    pod: Arc<Pod>,
}

#[async_trait]
impl MethodHandler for Explain {
    async fn handler(&self, _ctx: TtrpcContext, _request: Request) -> ttrpc::Result<Response> {
        let tasks = self.pod.tasks();
        let containers = tasks.iter().filter_map(|task| task.container());
        let explained: Vec<Value> = containers.map(|c| c.explain()).collect();
        Ok(answer(&json!({ "containers": explained })))
    }
}

struct Promise {
    pod: Arc<Pod>,
}

#[async_trait]
impl MethodHandler for Promise {
    async fn handler(&self, _ctx: TtrpcContext, _request: Request) -> ttrpc::Result<Response> {
        Ok(promise(&self.pod).map_or_else(|e| refusal(status(e)), |body| answer(&body)))
    }
}

/// What containerd renames a bundle to before it removes it; that of a sandbox container
/// that has ended goes before its pod does.
fn removed(bundle: &Path) -> PathBuf {
    let name = bundle.file_name().unwrap_or_default();
    bundle.with_file_name(format!(".{}", name.display()))
}

/// What living processes of the pod were promised to be.
fn promise(pod: &Pod) -> Result<Value, ShimError> {
    let sandbox = pod.sandbox()?;
    let tasks = pod.tasks();
    let bundles = tasks.iter().map(|task| &task.bundle).chain([&pod.bundle]);
    let bundles = bundles.flat_map(|bundle| [bundle.clone(), removed(bundle)]);
    let logs = tasks.iter().flat_map(|task| {
        let execs = task.execs().into_iter().map(|exec| exec.paths.logs());
        task.init.paths.logs().into_iter().chain(execs.flatten())
    });
    let files = bundles.chain(logs);
    let mut promise = sandbox.promise(files);
    for task in &tasks {
        let Some(container) = task.container() else {
            continue;
        };
        let ended = task.init.facts().phase == Phase::Stopped;
        let said = container.promise(&sandbox);
        promise.learners.extend(container.learner_promise(&sandbox));
        if ended {
            promise.forkers.push(said.forker);
        } else {
            promise.containers.push(said);
        }
    }
    serde_json::to_value(promise).map_err(|e| ShimError::Unknown(format!("promise: {e}")))
}

struct Denials {
    pod: Arc<Pod>,
}

#[async_trait]
impl MethodHandler for Denials {
    async fn handler(&self, _ctx: TtrpcContext, _request: Request) -> ttrpc::Result<Response> {
        let mut said = self.pod.records.denial_list();
        said["learning"] = learning(&self.pod).into();
        Ok(answer(&said))
    }
}

/// Containers that are learned from: what they are refused isn't counted.
fn learning(pod: &Pod) -> Vec<String> {
    let tasks = pod.tasks();
    let learns = |task: &&Arc<Task>| {
        let container = task.container();
        container.is_some_and(|container| container.policy().0.effective.learn)
    };
    tasks.iter().filter(learns).map(|t| t.id.clone()).collect()
}

struct Recording {
    pod: Arc<Pod>,
}

#[async_trait]
impl MethodHandler for Recording {
    async fn handler(&self, _ctx: TtrpcContext, _request: Request) -> ttrpc::Result<Response> {
        Ok(recording(&self.pod).map_or_else(|e| refusal(status(e)), |body| answer(&body)))
    }
}

/// What was learned from the pod by now; null where nothing is.
fn recording(pod: &Pod) -> Result<Value, ShimError> {
    let sandbox = pod.sandbox()?;
    let Some(learned) = sandbox.learned() else {
        return Ok(json!({ "recording": null }));
    };
    let text = learned.recording().to_json();
    let body = text.and_then(|text| serde_json::from_str::<Value>(&text));
    let body = body.map_err(|e| ShimError::Unknown(format!("recording: {e}")))?;
    Ok(json!({ "recording": body }))
}

fn inspect(pod: &Pod) -> Value {
    let sandbox = pod.sandbox();
    let containers: Vec<Value> = pod.tasks().iter().map(|task| container(task)).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "namespace": pod.events.namespace(),
        "pod": pod.id,
        "bundle": pod.bundle,
        "since": crate::log::rfc3339(pod.since),
        "shim": { "pid": std::process::id() },
        "sandbox": match sandbox {
            Ok(sandbox) => sandbox.facts(),
            Err(error) => json!({ "error": error.to_string() }),
        },
        "containers": containers,
        "dropped": pod.records.dropped(),
    })
}

fn container(task: &Task) -> Value {
    let mut about = process(&task.init);
    about["id"] = task.id.clone().into();
    about["bundle"] = task.bundle.display().to_string().into();
    about["paused"] = task.is_paused().into();
    let execs = task.execs();
    about["execs"] = execs
        .iter()
        .take(PROCESSES)
        .map(|exec| {
            let mut about = process(exec);
            about["id"] = exec.exec_id.clone().into();
            about
        })
        .collect();
    match task.container() {
        Some(container) => {
            about["sandbox"] = container.facts();
            about["denied"] = task.records.denial_total(&task.id).into();
        }
        None => about["pause"] = true.into(),
    }
    about
}

fn process(process: &Process) -> Value {
    let facts = process.facts();
    json!({
        "pid": facts.pid,
        "state": facts.phase.name(),
        "terminal": process.paths.terminal,
        "exit": process.exited().map(|exited| exited.status),
    })
}

struct Records {
    pod: Arc<Pod>,
    room: Semaphore,
}

/// What is asked of [`Records`].
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Ask {
    /// From which number on.
    since: u64,
    /// How long to wait for one, in milliseconds.
    wait_ms: u64,
    /// How many at most.
    limit: usize,
}

impl Default for Ask {
    fn default() -> Ask {
        Ask {
            since: 0,
            wait_ms: 0,
            limit: PAGE,
        }
    }
}

#[async_trait]
impl MethodHandler for Records {
    async fn handler(&self, _ctx: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        Ok(self
            .page(&request)
            .await
            .map_or_else(refusal, |body| answer(&body)))
    }
}

impl Records {
    async fn page(&self, request: &Request) -> Result<Value, Status> {
        let ask: Ask = parse(request).map_err(status)?;
        let records = &self.pod.records;
        let limit = ask.limit.clamp(1, PAGE);
        let mut page = records.page(ask.since, limit);
        if page.records.is_empty() && ask.wait_ms > 0 {
            // Dropped with this future when the client hangs up.
            let _place = self.room.try_acquire().map_err(|_| {
                get_status(
                    Code::RESOURCE_EXHAUSTED,
                    format!("Records: {WAITING} clients wait for records already; try later"),
                )
            })?;
            let wait = Duration::from_millis(ask.wait_ms).min(WAIT_MAX);
            // In time or not: what there is then is the answer.
            let _late = tokio::time::timeout(wait, records.wait(ask.since)).await;
            page = records.page(ask.since, limit);
        }
        serde_json::to_value(page)
            .map_err(|error| status(ShimError::Unknown(format!("encode records: {error}"))))
    }
}

//! The sandbox service, `containerd.runtime.sandbox.v1.Sandbox`: containerd
//! makes the pod by it where a runtime's `sandboxer` is `"shim"`. There is no
//! pause task then; containers come by the task service at the same address.
//! Off unless the configuration has it on. containerd itself publishes the
//! events of sandboxes.

mod config;
mod document;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use protobuf::MessageField;
use ttrpc::r#async::{Service, TtrpcContext};

use super::{detached, note_refusal, stats};
use crate::bootstrap::info::RUNTIME;
use crate::error::{ShimError, again};
use crate::events::timestamp;
use crate::pod::Pod;
use crate::pod::life::{Life, Step};
use crate::sandbox::{Origin, SandboxError};
use document::Owner;

/// What CRI reads of the state.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

struct Sandboxes {
    pod: Arc<Pod>,
    api: Result<bool, SandboxError>,
    /// One CreateSandbox at a time.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// The service.
pub fn services(pod: Arc<Pod>, api: Result<bool, SandboxError>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(Sandboxes {
        pod,
        api,
        turn: Arc::default(),
    }))
}

impl Sandboxes {
    /// The pod, if the service is on.
    fn on(&self, call: &str) -> Result<&Arc<Pod>, ShimError> {
        match &self.api {
            Ok(true) => Ok(&self.pod),
            Ok(false) => Err(ShimError::Unimplemented(format!(
                "{call}: the sandbox API is off; set sandbox.api = true in config.toml, or \
                 leave the runtime's sandboxer at \"podsandbox\""
            ))),
            Err(error) => Err(again(error).into()),
        }
    }

    /// The pod, if it is the one that is meant.
    fn named(&self, call: &str, id: &str) -> Result<&Arc<Pod>, ShimError> {
        let pod = self.on(call)?;
        if id == pod.id {
            return Ok(pod);
        }
        Err(ShimError::NotFound(format!(
            "{call}: sandbox {id:?} not found; this shim has {:?}",
            pod.id
        )))
    }

    /// The pod, if its sandbox has been created.
    fn created(&self, call: &str, id: &str) -> Result<(&Arc<Pod>, Life), ShimError> {
        let pod = self.named(call, id)?;
        match pod.life() {
            Life::Awaited => Err(wrong(call, Life::Awaited)),
            life => Ok((pod, life)),
        }
    }
}

fn wrong(call: &str, life: Life) -> ShimError {
    ShimError::FailedPrecondition(format!("{call}: the sandbox is {}", life.name()))
}

async fn create(pod: &Arc<Pod>, request: CreateSandboxRequest) -> Result<(), ShimError> {
    if request.sandbox_id != pod.id {
        return Err(ShimError::InvalidArgument(format!(
            "CreateSandbox: sandbox_id is {:?}, but this shim was started for {:?}",
            request.sandbox_id, pod.id
        )));
    }
    if pod.life() != Life::Awaited {
        return Err(ShimError::AlreadyExists(format!(
            "CreateSandbox: sandbox {:?} exists",
            pod.id
        )));
    }
    if !is_same(Path::new(&request.bundle_path), &pod.bundle) {
        return Err(ShimError::InvalidArgument(format!(
            "CreateSandbox: bundle_path is {:?}, but this shim was started in {}",
            request.bundle_path,
            pod.bundle.display()
        )));
    }
    if !request.rootfs.is_empty() {
        log::warn!(
            "sandbox {}: rootfs ignored: nothing runs in the sandbox",
            pod.id
        );
    }
    match pod.sandbox() {
        // A specification was in the bundle, and `start` went by it.
        Ok(_) if request.options.is_none() && request.netns_path.is_empty() => {}
        Ok(_) => {
            return Err(ShimError::InvalidArgument(
                "CreateSandbox: the bundle has a config.json, by which the sandbox was made; \
                 leave out options and netns_path, or the specification"
                    .to_owned(),
            ));
        }
        Err(ShimError::FailedPrecondition(_)) => {
            let config = config::read(request.options.as_ref())?;
            for note in &config.notes {
                log::warn!("sandbox {}: {note}", pod.id);
            }
            // Open until the pod is made, by its path.
            let users = match &config.userns {
                Some(_) if !request.netns_path.is_empty() => Owner::of(&request.netns_path)?,
                _ => None,
            };
            let document = document::write(&config, &request, users.as_ref())?;
            let files = document::files(&config, &pod.id)?;
            let has_parent = !config.cgroup_parent.is_empty();
            pod.make_sandbox(Origin::Given {
                document,
                files,
                has_parent,
            })?;
        }
        Err(error) => return Err(error),
    }
    // What containers will name by its pid. Here it is all that stands for the
    // pod, so the pod ends with it.
    let sandbox = pod.sandbox()?;
    sandbox.pause().await?;
    tokio::spawn(async move { sandbox.end_with_pause().await });
    pod.step(Step::Create(SystemTime::now()))
        .map(|_| ())
        .map_err(|life| wrong("CreateSandbox", life))
}

/// Whether two paths lead to the same directory.
fn is_same(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| rustix::fs::stat(path).map(|s| (s.st_dev, s.st_ino));
    a == b || matches!((identity(a), identity(b)), (Ok(a), Ok(b)) if a == b)
}

fn start(pod: &Arc<Pod>) -> Result<StartSandboxResponse, ShimError> {
    // First, as a sandbox that is lost can't be started.
    if pod.life() == Life::Awaited {
        return Err(wrong("StartSandbox", Life::Awaited));
    }
    let sandbox = pod.sandbox();
    let life = pod
        .step(Step::Start)
        .map_err(|life| wrong("StartSandbox", life))?;
    Ok(StartSandboxResponse {
        pid: sandbox?.pid(),
        created_at: life.created().map(timestamp).into(),
        ..StartSandboxResponse::default()
    })
}

fn status(pod: &Pod, life: Life, verbose: bool) -> SandboxStatusResponse {
    let is_ready = matches!(life, Life::Ready { .. });
    // A pid that has been given back may be anybody's.
    let pid = pod.sandbox().map_or(0, |sandbox| sandbox.pid());
    let mut info = HashMap::new();
    if verbose {
        let text = serde_json::json!({
            "pid": pid,
            "shimPid": std::process::id(),
            "runtimeType": RUNTIME,
            "sandboxState": life.name(),
            "containers": pod.ids(),
        });
        info.insert("info".to_owned(), text.to_string());
    }
    SandboxStatusResponse {
        sandbox_id: pod.id.clone(),
        pid,
        state: if is_ready { READY } else { NOT_READY }.to_owned(),
        info,
        created_at: life.created().map(timestamp).into(),
        exited_at: life.exited().map(|exited| timestamp(exited.at)).into(),
        ..SandboxStatusResponse::default()
    }
}

fn metrics(pod: &Pod) -> Result<SandboxMetricsResponse, ShimError> {
    let sandbox = pod.sandbox()?;
    let numbers = sandbox
        .stats()
        .map_err(|error| ShimError::NotFound(format!("SandboxMetrics of {:?}: {error}", pod.id)))?;
    let data = stats::pack(&numbers)
        .map_err(|error| ShimError::Unknown(format!("encode the metrics: {error}")))?;
    let mut response = SandboxMetricsResponse::default();
    let metric = response.metrics.mut_or_insert_default();
    metric.id = pod.id.clone();
    metric.timestamp = MessageField::some(timestamp(SystemTime::now()));
    metric.data = MessageField::some(data);
    Ok(response)
}

#[async_trait]
impl Sandbox for Sandboxes {
    async fn create_sandbox(
        &self,
        _ctx: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let pod = self.on("CreateSandbox")?.clone();
        let turn = self.turn.clone();
        detached(async move {
            let _turn = turn.lock().await;
            let made = create(&pod, request).await;
            note_refusal(&pod, &pod.id, made)?;
            Ok(CreateSandboxResponse::default())
        })
        .await
    }

    async fn start_sandbox(
        &self,
        _ctx: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        Ok(start(self.named("StartSandbox", &request.sandbox_id)?)?)
    }

    async fn platform(
        &self,
        _ctx: &TtrpcContext,
        request: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        self.named("Platform", &request.sandbox_id)?;
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        // In Go's names, which containerd's images have.
        platform.architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
        .to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _ctx: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let pod = self.named("StopSandbox", &request.sandbox_id)?.clone();
        let grace = Duration::from_secs(request.timeout_secs.into());
        detached(async move {
            pod.stop(grace).await;
            Ok(StopSandboxResponse::default())
        })
        .await
    }

    async fn wait_sandbox(
        &self,
        _ctx: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let (pod, _) = self.created("WaitSandbox", &request.sandbox_id)?;
        let exited = pod.wait_ended().await;
        Ok(WaitSandboxResponse {
            exit_status: exited.status,
            exited_at: MessageField::some(timestamp(exited.at)),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _ctx: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let (pod, life) = self.created("SandboxStatus", &request.sandbox_id)?;
        Ok(status(pod, life, request.verbose))
    }

    async fn ping_sandbox(
        &self,
        _ctx: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        let (pod, _) = self.created("PingSandbox", &request.sandbox_id)?;
        pod.sandbox().map_err(ttrpc::Error::from)?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _ctx: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let pod = self.named("ShutdownSandbox", &request.sandbox_id)?.clone();
        detached(async move {
            pod.end_now().await;
            Ok(ShutdownSandboxResponse::default())
        })
        .await
    }

    async fn sandbox_metrics(
        &self,
        _ctx: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let (pod, _) = self.created("SandboxMetrics", &request.sandbox_id)?;
        Ok(metrics(pod)?)
    }
}

//! The task service: `containerd.task.v2.Task` and `containerd.task.v3.Task`,
//! whose messages are the same; and the sandbox service.
//!
//! ttrpc drops a handler's future when the client's deadline passes or its
//! connection closes. So whatever changes something runs in a task of its own
//! and the handler only waits for it.

mod control;
mod exec_record;
mod inspect;
mod lifecycle;
mod operator;
mod sandbox;
mod stats;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use ttrpc::r#async::{Service, TtrpcContext};

use crate::error::ShimError;
use crate::pod::Pod;
use crate::sandbox::SandboxError;

#[derive(Clone)]
struct Tasks {
    pod: Arc<Pod>,
}

/// The task service by both names, and the sandbox service, which answers as
/// `api` says: on, off, or a configuration that can't be read.
pub fn services(pod: Arc<Pod>, api: Result<bool, SandboxError>) -> HashMap<String, Service> {
    let tasks = Arc::new(Tasks { pod: pod.clone() });
    let mut services = create_task(tasks.clone());
    for (_, service) in create_task(tasks) {
        services.insert("containerd.task.v2.Task".to_owned(), service);
    }
    services.extend(operator::services(pod.clone()));
    services.extend(sandbox::services(pod, api));
    services
}

/// Lets an operator see what the policy refused.
pub(super) fn note_refusal<T>(
    pod: &Pod,
    container: &str,
    result: Result<T, ShimError>,
) -> Result<T, ShimError> {
    if let Err(ShimError::Sandbox(SandboxError::Refused { rule, text })) = &result {
        pod.refused(container, Some(rule), text);
    }
    result
}

/// Runs a body to its end whatever becomes of the caller.
async fn detached<T: Send + 'static>(
    body: impl Future<Output = Result<T, ShimError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(body).await {
        Ok(answer) => answer.map_err(ttrpc::Error::from),
        Err(error) => Err(ShimError::Unknown(format!("the request was cut off: {error}")).into()),
    }
}

#[async_trait]
impl Task for Tasks {
    async fn create(
        &self,
        _ctx: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let (pod, id) = (self.pod.clone(), request.id.clone());
        detached(async move {
            let made = lifecycle::create(pod.clone(), request).await;
            note_refusal(&pod, &id, made)
        })
        .await
    }

    async fn start(
        &self,
        _ctx: &TtrpcContext,
        request: StartRequest,
    ) -> ttrpc::Result<StartResponse> {
        let (pod, id) = (self.pod.clone(), request.id.clone());
        detached(async move {
            let started = lifecycle::start(pod.clone(), request).await;
            note_refusal(&pod, &id, started)
        })
        .await
    }

    async fn delete(
        &self,
        _ctx: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        detached(lifecycle::delete(self.pod.clone(), request)).await
    }

    async fn exec(&self, _ctx: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        detached(lifecycle::exec(self.pod.clone(), request)).await
    }

    async fn shutdown(
        &self,
        _ctx: &TtrpcContext,
        request: ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        lifecycle::shutdown(&self.pod, &request);
        Ok(Empty::new())
    }

    async fn kill(&self, _ctx: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        Ok(control::kill(&self.pod, &request).await?)
    }

    async fn pause(&self, _ctx: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        detached(control::pause(self.pod.clone(), request.id)).await
    }

    async fn resume(&self, _ctx: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        detached(control::resume(self.pod.clone(), request.id)).await
    }

    async fn update(
        &self,
        _ctx: &TtrpcContext,
        request: UpdateTaskRequest,
    ) -> ttrpc::Result<Empty> {
        detached(control::update(self.pod.clone(), request)).await
    }

    async fn resize_pty(
        &self,
        _ctx: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        Ok(control::resize_pty(&self.pod, &request)?)
    }

    async fn close_io(&self, _ctx: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        Ok(control::close_io(&self.pod, &request).await?)
    }

    async fn checkpoint(
        &self,
        _ctx: &TtrpcContext,
        request: CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        Ok(control::checkpoint(&self.pod, &request)?)
    }

    async fn state(
        &self,
        _ctx: &TtrpcContext,
        request: StateRequest,
    ) -> ttrpc::Result<StateResponse> {
        Ok(inspect::state(&self.pod, &request).await?)
    }

    async fn wait(&self, _ctx: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        Ok(inspect::wait(&self.pod, &request).await?)
    }

    async fn connect(
        &self,
        _ctx: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        Ok(inspect::connect(&self.pod, &request))
    }

    async fn pids(&self, _ctx: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        Ok(inspect::pids(&self.pod, &request)?)
    }

    async fn stats(
        &self,
        _ctx: &TtrpcContext,
        request: StatsRequest,
    ) -> ttrpc::Result<StatsResponse> {
        Ok(stats::stats(&self.pod, &request)?)
    }
}

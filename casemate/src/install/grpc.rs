//! containerd's gRPC socket: the few calls and fields that are needed, numbered
//! as in its `.proto` files (api/services/*).

use std::path::Path;
use std::time::Duration;

use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use crate::error::{RunError, Step, one_line};

/// The configuration of CRI in its status is larger than the default allows.
const ANSWER_MAX: usize = 16 << 20;

/// A connection.
pub struct Client {
    inner: Grpc<Channel>,
    namespace: String,
    runtime: tokio::runtime::Runtime,
}

/// `google.protobuf.Empty`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Empty {}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Any {
    #[prost(string, tag = "1")]
    pub type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct VersionResponse {
    #[prost(string, tag = "1")]
    pub version: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Runtime {
    #[prost(string, tag = "1")]
    pub name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Container {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(message, optional, tag = "4")]
    pub runtime: Option<Runtime>,
    #[prost(message, optional, tag = "5")]
    pub spec: Option<Any>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateContainer {
    #[prost(message, optional, tag = "1")]
    pub container: Option<Container>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Containers {
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<Container>,
}

/// `types.Mount`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mount {
    #[prost(string, tag = "1")]
    pub kind: String,
    #[prost(string, tag = "2")]
    pub source: String,
    #[prost(string, tag = "3")]
    pub target: String,
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateTask {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(message, repeated, tag = "3")]
    pub rootfs: Vec<Mount>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CreateTaskResponse {
    #[prost(uint32, tag = "2")]
    pub pid: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ExecProcess {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(message, optional, tag = "6")]
    pub spec: Option<Any>,
    #[prost(string, tag = "7")]
    pub exec_id: String,
}

/// Start, Wait and DeleteProcess of an exec: its id comes second in all.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OfProcess {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

/// Start, Wait and Delete of a task: its container's id comes first in all.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OfTask {
    #[prost(string, tag = "1")]
    pub container_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct KillTask {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(uint32, tag = "3")]
    pub signal: u32,
    #[prost(bool, tag = "4")]
    pub all: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WaitResponse {
    #[prost(uint32, tag = "1")]
    pub exit_status: u32,
}

/// Whatever has a name or id as its first field, and no other that matters: what is to be
/// deleted, and CRI's answers and requests about one pod or container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Named {
    #[prost(string, tag = "1")]
    pub name: String,
}

impl Client {
    /// Connects to the socket; a namespace goes with every call.
    pub fn new(address: &Path, namespace: &str) -> Result<Self, RunError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .step("make", "the event loop")?;
        let shown = format!("unix://{}", address.display());
        let channel = runtime.block_on(async {
            let endpoint = Endpoint::from_shared(shown).map_err(|error| error.to_string())?;
            match tokio::time::timeout(Duration::from_secs(5), endpoint.connect()).await {
                Ok(Ok(channel)) => Ok(channel),
                Ok(Err(error)) => Err(cause(&error)),
                Err(_) => Err("no answer".to_owned()),
            }
        });
        let channel = channel.map_err(|why| {
            RunError::Refused(format!(
                "connect to containerd at {}: {why}",
                address.display()
            ))
        })?;
        Ok(Self {
            inner: Grpc::new(channel).max_decoding_message_size(ANSWER_MAX),
            namespace: namespace.to_owned(),
            runtime,
        })
    }

    /// One call.
    pub fn call<Q, A>(
        &mut self,
        path: &'static str,
        request: Q,
        limit: Duration,
    ) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut request = Request::new(request);
        if let Ok(namespace) = MetadataValue::try_from(&self.namespace) {
            request
                .metadata_mut()
                .insert("containerd-namespace", namespace);
        }
        let inner = &mut self.inner;
        self.runtime.block_on(async {
            let call = async {
                inner
                    .ready()
                    .await
                    .map_err(|error| Status::unavailable(cause(&error)))?;
                let codec = ProstCodec::<Q, A>::default();
                inner
                    .unary(request, PathAndQuery::from_static(path), codec)
                    .await
            };
            match tokio::time::timeout(limit, call).await {
                Ok(answer) => answer.map(tonic::Response::into_inner),
                Err(_) => Err(Status::deadline_exceeded(format!(
                    "no answer in {} s",
                    limit.as_secs()
                ))),
            }
        })
    }
}

/// Names the step of a call that failed.
pub fn wrong(step: &'static str) -> impl Fn(Status) -> RunError {
    move |status| RunError::Shim {
        step,
        reason: one_line(status.message()),
    }
}

/// The first cause: the others say that there was one.
fn cause(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    one_line(&last.to_string())
}

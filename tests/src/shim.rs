//! A shim's two faces: the command line that containerd calls, and the ttrpc
//! service behind the address that it answers.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest,
    KillRequest, PidsRequest, PidsResponse, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, WaitRequest, WaitResponse,
};
use containerd_shim_protos::bootstrap_api::BootstrapResult;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::Value;

use crate::error::{Failure, Result};
use crate::run::{Output, run};

/// How long any call may take that does not wait for a workload.
pub const SHORT: Duration = Duration::from_secs(20);

/// The command line that containerd gives to a shim.
#[derive(Debug, Clone)]
pub struct Invocation {
    /// The shim binary.
    pub program: PathBuf,
    /// containerd namespace.
    pub namespace: String,
    /// Container id.
    pub id: String,
    /// The bundle, which is the working directory too.
    pub bundle: PathBuf,
    /// `-address`.
    pub grpc: String,
    /// `TTRPC_ADDRESS`.
    pub ttrpc: String,
    /// What containerd writes to standard input.
    pub stdin: Vec<u8>,
    /// `-debug`.
    pub debug: bool,
    /// More environment.
    pub env: Vec<(String, String)>,
    /// PATH of the shim.
    pub path: String,
}

impl Invocation {
    /// The command for `action`, as containerd 1.7 builds it.
    pub fn command(&self, action: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["-namespace", &self.namespace, "-address", &self.grpc])
            .args(["-publish-binary", "/usr/bin/containerd", "-id", &self.id])
            .current_dir(if self.bundle.is_dir() {
                self.bundle.as_path()
            } else {
                Path::new("/")
            })
            .env("PATH", &self.path)
            .env("GOMAXPROCS", "2")
            .env("MAX_SHIM_VERSION", "2")
            .env("TTRPC_ADDRESS", &self.ttrpc)
            .env("GRPC_ADDRESS", &self.grpc)
            .env("NAMESPACE", &self.namespace)
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .process_group(0);
        if action == "delete" {
            command.arg("-bundle").arg(&self.bundle);
        }
        if self.debug {
            command.arg("-debug");
        }
        command.arg(action);
        command
    }

    /// Runs `action` to the end.
    pub fn run(&self, action: &str) -> Result<Output> {
        run(&mut self.command(action), &self.stdin, SHORT)
    }

    /// Runs `start` and reads the answer.
    pub fn start(&self) -> Result<Answer> {
        let output = self.run("start")?.ok()?;
        // containerd reads both pipes into one buffer.
        let mut all = output.stdout;
        all.extend(output.stderr);
        Answer::parse(&all)
    }

    /// Runs `delete` and decodes the answer.
    pub fn delete(&self) -> Result<DeleteResponse> {
        let mut quiet = self.clone();
        quiet.stdin = Vec::new();
        let output = quiet.run("delete")?.ok()?;
        DeleteResponse::parse_from_bytes(&output.stdout)
            .map_err(|e| Failure::Unexpected(format!("answer of delete is no DeleteResponse: {e}")))
    }
}

/// The form of an answer to `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// An address and nothing else.
    Bare,
    /// `{"version":…,"address":…,"protocol":…}`.
    Json,
    /// `containerd.runtime.bootstrap.v1.BootstrapResult`.
    Protobuf,
}

/// An answer to `start`.
#[derive(Debug, Clone)]
pub struct Answer {
    /// How it was written.
    pub form: Form,
    /// Version of the task API.
    pub version: i64,
    /// `unix://…`.
    pub address: String,
    /// `ttrpc`.
    pub protocol: String,
}

impl Answer {
    /// Reads any of the three forms, in the order that containerd 2.3 tries them.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if let Ok(result) = BootstrapResult::parse_from_bytes(bytes)
            && result.address.starts_with("unix://")
        {
            return Ok(Self {
                form: Form::Protobuf,
                version: result.version.into(),
                address: result.address,
                protocol: result.protocol,
            });
        }
        let text = String::from_utf8_lossy(bytes).trim().to_owned();
        if let Ok(json) = serde_json::from_str::<Value>(&text) {
            let field = |name: &str| json[name].as_str().unwrap_or_default().to_owned();
            return Ok(Self {
                form: Form::Json,
                version: json["version"].as_i64().unwrap_or_default(),
                address: field("address"),
                protocol: field("protocol"),
            });
        }
        if text.starts_with("unix://") && !text.contains(char::is_whitespace) {
            return Ok(Self {
                form: Form::Bare,
                version: 2,
                address: text,
                protocol: "ttrpc".to_owned(),
            });
        }
        Err(Failure::Unexpected(format!(
            "answer of start is none of the three forms: {text:?}"
        )))
    }

    /// The socket's path.
    pub fn socket(&self) -> PathBuf {
        PathBuf::from(self.address.trim_start_matches("unix://"))
    }
}

/// A connection to a shim.
#[derive(Clone)]
pub struct Client {
    client: ttrpc::Client,
    service: String,
}

impl Client {
    /// Connects and speaks the task API of that version.
    pub fn connect(address: &str, version: i64) -> Result<Self> {
        let client = ttrpc::Client::connect(address).map_err(|source| Failure::Rpc {
            method: format!("connect to {address}"),
            source,
        })?;
        let version = if version >= 3 { 3 } else { 2 };
        Ok(Self {
            client,
            service: format!("containerd.task.v{version}.Task"),
        })
    }

    /// The same connection for the sandbox service.
    pub fn of_sandbox(&self) -> Self {
        Self {
            client: self.client.clone(),
            service: "containerd.runtime.sandbox.v1.Sandbox".to_owned(),
        }
    }

    /// Any RPC of any service, as bytes.
    pub fn raw(
        &self,
        service: &str,
        method: &str,
        payload: Vec<u8>,
        limit: Duration,
    ) -> Result<Vec<u8>> {
        let failed = |source| Failure::Rpc {
            method: method.to_owned(),
            source,
        };
        let request = ttrpc::Request {
            service: service.to_owned(),
            method: method.to_owned(),
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
            payload,
            ..Default::default()
        };
        let response = self.client.request(request).map_err(failed)?;
        Ok(response.payload)
    }

    /// Any RPC of the service.
    pub fn call<R: Message>(&self, method: &str, ask: &dyn Ask, limit: Duration) -> Result<R> {
        let payload = self.raw(&self.service, method, ask.bytes()?, limit)?;
        R::parse_from_bytes(&payload)
            .map_err(|e| Failure::Unexpected(format!("decode answer of {method}: {e}")))
    }

    /// `Connect`.
    pub fn shim(&self, id: &str) -> Result<ConnectResponse> {
        let ask = ConnectRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call("Connect", &ask, Duration::from_secs(5))
    }

    /// `Start`.
    pub fn start(&self, id: &str) -> Result<StartResponse> {
        let ask = StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call("Start", &ask, SHORT)
    }

    /// `State`.
    pub fn state(&self, id: &str) -> Result<StateResponse> {
        let ask = StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call("State", &ask, SHORT)
    }

    /// `Wait`.
    pub fn wait(&self, id: &str, limit: Duration) -> Result<WaitResponse> {
        let ask = WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call("Wait", &ask, limit)
    }

    /// `Kill`.
    pub fn kill(&self, id: &str, signal: u32, all: bool) -> Result<Empty> {
        let ask = KillRequest {
            id: id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.call("Kill", &ask, SHORT)
    }

    /// `Kill` of an exec'ed process.
    pub fn kill_exec(&self, (id, exec_id): (&str, &str), signal: u32) -> Result<Empty> {
        let ask = KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            ..Default::default()
        };
        self.call("Kill", &ask, SHORT)
    }

    /// `Delete`.
    pub fn delete(&self, id: &str) -> Result<DeleteResponse> {
        let ask = DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call("Delete", &ask, SHORT)
    }

    /// `Exec`: registers a process; `stdout` and `stderr` may be empty.
    pub fn exec(
        &self,
        (id, exec_id): (&str, &str),
        process: &Value,
        stdout: &str,
        stderr: &str,
    ) -> Result<Empty> {
        let ask = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdout: stdout.to_owned(),
            stderr: stderr.to_owned(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: process.to_string().into_bytes(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        self.call("Exec", &ask, SHORT)
    }

    /// `Start` of a registered process.
    pub fn start_exec(&self, (id, exec_id): (&str, &str)) -> Result<StartResponse> {
        let ask = StartRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.call("Start", &ask, SHORT)
    }

    /// `Wait` for an exec'ed process.
    pub fn wait_exec(&self, (id, exec_id): (&str, &str)) -> Result<WaitResponse> {
        let ask = WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.call("Wait", &ask, SHORT)
    }

    /// `Delete` of an exec'ed process.
    pub fn delete_exec(&self, (id, exec_id): (&str, &str)) -> Result<DeleteResponse> {
        let ask = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.call("Delete", &ask, SHORT)
    }

    /// `Pids`.
    pub fn pids(&self, id: &str) -> Result<PidsResponse> {
        let ask = PidsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.call("Pids", &ask, SHORT)
    }

    /// `Shutdown`. A connection that closes before the answer is a success, as
    /// it is for containerd.
    pub fn shutdown(&self, id: &str) -> Result<()> {
        let ask = ShutdownRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        match self.call::<Empty>("Shutdown", &ask, SHORT) {
            Err(error) if error.code().is_some() => Err(error),
            _ => Ok(()),
        }
    }
}

/// A request message; object-safe so that `call` needs one type parameter only.
pub trait Ask {
    /// The wire form.
    fn bytes(&self) -> Result<Vec<u8>>;
}

impl<M: Message> Ask for M {
    fn bytes(&self) -> Result<Vec<u8>> {
        self.write_to_bytes()
            .map_err(|e| Failure::Unexpected(format!("encode request: {e}")))
    }
}

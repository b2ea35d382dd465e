//! A pod made by the sandbox API, by hand: what containerd's controller for
//! `sandboxer = "shim"` does, without containerd.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::Empty;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, WaitSandboxRequest,
    WaitSandboxResponse,
};
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

use crate::bundle::Task;
use crate::error::{Failure, Result, file};
use crate::run::until;
use crate::shim::{Client, SHORT};

/// What an `Any` with CRI's configuration of a pod is called.
pub const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

/// A shim started for a pod of the sandbox API.
pub struct Pod {
    /// Bundle, shim, log; its own config.json is never written.
    pub task: Task,
    netns: Option<Child>,
}

/// A process with a network namespace of its own.
fn netns() -> Result<Child> {
    let child = Command::new("unshare")
        .args(["--net", "sleep", "600"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(file("run", std::path::Path::new("unshare")))?;
    let link = |pid: String| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let own = link("self".to_owned());
    until("a network namespace", SHORT, || {
        link(child.id().to_string()).is_some_and(|ns| Some(ns) != own)
    })?;
    Ok(child)
}

impl Pod {
    /// A bundle without config.json; nothing is started. The node's
    /// configuration is `config`.
    pub fn new(name: &str, config: &str) -> Result<Self> {
        let mut task = Task::new(name, &[])?;
        let path = task.side.join("config.toml");
        fs::write(&path, config).map_err(file("write", &path))?;
        task.shim
            .env
            .push(("CASEMATE_CONFIG".to_owned(), path.display().to_string()));
        Ok(Self { task, netns: None })
    }

    /// As [`Pod::new`], with the API on and the shim started.
    pub fn booted(name: &str) -> Result<Self> {
        let mut pod = Self::new(name, "sandbox.api = true\n")?;
        pod.task.boot_as_it_is()?;
        Ok(pod)
    }

    /// As [`Pod::booted`], created with a network namespace and `options`, and
    /// started; with the pid that containerd is told.
    pub fn ready(name: &str, options: Vec<u8>) -> Result<(Self, u32)> {
        let mut pod = Self::booted(name)?;
        let request = pod.request(options)?;
        pod.create(&request)?;
        let pid = pod.start()?.pid;
        Ok((pod, pid))
    }

    /// The pod's id.
    pub fn id(&self) -> &str {
        &self.task.id
    }

    /// The sandbox service.
    pub fn api(&self) -> Result<Client> {
        Ok(self.task.rpc()?.of_sandbox())
    }

    /// Path of the network namespace, made at the first call.
    pub fn netns(&mut self) -> Result<String> {
        let child = match self.netns.take() {
            Some(child) => child,
            None => netns()?,
        };
        let path = format!("/proc/{}/ns/net", child.id());
        self.netns = Some(child);
        Ok(path)
    }

    /// The request that containerd sends, with `options` encoded.
    pub fn request(&mut self, options: Vec<u8>) -> Result<CreateSandboxRequest> {
        Ok(CreateSandboxRequest {
            sandbox_id: self.task.id.clone(),
            bundle_path: self.task.bundle().display().to_string(),
            netns_path: self.netns()?,
            options: Some(Any {
                type_url: CONFIG_TYPE.to_owned(),
                value: options,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
    }

    /// `CreateSandbox`.
    pub fn create(&self, request: &CreateSandboxRequest) -> Result<()> {
        let answer: Result<Empty> = self.api()?.call("CreateSandbox", request, SHORT);
        answer.map(|_| ())
    }

    /// `StartSandbox`.
    pub fn start(&self) -> Result<StartSandboxResponse> {
        let ask = StartSandboxRequest {
            sandbox_id: self.task.id.clone(),
            ..Default::default()
        };
        self.api()?.call("StartSandbox", &ask, SHORT)
    }

    /// `SandboxStatus`, verbose.
    pub fn status(&self) -> Result<SandboxStatusResponse> {
        let ask = SandboxStatusRequest {
            sandbox_id: self.task.id.clone(),
            verbose: true,
            ..Default::default()
        };
        self.api()?.call("SandboxStatus", &ask, SHORT)
    }

    /// `StopSandbox`.
    pub fn stop(&self, timeout_secs: u32) -> Result<()> {
        let ask = StopSandboxRequest {
            sandbox_id: self.task.id.clone(),
            timeout_secs,
            ..Default::default()
        };
        let answer: Result<Empty> = self.api()?.call("StopSandbox", &ask, SHORT);
        answer.map(|_| ())
    }

    /// A pending `WaitSandbox` in a thread of its own.
    pub fn waiter(&self) -> Result<std::thread::JoinHandle<Result<WaitSandboxResponse>>> {
        let (api, ask) = (
            self.api()?,
            WaitSandboxRequest {
                sandbox_id: self.task.id.clone(),
                ..Default::default()
            },
        );
        Ok(std::thread::spawn(move || {
            api.call("WaitSandbox", &ask, Duration::from_secs(60))
        }))
    }

    /// `ShutdownSandbox`, whose answer must come.
    pub fn shutdown(&self) -> Result<()> {
        let ask = ShutdownSandboxRequest {
            sandbox_id: self.task.id.clone(),
            ..Default::default()
        };
        let answer: Result<Empty> = self.api()?.call("ShutdownSandbox", &ask, SHORT);
        answer.map(|_| ())
    }

    /// Shuts down; shim and socket must go, and nothing be left.
    pub fn finish(self) -> Result<()> {
        self.task.expect_posture()?;
        let socket = self.task.answer()?.socket();
        self.shutdown()?;
        self.task.wait_gone(Duration::from_secs(5))?;
        until("the socket to go", Duration::from_secs(1), || {
            !socket.exists()
        })?;
        self.task.expect_clean(Duration::from_secs(2))
    }

    /// A container of the pod, as CRI specifies it: namespaces by the pid of
    /// the sandbox. Not created yet.
    pub fn container(&self, name: &str, args: &[&str], sandbox_pid: u32) -> Result<Task> {
        let mut task = Task::new(name, args)?;
        task.shim.env.clone_from(&self.task.shim.env);
        let path = |kind: &str| format!("/proc/{sandbox_pid}/ns/{kind}");
        task.spec["linux"]["namespaces"] = json!([
            {"type": "mount"}, {"type": "pid"},
            {"type": "ipc", "path": path("ipc")},
            {"type": "uts", "path": path("uts")},
            {"type": "network", "path": path("net")},
        ]);
        task.spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": self.task.id,
        });
        task.write_spec()?;
        task.join(&self.task)?;
        Ok(task)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(child) = &mut self.netns {
            let _gone = child.kill();
            let _reaped = child.wait();
        }
    }
}

/// One length-delimited field of a protobuf message.
pub fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    let mut length = value.len();
    while length >= 128 {
        bytes.push(u8::try_from(length & 127).unwrap_or(0) | 128);
        length >>= 7;
    }
    bytes.push(u8::try_from(length).unwrap_or(0));
    bytes.extend(value);
    bytes
}

/// One small number as a field.
pub fn number(number: u8, value: u8) -> Vec<u8> {
    vec![number << 3, value & 127]
}

/// A `PodSandboxConfig` with a host name, DNS, a parent cgroup and a sysctl.
pub fn config(hostname: &str, cgroup_parent: &str) -> Vec<u8> {
    let dns = [
        field(1, b"10.9.8.7"),
        field(2, b"pod.example"),
        field(3, b"ndots:5"),
    ];
    let sysctl = [field(1, b"net.ipv4.tcp_fin_timeout"), field(2, b"77")];
    let linux = [
        field(1, cgroup_parent.as_bytes()),
        field(3, &sysctl.concat()),
    ];
    [
        field(
            1,
            &[field(1, b"web"), field(2, b"uid-1"), field(3, b"default")].concat(),
        ),
        field(2, hostname.as_bytes()),
        field(3, b"/var/log/pods/web"),
        field(4, &dns.concat()),
        field(8, &linux.concat()),
    ]
    .concat()
}

/// A `PodSandboxConfig` whose `namespace_options` are `options`.
pub fn with_namespaces(options: &[u8]) -> Vec<u8> {
    field(8, &field(2, &field(1, options)))
}

/// The text under `info` of a status, as JSON.
pub fn info(status: &SandboxStatusResponse) -> Result<Value> {
    let text = status.info.get("info").map(String::as_str);
    serde_json::from_str(text.unwrap_or_default())
        .map_err(|e| Failure::Unexpected(format!("info of the status is no JSON: {e}")))
}

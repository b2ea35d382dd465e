//! The shim from outside, as containerd has it: a program to start, then a
//! ttrpc service.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse, Empty,
    ForwardRequest, KillRequest, ResizePtyRequest, ShutdownRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::{Events, create_events};
use protobuf::Message;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::net::UnixStream;
use ttrpc::TtrpcContext;
use ttrpc::context::{Context, with_duration};

use crate::bundle::Bundle;
use crate::error::{RunError, Step, one_line, rpc};
use crate::release::{self, Runnable, SHIM};

/// Where shims listen. Not below TMPDIR: the path of a socket has at most 107
/// bytes (unix(7)), and 64 of them are the name.
const SOCKETS: &str = "/run/casemate/s";

/// containerd namespace of everything that is run by hand.
const NAMESPACE: &str = "casemate";
/// For any request that doesn't wait for the workload.
const SOON: Duration = Duration::from_secs(30);
/// How long the shim may take to go after Shutdown.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// A shim for one container.
pub struct Shim {
    program: Runnable,
    bundle: PathBuf,
    id: String,
    task: TaskClient,
    process: Option<OwnedFd>,
    /// Takes the events, which go nowhere; lives as long as the shim.
    _events: ttrpc::Server,
}

struct Nowhere;

impl Events for Nowhere {
    fn forward(&self, _: &TtrpcContext, _: ForwardRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }
}

impl Shim {
    /// Starts the shim for the bundle and connects to it.
    pub async fn start(bundle: &Bundle) -> Result<Shim, RunError> {
        let program = release::runnable()?;
        let events = listen(&bundle.events())?;
        let started = match start(&program.shim, bundle) {
            Ok(address) => connect(&address, &bundle.id).await,
            Err(error) => Err(error),
        };
        match started {
            Ok((task, process)) => Ok(Shim {
                program,
                bundle: bundle.path().to_owned(),
                id: bundle.id.clone(),
                task,
                process,
                _events: events,
            }),
            Err(error) => {
                delete(&program.shim, bundle.path(), &bundle.id);
                Err(error)
            }
        }
    }

    /// Makes the container, its process waiting; returns that process' pid.
    pub async fn create(&self, bundle: &Bundle, terminal: bool) -> Result<u32, RunError> {
        let fifo = |name| bundle.fifo(name).display().to_string();
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: bundle.path().display().to_string(),
            rootfs: bundle.mounts(),
            terminal,
            stdin: fifo("stdin"),
            stdout: fifo("stdout"),
            stderr: if terminal {
                String::new()
            } else {
                fifo("stderr")
            },
            ..CreateTaskRequest::default()
        };
        self.task
            .create(soon(), &request)
            .await
            .map(|answer| answer.pid)
            .map_err(|error| not_run(rpc("create")(error)))
    }

    /// Lets the process go.
    pub async fn go(&self) -> Result<(), RunError> {
        let request = StartRequest {
            id: self.id.clone(),
            ..StartRequest::default()
        };
        self.task
            .start(soon(), &request)
            .await
            .map(drop)
            .map_err(rpc("start"))
    }

    /// Waits until the process has ended.
    pub async fn wait(&self) -> Result<u32, RunError> {
        let request = WaitRequest {
            id: self.id.clone(),
            ..WaitRequest::default()
        };
        let answer = self.task.wait(Context::default(), &request).await;
        answer.map(|answer| answer.exit_status).map_err(rpc("wait"))
    }

    /// Sends a signal to the process, or with `all` to every one.
    pub async fn kill(&self, signal: i32, all: bool) -> Result<(), RunError> {
        let request = KillRequest {
            id: self.id.clone(),
            signal: u32::try_from(signal).unwrap_or_default(),
            all,
            ..KillRequest::default()
        };
        self.task
            .kill(soon(), &request)
            .await
            .map(drop)
            .map_err(rpc("kill"))
    }

    /// Ends the process' standard input.
    pub async fn close_stdin(&self) -> Result<(), RunError> {
        let request = CloseIORequest {
            id: self.id.clone(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.task
            .close_io(soon(), &request)
            .await
            .map(drop)
            .map_err(rpc("close stdin"))
    }

    /// Sets the size of the process' terminal.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<(), RunError> {
        let request = ResizePtyRequest {
            id: self.id.clone(),
            width: columns.into(),
            height: rows.into(),
            ..ResizePtyRequest::default()
        };
        self.task
            .resize_pty(soon(), &request)
            .await
            .map(drop)
            .map_err(rpc("resize terminal"))
    }

    /// Removes the container. All its output has been written then.
    pub async fn delete(&self) -> Result<DeleteResponse, RunError> {
        let request = DeleteRequest {
            id: self.id.clone(),
            ..DeleteRequest::default()
        };
        self.task
            .delete(soon(), &request)
            .await
            .map_err(rpc("delete"))
    }

    /// Ends whatever is left of it, kindly if that works.
    pub async fn end(self) {
        // Each fails if there is nothing to do any more.
        let _ended = self.kill(9, true).await;
        let ended = tokio::time::timeout(GONE_WITHIN, self.wait()).await;
        let _deleted = self.delete().await;
        let request = ShutdownRequest {
            id: self.id.clone(),
            ..ShutdownRequest::default()
        };
        let asked = self.task.shutdown(soon(), &request).await;
        let is_gone = self
            .process
            .as_ref()
            .is_some_and(|shim| has_ended(shim, GONE_WITHIN));
        if ended.is_err() || asked.is_err() || !is_gone {
            if let Some(shim) = &self.process {
                let _gone = rustix::process::pidfd_send_signal(shim, Signal::KILL);
                has_ended(shim, GONE_WITHIN);
            }
            delete(&self.program.shim, &self.bundle, &self.id);
        }
    }
}

/// A command that isn't there, or can't be executed, is no failure of ours: the agent
/// says it as `start process: execute NAME: REASON`.
fn not_run(error: RunError) -> RunError {
    let RunError::Shim { reason, .. } = &error else {
        return error;
    };
    let said = reason.strip_prefix("start process: execute ");
    let Some((command, reason)) = said.and_then(|said| said.split_once(": ")) else {
        return error;
    };
    let absent = ["not found", "No such file"];
    RunError::Command {
        command: command.to_owned(),
        reason: reason.to_owned(),
        status: match absent.iter().any(|words| reason.contains(words)) {
            true => 127,
            false => 126,
        },
    }
}

fn soon() -> Context {
    with_duration(SOON)
}

fn has_ended(process: &OwnedFd, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).ok();
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        match rustix::event::poll(&mut fds, left.as_ref()) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn listen(path: &Path) -> Result<ttrpc::Server, RunError> {
    let mut server = ttrpc::Server::new()
        .bind(&format!("unix://{}", path.display()))
        .map_err(rpc("listen for events"))?
        .register_service(create_events(Arc::new(Nowhere)));
    server.start().map_err(rpc("listen for events"))?;
    Ok(server)
}

fn command(program: &Path, dir: &Path, id: &str, action: &str) -> Command {
    let mut command = Command::new(program);
    command
        .args([
            "-namespace",
            NAMESPACE,
            "-address",
            "",
            "-publish-binary",
            "",
            "-id",
            id,
        ])
        .args(["-bundle".as_ref(), dir.as_os_str()])
        .arg(action)
        .current_dir(dir)
        // Not in the group that Ctrl-C goes to.
        .process_group(0);
    command
}

/// Runs `start`; its answer is the address.
fn start(program: &Path, bundle: &Bundle) -> Result<String, RunError> {
    let object = program.display();
    let params = BootstrapParams {
        instance_id: bundle.id.clone(),
        namespace: NAMESPACE.to_owned(),
        containerd_ttrpc_address: bundle.events().display().to_string(),
        socket_dir: Some(SOCKETS.to_owned()),
        ..BootstrapParams::default()
    };
    let params = params.write_to_bytes().map_err(|error| {
        RunError::Refused(format!("encode the parameters of {object}: {error}"))
    })?;
    let mut child = command(program, bundle.path(), &bundle.id, "start")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .step("run", &object)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that has ended already says why on its stderr.
        let _lost = stdin.write_all(&params);
    }
    let mut answer = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout
            .read_to_end(&mut answer)
            .step("read the answer of", &object)?;
    }
    let output = child.wait_with_output().step("wait for", object)?;
    if !output.status.success() {
        let said = one_line(&String::from_utf8_lossy(&output.stderr));
        return Err(RunError::Shim {
            step: "start the shim",
            reason: said.trim_start_matches(&format!("{SHIM}: ")).to_owned(),
        });
    }
    BootstrapResult::parse_from_bytes(&answer)
        .map(|result| result.address)
        .map_err(|error| RunError::Shim {
            step: "start the shim",
            reason: format!(
                "its answer is not understood ({error}): install shim and casemate of one release"
            ),
        })
}

/// Runs `delete`, which cleans up after a shim that can't.
fn delete(program: &Path, bundle: &Path, id: &str) {
    // There is nothing behind this to fall back to.
    let _output = command(program, bundle, id, "delete")
        .stdin(Stdio::null())
        .output();
}

async fn connect(address: &str, id: &str) -> Result<(TaskClient, Option<OwnedFd>), RunError> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    let stream = UnixStream::connect(path)
        .await
        .step("connect to the shim at", path)?;
    let task = TaskClient::new(Client::new(stream.into()));
    let request = ConnectRequest {
        id: id.to_owned(),
        ..ConnectRequest::default()
    };
    let answer = task
        .connect(soon(), &request)
        .await
        .map_err(rpc("connect"))?;
    let process = i32::try_from(answer.shim_pid)
        .ok()
        .and_then(Pid::from_raw)
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
    Ok((task, process))
}

//! An exec of a task made by hand: its process document, its fifos, its calls.

use std::path::PathBuf;
use std::time::Duration;

use containerd_shim_protos::api::{
    CloseIORequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, ResizePtyRequest,
    StateResponse, WaitRequest,
};
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

use crate::bundle::Task;
use crate::error::Result;
use crate::shim::{Client, SHORT};
use crate::stdio::{Reader, make_fifo};

/// The type URL of an exec's document.
pub const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// One exec, not yet known to the shim.
pub struct Exec {
    client: Client,
    /// The container.
    pub id: String,
    /// Its own id.
    pub exec_id: String,
    /// The OCI process document: init's, with other arguments.
    pub process: Value,
    /// Paths: stdin, stdout, stderr. No stdin unless [`Exec::with_stdin`].
    pub stdio: [String; 3],
    /// What it wrote to standard output (with a terminal: to that).
    pub stdout: Reader,
    /// What it wrote to standard error.
    pub stderr: Reader,
    /// Whether it gets a terminal.
    pub terminal: bool,
    side: PathBuf,
}

impl Exec {
    /// An exec of `args` with fifos for output.
    pub fn new(task: &Task, exec_id: &str, args: &[&str]) -> Result<Self> {
        let fifo = |name: &str| task.side.join(format!("{exec_id}.{name}"));
        for name in ["out", "err"] {
            make_fifo(&fifo(name))?;
        }
        let mut process = task.spec["process"].clone();
        process["args"] = json!(args);
        let shown = |path: PathBuf| path.display().to_string();
        Ok(Self {
            client: task.rpc()?.clone(),
            id: task.id.clone(),
            exec_id: exec_id.to_owned(),
            process,
            stdio: [String::new(), shown(fifo("out")), shown(fifo("err"))],
            stdout: Reader::start(&fifo("out")),
            stderr: Reader::start(&fifo("err")),
            terminal: false,
            side: task.side.clone(),
        })
    }

    /// A shell script.
    pub fn sh(task: &Task, exec_id: &str, script: &str) -> Result<Self> {
        Self::new(task, exec_id, &["/bin/sh", "-c", script])
    }

    /// With a fifo for input.
    pub fn with_stdin(mut self) -> Result<Self> {
        make_fifo(&self.stdin())?;
        self.stdio[0] = self.stdin().display().to_string();
        Ok(self)
    }

    /// With a terminal of that size, and input.
    pub fn with_terminal(mut self, rows: u16, columns: u16) -> Result<Self> {
        self.terminal = true;
        self.process["terminal"] = json!(true);
        self.process["consoleSize"] = json!({"height": rows, "width": columns});
        self.stdio[2].clear();
        self.with_stdin()
    }

    /// The input fifo's path.
    pub fn stdin(&self) -> PathBuf {
        self.side.join(format!("{}.in", self.exec_id))
    }

    /// The request that [`Exec::add`] sends.
    pub fn request(&self) -> ExecProcessRequest {
        let [stdin, stdout, stderr] = self.stdio.clone();
        ExecProcessRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            terminal: self.terminal,
            stdin,
            stdout,
            stderr,
            spec: Some(Any {
                type_url: PROCESS.to_owned(),
                value: self.process.to_string().into_bytes(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    fn name(&self) -> (&str, &str) {
        (&self.id, &self.exec_id)
    }

    /// `Exec`.
    pub fn add(&self) -> Result<()> {
        self.client
            .call::<Empty>("Exec", &self.request(), SHORT)
            .map(drop)
    }

    /// `Start`; the host pid.
    pub fn start(&self) -> Result<u32> {
        Ok(self.client.start_exec(self.name())?.pid)
    }

    /// `Exec` and `Start`; the host pid.
    pub fn begin(&self) -> Result<u32> {
        self.add()?;
        self.start()
    }

    /// `Wait`; the exit status.
    pub fn wait(&self) -> Result<u32> {
        self.wait_within(SHORT)
    }

    /// `Wait` with another limit.
    pub fn wait_within(&self, limit: Duration) -> Result<u32> {
        let ask = WaitRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            ..Default::default()
        };
        let reply: containerd_shim_protos::api::WaitResponse =
            self.client.call("Wait", &ask, limit)?;
        Ok(reply.exit_status)
    }

    /// `Delete`.
    pub fn delete(&self) -> Result<DeleteResponse> {
        self.client.delete_exec(self.name())
    }

    /// `State`.
    pub fn state(&self) -> Result<StateResponse> {
        let ask = containerd_shim_protos::api::StateRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            ..Default::default()
        };
        self.client.call("State", &ask, SHORT)
    }

    /// `Kill`.
    pub fn kill(&self, signal: u32) -> Result<()> {
        let ask = KillRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            signal,
            ..Default::default()
        };
        self.client.call::<Empty>("Kill", &ask, SHORT).map(drop)
    }

    /// `CloseIO` of stdin.
    pub fn close_stdin(&self) -> Result<()> {
        let ask = CloseIORequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            stdin: true,
            ..Default::default()
        };
        self.client.call::<Empty>("CloseIO", &ask, SHORT).map(drop)
    }

    /// `ResizePty`.
    pub fn resize(&self, rows: u32, columns: u32) -> Result<()> {
        let ask = ResizePtyRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            width: columns,
            height: rows,
            ..Default::default()
        };
        self.client
            .call::<Empty>("ResizePty", &ask, SHORT)
            .map(drop)
    }

    /// The whole life; exit status and standard output.
    pub fn run(&self) -> Result<(u32, String)> {
        self.begin()?;
        let status = self.wait()?;
        self.delete()?;
        Ok((status, self.stdout.text(SHORT)?))
    }
}

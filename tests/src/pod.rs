//! Pods made by hand as containerd's CRI plugin makes them: a pause task whose
//! shim serves the tasks of the pod's containers too, and containers that join
//! what it has by the paths that containerd would write.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::events::task::TaskExit;
use serde_json::{Value, json};

use crate::bundle::Task;
use crate::error::{Failure, Result};
use crate::procs;
use crate::shim::SHORT;
use crate::spec::annotate;
use crate::stdio::{Reader, make_fifo};

/// CRI's annotation with the pod's id.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
/// CRI's annotation that tells pause tasks from others.
const KIND: &str = "io.kubernetes.cri.container-type";

/// A pause task, not booted yet. The image's binary is never executed.
pub fn pause(name: &str) -> Result<Task> {
    let mut pause = Task::new(name, &["/pause"])?;
    let id = pause.id.clone();
    annotate(&mut pause.spec, SANDBOX, &id);
    annotate(&mut pause.spec, KIND, "sandbox");
    pause.stdio = Default::default();
    Ok(pause)
}

/// A task of `pause`'s pod that runs `args`, not booted yet; its namespaces are
/// paths below /proc of the pause task, as CRI writes them. The network is the
/// pause task's own path, where that has one.
pub fn container(pause: &Task, name: &str, args: &[&str]) -> Result<Task> {
    let mut task = Task::new(name, args)?;
    annotate(&mut task.spec, SANDBOX, &pause.id);
    annotate(&mut task.spec, KIND, "container");
    let pid = pause.rpc()?.state(&pause.id)?.pid;
    let ns = |kind: &str| format!("/proc/{pid}/ns/{kind}");
    task.spec["linux"]["namespaces"] = json!([
        {"type": "pid"}, {"type": "mount"},
        {"type": "ipc", "path": ns("ipc")},
        {"type": "uts", "path": ns("uts")},
        {"type": "network", "path": ns("net")},
    ]);
    Ok(task)
}

/// Ends a container of a pod, not the pod.
pub fn end(task: Task) -> Result<()> {
    remove(task).map(drop)
}

fn remove(task: Task) -> Result<DeleteResponse> {
    task.expect_posture()?;
    let rpc = task.rpc()?.clone();
    let _ = rpc.kill(&task.id, 9, true);
    rpc.wait(&task.id, SHORT)?;
    let deleted = rpc.delete(&task.id)?;
    task.forget();
    Ok(deleted)
}

/// The host pid of a task's init.
pub fn init(task: &Task) -> Result<u32> {
    Ok(task.rpc()?.state(&task.id)?.pid)
}

/// The agent and the forker of a pod's only container: the parents of init.
pub fn insiders(task: &Task) -> Result<(u32, u32)> {
    let parent = |pid: u32| -> Result<u32> {
        let text = procs::status_field(pid, "PPid").unwrap_or_default();
        text.parse()
            .map_err(|_| Failure::Unexpected(format!("parent of {pid}: {text:?}")))
    };
    let forker = parent(init(task)?)?;
    Ok((parent(forker)?, forker))
}

/// Whose processes a container sees (`NamespaceMode` of CRI).
#[derive(Clone, Copy)]
pub enum Pids<'a> {
    /// Its own only: CONTAINER.
    Own,
    /// All of the pod: POD.
    Pod,
    /// Those of another container: TARGET.
    Of(&'a Task),
}

/// A pod: its sandbox container, running. Members must end before it does.
pub struct Pod {
    /// The sandbox container; its recorder gets all events of the pod.
    pub pause: Task,
    /// The pid that Create answered for it.
    pub pid: u32,
}

impl Pod {
    /// A pod with nothing in it.
    pub fn start(name: &str) -> Result<Self> {
        Self::with(name, |_| ())
    }

    /// The same, its sandbox container changed before it is made.
    pub fn with(name: &str, change: impl FnOnce(&mut Task)) -> Result<Self> {
        let mut pause = pause(name)?;
        change(&mut pause);
        pause.boot()?;
        let pid = pause.create()?.pid;
        pause.rpc()?.start(&pause.id)?;
        Ok(Self { pause, pid })
    }

    /// A container of the pod, not made yet.
    pub fn member(&self, name: &str, args: &[&str], pids: Pids<'_>) -> Result<Task> {
        let mut task = container(&self.pause, name, args)?;
        let path = match pids {
            Pids::Own => None,
            Pids::Pod => Some(self.pid),
            Pids::Of(target) => Some(target.rpc()?.state(&target.id)?.pid),
        };
        if let (Some(pid), Some(list)) = (path, task.spec["linux"]["namespaces"].as_array_mut()) {
            list.retain(|namespace| namespace["type"] != "pid");
            list.push(json!({"type": "pid", "path": format!("/proc/{pid}/ns/pid")}));
        }
        // As the sandbox container's: a pod has one version of containerd.
        task.spec["ociVersion"] = self.pause.spec["ociVersion"].clone();
        task.shim.env = self.pause.shim.env.clone();
        Ok(task)
    }

    /// A running container of the pod.
    pub fn run(&self, name: &str, args: &[&str], pids: Pids<'_>) -> Result<Task> {
        let mut task = self.member(name, args, pids)?;
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        Ok(task)
    }

    /// Kills a container, if need be, and deletes it.
    pub fn remove(&self, task: Task) -> Result<DeleteResponse> {
        remove(task)
    }

    /// Ends the pod; fails if anything is left.
    pub fn finish(self) -> Result<()> {
        self.pause.finish()
    }

    /// All exits so far: container, process, status. Those of [`say`] too.
    pub fn exits(&self) -> Result<Vec<(String, String, u32)>> {
        self.pause
            .events
            .events()
            .iter()
            .filter(|event| event.topic == "/tasks/exit")
            .map(|event| {
                let exit: TaskExit = event.decode()?;
                Ok((exit.container_id, exit.id, exit.exit_status))
            })
            .collect()
    }

    /// Waits until there have been that many exits.
    pub fn wait_for_exits(&self, count: usize) -> Result<Vec<(String, String, u32)>> {
        let limit = Duration::from_secs(10);
        crate::run::until(&format!("{count} exits"), limit, || {
            self.exits().is_ok_and(|exits| exits.len() >= count)
        })?;
        self.exits()
    }
}

/// Runs `args` in a container; the host pid, and what it writes.
pub fn exec(task: &Task, exec_id: &str, args: &[&str]) -> Result<(u32, Reader)> {
    let out = task.side.join(format!("{exec_id}.out"));
    make_fifo(&out)?;
    let reader = Reader::start(&out);
    let mut process: Value = task.spec["process"].clone();
    process["args"] = json!(args);
    let exec = (task.id.as_str(), exec_id);
    let rpc = task.rpc()?;
    rpc.exec(exec, &process, &out.display().to_string(), "")?;
    Ok((rpc.start_exec(exec)?.pid, reader))
}

/// The same to the end: what it wrote.
pub fn say(task: &Task, exec_id: &str, args: &[&str]) -> Result<String> {
    let (_, out) = exec(task, exec_id, args)?;
    let exec = (task.id.as_str(), exec_id);
    task.rpc()?.wait_exec(exec)?;
    // Delete would take what nobody has read yet.
    let text = out.text(SHORT)?;
    task.rpc()?.delete_exec(exec)?;
    Ok(text)
}

/// Inode of a namespace of a process.
pub fn namespace(pid: u32, kind: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/ns/{kind}");
    let meta = fs::metadata(&path).map_err(crate::error::file("look at", path.as_ref()))?;
    Ok(meta.ino())
}

/// Host pids of all that live in the pid namespace with that inode, zombies too.
pub fn population(inode: u64) -> Vec<u32> {
    procs::all()
        .into_iter()
        .filter(|pid| namespace(*pid, "pid").is_ok_and(|ino| ino == inode))
        .collect()
}

/// A process' number in the innermost of its pid namespaces.
pub fn inner_pid(pid: u32) -> Option<u32> {
    let pids = procs::status_field(pid, "NSpid")?;
    pids.split_whitespace().last()?.parse().ok()
}

//! Pods made by hand as containerd's CRI plugin makes them: a pause task whose
//! shim serves the tasks of the pod's containers too.

use serde_json::json;

use crate::bundle::Task;
use crate::error::Result;
use crate::spec::annotate;

/// CRI's annotation with the pod's id.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
/// CRI's annotation that tells pause tasks from others.
const KIND: &str = "io.kubernetes.cri.container-type";

/// A pause task, not booted yet.
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
    let rpc = task.rpc()?.clone();
    let _ = rpc.kill(&task.id, 9, true);
    rpc.wait(&task.id, crate::shim::SHORT)?;
    rpc.delete(&task.id)?;
    task.forget();
    Ok(())
}

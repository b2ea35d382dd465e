//! Kill, Pause, Resume, Update, ResizePty, CloseIO, Checkpoint.

use std::sync::Arc;
use std::time::Duration;

use casemate_cgroup::{Cgroup, CgroupError};
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, Empty, KillRequest, ResizePtyRequest, UpdateTaskRequest,
};
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use containerd_shim_protos::topics;
use oci_spec::runtime::LinuxResources;

use crate::error::ShimError;
use crate::pod::Pod;
use crate::pod::process::finished;
use crate::pod::state::Phase;
use crate::pod::task::{KILLED, Task};

/// Between the answer to Kill and the end of the pod's sandbox container. By that end CRI
/// deletes it, shuts us down and closes the connection, and a client that hasn't looked at
/// the answer by then takes either for it (ttrpc's `dispatch`): StopPodSandbox fails with
/// "ttrpc: closed". A process that is killed takes its time to end, too.
const ANSWER_FIRST: Duration = Duration::from_millis(20);

/// The highest signal there is (signal(7)).
const SIGNAL_MAX: i32 = 64;

/// Signals init, one exec, or everything in the container. One whose Create is under way
/// is waited for a moment: whoever has given that up may kill it.
pub async fn kill(pod: &Pod, request: &KillRequest) -> Result<Empty, ShimError> {
    let task = pod.task_soon(&request.id).await?;
    let process = task.process(&request.exec_id)?;
    let signal = i32::try_from(request.signal).unwrap_or(i32::MAX);
    if signal > SIGNAL_MAX {
        return Err(ShimError::InvalidArgument(format!(
            "kill: signal {} is none: give 1 to {SIGNAL_MAX}",
            request.signal
        )));
    }
    let phase = process.facts().phase;
    match phase {
        Phase::Stopped => return Err(finished()),
        Phase::Added => {
            return Err(ShimError::FailedPrecondition(format!(
                "kill exec {:?} of container {:?}: it has not been started",
                request.exec_id, request.id
            )));
        }
        Phase::Created | Phase::Opening | Phase::Starting | Phase::Running => {}
    }
    let Some(container) = task.container() else {
        // The polite ones end it with 0, as they do the pause binary.
        match signal {
            libc::SIGKILL => end_pause(task, KILLED),
            libc::SIGTERM | libc::SIGINT => end_pause(task, 0),
            _ => {}
        }
        return Ok(Empty::new());
    };
    if request.all && request.exec_id.is_empty() {
        container.kill_all(signal)?;
    } else {
        process.signal(signal)?;
    }
    if signal == libc::SIGKILL && request.exec_id.is_empty() {
        task.insist();
    }
    if signal == libc::SIGKILL && task.is_paused() && request.exec_id.is_empty() {
        // A frozen process of cgroup v1 dies only when it is thawed, and a frozen
        // forker tells of no exit. One exec is no reason to let all others go on.
        cgroup(&task)?.thaw().map_err(|error| {
            ShimError::Unknown(format!("thaw container {:?} to kill it: {error}", task.id))
        })?;
        task.set_paused(false);
    }
    Ok(Empty::new())
}

/// Ends the stand-in for pause, a moment after the answer.
fn end_pause(task: Arc<Task>, status: u32) {
    tokio::spawn(async move {
        tokio::time::sleep(ANSWER_FIRST).await;
        task.end_pause(status);
    });
}

/// Freezes a running container.
pub async fn pause(pod: Arc<Pod>, id: String) -> Result<Empty, ShimError> {
    let task = pod.task(&id)?;
    let _turn = task.turn.lock().await;
    require_running(&task, "pause")?;
    if task.is_paused() {
        return Err(ShimError::FailedPrecondition(format!(
            "pause container {id:?}: it is paused"
        )));
    }
    cgroup(&task)?
        .freeze()
        .map_err(|error| ShimError::Unknown(format!("pause container {id:?}: {error}")))?;
    task.set_paused(true);
    pod.events.push(
        topics::TASK_PAUSED_EVENT_TOPIC,
        &TaskPaused {
            container_id: id,
            ..TaskPaused::default()
        },
    );
    Ok(Empty::new())
}

/// Thaws a paused container.
pub async fn resume(pod: Arc<Pod>, id: String) -> Result<Empty, ShimError> {
    let task = pod.task(&id)?;
    let _turn = task.turn.lock().await;
    if !task.is_paused() {
        return Err(ShimError::FailedPrecondition(format!(
            "resume container {id:?}: it is not paused"
        )));
    }
    cgroup(&task)?
        .thaw()
        .map_err(|error| ShimError::Unknown(format!("resume container {id:?}: {error}")))?;
    task.set_paused(false);
    pod.events.push(
        topics::TASK_RESUMED_EVENT_TOPIC,
        &TaskResumed {
            container_id: id,
            ..TaskResumed::default()
        },
    );
    Ok(Empty::new())
}

/// Applies the limits that the request names, and no others.
pub async fn update(pod: Arc<Pod>, request: UpdateTaskRequest) -> Result<Empty, ShimError> {
    let task = pod.task(&request.id)?;
    let _turn = task.turn.lock().await;
    if task.init.facts().phase == Phase::Stopped {
        return Err(ShimError::FailedPrecondition(format!(
            "update container {:?}: it is stopped",
            task.id
        )));
    }
    let Some(resources) = request.resources.as_ref() else {
        return Err(ShimError::InvalidArgument(format!(
            "update container {:?}: resources is empty",
            task.id
        )));
    };
    let resources: LinuxResources = serde_json::from_slice(&resources.value).map_err(|error| {
        ShimError::InvalidArgument(format!(
            "update container {:?}: resources: {error}",
            task.id
        ))
    })?;
    let resources = casemate_spec::tighten_update(resources).map_err(|error| {
        ShimError::InvalidArgument(format!("update container {:?}: {error}", task.id))
    })?;
    if task.container().is_none() {
        // The sandbox container has no processes to limit.
        return Ok(Empty::new());
    }
    let cgroup = cgroup(&task)?;
    let notes = cgroup
        .apply(&resources)
        .map_err(|error| refused(&task.id, &error))?;
    crate::sandbox::keep_limits(cgroup, &resources)
        .await
        .map_err(|error| ShimError::Unknown(format!("update container {:?}: {error}", task.id)))?;
    for note in notes {
        log::warn!("update container {}: {note}", task.id);
    }
    Ok(Empty::new())
}

/// A value that can't be set is the caller's affair, all else the host's.
fn refused(id: &str, error: &CgroupError) -> ShimError {
    let text = format!("update container {id:?}: {error}");
    match error {
        CgroupError::Limit { .. } => ShimError::InvalidArgument(text),
        CgroupError::Gone { .. } => ShimError::NotFound(text),
        _ => ShimError::Unknown(text),
    }
}

/// Sets the size of a terminal; without one there is nothing to do.
pub fn resize_pty(pod: &Pod, request: &ResizePtyRequest) -> Result<Empty, ShimError> {
    let process = pod.task(&request.id)?.process(&request.exec_id)?;
    match process.streams() {
        Some(streams) => streams.resize(request.width, request.height)?,
        None => process.facts().size = Some((request.width, request.height)),
    }
    Ok(Empty::new())
}

/// Lets go of stdin. Counts also before there are streams, and while Create is under
/// way.
pub async fn close_io(pod: &Pod, request: &CloseIORequest) -> Result<Empty, ShimError> {
    let task = pod.task_made(&request.id).await?;
    let process = task.process(&request.exec_id)?;
    if request.stdin {
        process.facts().stdin_closed = true;
        if let Some(streams) = process.streams() {
            streams.close_stdin();
        }
    }
    Ok(Empty::new())
}

/// Not offered; the container keeps running.
pub fn checkpoint(pod: &Pod, request: &CheckpointTaskRequest) -> Result<Empty, ShimError> {
    pod.task(&request.id)?;
    Err(ShimError::Unimplemented(format!(
        "checkpoint container {:?}: checkpointing is not supported",
        request.id
    )))
}

fn require_running(task: &Task, what: &str) -> Result<(), ShimError> {
    let phase = task.init.facts().phase;
    if phase == Phase::Running {
        Ok(())
    } else {
        Err(ShimError::FailedPrecondition(format!(
            "{what} container {:?}: it is {}",
            task.id,
            phase.name()
        )))
    }
}

/// The cgroup of a container.
pub fn cgroup(task: &Task) -> Result<&Cgroup, ShimError> {
    task.container()
        .and_then(|container| container.cgroup())
        .ok_or_else(|| ShimError::NotFound(format!("container {:?} has no cgroup", task.id)))
}

//! State, Wait, Connect, Pids: nothing here changes or waits for a lock
//! that is held for long. (State and Wait wait for a Create of their container
//! to end.)

use std::collections::HashMap;
use std::time::Duration;

use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, PidsRequest, PidsResponse, ProcessInfo, StateRequest,
    StateResponse, Status, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use super::control::cgroup;
use crate::error::ShimError;
use crate::events::timestamp;
use crate::pod::Pod;
use crate::pod::state::Phase;
use crate::pod::task::Task;

/// Where a process is.
pub async fn state(pod: &Pod, request: &StateRequest) -> Result<StateResponse, ShimError> {
    let task = pod.task_made(&request.id).await?;
    let process = task.process(&request.exec_id)?;
    let (phase, pid) = {
        let facts = process.facts();
        (facts.phase, facts.pid)
    };
    let exited = process.exited();
    Ok(StateResponse {
        // runc's shim gives the process's own id here, an exec's for an exec.
        id: if request.exec_id.is_empty() {
            request.id.clone()
        } else {
            request.exec_id.clone()
        },
        bundle: task.bundle.to_string_lossy().into_owned(),
        pid,
        status: status(phase, task.is_paused()).into(),
        stdin: process.paths.stdin.clone(),
        stdout: process.paths.stdout.clone(),
        stderr: process.paths.stderr.clone(),
        terminal: process.paths.terminal,
        exit_status: exited.map_or(0, |exited| exited.status),
        exited_at: exited.map(|exited| timestamp(exited.at)).into(),
        exec_id: request.exec_id.clone(),
        ..StateResponse::default()
    })
}

fn status(phase: Phase, paused: bool) -> Status {
    match phase {
        Phase::Stopped => Status::STOPPED,
        Phase::Added | Phase::Created | Phase::Opening | Phase::Starting => Status::CREATED,
        Phase::Running if paused => Status::PAUSED,
        Phase::Running => Status::RUNNING,
    }
}

/// For whoever reads output to have read it, before it is told of the end: containerd's
/// client closes its ends of the fifos when it deletes a task, with what is in them
/// (containerd pull requests 8643 and 8334 changed when, not that it does).
const READ_WITHIN: Duration = Duration::from_secs(5);
/// And to read at all.
const STALLED: Duration = Duration::from_millis(500);

/// Answers when the process has ended, for as long as its record lives.
pub async fn wait(pod: &Pod, request: &WaitRequest) -> Result<WaitResponse, ShimError> {
    let task = pod.task_made(&request.id).await?;
    let process = task.process(&request.exec_id)?;
    let exited = process.wait().await;
    if let Some(streams) = process.streams() {
        streams.read_out(STALLED, READ_WITHIN).await;
    }
    Ok(WaitResponse {
        exit_status: exited.status,
        exited_at: MessageField::some(timestamp(exited.at)),
        ..WaitResponse::default()
    })
}

/// Who we are. Never fails: containerd asks before it knows anything.
pub fn connect(pod: &Pod, request: &ConnectRequest) -> ConnectResponse {
    let task_pid = pod
        .find(&request.id)
        .map_or(0, |task| task.init.facts().pid);
    ConnectResponse {
        shim_pid: std::process::id(),
        task_pid,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..ConnectResponse::default()
    }
}

/// Every process of a container, by host pid.
pub fn pids(pod: &Pod, request: &PidsRequest) -> Result<PidsResponse, ShimError> {
    let task = pod.task(&request.id)?;
    let execs = exec_pids(&task);
    let mut processes = Vec::new();
    for pid in all_pids(&task)? {
        let info = match execs.get(&pid) {
            Some(exec_id) => MessageField::some(details(exec_id)?),
            None => MessageField::none(),
        };
        processes.push(ProcessInfo {
            pid,
            info,
            ..ProcessInfo::default()
        });
    }
    Ok(PidsResponse {
        processes,
        ..PidsResponse::default()
    })
}

fn all_pids(task: &Task) -> Result<Vec<u32>, ShimError> {
    let (phase, init) = {
        let facts = task.init.facts();
        (facts.phase, facts.pid)
    };
    let Some(container) = task.container() else {
        let alive = phase != Phase::Stopped;
        return Ok(alive.then_some(init).into_iter().collect());
    };
    if container.cgroup().is_none() {
        return Ok(Vec::new());
    }
    let mut pids = cgroup(task)?.pids().map_err(|error| {
        ShimError::Unknown(format!(
            "list processes of container {:?}: {error}",
            task.id
        ))
    })?;
    pids.retain(|pid| *pid != container.forker_pid() && *pid != 0);
    Ok(pids)
}

fn exec_pids(task: &Task) -> HashMap<u32, String> {
    task.execs()
        .iter()
        .filter_map(|process| {
            let facts = process.facts();
            (facts.phase == Phase::Running).then(|| (facts.pid, process.exec_id.clone()))
        })
        .collect()
}

fn details(exec_id: &str) -> Result<Any, ShimError> {
    let details = ProcessDetails {
        exec_id: exec_id.to_owned(),
        ..ProcessDetails::default()
    };
    Ok(Any {
        type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
        value: details
            .write_to_bytes()
            .map_err(|error| ShimError::Unknown(format!("encode process details: {error}")))?,
        ..Any::default()
    })
}

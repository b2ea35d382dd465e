//! Calls of the task service beyond a plain life, and what the kernel says of a
//! container's cgroup.

use std::fs;
use std::path::{Path, PathBuf};

use casemate_tests::bundle::Task;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Stop, fail};
use containerd_shim_protos::api::{
    Empty, PauseRequest, ResumeRequest, StatsRequest, StatsResponse, UpdateTaskRequest,
};
use protobuf::well_known_types::any::Any;
use serde_json::Value;

/// Containerd's enum `Status`.
pub const PAUSED: i32 = 4;

/// `Pause`.
pub fn pause(task: &Task) -> casemate_tests::Result<Empty> {
    let ask = PauseRequest {
        id: task.id.clone(),
        ..Default::default()
    };
    task.rpc()?.call("Pause", &ask, SHORT)
}

/// `Resume`.
pub fn resume(task: &Task) -> casemate_tests::Result<Empty> {
    let ask = ResumeRequest {
        id: task.id.clone(),
        ..Default::default()
    };
    task.rpc()?.call("Resume", &ask, SHORT)
}

/// `Update`.
pub fn update(task: &Task, resources: &Value) -> casemate_tests::Result<Empty> {
    let ask = UpdateTaskRequest {
        id: task.id.clone(),
        resources: Some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: resources.to_string().into_bytes(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    task.rpc()?.call("Update", &ask, SHORT)
}

/// `Stats`.
pub fn stats(task: &Task) -> casemate_tests::Result<Any> {
    let ask = StatsRequest {
        id: task.id.clone(),
        ..Default::default()
    };
    let reply: StatsResponse = task.rpc()?.call("Stats", &ask, SHORT)?;
    Ok(reply.stats.unwrap_or_default())
}

/// Whether the node has cgroup v2 alone.
pub fn is_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// The cgroup directory of process `pid` for a v1 `controller`, or its one of v2.
pub fn cgroup(pid: u32, controller: &str) -> Result<PathBuf, Stop> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    for line in text.lines() {
        let parts: Vec<&str> = line.splitn(3, ':').collect();
        let [_, names, path] = parts[..] else {
            continue;
        };
        let path = path.trim_start_matches('/');
        let base = Path::new("/sys/fs/cgroup");
        if is_v2() && names.is_empty() {
            return Ok(base.join(path));
        }
        if names.split(',').any(|name| name == controller) {
            return Ok(base.join(controller).join(path));
        }
    }
    fail(format!("{pid} has no cgroup of {controller}: {text}"))
}

/// Host pid of init.
pub fn init(task: &Task) -> Result<u32, Stop> {
    Ok(task.rpc()?.state(&task.id)?.pid)
}

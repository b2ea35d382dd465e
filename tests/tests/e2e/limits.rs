//! Limits of a container's cgroup: read back from the kernel, then run into.
//! On version 1 and on version 2.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use casemate_tests::bundle::Task;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq};
use serde_json::json;

use crate::common::LONG;

crate::trials![
    sandbox_cgroup_limits_are_in_force,
    sandbox_memory_limit_kills_and_tells,
    sandbox_processes_are_in_their_cgroup,
];

const MEMORY: u64 = 64 << 20;

/// The cgroup of process `pid` for a v1 `controller`, or its one of v2.
pub fn cgroup(pid: u32, controller: &str) -> Result<PathBuf, Stop> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let base = Path::new("/sys/fs/cgroup");
    let pure = base.join("cgroup.controllers").exists();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, names, path) = (parts.next(), parts.next(), parts.next());
        let (Some(names), Some(path)) = (names, path) else {
            continue;
        };
        let path = path.trim_start_matches('/');
        if pure && names.is_empty() {
            return Ok(base.join(path));
        }
        if !pure && names.split(',').any(|name| name == controller) {
            return Ok(base.join(controller).join(path));
        }
    }
    fail(format!(
        "process {pid} has no cgroup of {controller}: {text}"
    ))
}

pub fn init(task: &Task) -> Result<u32, Stop> {
    Ok(task.rpc()?.state(&task.id)?.pid)
}

fn sandbox_cgroup_limits_are_in_force() -> Outcome {
    let mut task = Task::new("limits", &["/bin/probe", "sleep"])?;
    let resources = &mut task.spec["linux"]["resources"];
    resources["memory"] = json!({"limit": MEMORY});
    resources["cpu"] = json!({"shares": 1024, "quota": 50_000, "period": 100_000});
    resources["pids"] = json!({"limit": 77});
    task.boot()?;
    task.create()?;
    let pid = init(&task)?;
    let read = |controller: &str, name: &str| -> Result<String, Stop> {
        Ok(fs::read_to_string(cgroup(pid, controller)?.join(name))?
            .trim()
            .to_owned())
    };
    let v2 = cgroup(pid, "memory")?.join("cgroup.controllers").exists();
    let want: BTreeMap<(&str, &str), String> = if v2 {
        [
            (("memory", "memory.max"), MEMORY.to_string()),
            (("cpu", "cpu.max"), "50000 100000".to_owned()),
            (("pids", "pids.max"), "77".to_owned()),
        ]
        .into()
    } else {
        [
            (("memory", "memory.limit_in_bytes"), MEMORY.to_string()),
            (("cpu", "cpu.cfs_quota_us"), "50000".to_owned()),
            (("cpu", "cpu.cfs_period_us"), "100000".to_owned()),
            (("cpu", "cpu.shares"), "1024".to_owned()),
            (("pids", "pids.max"), "77".to_owned()),
        ]
        .into()
    };
    for ((controller, name), value) in want {
        ensure_eq!(read(controller, name)?, value, "{name}");
    }
    if v2 {
        // 1024 shares, the default of version 1, are 39 by the older formula of
        // runtimes and 100, the default of version 2, by the newer.
        let weight: u64 = read("cpu", "cpu.weight")?.parse().unwrap_or(0);
        ensure!((39..=100).contains(&weight), "cpu.weight {weight}");
    }
    Ok(task.finish()?)
}

/// The task is killed for want of memory, which is told before its end.
pub fn killed_for_memory(task: &Task) -> Outcome {
    let status = task.rpc()?.wait(&task.id, LONG)?.exit_status;
    ensure_eq!(status, 137, "exit status");
    task.events.wait_for("exit", SHORT)?;
    task.events.wait_for("oom", SHORT)?;
    let topics = task.events.topics();
    let place = |topic: &str| topics.iter().position(|t| t == topic);
    ensure!(place("oom") < place("exit"), "order of events: {topics:?}");
    Ok(())
}

fn sandbox_memory_limit_kills_and_tells() -> Outcome {
    let mut task = Task::new(
        "oomkill",
        &[
            "/bin/dd",
            "if=/dev/zero",
            "of=/dev/null",
            "bs=200M",
            "count=1",
        ],
    )?;
    task.spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    killed_for_memory(&task)?;
    Ok(task.finish()?)
}

fn sandbox_processes_are_in_their_cgroup() -> Outcome {
    let task = Task::sleeping("incgroup")?;
    let pid = init(&task)?;
    for controller in ["memory", "pids"] {
        let dir = cgroup(pid, controller)?;
        ensure!(
            dir.file_name()
                .is_some_and(|name| name.to_string_lossy().contains(&task.id)),
            "{controller} of init: {}",
            dir.display()
        );
        let text = fs::read_to_string(dir.join("cgroup.procs"))?;
        ensure!(
            text.lines().any(|line| line == pid.to_string()),
            "{} lacks {pid}: {text}",
            dir.display()
        );
    }
    Ok(task.finish()?)
}

//! 96–100: events, as their receiver sees them.

use std::time::{Duration, Instant};

use casemate_tests::bundle::{NAMESPACE, Task};
use casemate_tests::shim::SHORT;
use casemate_tests::skip::Outcome;
use casemate_tests::{ensure, ensure_eq};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskStart,
};

crate::trials![
    c096_a_normal_life,
    c097_events_wait_for_their_receiver,
    c098_a_receiver_that_hangs,
    c099_shutdown_flushes,
    c100_an_exec,
];

fn c096_a_normal_life() -> Outcome {
    let mut task = Task::new("c096", &["/bin/probe", "exit", "11"])?;
    task.boot()?;
    let pid = task.create()?.pid;
    task.start_and_wait()?;
    task.rpc()?.delete(&task.id)?;
    task.events.wait_for("delete", SHORT)?;
    ensure_eq!(
        task.events.topics(),
        ["create", "start", "exit", "delete"],
        "topics"
    );
    for event in task.events.events() {
        ensure_eq!(event.namespace, NAMESPACE, "namespace of {}", event.topic);
        ensure!(
            event.type_url.starts_with("containerd.events.Task"),
            "type {}",
            event.type_url
        );
    }
    let create: TaskCreate = task.events.wait_for("create", SHORT)?.decode()?;
    ensure_eq!(create.container_id, task.id, "id of create");
    ensure_eq!(create.pid, pid, "pid of create");
    ensure_eq!(
        create.bundle,
        task.bundle().display().to_string(),
        "bundle of create"
    );
    ensure_eq!(create.rootfs.len(), task.rootfs.len(), "mounts of create");
    ensure_eq!(create.io.stdout, task.stdio[1], "stdout of create");
    let start: TaskStart = task.events.wait_for("start", SHORT)?.decode()?;
    ensure_eq!(
        (start.container_id, start.pid),
        (task.id.clone(), pid),
        "start"
    );
    let exit: TaskExit = task.events.wait_for("exit", SHORT)?.decode()?;
    ensure_eq!(
        (exit.container_id, exit.pid, exit.exit_status),
        (task.id.clone(), pid, 11),
        "exit"
    );
    ensure_eq!(exit.id, task.id, "id of exit");
    ensure!(exit.exited_at.seconds > 0, "exit has no time");
    let delete: TaskDelete = task.events.wait_for("delete", SHORT)?.decode()?;
    ensure_eq!(
        (delete.container_id, delete.pid),
        (task.id.clone(), pid),
        "delete"
    );
    ensure_eq!(delete.exit_status, 11, "status of delete");
    Ok(task.finish()?)
}

fn c097_events_wait_for_their_receiver() -> Outcome {
    let mut task = Task::new("c097", &["/bin/probe", "exit", "0"])?;
    task.boot()?;
    task.events.down();
    task.create()?;
    task.start_and_wait()?;
    std::thread::sleep(Duration::from_secs(4));
    task.events.up()?;
    task.events.wait_for("exit", Duration::from_secs(40))?;
    ensure_eq!(
        task.events.topics(),
        ["create", "start", "exit"],
        "topics in order"
    );
    Ok(task.finish()?)
}

fn c098_a_receiver_that_hangs() -> Outcome {
    let mut task = Task::new("c098", &["/bin/probe", "exit", "0"])?;
    task.boot()?;
    task.events.slow_down(Duration::from_secs(3));
    let begun = Instant::now();
    task.create()?;
    task.start_and_wait()?;
    task.rpc()?.state(&task.id)?;
    let took = begun.elapsed();
    task.events.slow_down(Duration::ZERO);
    ensure!(
        took < Duration::from_secs(3),
        "calls waited for events: {took:?}"
    );
    Ok(task.finish()?)
}

fn c099_shutdown_flushes() -> Outcome {
    let mut task = Task::new("c099", &["/bin/probe", "exit", "0"])?;
    task.boot()?;
    task.create()?;
    task.start_and_wait()?;
    task.events.slow_down(Duration::from_millis(300));
    task.rpc()?.delete(&task.id)?;
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(8))?;
    ensure!(
        task.events.topics().iter().any(|t| t == "delete"),
        "events after the shim's end: {:?}",
        task.events.topics()
    );
    Ok(())
}

fn c100_an_exec() -> Outcome {
    let task = Task::running("c100", &["/bin/probe", "sleep"])?;
    let process = serde_json::json!({
        "user": {"uid": 0, "gid": 0},
        "args": ["/bin/probe", "exit", "9"],
        "env": ["PATH=/bin"],
        "cwd": "/",
    });
    let exec_id = "e1".to_owned();
    let exec = (task.id.as_str(), exec_id.as_str());
    task.rpc()?.exec(exec, &process, "", "")?;
    let pid = task.rpc()?.start_exec(exec)?.pid;
    let wait = task.rpc()?.wait_exec(exec)?;
    ensure_eq!(wait.exit_status, 9, "exit status of the exec");
    let deleted = task.rpc()?.delete_exec(exec)?;
    ensure_eq!(deleted.exit_status, 9, "exit status in Delete");
    let exit: TaskExit = task.events.wait_for("exit", SHORT)?.decode()?;
    ensure_eq!(
        task.events.topics(),
        ["create", "start", "exec-added", "exec-started", "exit"],
        "topics"
    );
    let added: TaskExecAdded = task.events.wait_for("exec-added", SHORT)?.decode()?;
    ensure_eq!(
        (added.container_id, added.exec_id),
        (task.id.clone(), exec_id.clone()),
        "exec-added"
    );
    let started: TaskExecStarted = task.events.wait_for("exec-started", SHORT)?.decode()?;
    ensure_eq!(
        (started.container_id, started.exec_id, started.pid),
        (task.id.clone(), exec_id.clone(), pid),
        "exec-started"
    );
    ensure_eq!(
        (exit.container_id, exit.id, exit.exit_status),
        (task.id.clone(), exec_id, 9),
        "exit of the exec"
    );
    Ok(task.finish()?)
}

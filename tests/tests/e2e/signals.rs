//! 72–76: kill and pids.

use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::procs;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::Outcome;
use casemate_tests::{ensure, ensure_eq};
use containerd_shim_protos::events::task::TaskExit;
use ttrpc::Code;

use crate::common::expect_code;

crate::trials![
    c072_signal_reaches_the_handler_of_init_only,
    c073_kill_all_of_a_tree,
    c074_kill_after_exit,
    c075_kill_of_created,
    c076_pids_lists_children,
];

fn c072_signal_reaches_the_handler_of_init_only() -> Outcome {
    let script = "(trap 'echo child' USR1; echo ready; while :; do sleep 0.05; done) & \
                  trap 'echo init; exit 9' USR1; echo ready; while :; do sleep 0.05; done";
    let task = Task::running("c072", &["/bin/sh", "-c", script])?;
    task.stdout.until("ready\nready", SHORT)?;
    task.rpc()?.kill(&task.id, 10, false)?;
    ensure_eq!(
        task.rpc()?.wait(&task.id, SHORT)?.exit_status,
        9,
        "exit of the handler"
    );
    task.rpc()?.delete(&task.id)?;
    let out = task.stdout.text(SHORT)?;
    ensure!(
        out.contains("init") && !out.contains("child"),
        "output {out:?}"
    );
    Ok(task.finish()?)
}

fn c073_kill_all_of_a_tree() -> Outcome {
    let script = "for i in $(seq 50); do (sleep 300; sleep 300) & done; echo up; wait";
    let task = Task::running("c073", &["/bin/sh", "-c", script])?;
    task.stdout.until("up", SHORT)?;
    until("51 processes", SHORT, || {
        task.rpc()
            .and_then(|rpc| rpc.pids(&task.id))
            .is_ok_and(|p| p.processes.len() > 50)
    })?;
    let pids: Vec<_> = task
        .rpc()?
        .pids(&task.id)?
        .processes
        .iter()
        .filter_map(|p| procs::identity(p.pid))
        .collect();
    task.rpc()?.kill(&task.id, 9, true)?;
    ensure_eq!(
        task.rpc()?.wait(&task.id, SHORT)?.exit_status,
        137,
        "exit of init"
    );
    until("the tree to die", Duration::from_secs(3), || {
        !pids.iter().any(|p| procs::alive(*p))
    })?;
    task.rpc()?.delete(&task.id)?;
    task.events.wait_for("delete", SHORT)?;
    let exits = task.events.topics().iter().filter(|t| *t == "exit").count();
    ensure_eq!(exits, 1, "exit events");
    Ok(task.finish()?)
}

fn c074_kill_after_exit() -> Outcome {
    let task = Task::running("c074", &["/bin/true"])?;
    task.rpc()?.wait(&task.id, SHORT)?;
    expect_code(
        "Kill",
        task.rpc()?.kill(&task.id, 15, false),
        Code::NOT_FOUND,
    )?;
    Ok(task.finish()?)
}

fn c075_kill_of_created() -> Outcome {
    let task = Task::created("c075", &["/bin/probe", "sleep"])?;
    task.rpc()?.kill(&task.id, 9, false)?;
    ensure_eq!(task.rpc()?.wait(&task.id, SHORT)?.exit_status, 137, "Wait");
    let exit: TaskExit = task.events.wait_for("exit", SHORT)?.decode()?;
    ensure_eq!(exit.exit_status, 137, "exit event");
    ensure_eq!(task.events.topics()[0], "create", "first event");
    Ok(task.finish()?)
}

fn c076_pids_lists_children() -> Outcome {
    let task = Task::running(
        "c076",
        &["/bin/sh", "-c", "probe sleep & probe sleep & echo up; wait"],
    )?;
    task.stdout.until("up", SHORT)?;
    let init = task.rpc()?.state(&task.id)?.pid;
    until("three processes", SHORT, || {
        task.rpc()
            .and_then(|rpc| rpc.pids(&task.id))
            .is_ok_and(|p| p.processes.len() == 3)
    })?;
    let pids = task.rpc()?.pids(&task.id)?.processes;
    ensure!(
        pids.iter().any(|p| p.pid == init),
        "init {init} is not in {pids:?}"
    );
    for process in &pids {
        // In the middle of exec(2) a process has no command line.
        let known = || {
            let command = procs::command_line(process.pid);
            command.contains("probe") || command.contains("sh")
        };
        until(
            &format!("a command of ours at host pid {}", process.pid),
            SHORT,
            known,
        )?;
    }
    Ok(task.finish()?)
}

//! 76–78, 84, 86: pids with their execs, pause, OOM, checkpoint.

use std::collections::BTreeMap;
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, procs};
use containerd_shim_protos::api::{CheckpointTaskRequest, Empty};
use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::shim::oci::ProcessDetails;
use protobuf::{Enum, Message};
use serde_json::json;
use ttrpc::Code;

use crate::calls::{PAUSED, init, pause, resume, stats, update};
use crate::common::{LONG, RUNNING, STOPPED, casemate_only, expect_code, expect_text, status};

crate::trials![
    c076_pids_name_execs,
    c077_pause_and_resume,
    c077_exec_in_a_paused_container,
    c078_kill_of_paused,
    c078_kill_of_an_exec_in_a_paused_container,
    c084_oom_is_told_once_before_the_exit,
    c086_checkpoint,
    exec_with_the_pids_limit_used_up,
];

fn exec_status(exec: &Exec) -> Result<i32, Stop> {
    let state = exec.state()?;
    Ok(state.status.enum_value().map_or_else(|n| n, |s| s.value()))
}

fn c076_pids_name_execs() -> Outcome {
    let task = Task::sleeping("c076x")?;
    let a = Exec::new(&task, "a", &["/bin/probe", "sleep"])?;
    let b = Exec::sh(&task, "b", "probe sleep & echo up; wait")?;
    let (a_pid, b_pid) = (a.begin()?, b.begin()?);
    b.stdout.until("up", SHORT)?;
    let mut known: BTreeMap<u32, String> = BTreeMap::new();
    until("four processes", SHORT, || {
        let pids = task.rpc().and_then(|rpc| rpc.pids(&task.id));
        let pids = pids.map(|p| p.processes).unwrap_or_default();
        known = pids
            .iter()
            .map(|p| {
                let info = p.info.as_ref().map_or_else(String::new, |any| {
                    let details = ProcessDetails::parse_from_bytes(&any.value);
                    let id = details.map(|d| d.exec_id).unwrap_or_default();
                    format!("{} {id}", any.type_url)
                });
                (p.pid, info)
            })
            .collect();
        known.len() == 4
    })?;
    let typed = |id: &str| format!("containerd.runc.v1.ProcessDetails {id}");
    ensure_eq!(known.get(&a_pid), Some(&typed("a")), "exec a");
    ensure_eq!(known.get(&b_pid), Some(&typed("b")), "exec b");
    ensure_eq!(known.get(&init(&task)?), Some(&String::new()), "init");
    let nameless = known.values().filter(|info| info.is_empty()).count();
    ensure_eq!(nameless, 2, "init and the child of b: {known:?}");
    Ok(task.finish()?)
}

/// The counter that a script appends to its output goes on.
const COUNTS: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done";

fn c077_pause_and_resume() -> Outcome {
    let task = Task::running("c077", &["/bin/sh", "-c", COUNTS])?;
    let exec = Exec::sh(&task, "e", COUNTS)?;
    exec.begin()?;
    for reader in [&task.stdout, &exec.stdout] {
        reader.until("3\n", SHORT)?;
    }
    expect_code(
        "Resume, not paused",
        resume(&task),
        Code::FAILED_PRECONDITION,
    )?;
    pause(&task)?;
    task.events.wait_for("paused", SHORT)?;
    ensure_eq!(status(&task)?, PAUSED, "state");
    ensure_eq!(exec_status(&exec)?, PAUSED, "state of the exec");
    std::thread::sleep(Duration::from_millis(100));
    let size = || (task.stdout.so_far().len(), exec.stdout.so_far().len());
    let frozen = size();
    std::thread::sleep(Duration::from_millis(400));
    ensure_eq!(size(), frozen, "output while paused");
    expect_code("Pause twice", pause(&task), Code::FAILED_PRECONDITION)?;
    // What only looks does work.
    ensure!(
        task.rpc()?.pids(&task.id)?.processes.len() >= 2,
        "pids while paused"
    );
    stats(&task)?;
    expect_code(
        "Delete, paused",
        task.rpc()?.delete(&task.id),
        Code::FAILED_PRECONDITION,
    )?;
    ensure_eq!(status(&task)?, PAUSED, "state after Pause twice");
    resume(&task)?;
    task.events.wait_for("resumed", SHORT)?;
    ensure_eq!(status(&task)?, RUNNING, "state");
    ensure_eq!(exec_status(&exec)?, RUNNING, "state of the exec");
    until("output to go on", SHORT, || {
        let now = size();
        now.0 > frozen.0 && now.1 > frozen.1
    })?;
    let topics = task.events.topics();
    for topic in ["paused", "resumed"] {
        let n = topics.iter().filter(|t| *t == topic).count();
        ensure_eq!(n, 1, "{topic} in {topics:?}");
    }
    let created = Task::created("c077c", &["/bin/probe", "sleep"])?;
    expect_code("Pause, created", pause(&created), Code::FAILED_PRECONDITION)?;
    created.finish()?;
    Ok(task.finish()?)
}

fn c077_exec_in_a_paused_container() -> Outcome {
    let task = Task::sleeping("c077e")?;
    let before = Exec::sh(&task, "before", "echo ran")?;
    before.add()?;
    pause(&task)?;
    expect_code("Start(exec)", before.start(), Code::FAILED_PRECONDITION)?;
    let during = Exec::new(&task, "during", &["/bin/true"])?;
    expect_code("Exec", during.add(), Code::FAILED_PRECONDITION)?;
    resume(&task)?;
    // The refused Start took nothing away.
    before.start()?;
    ensure_eq!(before.wait()?, 0, "exit status");
    before.delete()?;
    ensure_eq!(before.stdout.text(SHORT)?, "ran\n", "output");
    Ok(task.finish()?)
}

fn c078_kill_of_paused() -> Outcome {
    for all in [false, true] {
        let task = Task::running("c078", &["/bin/sh", "-c", "probe sleep & echo up; wait"])?;
        task.stdout.until("up", SHORT)?;
        pause(&task)?;
        let pids = task.rpc()?.pids(&task.id)?.processes;
        let pids: Vec<_> = pids.iter().filter_map(|p| procs::identity(p.pid)).collect();
        ensure_eq!(pids.len(), 2, "processes");
        task.rpc()?.kill(&task.id, 9, all)?;
        let ended = task.rpc()?.wait(&task.id, Duration::from_secs(5))?;
        ensure_eq!(ended.exit_status, 137, "exit status, all={all}");
        until("all to die", SHORT, || {
            !pids.iter().any(|p| procs::alive(*p))
        })?;
        ensure_eq!(status(&task)?, STOPPED, "state");
        task.rpc()?.delete(&task.id)?;
        task.finish()?;
    }
    Ok(())
}

fn c078_kill_of_an_exec_in_a_paused_container() -> Outcome {
    casemate_only()?;
    let task = Task::running("c078e", &["/bin/sh", "-c", COUNTS])?;
    let exec = Exec::new(&task, "e", &["/bin/probe", "sleep"])?;
    exec.begin()?;
    task.stdout.until("3\n", SHORT)?;
    pause(&task)?;
    exec.kill(9)?;
    std::thread::sleep(Duration::from_millis(100));
    let frozen = task.stdout.so_far().len();
    std::thread::sleep(Duration::from_millis(300));
    ensure_eq!(
        status(&task)?,
        PAUSED,
        "state: one exec is not the container"
    );
    ensure_eq!(task.stdout.so_far().len(), frozen, "output while paused");
    resume(&task)?;
    ensure_eq!(exec.wait()?, 137, "exit status");
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}

fn c084_oom_is_told_once_before_the_exit() -> Outcome {
    let mut task = Task::new(
        "c084",
        &[
            "/bin/dd",
            "if=/dev/zero",
            "of=/dev/null",
            "bs=400M",
            "count=1",
        ],
    )?;
    let limit = 128 << 20;
    task.spec["linux"]["resources"]["memory"] = json!({"limit": limit, "swap": limit});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    ensure_eq!(
        task.rpc()?.wait(&task.id, LONG)?.exit_status,
        137,
        "exit status"
    );
    task.rpc()?.delete(&task.id)?;
    task.events.wait_for("delete", SHORT)?;
    let oom: TaskOOM = task.events.wait_for("oom", SHORT)?.decode()?;
    ensure_eq!(oom.container_id, task.id, "container of the event");
    ensure_eq!(
        task.events.topics(),
        ["create", "start", "oom", "exit", "delete"],
        "topics"
    );
    Ok(task.finish()?)
}

fn c086_checkpoint() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c086")?;
    let ask = CheckpointTaskRequest {
        id: task.id.clone(),
        path: task.side.display().to_string(),
        ..Default::default()
    };
    expect_code(
        "Checkpoint",
        task.rpc()?.call::<Empty>("Checkpoint", &ask, SHORT),
        Code::UNIMPLEMENTED,
    )?;
    ensure_eq!(status(&task)?, RUNNING, "state");
    let exec = Exec::sh(&task, "e", "echo lives")?;
    ensure_eq!(exec.run()?, (0, "lives\n".to_owned()), "an exec");
    Ok(task.finish()?)
}

fn exec_with_the_pids_limit_used_up() -> Outcome {
    casemate_only()?;
    let script = "for i in 1 2 3 4 5 6 7 8; do probe sleep & done; echo up; wait";
    let mut task = Task::new("pidsfull", &["/bin/sh", "-c", script])?;
    // Eight, their shell, and the forker.
    task.spec["linux"]["resources"]["pids"] = json!({"limit": 10});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    task.stdout.until("up", SHORT)?;
    let before = task.rpc()?.pids(&task.id)?.processes.len();
    ensure_eq!(before, 9, "processes");
    for n in 0..3 {
        let exec = Exec::new(&task, &format!("e{n}"), &["/bin/true"])?;
        exec.add()?;
        expect_text("Start", exec.start(), "linux.resources.pids.limit")?;
        exec.wait_within(Duration::from_secs(5))?;
        exec.delete()?;
    }
    ensure_eq!(status(&task)?, RUNNING, "state");
    ensure_eq!(
        task.rpc()?.pids(&task.id)?.processes.len(),
        before,
        "processes"
    );
    // More room, and it works: the way out that the error names.
    update(&task, &json!({"pids": {"limit": 20}}))?;
    let exec = Exec::sh(&task, "after", "echo fits")?;
    ensure_eq!(exec.run()?, (0, "fits\n".to_owned()), "an exec");
    Ok(task.finish()?)
}

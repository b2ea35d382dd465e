//! 31–55: create, start, state, wait, delete.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::leaks;
use casemate_tests::procs;
use casemate_tests::run::until;
use casemate_tests::shim::{Client, SHORT};
use casemate_tests::skip::Outcome;
use casemate_tests::{ensure, ensure_eq};
use containerd_shim_protos::api::{
    CloseIORequest, DeleteRequest, DeleteResponse, Empty, KillRequest, Mount, PauseRequest,
    PidsRequest, PidsResponse, ResizePtyRequest, StateRequest, StateResponse, StatsRequest,
    StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::Code;

use crate::common::{
    CREATED, LONG, RUNNING, STOPPED, expect_code, expect_text, output, run, status, waiter,
};

crate::trials![
    c031_create_parks_the_container,
    c032_connect_knows_the_pid,
    c033_failed_second_mount_undoes_the_first,
    c034_spec_error_leaves_nothing,
    c035_existing_id,
    c036_options_of_all_kinds,
    c037_io_owner,
    c038_start_runs_the_created_pid,
    c039_start_twice,
    c040_missing_executable_is_named,
    c041_exit_codes,
    c042_signal_exit_codes,
    c043_exit_before_start_answers,
    c044_many_short_containers,
    c045_four_waits_agree,
    c046_wait_survives_a_lost_connection,
    c047_calls_answer_while_wait_pends,
    c048_delete_of_running_is_refused,
    c049_delete_of_created,
    c050_delete_of_stopped,
    c051_burst_right_before_exit,
    c052_grandchild_holds_stdout,
    c053_unknown_id,
    c054_connect_with_unknown_id,
    c055_delete_outlives_its_deadline,
];

fn c031_create_parks_the_container() -> Outcome {
    let task = Task::new(
        "c031",
        &["/bin/sh", "-c", "echo ran > /mark; exec /bin/probe sleep"],
    )?;
    let mut task = task;
    task.boot()?;
    let pid = task.create()?.pid;
    ensure!(pid > 0, "Create answered pid 0");
    ensure_eq!(status(&task)?, CREATED, "state after Create");
    let mark = task.side.join("upper/mark");
    std::thread::sleep(Duration::from_millis(300));
    ensure!(!mark.exists(), "user code ran before Start");
    task.rpc()?.start(&task.id)?;
    until("user code to run", SHORT, || mark.exists())?;
    Ok(task.finish()?)
}

fn c032_connect_knows_the_pid() -> Outcome {
    let mut task = Task::new("c032", &["/bin/probe", "sleep"])?;
    task.boot()?;
    let pid = task.create()?.pid;
    let reply = task.rpc()?.shim(&task.id)?;
    ensure_eq!(reply.task_pid, pid, "task_pid of Connect");
    ensure!(
        procs::identity(pid).is_some(),
        "no process {pid} on the host"
    );
    ensure_eq!(reply.shim_pid, task.shim_pid()?, "shim_pid is stable");
    Ok(task.finish()?)
}

fn c033_failed_second_mount_undoes_the_first() -> Outcome {
    let mut task = Task::new("c033", &["/bin/true"])?;
    task.rootfs.push(Mount {
        type_: "bind".to_owned(),
        source: "/nonexistent/second".to_owned(),
        options: vec!["rbind".to_owned()],
        ..Default::default()
    });
    task.boot()?;
    expect_text("Create", task.create(), "")?;
    let left = leaks::mounts_with(&task.id);
    ensure!(left.is_empty(), "mounts left: {left:?}");
    Ok(())
}

fn c034_spec_error_leaves_nothing() -> Outcome {
    let mut task = Task::new("c034", &["/bin/true"])?;
    if let Some(list) = task.spec["linux"]["namespaces"].as_array_mut() {
        list.retain(|ns| ns["type"] != "network");
        list.push(json!({"type": "network", "path": "/nonexistent/netns"}));
    }
    task.boot()?;
    expect_text("Create", task.create(), "/nonexistent/netns")?;
    expect_code("Delete", task.rpc()?.delete(&task.id), Code::NOT_FOUND)?;
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(3))?;
    Ok(task.expect_clean(Duration::from_secs(2))?)
}

fn c035_existing_id() -> Outcome {
    let task = Task::created("c035", &["/bin/probe", "sleep"])?;
    expect_code("second Create", task.create(), Code::ALREADY_EXISTS)?;
    ensure_eq!(status(&task)?, CREATED, "state of the first");
    Ok(task.finish()?)
}

fn c036_options_of_all_kinds() -> Outcome {
    let runc = Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        ..Default::default()
    };
    let generic = Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        ..Default::default()
    };
    for options in [None, Some(runc), Some(generic)] {
        let mut task = Task::new("c036", &["/bin/probe", "exit", "7"])?;
        let shown = format!("{options:?}");
        task.options = options;
        let (deleted, _) = task.run_to_end()?;
        ensure_eq!(deleted.exit_status, 7, "exit with options {shown}");
        task.rpc()?.shutdown(&task.id)?;
    }
    Ok(())
}

fn c037_io_owner() -> Outcome {
    // io_uid and io_gid are fields 4 and 5 of containerd.runc.v1.Options.
    let mut task = Task::new("c037", &["/bin/probe", "sleep"])?;
    task.options = Some(Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        value: vec![4 << 3, 0xe8, 0x07, 5 << 3, 0xd0, 0x0f],
        ..Default::default()
    });
    task.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    task.boot()?;
    let pid = task.create()?.pid;
    task.rpc()?.start(&task.id)?;
    for fd in [1, 2] {
        let meta = fs::metadata(format!("/proc/{pid}/fd/{fd}"))?;
        ensure_eq!(
            (meta.uid(), meta.gid()),
            (1000, 2000),
            "owner of descriptor {fd}"
        );
    }
    Ok(task.finish()?)
}

fn c038_start_runs_the_created_pid() -> Outcome {
    let mut task = Task::new("c038", &["/bin/probe", "sleep"])?;
    task.boot()?;
    let created = task.create()?.pid;
    let started = task.rpc()?.start(&task.id)?.pid;
    ensure_eq!(started, created, "pid of Start");
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}

fn c039_start_twice() -> Outcome {
    let task = Task::sleeping("c039")?;
    expect_text("second Start", task.rpc()?.start(&task.id), "")?;
    ensure_eq!(status(&task)?, RUNNING, "state after the second Start");
    Ok(task.finish()?)
}

fn c040_missing_executable_is_named() -> Outcome {
    let mut task = Task::new("c040", &["/no/such/program"])?;
    task.boot()?;
    let result = match task.create() {
        Ok(_) => task.rpc()?.start(&task.id).map(|_| ()),
        Err(error) => Err(error),
    };
    expect_text("Create or Start", result, "/no/such/program")?;
    let _ = task.rpc()?.delete(&task.id);
    expect_code(
        "State after Delete",
        task.rpc()?.state(&task.id),
        Code::NOT_FOUND,
    )?;
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(3))?;
    Ok(task.expect_clean(Duration::from_secs(2))?)
}

fn c041_exit_codes() -> Outcome {
    for code in [0u32, 1, 42, 255] {
        let mut task = Task::new("c041", &["/bin/probe", "exit", &code.to_string()])?;
        task.boot()?;
        task.create()?;
        ensure_eq!(task.start_and_wait()?.exit_status, code, "Wait");
        ensure_eq!(task.rpc()?.delete(&task.id)?.exit_status, code, "Delete");
        task.rpc()?.shutdown(&task.id)?;
    }
    Ok(())
}

fn c042_signal_exit_codes() -> Outcome {
    for (signal, code) in [(9u32, 137u32), (15, 143)] {
        // A child of a shell, not pid 1: the default action of SIGTERM is what
        // is asked for, and the kernel keeps it from a namespace's init.
        let script = "probe sleep & child=$!; trap 'kill $child; wait $child; exit $?' TERM; \
                      echo up; wait $child";
        let task = Task::running("c042", &["/bin/sh", "-c", script])?;
        task.stdout.until("up", SHORT)?;
        task.rpc()?.kill(&task.id, signal, false)?;
        let reply = task.rpc()?.wait(&task.id, SHORT)?;
        ensure_eq!(reply.exit_status, code, "exit after signal {signal}");
        task.finish()?;
    }
    Ok(())
}

fn c043_exit_before_start_answers() -> Outcome {
    for _ in 0..10 {
        let task = Task::created("c043", &["/bin/probe", "exit", "3"])?;
        task.rpc()?.start(&task.id)?;
        task.events.wait_for("exit", SHORT)?;
        let topics = task.events.topics();
        ensure_eq!(topics, ["create", "start", "exit"], "events");
        task.finish()?;
    }
    Ok(())
}

fn c044_many_short_containers() -> Outcome {
    // 1000 in all, 4 at a time, each seen through Wait, Delete and its events.
    let mut workers = Vec::new();
    for worker in 0..4u32 {
        workers.push(std::thread::spawn(move || -> Result<(), String> {
            for n in 0..250u32 {
                let code = (worker * 250 + n) % 200;
                let text = |e: casemate_tests::Failure| e.to_string();
                let mut task =
                    Task::new("c044", &["/bin/probe", "exit", &code.to_string()]).map_err(text)?;
                let (deleted, _) = task.run_to_end().map_err(text)?;
                task.events.wait_for("delete", SHORT).map_err(text)?;
                let topics = task.events.topics();
                if deleted.exit_status != code || topics != ["create", "start", "exit", "delete"] {
                    return Err(format!("{code}: {} {topics:?}", deleted.exit_status));
                }
                task.finish().map_err(text)?;
            }
            Ok(())
        }));
    }
    for worker in workers {
        match worker.join() {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return casemate_tests::skip::fail(why),
            Err(_) => return casemate_tests::skip::fail("a worker panicked"),
        }
    }
    Ok(())
}

fn c045_four_waits_agree() -> Outcome {
    let task = Task::sleeping("c045")?;
    let before: Vec<_> = (0..3).map(|_| waiter(&task)).collect::<Result<_, _>>()?;
    std::thread::sleep(Duration::from_millis(200));
    task.rpc()?.kill(&task.id, 9, false)?;
    let mut replies: Vec<_> = before
        .into_iter()
        .map(|w| w.join().ok().flatten())
        .collect();
    replies.push(waiter(&task)?.join().ok().flatten());
    ensure!(
        replies[0].is_some_and(|r| r.0 == 137 && r.1 > 0),
        "first reply {:?}",
        replies[0]
    );
    ensure!(
        replies.iter().all(|r| *r == replies[0]),
        "replies differ: {replies:?}"
    );
    Ok(task.finish()?)
}

fn c046_wait_survives_a_lost_connection() -> Outcome {
    let task = Task::sleeping("c046")?;
    let answer = task.answer()?.clone();
    let other = Client::connect(&answer.address, answer.version)?;
    // The limit ends the call on our side; then the connection goes.
    expect_text("Wait", other.wait(&task.id, Duration::from_millis(200)), "")?;
    drop(other);
    std::thread::sleep(Duration::from_millis(100));
    ensure_eq!(status(&task)?, RUNNING, "state after the connection went");
    let wait = waiter(&task)?;
    task.rpc()?.kill(&task.id, 9, false)?;
    ensure_eq!(
        wait.join().ok().flatten().map(|r| r.0),
        Some(137),
        "new Wait"
    );
    Ok(task.finish()?)
}

fn c047_calls_answer_while_wait_pends() -> Outcome {
    let task = Task::sleeping("c047")?;
    let waits: Vec<_> = (0..20).map(|_| waiter(&task)).collect::<Result<_, _>>()?;
    std::thread::sleep(Duration::from_millis(300));
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        let begun = Instant::now();
        task.rpc()?.shim(&task.id)?;
        task.rpc()?.state(&task.id)?;
        slowest = slowest.max(begun.elapsed());
    }
    ensure!(
        slowest < Duration::from_millis(200),
        "Connect + State took {slowest:?}"
    );
    task.rpc()?.kill(&task.id, 9, false)?;
    for wait in waits {
        ensure_eq!(
            wait.join().ok().flatten().map(|r| r.0),
            Some(137),
            "pending Wait"
        );
    }
    Ok(task.finish()?)
}

fn c048_delete_of_running_is_refused() -> Outcome {
    let task = Task::sleeping("c048")?;
    expect_text("Delete", task.rpc()?.delete(&task.id), "")?;
    ensure_eq!(status(&task)?, RUNNING, "state after the refused Delete");
    Ok(task.finish()?)
}

fn c049_delete_of_created() -> Outcome {
    let mut task = Task::new("c049", &["/bin/probe", "sleep"])?;
    task.boot()?;
    let pid = task.create()?.pid;
    task.rpc()?.delete(&task.id)?;
    until("init to die", Duration::from_secs(3), || {
        procs::identity(pid).is_none()
    })?;
    task.events.wait_for("delete", SHORT)?;
    let topics = task.events.topics();
    let place = |name: &str| topics.iter().position(|t| t == name);
    ensure!(place("create") < place("delete"), "events {topics:?}");
    ensure!(
        place("start").is_none(),
        "a start event of a task never started: {topics:?}"
    );
    Ok(task.finish()?)
}

fn c050_delete_of_stopped() -> Outcome {
    let mut task = Task::new("c050", &["/bin/probe", "exit", "5"])?;
    task.boot()?;
    let pid = task.create()?.pid;
    let wait = task.start_and_wait()?;
    ensure_eq!(status(&task)?, STOPPED, "state after exit");
    let deleted = task.rpc()?.delete(&task.id)?;
    ensure_eq!(
        (deleted.pid, deleted.exit_status),
        (pid, 5),
        "reply of Delete"
    );
    ensure_eq!(deleted.exited_at, wait.exited_at, "time of Delete and Wait");
    expect_code("State", task.rpc()?.state(&task.id), Code::NOT_FOUND)?;
    let mounts = leaks::mounts_with(&task.id);
    ensure!(mounts.is_empty(), "mounts left: {mounts:?}");
    let cgroups = own_cgroups(&task);
    ensure!(cgroups.is_empty(), "cgroups left: {cgroups:?}");
    Ok(task.finish()?)
}

/// Cgroups of the container itself; one of the pod may live until Shutdown.
fn own_cgroups(task: &Task) -> Vec<String> {
    let mut all = leaks::cgroups_with(&task.id);
    all.retain(|path| path.ends_with(&format!("/{}", task.id)));
    all
}

fn c051_burst_right_before_exit() -> Outcome {
    const BYTES: usize = 8 << 20;
    let mut task = Task::new("c051", &["/bin/probe", "burst", &BYTES.to_string()])?;
    task.boot()?;
    task.create()?;
    task.start_and_wait()?;
    task.rpc()?.delete(&task.id)?;
    let got = task.stdout.all(SHORT)?;
    ensure_eq!(got.len(), BYTES, "bytes");
    let wrong = got
        .chunks_exact(8)
        .enumerate()
        .find(|(n, chunk)| **chunk != (*n as u64).to_le_bytes());
    ensure!(
        wrong.is_none(),
        "counter breaks at {:?}",
        wrong.map(|w| w.0)
    );
    Ok(task.finish()?)
}

fn c052_grandchild_holds_stdout() -> Outcome {
    // A private pid namespace dies with its init; an agent that is pid 1 above
    // the container is what could let the grandchild live on.
    let mut task = Task::new(
        "c052",
        &["/bin/sh", "-c", "(sleep 300) & echo parent; exit 4"],
    )?;
    task.boot()?;
    task.create()?;
    task.start_and_wait()?;
    let begun = Instant::now();
    let deleted = task.rpc()?.delete(&task.id)?;
    ensure_eq!(deleted.exit_status, 4, "exit status");
    ensure!(
        begun.elapsed() < Duration::from_secs(12),
        "Delete took {:?}",
        begun.elapsed()
    );
    ensure_eq!(output(&task)?.trim(), "parent", "output");
    Ok(task.finish()?)
}

fn c053_unknown_id() -> Outcome {
    let task = Task::created("c053", &["/bin/probe", "sleep"])?;
    let rpc = task.rpc()?;
    let id = "no-such-task".to_owned();
    let spec = Any {
        type_url: String::new(),
        ..Default::default()
    };
    let state = StateRequest {
        id: id.clone(),
        ..Default::default()
    };
    expect_code(
        "State",
        rpc.call::<StateResponse>("State", &state, SHORT),
        Code::NOT_FOUND,
    )?;
    let kill = KillRequest {
        id: id.clone(),
        signal: 9,
        ..Default::default()
    };
    expect_code(
        "Kill",
        rpc.call::<Empty>("Kill", &kill, SHORT),
        Code::NOT_FOUND,
    )?;
    let delete = DeleteRequest {
        id: id.clone(),
        ..Default::default()
    };
    expect_code(
        "Delete",
        rpc.call::<DeleteResponse>("Delete", &delete, SHORT),
        Code::NOT_FOUND,
    )?;
    let wait = WaitRequest {
        id: id.clone(),
        ..Default::default()
    };
    expect_code(
        "Wait",
        rpc.call::<WaitResponse>("Wait", &wait, SHORT),
        Code::NOT_FOUND,
    )?;
    let pids = PidsRequest {
        id: id.clone(),
        ..Default::default()
    };
    expect_code(
        "Pids",
        rpc.call::<PidsResponse>("Pids", &pids, SHORT),
        Code::NOT_FOUND,
    )?;
    let update = UpdateTaskRequest {
        id: id.clone(),
        resources: Some(spec).into(),
        ..Default::default()
    };
    expect_code(
        "Update",
        rpc.call::<Empty>("Update", &update, SHORT),
        Code::NOT_FOUND,
    )?;
    let stats = StatsRequest {
        id: id.clone(),
        ..Default::default()
    };
    expect_code(
        "Stats",
        rpc.call::<StatsResponse>("Stats", &stats, SHORT),
        Code::NOT_FOUND,
    )?;
    let pause = PauseRequest {
        id: id.clone(),
        ..Default::default()
    };
    expect_code(
        "Pause",
        rpc.call::<Empty>("Pause", &pause, SHORT),
        Code::NOT_FOUND,
    )?;
    let resize = ResizePtyRequest {
        id: id.clone(),
        ..Default::default()
    };
    expect_code(
        "ResizePty",
        rpc.call::<Empty>("ResizePty", &resize, SHORT),
        Code::NOT_FOUND,
    )?;
    let close = CloseIORequest {
        id,
        ..Default::default()
    };
    expect_code(
        "CloseIO",
        rpc.call::<Empty>("CloseIO", &close, SHORT),
        Code::NOT_FOUND,
    )?;
    Ok(task.finish()?)
}

fn c054_connect_with_unknown_id() -> Outcome {
    let task = Task::created("c054", &["/bin/probe", "sleep"])?;
    let reply = task.rpc()?.shim("no-such-task")?;
    ensure_eq!(reply.task_pid, 0, "task_pid");
    ensure_eq!(reply.shim_pid, task.shim_pid()?, "shim_pid");
    Ok(task.finish()?)
}

fn c055_delete_outlives_its_deadline() -> Outcome {
    let task = Task::running("c055", &["/bin/probe", "exit", "0"])?;
    task.rpc()?.wait(&task.id, LONG)?;
    let ask = DeleteRequest {
        id: task.id.clone(),
        ..Default::default()
    };
    let _ = task
        .rpc()?
        .call::<DeleteResponse>("Delete", &ask, Duration::from_millis(1));
    until("the delete to be done", Duration::from_secs(5), || {
        let _ = task.rpc().and_then(|rpc| rpc.delete(&task.id));
        task.rpc().and_then(|rpc| rpc.state(&task.id)).is_err()
    })?;
    let cgroups = own_cgroups(&task);
    ensure!(cgroups.is_empty(), "cgroups left: {cgroups:?}");
    let seen = fs::read_dir(task.bundle().join("rootfs"))
        .map(|d| d.count())
        .unwrap_or(0);
    ensure_eq!(seen, 0, "files in rootfs after Delete");
    let deletes = task
        .events
        .topics()
        .iter()
        .filter(|t| *t == "delete")
        .count();
    ensure!(deletes <= 1, "{deletes} delete events");
    let _ = run("c055", &["/bin/true"])?;
    Ok(task.finish()?)
}

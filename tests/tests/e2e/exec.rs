//! 56–60, 68–71: the life of an exec.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, procs};
use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit};
use protobuf::Enum;
use ttrpc::Code;

use crate::common::{RUNNING, casemate_only, expect_code, expect_text, status};

crate::trials![
    c056_exec_only_registers,
    c057_exec_runs_and_its_code_is_told,
    c058_duplicate_exec_id,
    c059_exec_that_cannot_start,
    c059_exec_whose_streams_cannot_be_opened,
    c060_exec_after_init,
    c068_kill_of_an_exec,
    c069_delete_of_an_exec,
    c071_execs_end_before_init,
    exec_asks_whether_its_user_may_execute,
    exec_hundred_at_once,
    exec_twice_started_at_once,
    exec_wait_ends_with_the_record,
];

/// Status of an exec as a number of containerd's enum.
fn state(exec: &Exec) -> Result<i32, Stop> {
    let state = exec.state()?;
    Ok(state.status.enum_value().map_or_else(|n| n, |s| s.value()))
}

fn c056_exec_only_registers() -> Outcome {
    let task = Task::sleeping("c056")?;
    let before = task.rpc()?.pids(&task.id)?.processes.len();
    let exec = Exec::sh(&task, "e1", "echo ran; echo ran > /tmp/ran")?;
    exec.add()?;
    task.events.wait_for("exec-added", SHORT)?;
    std::thread::sleep(Duration::from_millis(300));
    let shown = exec.state()?;
    ensure_eq!(shown.pid, 0, "pid before Start");
    ensure_eq!(state(&exec)?, crate::common::CREATED, "state before Start");
    ensure_eq!(
        (shown.id.as_str(), shown.exec_id.as_str()),
        ("e1", "e1"),
        "ids in State"
    );
    ensure_eq!(shown.stdout, exec.stdio[1], "stdout in State");
    ensure_eq!(
        task.rpc()?.pids(&task.id)?.processes.len(),
        before,
        "processes"
    );
    ensure!(!task.side.join("upper/tmp/ran").exists(), "it ran");
    ensure!(
        !task.events.topics().iter().any(|t| t == "exec-started"),
        "exec-started before Start"
    );
    // Control: the same exec does run.
    exec.start()?;
    ensure_eq!(exec.wait()?, 0, "exit status");
    exec.delete()?;
    ensure_eq!(exec.stdout.text(SHORT)?, "ran\n", "output");
    ensure!(task.side.join("upper/tmp/ran").exists(), "it did not run");
    Ok(task.finish()?)
}

fn c057_exec_runs_and_its_code_is_told() -> Outcome {
    let task = Task::sleeping("c057")?;
    let init = task.rpc()?.state(&task.id)?.pid;
    let long = Exec::new(&task, "long", &["/bin/probe", "sleep"])?;
    let pid = long.begin()?;
    ensure!(
        procs::command_line(pid).contains("probe"),
        "host pid {pid}: {}",
        procs::command_line(pid)
    );
    let cgroup = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cgroup"));
    ensure_eq!(cgroup(pid)?, cgroup(init)?, "cgroups");
    ensure_eq!(state(&long)?, RUNNING, "state");
    let started: TaskExecStarted = task.events.wait_for("exec-started", SHORT)?.decode()?;
    ensure_eq!(started.pid, pid, "pid in the event");
    for code in [0, 1, 42, 255] {
        let id = format!("c{code}");
        let exec = Exec::new(&task, &id, &["/bin/probe", "exit", &code.to_string()])?;
        exec.begin()?;
        ensure_eq!(exec.wait()?, code, "Wait");
        ensure_eq!(exec.state()?.exit_status, code, "State");
        ensure_eq!(exec.delete()?.exit_status, code, "Delete");
    }
    // It is no pid 1: a signal's default action ends it.
    long.kill(15)?;
    ensure_eq!(long.wait()?, 143, "after SIGTERM");
    let deleted = long.delete()?;
    ensure_eq!((deleted.exit_status, deleted.pid), (143, pid), "Delete");
    ensure!(deleted.exited_at.is_some(), "no time in Delete");
    ensure_eq!(status(&task)?, RUNNING, "state of the container");
    Ok(task.finish()?)
}

fn c058_duplicate_exec_id() -> Outcome {
    let task = Task::sleeping("c058")?;
    let exec = Exec::new(&task, "e1", &["/bin/probe", "sleep"])?;
    exec.add()?;
    expect_code("Exec, registered", exec.add(), Code::ALREADY_EXISTS)?;
    exec.start()?;
    expect_code("Exec, running", exec.add(), Code::ALREADY_EXISTS)?;
    exec.kill(9)?;
    exec.wait()?;
    expect_code("Exec, ended", exec.add(), Code::ALREADY_EXISTS)?;
    exec.delete()?;
    // An id is free again after Delete.
    exec.add()?;
    exec.delete()?;
    let mut empty = Exec::new(&task, "e2", &["/bin/true"])?;
    empty.exec_id.clear();
    expect_code("Exec, no id", empty.add(), Code::INVALID_ARGUMENT)?;
    Ok(task.finish()?)
}

fn c059_exec_that_cannot_start() -> Outcome {
    let mut task = Task::new("c059", &["/bin/probe", "sleep"])?;
    let tmp = task.side.join("upper/odd");
    fs::create_dir_all(&tmp)?;
    fs::write(tmp.join("plain"), "no program")?;
    fs::write(tmp.join("script"), "#!/no/such/interpreter\n")?;
    fs::write(tmp.join("elf"), "\x7fELFnot really")?;
    for name in ["script", "elf"] {
        casemate_tests::world::set_mode(&tmp.join(name), 0o755)?;
    }
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    for (n, (program, cwd, part)) in [
        ("/no/such/binary", "/", "/no/such/binary"),
        ("nowhere-in-path", "/", "nowhere-in-path"),
        ("/odd/plain", "/", "/odd/plain"),
        ("/odd", "/", "/odd"),
        ("/odd/script", "/", "/odd/script"),
        ("/odd/elf", "/", "/odd/elf"),
        ("/bin/true", "/no/such/directory", "/no/such/directory"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut exec = Exec::new(&task, &format!("e{n}"), &[program])?;
        exec.process["cwd"] = cwd.into();
        exec.add()?;
        expect_text(program, exec.start(), part)?;
        // Whoever waits has an answer, and the record can go.
        let status = exec.wait_within(Duration::from_secs(5))?;
        ensure!(status != 0, "{program}: Wait answers 0");
        ensure_eq!(state(&exec)?, crate::common::STOPPED, "{program}: state");
        expect_code("second Start", exec.start(), Code::FAILED_PRECONDITION)?;
        expect_code("Kill", exec.kill(9), Code::NOT_FOUND)?;
        exec.delete()?;
        expect_code("State after Delete", exec.state(), Code::NOT_FOUND)?;
    }
    ensure_eq!(
        crate::common::status(&task)?,
        RUNNING,
        "state of the container"
    );
    let after = Exec::sh(&task, "after", "echo fine")?;
    ensure_eq!(after.run()?, (0, "fine\n".to_owned()), "a sound exec");
    // One exit, the sound one's: nothing that did not start has ended.
    // Events come after the answers.
    let exits = || task.events.topics().iter().filter(|t| *t == "exit").count();
    until("the exit event", SHORT, || exits() > 0)?;
    ensure_eq!(exits(), 1, "exit events");
    Ok(task.finish()?)
}

fn c059_exec_whose_streams_cannot_be_opened() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c059s")?;
    let plain = task.side.join("plain");
    fs::write(&plain, "x")?;
    for (n, stdout) in [
        "/no/such/fifo".to_owned(),
        plain.display().to_string(),
        "ftp://host/x".to_owned(),
        "binary:///no/such/logger".to_owned(),
    ]
    .into_iter()
    .enumerate()
    {
        let mut exec = Exec::new(&task, &format!("e{n}"), &["/bin/true"])?;
        exec.stdio[1] = stdout.clone();
        exec.add()?;
        let named = stdout.rsplit("://").next().unwrap_or_default();
        expect_text(&stdout, exec.start(), named)?;
        let status = exec.wait_within(Duration::from_secs(5))?;
        ensure!(status != 0, "{stdout}: Wait answers 0");
        expect_code("second Start", exec.start(), Code::FAILED_PRECONDITION)?;
        exec.delete()?;
    }
    ensure_eq!(status(&task)?, RUNNING, "state of the container");
    Ok(task.finish()?)
}

/// Modes count for the user that the process is to be, and his capabilities do.
fn exec_asks_whether_its_user_may_execute() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("modes")?;
    let make = "mkdir -p /srv/dir; for n in own none; do cp /bin/probe /srv/$n; done; \
                chmod 700 /srv/own; chmod 600 /srv/none";
    let (code, said) = Exec::sh(&task, "make", make)?.run()?;
    ensure_eq!(code, 0, "{said}");
    let over = &["CAP_DAC_OVERRIDE"][..];
    for (at, (uid, capabilities, name, refused)) in [
        (0, over, "/srv/own", ""),
        (1234, &[], "/srv/own", "execute /srv/own: Permission denied"),
        (1234, &[], "own", "execute own: permission denied"),
        (1234, over, "/srv/own", ""),
        (1234, over, "own", ""),
        (1234, over, "/srv/none", "execute /srv/none: "),
        (0, over, "/srv/none", "execute /srv/none: "),
        (0, over, "/srv/dir", "execute /srv/dir: "),
        (
            1234,
            over,
            "/srv/nothing",
            "execute /srv/nothing: No such file",
        ),
        (0, over, "/srv/own/x", "execute /srv/own/x: Not a directory"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut exec = Exec::new(&task, &format!("e{at}"), &[name])?;
        exec.process["user"] = serde_json::json!({"uid": uid, "gid": uid});
        exec.process["env"] = serde_json::json!(["PATH=/nowhere:/srv"]);
        for set in [
            "bounding",
            "effective",
            "permitted",
            "inheritable",
            "ambient",
        ] {
            exec.process["capabilities"][set] = serde_json::json!(capabilities);
        }
        let at = format!("{name} as {uid} with {capabilities:?}");
        match exec.run() {
            Ok((code, said)) => {
                ensure!(refused.is_empty(), "{at}: {code}, {said:?}");
                ensure_eq!(code, 0, "{at}: {said:?}");
            }
            Err(error) => {
                let text = error.to_string();
                ensure!(
                    !refused.is_empty() && text.contains(refused),
                    "{at}: {text}"
                );
            }
        }
    }
    Ok(task.finish()?)
}

fn c060_exec_after_init() -> Outcome {
    let task = Task::sleeping("c060")?;
    let exec = Exec::new(&task, "early", &["/bin/true"])?;
    exec.add()?;
    let (client, id) = (task.rpc()?.clone(), task.id.clone());
    let waiting = std::thread::spawn(move || client.wait_exec((&id, "early")));
    task.rpc()?.kill(&task.id, 9, false)?;
    task.rpc()?.wait(&task.id, SHORT)?;
    expect_code("Start(exec)", exec.start(), Code::FAILED_PRECONDITION)?;
    let late = Exec::new(&task, "late", &["/bin/true"])?;
    expect_code("Exec", late.add(), Code::FAILED_PRECONDITION)?;
    if casemate_only().is_ok() {
        // It will never run: a Wait that pends is told so.
        until("Wait of the exec", Duration::from_secs(5), || {
            waiting.is_finished()
        })?;
        exec.wait_within(Duration::from_secs(5))?;
    }
    exec.delete()?;
    Ok(task.finish()?)
}

fn c068_kill_of_an_exec() -> Outcome {
    let script = "trap 'echo init' USR1; echo up; while :; do sleep 0.05; done";
    let task = Task::running("c068", &["/bin/sh", "-c", script])?;
    task.stdout.until("up", SHORT)?;
    let loops = "trap 'echo hit; exit 7' USR1; echo up; while :; do sleep 0.05; done";
    let (a, b) = (Exec::sh(&task, "a", loops)?, Exec::sh(&task, "b", loops)?);
    a.add()?;
    expect_code("Kill, registered", a.kill(10), Code::FAILED_PRECONDITION)?;
    a.start()?;
    b.begin()?;
    for exec in [&a, &b] {
        exec.stdout.until("up", SHORT)?;
    }
    if casemate_only().is_ok() {
        for signal in [65, 1000, u32::MAX] {
            expect_code("no signal", a.kill(signal), Code::INVALID_ARGUMENT)?;
        }
    }
    a.kill(10)?;
    ensure_eq!(a.wait()?, 7, "exit of the handler");
    expect_code("Kill, ended", a.kill(10), Code::NOT_FOUND)?;
    std::thread::sleep(Duration::from_millis(200));
    ensure_eq!(state(&b)?, RUNNING, "the other exec");
    let heard = String::from_utf8_lossy(&task.stdout.so_far()).into_owned();
    ensure!(!heard.contains("init"), "init got the signal: {heard}");
    a.delete()?;
    expect_code("Kill, deleted", a.kill(10), Code::NOT_FOUND)?;
    b.kill(9)?;
    ensure_eq!(b.wait()?, 137, "SIGKILL");
    Ok(task.finish()?)
}

fn c069_delete_of_an_exec() -> Outcome {
    let task = Task::sleeping("c069")?;
    let exec = Exec::new(&task, "e", &["/bin/probe", "sleep"])?;
    exec.add()?;
    // Registered and never started: nothing stands in the way.
    exec.delete()?;
    expect_code("State", exec.state(), Code::NOT_FOUND)?;
    exec.add()?;
    exec.start()?;
    expect_code("Delete, running", exec.delete(), Code::FAILED_PRECONDITION)?;
    ensure_eq!(state(&exec)?, RUNNING, "state after the refused Delete");
    exec.kill(9)?;
    exec.wait()?;
    ensure_eq!(exec.delete()?.exit_status, 137, "Delete, ended");
    expect_code("Delete, deleted", exec.delete(), Code::NOT_FOUND)?;
    Ok(task.finish()?)
}

fn c071_execs_end_before_init() -> Outcome {
    let task = Task::sleeping("c071")?;
    let execs: Vec<Exec> = (0..3)
        .map(|n| Exec::new(&task, &format!("e{n}"), &["/bin/probe", "sleep"]))
        .collect::<casemate_tests::Result<_>>()?;
    for exec in &execs {
        exec.begin()?;
    }
    task.rpc()?.kill(&task.id, 9, false)?;
    ensure_eq!(
        task.rpc()?.wait(&task.id, SHORT)?.exit_status,
        137,
        "exit of init"
    );
    let exits = || -> Result<Vec<TaskExit>, Stop> {
        let all = task.events.events();
        let exits = all.iter().filter(|e| e.topic == "/tasks/exit");
        Ok(exits
            .map(|e| e.decode())
            .collect::<casemate_tests::Result<_>>()?)
    };
    until("four exits", SHORT, || exits().is_ok_and(|e| e.len() == 4))?;
    let exits = exits()?;
    ensure_eq!(exits[3].id, task.id, "the last exit");
    let ids: BTreeSet<&str> = exits.iter().map(|e| e.id.as_str()).collect();
    ensure_eq!(ids.len(), 4, "ids in {exits:?}");
    for exec in &execs {
        ensure_eq!(exec.wait()?, 137, "exit of {}", exec.exec_id);
        exec.delete()?;
    }
    Ok(task.finish()?)
}

fn exec_hundred_at_once() -> Outcome {
    let task = Task::sleeping("hundred")?;
    let shim = task.shim_pid()?;
    let count = || fs::read_dir(format!("/proc/{shim}/fd")).map_or(0, |d| d.count());
    let (before, begun) = (count(), Instant::now());
    let mut threads = Vec::new();
    for n in 0..100 {
        let exec = Exec::sh(
            &task,
            &format!("e{n}"),
            &format!("echo {n}; exit {}", n % 7),
        )?;
        threads.push(std::thread::spawn(move || {
            exec.run().map_err(|e| format!("{n}: {e}"))
        }));
    }
    for (n, thread) in (0u32..).zip(threads) {
        match thread.join() {
            Ok(Ok(done)) => ensure_eq!(done, (n % 7, format!("{n}\n")), "exec {n}"),
            Ok(Err(why)) => return fail(why),
            Err(_) => return fail(format!("the thread of exec {n} panicked")),
        }
    }
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(30), "took {took:?}");
    ensure_eq!(task.rpc()?.pids(&task.id)?.processes.len(), 1, "processes");
    until("the shim's descriptors to go back", SHORT, || {
        count() <= before
    })?;
    let exits = || task.events.topics().iter().filter(|t| *t == "exit").count();
    until("a hundred exit events", SHORT, || exits() >= 100)?;
    ensure_eq!(exits(), 100, "exit events");
    Ok(task.finish()?)
}

fn exec_twice_started_at_once() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("twice")?;
    for n in 0..10 {
        // A logger makes the time in which two Starts can meet.
        let logger = task.side.join(format!("logger{n}"));
        let log = task.side.join(format!("log{n}"));
        let text = format!(
            "#!/bin/sh\necho started >>{}\nsleep 0.05\nexec 5>&-\nexec cat <&3\n",
            log.display()
        );
        fs::write(&logger, text)?;
        casemate_tests::world::set_mode(&logger, 0o755)?;
        let mut exec = Exec::sh(&task, &format!("e{n}"), "echo ran >> /tmp/ran")?;
        exec.stdio[1] = format!("binary://{}", logger.display());
        exec.stdio[2] = exec.stdio[1].clone();
        exec.add()?;
        let answers: Vec<bool> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| exec.start().is_ok()))
                .collect();
            all.into_iter().map(|t| t.join().unwrap_or(false)).collect()
        });
        let ok = answers.iter().filter(|ok| **ok).count();
        ensure_eq!(ok, 1, "Starts that succeeded: {answers:?}");
        ensure_eq!(exec.wait()?, 0, "exit status");
        exec.delete()?;
        ensure_eq!(fs::read_to_string(&log)?, "started\n", "loggers started");
    }
    let ran = fs::read_to_string(task.side.join("upper/tmp/ran"))?;
    ensure_eq!(ran.lines().count(), 10, "runs");
    Ok(task.finish()?)
}

fn exec_wait_ends_with_the_record() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("execwait")?;
    let exec = Exec::new(&task, "never", &["/bin/true"])?;
    exec.add()?;
    let (client, id) = (task.rpc()?.clone(), task.id.clone());
    let waiting = std::thread::spawn(move || client.wait_exec((&id, "never")));
    std::thread::sleep(Duration::from_millis(300));
    exec.delete()?;
    until("Wait of the deleted exec", Duration::from_secs(5), || {
        waiting.is_finished()
    })?;
    Ok(task.finish()?)
}

//! 91–92: logging binaries. The loggers are shell scripts of the host.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::world::set_mode;
use casemate_tests::{ensure, ensure_eq, procs};
use containerd_shim_protos::api::ResizePtyRequest;
use containerd_shim_protos::api::{CreateTaskResponse, Empty};
use rustix::process::Signal;
use serde_json::json;

use crate::common::{casemate_only, expect_code, expect_text};

crate::trials![
    c091_logging_binary,
    c091_logging_binary_that_will_not_end,
    c091_logging_binary_that_is_killed_with_the_shim,
    c091_logging_binary_of_a_shim_that_ends,
    c091_logging_binary_that_is_never_ready,
    c091_logging_binary_that_cannot_run,
    c091_logging_binary_of_a_terminal,
    c091_logging_binary_of_an_exec,
    c092_logging_binary_v2_that_says_nothing,
    c092_logging_binary_v2_that_speaks,
];

/// Ready by end of file, then copies both streams until they end.
const ORDINARY: &str = "exec 5>&-\ncat <&4 >err &\ncat <&3 >out\nwait\necho end >done";

/// Writes a logger, with its own directory as working directory.
fn logger(task: &Task, script: &str) -> Result<PathBuf, Stop> {
    let path = task.side.join("logger");
    let dir = task.side.display();
    fs::write(&path, format!("#!/bin/sh\ncd {dir}\n{script}\n"))?;
    set_mode(&path, 0o755)?;
    Ok(path)
}

/// A task that runs `sh -c workload`, its output going to a logger.
fn logged(name: &str, workload: &str, scheme: &str, script: &str) -> Result<Task, Stop> {
    let mut task = Task::new(name, &["/bin/sh", "-c", workload])?;
    let path = logger(&task, script)?;
    let uri = format!("{scheme}://{}", path.display());
    task.stdio = [String::new(), uri.clone(), uri];
    Ok(task)
}

/// What the logger wrote into one of its files.
fn wrote(task: &Task, file: &str) -> Result<String, Stop> {
    let path = task.side.join(file);
    let mut text = String::new();
    until(&path.display().to_string(), SHORT, || {
        text = fs::read_to_string(&path).unwrap_or_default();
        text.ends_with('\n')
    })?;
    Ok(text)
}

/// Pids of a process's children, zombies too.
fn children(shim: u32) -> Vec<u32> {
    let path = format!("/proc/{shim}/task/{shim}/children");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

fn gone(pid: &str) -> bool {
    !Path::new("/proc").join(pid.trim()).exists()
}

fn c091_logging_binary() -> Outcome {
    let facts = "echo \"$#|$1|$2|$3|$4\" >args\nenv >env\ngrep -E 'NoNewPrivs|Seccomp:' \
                 /proc/$$/status >locks\nprobe fds >fds\necho $$ >pid\n";
    let script = format!("{facts}{ORDINARY}");
    let mut task = logged("c091", "echo to-out; echo to-err >&2", "binary", &script)?;
    for field in &mut task.stdio[1..] {
        field.push_str("?a=b&c%20c=d%26");
    }
    task.boot()?;
    let before = children(task.shim_pid()?);
    task.create()?;
    ensure_eq!(task.start_and_wait()?.exit_status, 0, "exit status");
    task.rpc()?.delete(&task.id)?;

    // It has ended by itself: nothing of the output is missing.
    ensure_eq!(wrote(&task, "out")?, "to-out\n", "standard output");
    ensure_eq!(wrote(&task, "err")?, "to-err\n", "standard error");
    ensure!(gone(&wrote(&task, "pid")?), "the logger still runs");
    ensure_eq!(children(task.shim_pid()?), before, "children of the shim");

    let env = wrote(&task, "env")?;
    let names = |name: &str, value: &str| env.lines().any(|l| l == format!("{name}={value}"));
    ensure!(names("CONTAINER_ID", &task.id), "CONTAINER_ID in {env}");
    ensure!(
        names("CONTAINER_NAMESPACE", &task.shim.namespace),
        "CONTAINER_NAMESPACE in {env}"
    );
    let fds = wrote(&task, "fds")?;
    let fds: Vec<&str> = fds
        .lines()
        .map(|line| line.split(":[").next().unwrap_or_default())
        .collect();
    let own = format!("1 {}", task.side.join("fds").display());
    let want = [
        "0 /dev/null",
        &own,
        "2 /dev/null",
        "3 pipe",
        "4 pipe",
        "5 pipe",
    ];
    ensure_eq!(fds, want, "descriptors");
    if casemate_only().is_ok() {
        ensure_eq!(wrote(&task, "args")?, "4|a|b|c c|d&\n", "arguments");
        let locks = wrote(&task, "locks")?.replace('\t', " ");
        ensure_eq!(locks, "NoNewPrivs: 1\nSeccomp: 2\n", "the shim's locks");
    }
    Ok(task.finish()?)
}

/// Ignores everything that it could be told; so does its child.
const STUBBORN: &str = "exec 5>&-\ntrap 'echo term >term' TERM\n\
                        (trap '' TERM; sleep 1000) &\necho $! >child\necho $$ >pid\n\
                        while :; do sleep 0.1; done";

fn c091_logging_binary_that_will_not_end() -> Outcome {
    casemate_only()?;
    let mut task = logged("c091s", "exit 4", "binary", STUBBORN)?;
    task.boot()?;
    let before = children(task.shim_pid()?);
    task.create()?;
    ensure_eq!(task.start_and_wait()?.exit_status, 4, "exit status");
    let (client, id) = (task.rpc()?.clone(), task.id.clone());
    let begun = Instant::now();
    let deleting = std::thread::spawn(move || client.delete(&id));
    // Meanwhile the shim serves.
    while begun.elapsed() < Duration::from_secs(3) {
        let asked = Instant::now();
        task.rpc()?.shim(&task.id)?;
        ensure!(asked.elapsed() < Duration::from_secs(1), "Connect was slow");
        std::thread::sleep(Duration::from_millis(200));
    }
    match deleting.join() {
        Ok(deleted) => ensure_eq!(deleted?.exit_status, 4, "status of Delete"),
        Err(_) => return fail("the thread of Delete panicked"),
    }
    let took = begun.elapsed().as_secs();
    ensure!((12..=14).contains(&took), "Delete took {took} s");
    ensure_eq!(wrote(&task, "term")?, "term\n", "SIGTERM came");
    ensure!(gone(&wrote(&task, "pid")?), "the logger still runs");
    ensure!(gone(&wrote(&task, "child")?), "its child still runs");
    ensure_eq!(children(task.shim_pid()?), before, "children of the shim");
    Ok(task.finish()?)
}

fn c091_logging_binary_that_is_killed_with_the_shim() -> Outcome {
    casemate_only()?;
    let mut task = logged("c091k", "exec probe sleep", "binary", STUBBORN)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let (pid, child) = (wrote(&task, "pid")?, wrote(&task, "child")?);
    procs::signal(task.shim_pid()?, Signal::KILL);
    task.wait_gone(Duration::from_secs(2))?;
    let begun = Instant::now();
    ensure_eq!(task.shim.delete()?.exit_status, 137, "status of delete");
    ensure!(begun.elapsed() < Duration::from_secs(5), "delete was slow");
    let limit = Duration::from_secs(2);
    // Zombies are the affair of whoever adopted them.
    let ended = |pid: &str| {
        pid.trim()
            .parse()
            .is_ok_and(|pid| procs::identity(pid).is_none())
    };
    until("the logger to go", limit, || ended(&pid) && ended(&child))?;
    Ok(task.expect_clean(limit)?)
}

fn c091_logging_binary_of_a_shim_that_ends() -> Outcome {
    casemate_only()?;
    // The last lines come after the end of the container's own.
    let script = format!("echo $$ >pid\n{}", ORDINARY.replace("wait", "sleep 0.3"));
    let workload = "probe lines 50 1; exec probe sleep";
    let mut task = logged("c091e", workload, "binary", &script)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let out = task.side.join("out");
    until("the workload's lines", SHORT, || {
        fs::read_to_string(&out).is_ok_and(|text| text.contains("line 50\n"))
    })?;
    procs::signal(task.shim_pid()?, Signal::TERM);
    task.wait_gone(Duration::from_secs(5))?;
    ensure!(gone(&wrote(&task, "pid")?), "the logger still runs");
    ensure_eq!(wrote(&task, "done")?, "end\n", "the logger's own end");
    Ok(task.expect_clean(Duration::from_secs(2))?)
}

fn c091_logging_binary_that_is_never_ready() -> Outcome {
    casemate_only()?;
    let mut task = logged("c091n", "true", "binary", "echo $$ >pid\nsleep 1000")?;
    task.boot()?;
    let before = children(task.shim_pid()?);
    let (client, request) = (task.rpc()?.clone(), task.create_request());
    let begun = Instant::now();
    let creating = std::thread::spawn(move || {
        client.call::<CreateTaskResponse>("Create", &request, Duration::from_secs(30))
    });
    // Meanwhile the shim serves.
    while begun.elapsed() < Duration::from_secs(3) {
        let asked = Instant::now();
        // That of the container itself would wait for what becomes of it.
        expect_code(
            "State",
            task.rpc()?.state("another"),
            ttrpc::Code::NOT_FOUND,
        )?;
        let pids = task.rpc()?.pids(&task.id);
        expect_code("Pids", pids, ttrpc::Code::NOT_FOUND)?;
        ensure!(asked.elapsed() < Duration::from_secs(1), "it was slow");
        std::thread::sleep(Duration::from_millis(200));
    }
    let Ok(created) = creating.join() else {
        return fail("the thread of Create panicked");
    };
    expect_text("Create", created, "not ready within 10 s")?;
    let took = begun.elapsed().as_secs();
    ensure!((9..=12).contains(&took), "Create took {took} s");
    ensure!(gone(&wrote(&task, "pid")?), "the logger still runs");
    ensure_eq!(children(task.shim_pid()?), before, "children of the shim");
    Ok(task.finish()?)
}

fn c091_logging_binary_that_cannot_run() -> Outcome {
    let mut task = Task::new("c091x", &["/bin/true"])?;
    let plain = task.side.join("plain");
    fs::write(&plain, "not a program\n")?;
    task.boot()?;
    let before = children(task.shim_pid()?);
    for path in [
        "/nonexistent/logger".to_owned(),
        plain.display().to_string(),
    ] {
        for scheme in ["binary", "binary-v2"] {
            if scheme == "binary-v2" && casemate_only().is_err() {
                continue;
            }
            let uri = format!("{scheme}://{path}");
            task.stdio = [String::new(), uri.clone(), uri];
            expect_text("Create", task.create(), &path)?;
        }
    }
    if casemate_only().is_ok() {
        for (uri, why) in [
            ("binary://bin/logger", "absolute"),
            ("binary:///bin/logger?a=%0", "broken escape"),
        ] {
            task.stdio = [String::new(), uri.to_owned(), String::new()];
            let created = task.create();
            let text = created.err().map(|e| e.to_string()).unwrap_or_default();
            ensure!(text.contains(uri) && text.contains(why), "{uri}: {text:?}");
        }
        task.stdio = [String::new(), String::new(), "binary:///bin/cat".to_owned()];
        expect_text("Create", task.create(), "stdout's scheme is for both")?;
        ensure_eq!(children(task.shim_pid()?), before, "children of the shim");
    }
    // Nothing stands in the way of another attempt.
    task.stdio = Default::default();
    task.create()?;
    ensure_eq!(task.start_and_wait()?.exit_status, 0, "exit status");
    Ok(task.finish()?)
}

fn c091_logging_binary_of_a_terminal() -> Outcome {
    casemate_only()?;
    let workload = "test -t 1 && stty size && echo shown";
    let mut task = logged("c091t", workload, "binary", ORDINARY)?;
    task.spec["process"]["terminal"] = json!(true);
    task.stdio[2] = String::new();
    task.boot()?;
    let mut request = task.create_request();
    request.terminal = true;
    let _: CreateTaskResponse = task.rpc()?.call("Create", &request, SHORT)?;
    let resize = ResizePtyRequest {
        id: task.id.clone(),
        width: 99,
        height: 33,
        ..Default::default()
    };
    let _: Empty = task.rpc()?.call("ResizePty", &resize, SHORT)?;
    ensure_eq!(task.start_and_wait()?.exit_status, 0, "exit status");
    task.rpc()?.delete(&task.id)?;
    let shown = wrote(&task, "out")?;
    ensure_eq!(shown, "33 99\r\nshown\r\n", "what the terminal showed");
    ensure_eq!(wrote(&task, "done")?, "end\n", "the logger's own end");
    Ok(task.finish()?)
}

fn c091_logging_binary_of_an_exec() -> Outcome {
    let task = Task::sleeping("c091e")?;
    let path = logger(&task, &format!("echo $CONTAINER_ID >id\n{ORDINARY}"))?;
    let uri = format!("binary://{}", path.display());
    let before = children(task.shim_pid()?);
    let mut process = task.spec["process"].clone();
    process["args"] = json!(["/bin/sh", "-c", "echo from-exec; exit 5"]);
    let exec_id = "logged";
    let exec = (task.id.as_str(), exec_id);
    task.rpc()?.exec(exec, &process, &uri, &uri)?;
    task.rpc()?.start_exec(exec)?;
    let ended = task.rpc()?.wait_exec(exec)?;
    ensure_eq!(ended.exit_status, 5, "exit status");
    task.rpc()?.delete_exec(exec)?;
    ensure_eq!(wrote(&task, "out")?, "from-exec\n", "output");
    ensure_eq!(wrote(&task, "id")?.trim(), exec_id, "CONTAINER_ID");
    ensure_eq!(children(task.shim_pid()?), before, "children of the shim");
    Ok(task.finish()?)
}

fn c092_logging_binary_v2_that_says_nothing() -> Outcome {
    casemate_only()?;
    // One that ends, and one that lives on after it closed the descriptor.
    for (name, script) in [
        ("c092", "echo $$ >pid\nexit 0"),
        ("c092l", "echo $$ >pid\nexec 5>&-\nexec sleep 1000"),
    ] {
        let mut task = logged(name, "true", "binary-v2", script)?;
        task.boot()?;
        let before = children(task.shim_pid()?);
        expect_text("Create", task.create(), "without a word")?;
        ensure!(gone(&wrote(&task, "pid")?), "the logger still runs");
        ensure_eq!(children(task.shim_pid()?), before, "children of the shim");
        expect_code("State", task.rpc()?.state(&task.id), ttrpc::Code::NOT_FOUND)?;

        // The same logger as v1 is ready with that end of file.
        for field in &mut task.stdio[1..] {
            *field = field.replace("binary-v2", "binary");
        }
        task.create()?;
        task.finish()?;
    }
    Ok(())
}

fn c092_logging_binary_v2_that_speaks() -> Outcome {
    casemate_only()?;
    // The byte is enough: the descriptor stays open.
    let script = "sleep 0.5; echo >&5\ncat <&4 >err &\ncat <&3 >out\nwait";
    let mut task = logged("c092s", "probe lines 50 1; exit 3", "binary-v2", script)?;
    task.boot()?;
    let begun = Instant::now();
    task.create()?;
    ensure!(
        begun.elapsed() >= Duration::from_millis(500),
        "Create answered before the logger was ready"
    );
    ensure_eq!(task.start_and_wait()?.exit_status, 3, "exit status");
    task.rpc()?.delete(&task.id)?;
    let want: Vec<String> = (1..=50).map(|n| format!("line {n}")).collect();
    ensure_eq!(
        wrote(&task, "out")?.lines().collect::<Vec<_>>(),
        want,
        "lines"
    );
    Ok(task.finish()?)
}

//! 85, 110, 111: two containers of one pod, and a shim that is found again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::run::until;
use casemate_tests::shim::{Client, SHORT};
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, procs, spec};
use containerd_shim_protos::api::CreateTaskResponse;
use containerd_shim_protos::events::task::TaskOOM;
use rustix::process::Signal;
use serde_json::json;

use crate::common::{LONG, RUNNING, casemate_only, status};

crate::trials![
    c085_oom_of_one_is_not_told_of_the_other,
    c110_address_file_leads_back_to_the_shim,
    c111_another_build_beside_a_running_shim,
    c111_journal_of_another_release,
];

const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// A second container in the pod of `first`, running; its events go to the
/// first's receiver.
fn second(first: &Task, name: &str, args: &[&str], memory: u64) -> Result<Task, Stop> {
    let mut task = Task::new(name, args)?;
    spec::annotate(&mut task.spec, SANDBOX, &first.id);
    if memory > 0 {
        task.spec["linux"]["resources"]["memory"] = json!({"limit": memory, "swap": memory});
    }
    task.write_spec()?;
    let answer = task.shim.start()?;
    ensure_eq!(answer.address, first.answer()?.address, "address");
    let rpc = first.rpc()?;
    rpc.call::<CreateTaskResponse>("Create", &task.create_request(), SHORT)?;
    rpc.start(&task.id)?;
    Ok(task)
}

fn c085_oom_of_one_is_not_told_of_the_other() -> Outcome {
    let first = Task::sleeping("c085")?;
    let limit = 32 << 20;
    let hog = [
        "/bin/dd",
        "if=/dev/zero",
        "of=/dev/null",
        "bs=200M",
        "count=1",
    ];
    let calm = second(&first, "c085calm", &["/bin/probe", "sleep"], limit)?;
    let victim = second(&first, "c085hog", &hog, limit)?;
    let rpc = first.rpc()?;
    ensure_eq!(rpc.wait(&victim.id, LONG)?.exit_status, 137, "the hog");
    first.events.wait_for("exit", SHORT)?;
    std::thread::sleep(Duration::from_millis(500));
    let ooms: Vec<TaskOOM> = first
        .events
        .events()
        .iter()
        .filter(|e| e.topic == "/tasks/oom")
        .map(|e| e.decode())
        .collect::<casemate_tests::Result<_>>()?;
    let ids: Vec<&str> = ooms.iter().map(|oom| oom.container_id.as_str()).collect();
    ensure_eq!(ids, [victim.id.as_str()], "containers with an OOM event");
    for task in [&victim, &calm] {
        let _ = rpc.kill(&task.id, 9, false);
        rpc.wait(&task.id, SHORT)?;
        rpc.delete(&task.id)?;
    }
    ensure_eq!(status(&first)?, RUNNING, "the first");
    Ok(first.finish()?)
}

fn c110_address_file_leads_back_to_the_shim() -> Outcome {
    let mut task = Task::new("c110", &["/bin/sh", "-c", "probe lines 1000 20; exit 3"])?;
    // As containerd 1.7 writes it.
    task.spec["ociVersion"] = json!("1.1.0");
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    task.stdout.until("line 3\n", SHORT)?;
    let pid = task.rpc()?.state(&task.id)?.pid;
    // What 1.7 reads after a restart, and nothing else.
    let address = fs::read_to_string(task.bundle().join("address"))?;
    let begun = Instant::now();
    let found = Client::connect(&address, 2)?;
    let connected = found.shim(&task.id)?;
    ensure_eq!(
        (connected.shim_pid, connected.task_pid),
        (task.shim_pid()?, pid),
        "Connect"
    );
    ensure!(begun.elapsed() < Duration::from_secs(5), "Connect was slow");
    ensure!(!found.pids(&task.id)?.processes.is_empty(), "no pids");
    task.stdout.until("line 20\n", SHORT)?;
    found.kill(&task.id, 9, true)?;
    ensure_eq!(found.wait(&task.id, SHORT)?.exit_status, 137, "Wait");
    Ok(task.finish()?)
}

/// The program of the shim, and what stands beside it, somewhere else.
fn another_build(task: &Task) -> Result<PathBuf, Stop> {
    let dir = task.side.join("other");
    fs::create_dir_all(&dir)?;
    let from = task.shim.program.parent().unwrap_or(Path::new("/"));
    for name in ["containerd-shim-casemate-v2", "casemate-agent"] {
        fs::copy(from.join(name), dir.join(name))?;
    }
    Ok(dir.join("containerd-shim-casemate-v2"))
}

fn c111_another_build_beside_a_running_shim() -> Outcome {
    casemate_only()?;
    let first = Task::sleeping("c111")?;
    let new = another_build(&first)?;
    let mut app = Task::new("c111app", &["/bin/probe", "sleep"])?;
    spec::annotate(&mut app.spec, SANDBOX, &first.id);
    app.shim.program.clone_from(&new);
    app.write_spec()?;
    let answer = app.shim.start()?;
    ensure_eq!(answer.address, first.answer()?.address, "address");
    let rpc = first.rpc()?;
    rpc.call::<CreateTaskResponse>("Create", &app.create_request(), SHORT)?;
    rpc.start(&app.id)?;
    // `delete` of the other build: the running one and its pod stay.
    rpc.kill(&app.id, 9, false)?;
    rpc.wait(&app.id, SHORT)?;
    rpc.delete(&app.id)?;
    ensure_eq!(app.shim.run("delete")?.code(), 0, "delete of the app");
    ensure_eq!(status(&first)?, RUNNING, "the first");
    // And with the shim dead, it cleans what the old one made.
    let pid = rpc.state(&first.id)?.pid;
    procs::signal(first.shim_pid()?, Signal::KILL);
    first.wait_gone(Duration::from_secs(2))?;
    let mut delete = first.shim.clone();
    delete.program = new;
    let reply = delete.delete()?;
    ensure_eq!((reply.pid, reply.exit_status), (pid, 137), "reply");
    Ok(first.expect_clean(Duration::from_secs(2))?)
}

/// The journal's form at release 0.1, as it is on disk. Each line is one that
/// every later release must understand: names stay, fields are only added.
const JOURNAL_0_1: &str = r#"{"shim":{"pid":SHIM,"start_time":1}}
{"socket":"SOCKET"}
{"cgroup":{"container":"","dirs":[AGENT_DIRS]}}
{"agent":{"pid":AGENT,"start_time":AGENT_START}}
{"container":{"id":"ID","bundle":"BUNDLE"}}
{"cgroup":{"container":"ID","dirs":[DIRS]}}
{"init":{"container":"ID","pid":4711}}
"#;

/// What a release to come may write in between.
const JOURNAL_LATER: &str = r#"{"weather":{"sun":true}}
{"shim":{"pid":SHIM,"start_time":1,"colour":"red","more":{"a":[1,2]}}}
["no","object"]
not even json
{"exit":{"container":"ID","status":9,"at":5,"pid":4711,"signal":"later"}}
{"init":{"cont"#;

fn c111_journal_of_another_release() -> Outcome {
    casemate_only()?;
    for (text, status) in [
        (JOURNAL_0_1.to_owned(), 137),
        (format!("{JOURNAL_0_1}{JOURNAL_LATER}"), 9),
    ] {
        let task = Task::sleeping("c111j")?;
        let agent = procs::family(task.shim_pid()?)
            .into_iter()
            .find(|p| procs::command_line(p.pid).starts_with("casemate-agent"))
            .ok_or_else(|| Stop::Fail("no agent".to_owned()))?;
        let dirs = casemate_tests::leaks::cgroups_with(&task.id);
        let list = |own: bool| {
            let wanted = |dir: &&String| {
                Path::new(dir)
                    .file_name()
                    .is_some_and(|n| (*n == *task.id) == own)
            };
            let shown: Vec<String> = dirs
                .iter()
                .filter(wanted)
                .map(|d| format!("{d:?}"))
                .collect();
            shown.join(",")
        };
        ensure!(
            !list(true).is_empty() && !list(false).is_empty(),
            "no cgroups"
        );
        let start = fs::read_to_string(format!("/proc/{}/stat", agent.pid))?;
        let start = start
            .rsplit(')')
            .next()
            .and_then(|t| t.split_whitespace().nth(19));
        let journal = text
            .replace("AGENT_START", start.unwrap_or("0"))
            .replace("AGENT_DIRS", &list(false))
            .replace("DIRS", &list(true))
            .replace("AGENT", &agent.pid.to_string())
            .replace("SHIM", &task.shim_pid()?.to_string())
            .replace("SOCKET", &task.answer()?.socket().display().to_string())
            .replace("BUNDLE", &task.bundle().display().to_string())
            .replace("ID", &task.id);
        procs::signal(task.shim_pid()?, Signal::KILL);
        task.wait_gone(Duration::from_secs(2))?;
        // What this release wrote is gone; the other's is all there is.
        fs::write(task.bundle().join("casemate.journal"), journal)?;
        let reply = task.shim.delete()?;
        ensure_eq!((reply.pid, reply.exit_status), (4711, status), "reply");
        until("the agent to go", SHORT, || !procs::alive(agent))?;
        task.expect_clean(Duration::from_secs(2))?;
    }
    Ok(())
}

//! What an operator sees of living pods, and of those that never came to live.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::operator::{ask, casemate, command, lines, records};
use casemate_tests::pod::{init, insiders};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{Failure, ensure, ensure_eq, procs};
use rustix::process::Signal;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::common::{LONG, casemate_only, expect_code};

crate::trials![
    operator_ps_tells_what_is,
    operator_registry_goes_with_the_pod,
    operator_registry_goes_with_delete,
    operator_events_of_a_refused_pod,
    operator_events_of_memory_and_agent,
    operator_events_follow,
    operator_events_follow_who_was_away,
    operator_events_waiters_are_bounded,
    operator_commands_say_what_is_wrong,
];

/// The registry's entries of a task.
fn entries(task: &Task) -> Vec<PathBuf> {
    let Ok(found) = fs::read_dir("/run/casemate/pods") else {
        return Vec::new();
    };
    let is_of = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(&format!("{}.", task.id))
    };
    found.flatten().map(|e| e.path()).filter(is_of).collect()
}

fn mode(path: &Path) -> Result<u32, Stop> {
    Ok(fs::metadata(path)?.permissions().mode() & 0o777)
}

/// What `casemate ps --json` says of a task.
fn listed(task: &Task) -> Result<Option<Value>, Stop> {
    let all = lines(&["ps", "--json"])?;
    let pods = all.first().and_then(Value::as_array).cloned();
    let pods = pods.unwrap_or_default();
    Ok(pods.into_iter().find(|pod| pod["pod"] == task.id))
}

fn operator_ps_tells_what_is() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("ps")?;
    let Some(pod) = listed(&task)? else {
        return fail("ps --json does not have the pod");
    };
    let (agent, forker) = insiders(&task)?;
    ensure_eq!(pod["shim"]["pid"], task.shim_pid()?, "pid of the shim");
    ensure_eq!(pod["sandbox"]["agent"]["pid"], agent, "pid of the agent");
    let container = &pod["containers"][0];
    ensure_eq!(container["id"], task.id.as_str(), "id of the container");
    ensure_eq!(container["pid"], init(&task)?, "pid of init");
    ensure_eq!(container["sandbox"]["forker"], forker, "pid of the forker");
    ensure_eq!(container["state"], "running", "state");
    let used = container["sandbox"]["usage"]["memory"].as_u64();
    ensure!(used.is_some_and(|n| n > 0), "memory: {container}");
    // Who the container's root is on the host, as the kernel has it.
    let uid = procs::status_field(init(&task)?, "Uid").unwrap_or_default();
    let root = pod["sandbox"]["ids"]["root"].to_string();
    ensure_eq!(uid.split_whitespace().next(), Some(&*root), "host id");
    ensure!(
        !pod.to_string().contains("PATH="),
        "environment of the workload: {pod}"
    );

    let table = casemate(&["ps"])?.ok()?.out();
    let row = table.lines().find(|line| line.contains(&task.id));
    ensure!(
        row.is_some_and(|row| row.contains("running") && row.contains(&root)),
        "no row of the pod in {table}"
    );
    let wide = casemate(&["ps", "-o", "wide"])?.ok()?.out();
    let row = wide.lines().find(|line| line.contains(&task.id));
    let shim = task.shim_pid()?.to_string();
    ensure!(
        wide.lines()
            .next()
            .is_some_and(|head| head.ends_with("RELEASE"))
            && row.is_some_and(|row| row.contains(" default ") && row.contains(&shim)),
        "no wide row of the pod in {wide}"
    );
    let [entry] = &entries(&task)[..] else {
        return fail(format!("entries: {:?}", entries(&task)));
    };
    ensure_eq!(mode(entry)?, 0o600, "mode of {}", entry.display());
    ensure_eq!(mode(Path::new("/run/casemate/pods"))?, 0o700, "mode");
    Ok(task.finish()?)
}

fn operator_registry_goes_with_the_pod() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("registry")?;
    ensure_eq!(entries(&task).len(), 1, "entries of a living pod");
    let rpc = task.rpc()?;
    rpc.kill(&task.id, 9, true)?;
    rpc.wait(&task.id, SHORT)?;
    rpc.delete(&task.id)?;
    rpc.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(5))?;
    ensure_eq!(entries(&task), Vec::<PathBuf>::new(), "entries");
    Ok(())
}

fn operator_registry_goes_with_delete() -> Outcome {
    casemate_only()?;
    for journal_is_there in [true, false] {
        let task = Task::sleeping("registrydead")?;
        let pid = task.shim_pid()?;
        procs::signal(pid, Signal::KILL);
        task.wait_gone(SHORT)?;
        ensure_eq!(entries(&task).len(), 1, "entries that the dead shim left");
        ensure!(listed(&task)?.is_none(), "ps lists a pod of a dead shim");
        let answer = casemate(&["events", &task.id])?;
        ensure!(answer.code() != 0, "events of a dead pod: {}", answer.out());
        let journal = task.bundle().join("casemate.journal");
        let away = task.side.join("journal");
        if !journal_is_there {
            fs::rename(&journal, &away)?;
            task.shim.delete()?;
            ensure_eq!(entries(&task), Vec::<PathBuf>::new(), "entries");
            fs::rename(&away, &journal)?;
        }
        for _ in 0..2 {
            task.shim.delete()?;
            ensure_eq!(entries(&task), Vec::<PathBuf>::new(), "entries");
        }
    }
    Ok(())
}

fn operator_events_of_a_refused_pod() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("refused", &["/bin/true"])?;
    if let Some(list) = task.spec["linux"]["namespaces"].as_array_mut() {
        list.retain(|namespace| namespace["type"] != "pid");
    }
    task.boot()?;
    expect_code("Create", task.create(), Code::INVALID_ARGUMENT)?;
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(5))?;
    // No shim is left that could tell.
    let told = lines(&["events", &task.id])?;
    let [refusal] = &told[..] else {
        return fail(format!("events: {told:?}"));
    };
    ensure_eq!(refusal["kind"], "policy_refusal", "kind");
    ensure_eq!(refusal["rule"], "host-pid", "rule");
    ensure_eq!(refusal["container"], task.id.as_str(), "container");
    let text = refusal["text"].as_str().unwrap_or_default();
    ensure!(text.contains("hostPID"), "no way out in {text:?}");
    for file in ["refused", "refused/log.jsonl"] {
        let path = Path::new("/run/casemate").join(file);
        ensure_eq!(mode(&path)? & 0o077, 0, "mode of {}", path.display());
    }
    Ok(())
}

fn operator_events_of_memory_and_agent() -> Outcome {
    casemate_only()?;
    let script = "dd if=/dev/zero of=/dev/null bs=200M count=1; exec sleep 1000";
    let mut task = Task::new("oomevent", &["/bin/sh", "-c", script])?;
    task.spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    until("a record of the kill", LONG, || {
        records(&task, "oom").is_ok_and(|found| !found.is_empty())
    })?;
    procs::signal(insiders(&task)?.0, Signal::KILL);
    task.rpc()?.wait(&task.id, SHORT)?;
    until("a record of the agent's end", SHORT, || {
        records(&task, "agent_loss").is_ok_and(|found| !found.is_empty())
    })?;
    let told = lines(&["events", &task.id])?;
    let kinds: Vec<&str> = told.iter().filter_map(|e| e["kind"].as_str()).collect();
    ensure_eq!(kinds, ["oom", "agent_loss"], "events");
    ensure_eq!(told[1]["containers"], json!([task.id]), "containers");
    let numbers: Vec<_> = told.iter().map(|e| e["seq"].as_u64()).collect();
    ensure_eq!(numbers, [Some(1), Some(2)], "numbers");
    Ok(task.finish()?)
}

fn operator_events_follow() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("follow")?;
    let mut child = command(&["events", "--follow", &task.id])?
        .stdout(Stdio::piped())
        .spawn()?;
    let Some(stdout) = child.stdout.take() else {
        return fail("no pipe");
    };
    // While it waits, the pod is as it was for everybody else.
    std::thread::sleep(Duration::from_millis(700));
    task.rpc()?.state(&task.id)?;
    procs::signal(insiders(&task)?.0, Signal::KILL);
    let lines = lines_of(stdout);
    let line = lines.recv_timeout(SHORT);
    let _gone = child.kill();
    child.wait()?;
    let line = line.map_err(|error| Stop::Fail(format!("nothing was told: {error}")))?;
    let event: Value = serde_json::from_str(&line).unwrap_or_default();
    ensure_eq!(event["kind"], "agent_loss", "kind in {line}");
    ensure_eq!(event["pod"], task.id.as_str(), "pod in {line}");
    Ok(task.finish()?)
}

/// The lines of a stream, as they come.
fn lines_of(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let _gone = sender.send(line);
        }
    });
    lines
}

/// A shim that couldn't be asked when its pod was first seen is asked again.
fn operator_events_follow_who_was_away() -> Outcome {
    casemate_only()?;
    let (task, other) = (Task::sleeping("away")?, Task::sleeping("there")?);
    let socket = task.answer()?.socket();
    let aside = socket.with_extension("aside");
    fs::rename(&socket, &aside)?;
    let mut child = command(&["events", "--follow"])?
        .stdout(Stdio::piped())
        .spawn()?;
    let Some(stdout) = child.stdout.take() else {
        return fail("no pipe");
    };
    let lines = lines_of(stdout);
    let told = |task: &Task| -> Outcome {
        procs::signal(insiders(task)?.0, Signal::KILL);
        loop {
            let line = lines.recv_timeout(SHORT);
            let line = line.map_err(|e| Stop::Fail(format!("of {}: {e}", task.id)))?;
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if event["pod"] == task.id.as_str() && event["kind"] == "agent_loss" {
                return Ok(());
            }
        }
    };
    // By now all pods have been seen.
    let first = told(&other);
    fs::rename(&aside, &socket)?;
    let second = first.and_then(|()| told(&task));
    let _gone = child.kill();
    child.wait()?;
    second?;
    other.finish()?;
    Ok(task.finish()?)
}

fn is_full(error: &Failure) -> bool {
    error.code() == Some(Code::RESOURCE_EXHAUSTED)
}

fn operator_events_waiters_are_bounded() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("waiters")?;
    let wait = json!({ "wait_ms": 4000 });
    let waiters: Vec<_> = (0..8)
        .map(|_| {
            let (client, wait) = (task.rpc().cloned(), wait.clone());
            std::thread::spawn(move || {
                let client = client?;
                // Whoever follows the events of all pods has a place now and then.
                let until = Instant::now() + Duration::from_secs(4);
                loop {
                    let told = ask(&client, "Records", &wait, SHORT).map(drop);
                    let full = told.as_ref().is_err_and(is_full);
                    if !full || Instant::now() > until {
                        return told;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            })
        })
        .collect();
    // A try takes a place for a moment, which a waiter would then lack.
    std::thread::sleep(Duration::from_millis(500));
    let ninth = || ask(task.rpc()?, "Records", &json!({ "wait_ms": 1 }), SHORT);
    until("the places to be taken", Duration::from_secs(3), || {
        ninth().as_ref().is_err_and(is_full)
    })?;
    // Who doesn't wait needs no place, and containerd's calls go on.
    ask(task.rpc()?, "Records", &json!({}), SHORT)?;
    task.rpc()?.state(&task.id)?;
    for waiter in waiters {
        waiter
            .join()
            .map_err(|_| Stop::Fail("a waiter panics".to_owned()))??;
    }
    let huge = json!({ "since": 1, "x": "y".repeat(5000) });
    let refused = ask(task.rpc()?, "Records", &huge, SHORT);
    expect_code("Records", refused, Code::INVALID_ARGUMENT)?;
    Ok(task.finish()?)
}

fn operator_commands_say_what_is_wrong() -> Outcome {
    casemate_only()?;
    let answer = casemate(&["events", "no-such-pod"])?;
    ensure_eq!(answer.code(), 125, "exit code");
    ensure!(
        answer.err().contains("no living pod has this id") && answer.err().lines().count() == 1,
        "{:?}",
        answer.err()
    );
    for name in ["ps", "events"] {
        let help = casemate(&[name, "--help"])?.ok()?.out();
        ensure!(help.contains("Examples:"), "help of {name}: {help}");
    }
    Ok(())
}

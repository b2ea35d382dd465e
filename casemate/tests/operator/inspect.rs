//! `casemate inspect`: what it tells of living pods is what the kernel has.

use std::fs;
use std::path::Path;

use casemate_tests::bundle::Task;
use casemate_tests::operator::{casemate, lines};
use casemate_tests::pod::{self, Pids, Pod, init, insiders};
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, procs};
use serde_json::{Value, json};

use crate::common::{configure, ready};

crate::trials![
    inspect_tells_what_is,
    inspect_tells_where_it_is_from,
    inspect_a_pod_of_several,
    inspect_tells_no_secrets,
];

/// What `casemate inspect --json` says of a task's pod.
fn inspected(task: &Task) -> Result<Value, Stop> {
    let mut all = lines(&["inspect", "--json", &task.id])?;
    match all.len() {
        1 => Ok(all.remove(0)),
        n => fail(format!("{n} lines")),
    }
}

fn inspect_tells_what_is() -> Outcome {
    ready()?;
    let mut task = Task::new("inspect", &["/bin/probe", "sleep"])?;
    task.spec["linux"]["resources"]["pids"] = json!({ "limit": 55 });
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let (exec, _out) = pod::exec(&task, "more", &["/bin/probe", "sleep"])?;
    let pod = inspected(&task)?;
    let (agent, forker) = insiders(&task)?;
    ensure_eq!(pod["pod"], json!(task.id), "pod");
    ensure_eq!(pod["shim"]["pid"], json!(task.shim_pid()?), "shim");
    let program = fs::read_link(format!("/proc/{}/exe", task.shim_pid()?))?;
    ensure_eq!(pod["shim"]["program"], json!(program), "program");
    ensure_eq!(pod["sandbox"]["agent"]["pid"], json!(agent), "agent");
    let [container] = &pod["containers"].as_array().cloned().unwrap_or_default()[..] else {
        return fail(format!("containers: {pod}"));
    };
    ensure_eq!(container["pid"], json!(init(&task)?), "init");
    ensure_eq!(container["sandbox"]["forker"], json!(forker), "forker");
    ensure_eq!(container["execs"][0]["id"], json!("more"), "exec");
    ensure_eq!(container["execs"][0]["pid"], json!(exec), "pid of exec");
    // Its cgroups are those that the kernel has it in, with that limit.
    let limits = container["limits"].as_object().cloned().unwrap_or_default();
    let Some((file, limit)) = limits.iter().find(|(file, _)| file.ends_with("pids.max")) else {
        return fail(format!("no pids.max: {limits:?}"));
    };
    ensure_eq!(*limit, json!("55"), "pids.max");
    ensure_eq!(fs::read_to_string(file)?.trim(), "55", "{file}");
    let procs = Path::new(file).with_file_name("cgroup.procs");
    let procs = fs::read_to_string(procs)?;
    let own = init(&task)?.to_string();
    ensure!(procs.lines().any(|pid| pid == own), "{own} in {procs:?}");
    // Its filters are the ones that are installed, the agent's in front.
    let installed = installed_filters(init(&task)?)?;
    let told = container["filters"].as_array().cloned().unwrap_or_default();
    ensure_eq!(told.len(), 2, "filters");
    ensure_eq!(
        told,
        installed
            .iter()
            .take(2)
            .map(|h| json!(h))
            .collect::<Vec<_>>(),
        "filters"
    );
    ensure!(
        container["mounts"].as_array().is_some_and(|m| m.len() > 3),
        "mounts: {container}"
    );

    let text = casemate(&["inspect", &task.id])?.ok()?.out();
    for part in [
        &*format!("pod {}", task.id),
        &format!("container {}", task.id),
        "exec more",
        "(from config profile)",
        "network guard",
        "pids.max",
    ] {
        ensure!(text.contains(part), "{part:?} is not in {text}");
    }
    Ok(task.finish()?)
}

/// Hashes of the filters of a process.
fn installed_filters(pid: u32) -> Result<Vec<String>, Stop> {
    let all = casemate_sys::seccomp::filters_of(pid)?;
    Ok(all.iter().map(|f| casemate_posture::hash(f)).collect())
}

fn inspect_tells_where_it_is_from() -> Outcome {
    ready()?;
    let mut task = Task::new("from", &["/bin/probe", "sleep"])?;
    task.spec["annotations"]["casemate.io/profile"] = json!("strict");
    task.spec["process"]["noNewPrivileges"] = json!(false);
    configure(&mut task, "[exec]\npolicy = \"record\"\n")?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let pod = inspected(&task)?;
    let policy = &pod["containers"][0]["policy"];
    for (name, value, from) in [
        ("profile", json!("strict"), "annotation casemate.io/profile"),
        ("exec", json!("record"), "config exec.policy"),
        ("no_new_privs", json!(true), "profile strict"),
        ("own_filter", json!(false), "specification linux.seccomp"),
    ] {
        ensure_eq!(policy[name]["value"], value, "{name}");
        ensure_eq!(policy[name]["from"], json!(from), "{name}");
    }
    // What is told is what the kernel has.
    ensure_eq!(
        procs::status_field(init(&task)?, "NoNewPrivs").as_deref(),
        Some("1"),
        "no_new_privs"
    );
    let decisions = pod["containers"][0]["decisions"].as_array().cloned();
    let decisions = decisions.unwrap_or_default();
    let of = |d: &&Value| d["field"] == "process.noNewPrivileges";
    let decision = decisions.iter().find(of);
    ensure_eq!(
        decision.map(|d| d["how"].clone()),
        Some(json!("stricter")),
        "decision in {decisions:?}"
    );
    Ok(task.finish()?)
}

fn inspect_a_pod_of_several() -> Outcome {
    ready()?;
    let pod = Pod::start("inspectpod")?;
    let one = pod.run("one", &["/bin/probe", "sleep"], Pids::Own)?;
    let two = pod.run("two", &["/bin/probe", "sleep"], Pids::Pod)?;
    let told = inspected(&pod.pause)?;
    let containers = told["containers"].as_array().cloned().unwrap_or_default();
    let find = |task: &Task| containers.iter().find(|c| c["id"] == task.id).cloned();
    for task in [&one, &two] {
        let Some(container) = find(task) else {
            return fail(format!("{} is not in {told}", task.id));
        };
        ensure!(container["policy"].is_object(), "policy of {container}");
    }
    let pids = |task: &Task| find(task).map(|c| c["namespaces"]["pid"].clone());
    ensure_eq!(pids(&one), Some(json!("own")), "pid namespace");
    ensure!(pids(&two) != Some(json!("own")), "pid namespace of {told}");
    pod.remove(one)?;
    pod.remove(two)?;
    Ok(pod.finish()?)
}

fn inspect_tells_no_secrets() -> Outcome {
    ready()?;
    let mut task = Task::new("secretive", &["/bin/sh", "-c", "sleep 1000; : canaryargv"])?;
    if let Some(env) = task.spec["process"]["env"].as_array_mut() {
        env.push(json!("TOKEN=canaryenv"));
    }
    task.spec["annotations"]["example.com/x"] = json!("canaryannotation");
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    pod::exec(&task, "e", &["/bin/sh", "-c", "sleep 1000; : canaryexec"])?;
    let said = inspected(&task)?.to_string();
    ensure!(!said.contains("canary"), "{said}");
    let text = casemate(&["inspect", &task.id])?.ok()?.out();
    ensure!(!text.contains("canary"), "{text}");
    Ok(task.finish()?)
}

//! OCI hooks: where they run, what they are told, and what becomes of the
//! container when they fail. Without leave of the node's configuration none of
//! the node's programs run.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::spec::annotate;
use casemate_tests::world::{probe, set_mode};
use casemate_tests::{ensure, ensure_eq, procs};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::{STOPPED, casemate_only, expect_text, status};
use crate::hostile::{expect, one_line};
use crate::hostile_node::configure;

crate::trials![
    c138_hooks_run_where_and_when_they_should,
    c138_hooks_are_refused_unless_allowed,
    c138_hook_that_fails_ends_the_container,
    c138_hook_that_hangs_is_killed_and_holds_up_nobody,
    c138_start_hook_that_fails_ends_the_start,
    c138_late_hooks_only_warn,
    c138_hook_inside_must_be_static,
    c138_hook_that_others_can_change_is_not_run,
    c138_poststop_runs_when_the_shim_was_killed,
    c138_poststop_runs_for_each_class,
];

/// A task whose shim may run what is in `<side>/hooks`, with the probe there.
fn task(name: &str, args: &[&str]) -> Result<Task, Stop> {
    let mut task = Task::new(name, args)?;
    let dir = task.side.join("hooks");
    fs::create_dir_all(&dir)?;
    set_mode(&dir, 0o755)?;
    fs::copy(probe()?, dir.join("probe"))?;
    set_mode(&dir.join("probe"), 0o755)?;
    configure(
        &mut task,
        &format!("[hooks]\nallow = [\"{}/\"]\ntimeout = 20\n", dir.display()),
    )?;
    Ok(task)
}

/// A hook that runs the probe of the node and writes to `file` of the task.
fn record(task: &Task, file: &str, then: &[&str]) -> Value {
    let mut args = vec![
        "probe".to_owned(),
        "hook".to_owned(),
        notes(task, file).display().to_string(),
    ];
    args.extend(then.iter().map(|word| (*word).to_owned()));
    json!({"path": task.side.join("hooks/probe"), "args": args})
}

fn notes(task: &Task, file: &str) -> PathBuf {
    task.side.join(file)
}

/// The lines that hooks wrote to a file of the host.
fn written(path: &std::path::Path) -> Result<Vec<Value>, Stop> {
    lines(&fs::read_to_string(path)?)
}

fn lines(text: &str) -> Result<Vec<Value>, Stop> {
    let each = text.lines().map(serde_json::from_str);
    each.collect::<Result<_, _>>()
        .map_err(|e| Stop::Fail(format!("{e}: {text}")))
}

fn namespace(pid: &str, kind: &str) -> Result<String, Stop> {
    let link = fs::read_link(format!("/proc/{pid}/ns/{kind}"))?;
    Ok(link.display().to_string())
}

fn field(status: &Value, name: &str) -> String {
    procs::field(status.as_str().unwrap_or_default(), name).unwrap_or_default()
}

fn c138_hooks_run_where_and_when_they_should() -> Outcome {
    casemate_only()?;
    let mut task = task("hooks", &["/bin/probe", "sleep"])?;
    let mut create_runtime = record(&task, "host", &[]);
    create_runtime["env"] = json!(["A=b c", "D="]);
    create_runtime["timeout"] = json!(9);
    task.spec["hooks"] = json!({
        "prestart": [record(&task, "host", &[])],
        "createRuntime": [create_runtime],
        "createContainer": [
            {"path": task.side.join("hooks/probe"), "args": ["x", "hook", "inside"], "env": ["E=f"]},
            {"path": task.side.join("hooks/probe"), "args": ["x", "hook", "inside"]},
        ],
        "startContainer": [
            {"path": "/bin/probe", "args": ["y", "hook", "/tmp/start"], "env": ["G=h"]},
        ],
        "poststart": [record(&task, "host", &[])],
        "poststop": [record(&task, "host", &[])],
    });
    task.spec["annotations"] = json!({"org.example": "value"});
    task.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    task.boot()?;
    task.create()?;
    let upper = task.side.join("upper");
    ensure_eq!(
        written(&notes(&task, "host"))?.len(),
        2,
        "hooks before Start"
    );
    ensure!(
        !upper.join("tmp/start").exists(),
        "startContainer ran before Start"
    );
    task.rpc()?.start(&task.id)?;
    let pid = task.rpc()?.state(&task.id)?.pid;
    let init: Vec<(&str, String)> = ["mnt", "pid", "net", "ipc", "uts", "user", "cgroup"]
        .into_iter()
        .map(|kind| Ok((kind, namespace(&pid.to_string(), kind)?)))
        .collect::<Result<_, Stop>>()?;
    task.rpc()?.kill(&task.id, 9, true)?;
    task.rpc()?.wait(&task.id, SHORT)?;
    ensure_eq!(
        written(&notes(&task, "host"))?.len(),
        3,
        "hooks after Start"
    );
    task.rpc()?.delete(&task.id)?;
    let host = written(&notes(&task, "host"))?;
    ensure_eq!(host.len(), 4, "hooks of the host");

    let bundle = task.bundle().display().to_string();
    let told = |line: &Value, status: &str| -> Outcome {
        let state = &line["state"];
        ensure_eq!(state["status"], json!(status), "status: {state}");
        ensure_eq!(state["id"], json!(task.id), "id: {state}");
        ensure_eq!(state["bundle"], json!(bundle), "bundle: {state}");
        ensure_eq!(state["ociVersion"], json!("1.0.2-dev"), "version: {state}");
        ensure_eq!(
            state["annotations"]["org.example"],
            json!("value"),
            "annotations: {state}"
        );
        Ok(())
    };
    // On the host, as the host's root with nothing taken away.
    for (line, status) in host
        .iter()
        .zip(["creating", "creating", "running", "stopped"])
    {
        told(line, status)?;
        for (kind, _) in &init {
            ensure_eq!(
                line[kind],
                json!(namespace("self", kind)?),
                "{kind} of a hook of the host"
            );
        }
        ensure_eq!(line["cwd"], json!(bundle), "cwd");
        ensure_eq!(line["args"][0], json!("probe"), "args");
        let of_test = fs::read_to_string("/proc/self/status")?;
        for set in ["CapEff", "Seccomp", "NoNewPrivs"] {
            let want = procs::field(&of_test, set).unwrap_or_default();
            ensure_eq!(
                field(&line["status"], set),
                want,
                "{set} of a hook of the host"
            );
        }
    }
    ensure_eq!(host[0]["env"], json!([]), "environment of prestart");
    ensure_eq!(host[1]["env"], json!(["A=b c", "D="]), "environment");
    ensure_eq!(host[2]["state"]["pid"], json!(pid), "pid of poststart");
    ensure!(host[3]["state"]["pid"].is_null(), "pid of poststop");
    ensure!(
        host[1]["state"]["pid"].as_u64().is_some_and(|p| p > 1),
        "pid of createRuntime: {}",
        host[1]["state"]
    );

    // Before the change of root: the container's namespaces, but for a pid
    // namespace of its own; the container's locks; nothing of the node to see.
    let inside = written(&upper.join("inside"))?;
    ensure_eq!(inside.len(), 2, "hooks before the change of root");
    for line in &inside {
        told(line, "creating")?;
        for (kind, of_init) in &init {
            let same = line[kind] == json!(of_init);
            ensure_eq!(same, *kind != "pid", "{kind} of createContainer: {line}");
        }
        ensure!(line["pid"] != json!(namespace("self", "pid")?), "{line}");
        ensure_eq!(line["no_new_privs"], json!(true), "no_new_privs: {line}");
        ensure_eq!(line["seccomp"], json!(2), "seccomp: {line}");
        let caps = line["caps"].as_u64().unwrap_or(u64::MAX);
        ensure_eq!(caps & !0xa804_25fb, 0, "capabilities of createContainer");
        ensure!(caps != 0, "no capabilities at all: {line}");
        // Nothing of the agent's root can be read, /proc least of all.
        ensure_eq!(line["status"], json!(""), "proc");
        ensure_eq!(line["sees"], json!([]), "the agent's root shows");
    }
    ensure_eq!(inside[0]["env"], json!(["E=f"]), "environment");

    // Inside, as the container's own user.
    let start = written(&upper.join("tmp/start"))?;
    ensure_eq!(start.len(), 1, "hooks before init");
    let line = &start[0];
    told(line, "created")?;
    for (kind, of_init) in &init {
        ensure_eq!(line[kind], json!(of_init), "{kind} of startContainer");
    }
    ensure_eq!(line["state"]["pid"], json!(1), "pid inside");
    ensure_eq!(line["env"], json!(["G=h"]), "environment");
    ensure_eq!(line["args"], json!(["y", "hook", "/tmp/start"]), "args");
    ensure_eq!(line["cwd"], json!("/"), "cwd");
    ensure_eq!(
        field(&line["status"], "Uid"),
        "1000\t1000\t1000\t1000",
        "user"
    );
    Ok(task.finish()?)
}

fn c138_hooks_are_refused_unless_allowed() -> Outcome {
    casemate_only()?;
    for kind in [
        "prestart",
        "createRuntime",
        "createContainer",
        "poststart",
        "poststop",
    ] {
        let mut task = Task::new("nohook", &["/bin/true"])?;
        let mark = task.side.join("mark");
        task.spec["hooks"][kind] = json!([{"path": "/bin/touch", "args": ["touch", &mark]}]);
        expect(
            task,
            &[&format!("hooks.{kind}[0]"), "/bin/touch", "hooks.allow"],
        )?;
        ensure!(!mark.exists(), "{kind} was run");
    }
    // One beside the directory that is allowed.
    let mut task = task("nohook", &["/bin/true"])?;
    task.spec["hooks"] = json!({"poststop": [{"path": task.side.join("hooks-and/more")}]});
    expect(task, &["hooks.poststop[0]", "hooks.allow"])
}

fn c138_hook_that_fails_ends_the_container() -> Outcome {
    casemate_only()?;
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let mut task = task("hookfails", &["/bin/true"])?;
        let mut failing = record(&task, "host", &["exit", "3"]);
        if kind == "createContainer" {
            failing["args"] = json!(["probe", "exit", "3"]);
        }
        task.spec["hooks"] = json!({
            kind: [failing, record(&task, "second", &[])],
            "poststop": [record(&task, "stop", &["exit", "1"]), record(&task, "stop", &[])],
        });
        task.boot()?;
        let text = match task.create() {
            Ok(_) => return fail(format!("Create in spite of {kind}")),
            Err(error) => one_line(&error.to_string())?,
        };
        for part in [format!("hooks.{kind}[0]").as_str(), "exit status 3"] {
            ensure!(text.contains(part), "{text:?} lacks {part:?}");
        }
        ensure!(
            !notes(&task, "second").exists(),
            "the hook after {kind} ran"
        );
        let stop = written(&notes(&task, "stop"))?;
        ensure_eq!(stop.len(), 2, "poststop after {kind}");
        ensure_eq!(stop[0]["state"]["status"], json!("stopped"), "status");
        // The shim lives, and nothing of the container is left.
        expect_text("State", task.rpc()?.state(&task.id), "not found")?;
        let cgroups = casemate_tests::leaks::cgroups_with(&task.id);
        let left: Vec<_> = cgroups
            .iter()
            .filter(|dir| std::path::Path::new(dir).ends_with(&task.id))
            .collect();
        ensure!(left.is_empty(), "left of {kind}: {left:?}");
        task.finish()?;
    }
    Ok(())
}

fn c138_hook_that_hangs_is_killed_and_holds_up_nobody() -> Outcome {
    casemate_only()?;
    for kind in ["createRuntime", "createContainer", "startContainer"] {
        let mut task = task("hookhangs", &["/bin/true"])?;
        let mut hanging = record(&task, "host", &["sleep"]);
        match kind {
            "createContainer" => hanging["args"] = json!(["probe", "sleep"]),
            "startContainer" => hanging = json!({"path": "/bin/probe", "args": ["probe", "sleep"]}),
            _ => {}
        }
        hanging["timeout"] = json!(2);
        task.spec["hooks"] = json!({kind: [hanging]});
        task.boot()?;
        let begun = Instant::now();
        let (client, request, id) = (task.rpc()?.clone(), task.create_request(), task.id.clone());
        let starts = kind == "startContainer";
        let under_way = std::thread::spawn(move || {
            let made = client
                .call::<containerd_shim_protos::api::CreateTaskResponse>("Create", &request, SHORT);
            match made {
                Ok(_) if starts => client.start(&id).map(|_| ()),
                other => other.map(|_| ()),
            }
        });
        // Meanwhile the shim answers as ever.
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(150));
            let asked = Instant::now();
            task.rpc()?.shim(&task.id)?;
            ensure!(
                asked.elapsed() < Duration::from_secs(1),
                "Connect took {:?} while {kind} hangs",
                asked.elapsed()
            );
        }
        let text = match under_way.join() {
            Ok(Err(error)) => one_line(&error.to_string())?,
            _ => return fail(format!("{kind} that hangs was no failure")),
        };
        ensure!(
            text.contains(&format!("hooks.{kind}[0]")) && text.contains("not done within 2 s"),
            "{text:?}"
        );
        ensure!(
            begun.elapsed() < Duration::from_secs(15),
            "{kind}: {:?}",
            begun.elapsed()
        );
        let left = casemate_tests::procs::with_command(&task.side.display().to_string());
        ensure!(left.is_empty(), "the hook is left: {left:?}");
        task.finish()?;
    }
    Ok(())
}

fn c138_start_hook_that_fails_ends_the_start() -> Outcome {
    casemate_only()?;
    for (hook, part) in [
        (
            json!({"path": "/bin/probe", "args": ["probe", "exit", "4"]}),
            "exit status 4",
        ),
        (json!({"path": "/nonexistent/hook"}), "/nonexistent/hook"),
    ] {
        let mut task = Task::new("starthook", &["/bin/touch", "/ran"])?;
        task.spec["hooks"] = json!({"startContainer": [hook]});
        task.boot()?;
        task.create()?;
        let started = task.rpc()?.start(&task.id);
        expect_text("Start", started, "hooks.startContainer[0]")?;
        ensure_eq!(status(&task)?, STOPPED, "status after the hook has failed");
        let again = task.rpc()?.start(&task.id);
        ensure!(again.is_err(), "a second Start");
        ensure!(!task.side.join("upper/ran").exists(), "init ran ({part})");
        task.rpc()?.delete(&task.id)?;
        task.finish()?;
    }
    Ok(())
}

fn c138_late_hooks_only_warn() -> Outcome {
    casemate_only()?;
    let mut task = task("latehook", &["/bin/echo", "ran"])?;
    task.spec["hooks"] = json!({
        "poststart": [record(&task, "host", &["exit", "5"]), record(&task, "host", &[])],
        "poststop": [record(&task, "host", &["exit", "6"]), record(&task, "host", &[])],
    });
    let (deleted, out) = task.run_to_end()?;
    ensure_eq!((deleted.exit_status, out.as_str()), (0, "ran\n"), "life");
    ensure_eq!(written(&notes(&task, "host"))?.len(), 4, "hooks");
    for part in [
        "hooks.poststart[0]",
        "exit status 5",
        "hooks.poststop[0]",
        "exit status 6",
    ] {
        task.log.until(part, SHORT)?;
    }
    Ok(task.finish()?)
}

fn c138_hook_inside_must_be_static() -> Outcome {
    casemate_only()?;
    let mut task = task("script", &["/bin/true"])?;
    let script = task.side.join("hooks/script");
    fs::write(&script, "#!/bin/sh\nexit 0\n")?;
    set_mode(&script, 0o755)?;
    task.spec["hooks"] = json!({"createContainer": [{"path": script}]});
    expect(task, &["hooks.createContainer[0]", "static program"])
}

fn c138_hook_that_others_can_change_is_not_run() -> Outcome {
    casemate_only()?;
    for (mode, dir_mode) in [(0o777, 0o755), (0o755, 0o777)] {
        let mut task = task("openhook", &["/bin/true"])?;
        let dir = task.side.join("hooks");
        set_mode(&dir.join("probe"), mode)?;
        set_mode(&dir, dir_mode)?;
        ensure_eq!(
            fs::metadata(&dir)?.permissions().mode() & 0o777,
            dir_mode,
            "mode"
        );
        task.spec["hooks"] = json!({"createRuntime": [record(&task, "host", &[])]});
        let mark = notes(&task, "host");
        expect(task, &["hooks.createRuntime[0]", "changed by others"])?;
        ensure!(!mark.exists(), "it was run");
    }
    Ok(())
}

fn c138_poststop_runs_when_the_shim_was_killed() -> Outcome {
    casemate_only()?;
    last_hooks(task("latestop", &["/bin/probe", "sleep"])?)
}

/// What the class lets a pod ask for, the node's configuration doesn't.
fn c138_poststop_runs_for_each_class() -> Outcome {
    casemate_only()?;
    let mut task = task("lateclass", &["/bin/probe", "sleep"])?;
    let link = task.side.join("containerd-shim-casemate-compat-v2");
    std::os::unix::fs::symlink(&task.shim.program, &link)?;
    task.shim.program = link;
    annotate(&mut task.spec, "casemate.io/profile", "compat");
    last_hooks(task)
}

fn last_hooks(mut task: Task) -> Outcome {
    task.spec["hooks"] = json!({"poststop": [record(&task, "host", &[])]});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let shim = task.shim_pid()?;
    // The runner of hooks is a child of the shim, and goes with it.
    let family = procs::family(shim);
    procs::signal(shim, Signal::KILL);
    until("the shim and all of its pod to end", SHORT, || {
        procs::identity(shim).is_none() && !family.iter().any(|who| procs::alive(*who))
    })?;
    ensure!(!notes(&task, "host").exists(), "poststop before the end");
    task.shim.delete()?;
    let host = written(&notes(&task, "host"))?;
    ensure_eq!(host.len(), 1, "poststop");
    ensure_eq!(host[0]["state"]["status"], json!("stopped"), "status");
    ensure_eq!(host[0]["state"]["id"], json!(task.id), "id");
    // And once only.
    task.shim.delete()?;
    ensure_eq!(written(&notes(&task, "host"))?.len(), 1, "poststop, again");
    Ok(task.expect_clean(Duration::from_secs(3))?)
}

//! `casemate posture`: silent about a pod that is as promised; what somebody with
//! root on the host changes about it is named, a line each.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use casemate_posture::Depth;
use casemate_tests::bundle::Task;
use casemate_tests::operator::{casemate, deviations};
use casemate_tests::pod::{self, Pids, Pod, init};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::probe;
use casemate_tests::{ensure, ensure_eq, leaks};
use serde_json::{Value, json};

use crate::common::casemate_only;
use crate::hostile_node::configure;
use crate::locks::sleeper;

crate::trials![
    posture_of_pods_as_promised,
    posture_of_each_profile,
    posture_after_an_update,
    posture_a_process_that_came_from_outside,
    posture_a_limit_that_was_changed,
    posture_a_volume_that_was_made_writable,
    posture_a_mask_that_was_taken_away,
    posture_of_a_pod_that_is_none,
];

/// What `casemate posture` says of the task's pod.
fn said(task: &Task) -> Result<(i32, Vec<String>), Stop> {
    let output = casemate(&["posture", &task.id])?;
    let lines = output.out().lines().map(str::to_owned).collect();
    ensure!(output.code() != 125, "{}", output.err());
    Ok((output.code(), lines))
}

pub fn as_promised(task: &Task) -> Outcome {
    let (code, lines) = said(task)?;
    ensure!(code == 0 && lines.is_empty(), "exit {code}: {lines:?}");
    Ok(())
}

/// Exit code 1, and each part is in a line.
pub fn names(task: &Task, parts: &[&str]) -> Outcome {
    let (code, lines) = said(task)?;
    ensure_eq!(code, 1, "exit code, with {lines:?}");
    for part in parts {
        ensure!(
            lines.iter().any(|line| line.contains(part)
                && line.contains("promised")
                && line.contains("found")),
            "no line with {part:?}: {lines:#?}"
        );
    }
    Ok(())
}

fn posture_of_pods_as_promised() -> Outcome {
    casemate_only()?;
    let task = sleeper("promised")?;
    let (_, _out) = pod::exec(&task, "more", &["/bin/probe", "sleep"])?;
    as_promised(&task)?;
    let all = casemate(&["posture", "--json", &task.id])?.ok()?;
    let all: Value = serde_json::from_slice(&all.stdout).map_err(|e| Stop::Fail(e.to_string()))?;
    ensure_eq!(all["deviations"], json!([]), "deviations");
    let container = &all["promise"]["containers"][0];
    ensure_eq!(container["id"], json!(task.id), "container");
    // What was set, and nothing else.
    let limits = container["limits"].as_object();
    let is_devices = |name: &String| name.ends_with("devices.list") || name.ends_with("program");
    ensure!(
        limits.is_some_and(|l| l.len() == 1 && l.keys().all(is_devices)),
        "limits: {container}"
    );
    ensure_eq!(
        container["filters"].as_array().map(Vec::len),
        Some(2),
        "filters"
    );
    // It goes on as before.
    ensure_eq!(
        pod::say(&task, "after", &["/bin/echo", "x"])?,
        "x\n",
        "an exec"
    );
    task.finish()?;
    // Pods of several containers, apart and together.
    let pod = Pod::start("promisedpod")?;
    let one = pod.run("one", &["/bin/probe", "sleep"], Pids::Own)?;
    let two = pod.run("two", &["/bin/probe", "sleep"], Pids::Pod)?;
    as_promised(&pod.pause)?;
    pod.remove(one)?;
    as_promised(&pod.pause)?;
    pod.remove(two)?;
    Ok(pod.finish()?)
}

fn posture_of_each_profile() -> Outcome {
    casemate_only()?;
    for profile in ["strict", "compat"] {
        let mut task = Task::new("posture", &["/bin/probe", "sleep"])?;
        task.spec["process"]["noNewPrivileges"] = json!(profile == "strict");
        configure(&mut task, &format!("profile = \"{profile}\"\n"))?;
        task.boot()?;
        task.create()?;
        // Also before it runs.
        as_promised(&task)?;
        task.rpc()?.start(&task.id)?;
        as_promised(&task)?;
        task.finish()?;
    }
    Ok(())
}

pub fn cgroup_file(task: &Task, name: &str) -> Result<std::path::PathBuf, Stop> {
    let mut all = leaks::cgroups_with(&task.id).into_iter();
    let found = all.find_map(|dir| {
        let path = std::path::Path::new(&dir);
        let own = path.file_name().is_some_and(|n| *n == *task.id);
        (own && path.join(name).exists()).then(|| path.join(name))
    });
    found.ok_or_else(|| Stop::Fail(format!("no {name} of {}", task.id)))
}

fn posture_after_an_update() -> Outcome {
    casemate_only()?;
    let task = sleeper("updated")?;
    crate::calls::update(&task, &json!({"pids": {"limit": 77}}))?;
    as_promised(&task)?;
    Ok(task.finish()?)
}

fn posture_a_limit_that_was_changed() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("limits")?;
    task.posture = false;
    let file = cgroup_file(&task, "pids.max")?;
    crate::calls::update(&task, &json!({"pids": {"limit": 77}}))?;
    fs::write(&file, "123")?;
    names(&task, &["limit pids.max", "promised 77, found 123"])?;
    Ok(task.finish()?)
}

/// `nsenter` into namespaces of the task's init.
fn entered(task: &Task, flags: &[&str]) -> Result<Child, Stop> {
    let pid = init(task)?.to_string();
    let child = Command::new("nsenter")
        .args(["--target", &pid])
        .args(flags)
        .args(["/bin/probe", "sleep"])
        .stdout(Stdio::null())
        .spawn()?;
    let exe = format!("/proc/{}/comm", child.id());
    until("nsenter to execute", SHORT, || {
        fs::read_to_string(&exe).is_ok_and(|name| name.trim() == "probe")
    })?;
    Ok(child)
}

pub fn end(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

fn posture_a_process_that_came_from_outside() -> Outcome {
    casemate_only()?;
    let task = sleeper("entered")?;
    let child = entered(&task, &["--mount"])?;
    let pid = child.id();
    let named = names(
        &task,
        &[
            &format!("process {pid}: Uid"),
            &format!("process {pid}: Seccomp"),
            &format!("process {pid}: CapEff"),
            &format!("process {pid}: user namespace"),
            &format!("process {pid}: cgroup"),
            &format!("process {pid}: hash of filter 0"),
        ],
    );
    end(child);
    named?;
    // In the user namespace alone, and so in no container.
    let child = Command::new(probe()?)
        .args(["enter", "user", &init(&task)?.to_string(), "sleep"])
        .spawn()?;
    std::thread::sleep(Duration::from_millis(300));
    let named = names(
        &task,
        &[
            &format!("process {} (", child.id()),
            "in its user namespace",
        ],
    );
    end(child);
    named?;
    as_promised(&task)?;
    Ok(task.finish()?)
}

/// Changes mounts from where init's mount namespace is the own one.
pub fn in_mounts(task: &Task, args: &[&str]) -> Outcome {
    let pid = init(task)?.to_string();
    let mut command = Command::new("nsenter");
    command
        .args(["--target", &pid, "--mount", "--pid", "/bin/busybox"])
        .args(args);
    casemate_tests::run::run(&mut command, &[], SHORT)?.ok()?;
    Ok(())
}

fn posture_a_volume_that_was_made_writable() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("volume")?;
    task.posture = false;
    // Its flags are locked even for root of the host; but that one can hide it.
    in_mounts(&task, &["mount", "-t", "tmpfs", "none", "/vol"])?;
    names(
        &task,
        &["mount /vol: promised ro", "mount /vol: promised nosuid"],
    )?;
    Ok(task.finish()?)
}

fn posture_a_mask_that_was_taken_away() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("masks")?;
    task.posture = false;
    // The forker has it open.
    in_mounts(&task, &["umount", "-l", "/proc/keys"])?;
    names(&task, &["/proc/keys: promised hidden"])?;
    Ok(task.finish()?)
}

fn posture_of_a_pod_that_is_none() -> Outcome {
    casemate_only()?;
    let output = casemate(&["posture", "no-such-pod"])?;
    ensure_eq!(output.code(), 125, "exit code");
    ensure!(output.err().contains("no-such-pod"), "{}", output.err());
    // Without stopping anybody.
    let task = sleeper("glance")?;
    ensure_eq!(deviations(&task, Depth::Glance)?, [], "deviations");
    Ok(task.finish()?)
}

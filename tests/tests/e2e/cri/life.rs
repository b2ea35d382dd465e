//! Pods and containers from request to removal.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use casemate_tests::image::catalog;
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, leaks, procs};
use k8s_cri::v1::*;
use serde_json::Value;

use super::Cri;
use super::client::{Pod, directory};
use super::config::{self, container, mount};

crate::cri_tests![
    lifecycle,
    ten_pods_at_once,
    restart_in_a_living_pod,
    init_container_then_app,
    reopened_log,
    c040_missing_program_is_named,
    c113_nothing_is_left,
    c114_namespaces_of_the_pod,
    c117_network_of_the_sandbox_pid,
    pause_is_never_executed,
    c143_c144_removal_is_quiet,
    c145_pause_killed_first,
    killed_container_is_reported,
    pause_image_is_pinned,
];

/// 1.6 forgets the path for all containers but the pod's first.
pub const SINCE_1_7: &[(&str, super::Test)] = &[("runtime_by_path", runtime_by_path)];

const READY: i32 = PodSandboxState::SandboxReady as i32;
const NOT_READY: i32 = PodSandboxState::SandboxNotready as i32;

fn pod_state(pod: &Pod<'_>) -> Result<i32, Stop> {
    Ok(pod.sandbox(false)?.status.unwrap_or_default().state)
}

fn lifecycle(cri: &Cri) -> Outcome {
    let pod = cri.pod("lifecycle")?;
    ensure_eq!(pod_state(&pod)?, READY, "state of the pod");
    let script = "echo to-stdout; echo to-stderr >&2; exec /bin/probe sleep";
    let id = pod.create(container("app", &["/bin/sh", "-c", script]))?;
    let created = ContainerState::ContainerCreated as i32;
    ensure_eq!(pod.status(&id)?.state, created, "state after creation");
    pod.start(&id)?;
    let running = ContainerState::ContainerRunning as i32;
    ensure_eq!(pod.status(&id)?.state, running, "state after start");

    let ran = pod.exec(
        &id,
        &["/bin/sh", "-c", "echo inside; echo oops >&2; exit 7"],
    )?;
    ensure_eq!(ran.code, 7, "exit code of exec: {ran:?}");
    ensure_eq!(ran.out, "inside\n", "output of exec");
    ensure_eq!(ran.err, "oops\n", "errors of exec");

    let status = pod.status(&id)?;
    until("the log", Duration::from_secs(10), || {
        pod.log(&status, "stderr") == "to-stderr\n"
    })?;
    ensure_eq!(pod.log(&status, "stdout"), "to-stdout\n", "log");

    let filter = ContainerFilter {
        pod_sandbox_id: pod.id.clone(),
        ..Default::default()
    };
    let request = ListContainersRequest {
        filter: Some(filter),
    };
    let listed = cri.call("ListContainers", async |mut c| {
        c.list_containers(request).await
    })?;
    let ids: Vec<_> = listed.containers.iter().map(|c| &c.id).collect();
    ensure_eq!(ids, [&id], "containers of the pod");

    pod.stop_container(&id, 1)?;
    let ended = pod.status(&id)?;
    let exited = ContainerState::ContainerExited as i32;
    ensure_eq!(ended.state, exited, "state after stop");
    // Process 1 has no handler for SIGTERM, so the kernel drops it.
    ensure_eq!(ended.exit_code, 137, "exit code: {ended:?}");
    ensure!(ended.finished_at > ended.started_at, "times of {ended:?}");
    ensure_eq!(
        pod_state(&pod)?,
        READY,
        "state of the pod with nothing in it"
    );
    pod.remove_container(&id)?;
    ensure!(pod.status(&id).is_err(), "a removed container has a status");
    pod.stop()?;
    ensure_eq!(pod_state(&pod)?, NOT_READY, "state of the stopped pod");
    pod.stop()?;
    pod.remove()
}

fn ten_pods_at_once(cri: &Cri) -> Outcome {
    let names: Vec<String> = (0..10).map(|n| format!("ten{n}")).collect();
    let one = |name: &str| -> Result<String, Stop> {
        let pod = cri.pod(name)?;
        let id = pod.sleeper("app")?;
        let out = pod.exec_sh(&id, "hostname")?;
        let ip = pod.ip()?;
        ensure_eq_or(&out, &format!("{name}\n"))?;
        pod.remove()?;
        Ok(ip)
    };
    let ended: Vec<Result<String, Stop>> = std::thread::scope(|scope| {
        let started: Vec<_> = names.iter().map(|name| scope.spawn(|| one(name))).collect();
        started
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| fail("a thread panicked")))
            .collect()
    });
    let mut addresses = Vec::new();
    for result in ended {
        addresses.push(result?);
    }
    addresses.sort();
    addresses.dedup();
    ensure_eq!(addresses.len(), 10, "addresses {addresses:?}");
    Ok(())
}

fn ensure_eq_or(got: &str, want: &str) -> Outcome {
    ensure_eq!(got, want, "output");
    Ok(())
}

fn restart_in_a_living_pod(cri: &Cri) -> Outcome {
    let pod = cri.pod("restart")?;
    let other = pod.sleeper("other")?;
    let net = "readlink /proc/self/ns/net";
    let before = pod.exec_sh(&other, net)?;
    let mut first = container("app", &["/bin/sh", "-c", "echo first; exit 3"]);
    let id = pod.run(first.clone())?;
    ensure_eq!(
        pod.ended(&id)?.exit_code,
        3,
        "exit code of the first attempt"
    );
    // The kubelet starts the next one while the first is still there.
    first.metadata.get_or_insert_default().attempt = 1;
    first.command = ["/bin/probe", "sleep"].map(str::to_owned).to_vec();
    let second = pod.run(first)?;
    pod.remove_container(&id)?;
    ensure_eq!(pod.exec_sh(&second, net)?, before, "network namespace");
    let running = ContainerState::ContainerRunning as i32;
    ensure_eq!(pod.status(&other)?.state, running, "the other container");
    pod.remove()
}

fn init_container_then_app(cri: &Cri) -> Outcome {
    let dir = directory(cri, "init")?;
    let pod = cri.pod("init")?;
    let volume = |c: &mut ContainerConfig| c.mounts.push(mount(&dir, "/data"));
    pod.sh("init", "echo prepared > /data/file", volume)?;
    let read = pod.sh("app", "cat /data/file", volume)?;
    ensure_eq!(read, "prepared\n", "what the init container left");
    let owner = fs::metadata(dir.join("file"))?;
    ensure_eq!((owner.uid(), owner.gid()), (0, 0), "owner on the host");
    pod.remove()
}

fn reopened_log(cri: &Cri) -> Outcome {
    let pod = cri.pod("reopen")?;
    let script = "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.05; done";
    let id = pod.run(container("app", &["/bin/sh", "-c", script]))?;
    let status = pod.status(&id)?;
    let log = Path::new(&status.log_path);
    let lines = || fs::read_to_string(log).unwrap_or_default().lines().count();
    until("the first lines", Duration::from_secs(20), || lines() > 2)?;
    fs::rename(log, log.with_extension("1"))?;
    let request = ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    cri.call("ReopenContainerLog", async |mut c| {
        c.reopen_container_log(request).await
    })?;
    until("lines in the new file", Duration::from_secs(20), || {
        lines() > 2
    })?;
    pod.remove()
}

fn c040_missing_program_is_named(cri: &Cri) -> Outcome {
    let pod = cri.pod("missing")?;
    let why = pod.refusal(container("app", &["/no/such/program"]))?;
    ensure!(why.contains("/no/such/program"), "refused with {why}");
    // The pod is as good as before.
    ensure_eq!(pod.sh("next", "echo fine", |_| ())?, "fine\n", "output");
    pod.remove()
}

fn c113_nothing_is_left(cri: &Cri) -> Outcome {
    let pod = cri.pod("clean")?;
    let container = pod.sleeper("app")?;
    pod.exec_sh(&container, "true")?;
    let cgroups = config::cgroups(&pod.config);
    ensure!(!cgroups.is_empty(), "the pod has no cgroup of its own");
    // By its name the kubelet finds whose network to count.
    for dir in &cgroups {
        ensure!(
            dir.join(&pod.id).is_dir(),
            "no cgroup {} of the sandbox in {}",
            pod.id,
            dir.display()
        );
    }
    ensure!(
        !leaks::with_mark(&container).is_empty(),
        "nothing while it runs"
    );
    pod.remove()?;
    let left = leaks::with_mark(&container);
    ensure!(
        left.is_empty(),
        "left of the container: {}",
        left.join("; ")
    );
    for dir in cgroups {
        ensure!(!dir.exists(), "{} is not empty", dir.display());
    }
    Ok(())
}

fn c114_namespaces_of_the_pod(cri: &Cri) -> Outcome {
    let pod = cri.pod("namespaces")?;
    let script = "for n in net ipc uts mnt pid user; do readlink /proc/self/ns/$n; done";
    let mut seen = Vec::new();
    for name in ["one", "two"] {
        let id = pod.sleeper(name)?;
        let text = pod.exec_sh(&id, script)?;
        seen.push(text.lines().map(str::to_owned).collect::<Vec<_>>());
    }
    let [one, two] = seen.as_slice() else {
        return fail("two containers");
    };
    ensure_eq!(one.len(), 6, "namespaces {one:?}");
    for (n, name) in ["net", "ipc", "uts", "mnt", "pid", "user"]
        .iter()
        .enumerate()
    {
        let shared = !["mnt", "pid"].contains(name);
        ensure_eq!(
            one.get(n) == two.get(n),
            shared,
            "{name}: {one:?} and {two:?}"
        );
        let host = fs::read_link(format!("/proc/self/ns/{name}"))?;
        ensure!(
            one.get(n) != Some(&host.display().to_string()),
            "{name} is the host's"
        );
    }
    pod.remove()
}

/// What the daemon itself knows of a pod.
pub fn details(pod: &Pod<'_>) -> Result<Value, Stop> {
    let info: HashMap<String, String> = pod.sandbox(true)?.info;
    let Some(text) = info.get("info") else {
        return fail(format!("no info in the pod's status: {info:?}"));
    };
    Ok(serde_json::from_str(text)?)
}

fn c117_network_of_the_sandbox_pid(cri: &Cri) -> Outcome {
    let pod = cri.pod("netns")?;
    let info = details(&pod)?;
    let pid = info["pid"].as_u64().unwrap_or(0);
    ensure!(pid > 0, "pid of the pod in {info}");
    let namespaces = info["runtimeSpec"]["linux"]["namespaces"].clone();
    let path = namespaces
        .as_array()
        .and_then(|all| all.iter().find(|n| n["type"] == "network"))
        .and_then(|n| n["path"].as_str())
        .unwrap_or_default()
        .to_owned();
    let by_pid = fs::metadata(format!("/proc/{pid}/ns/net"))?;
    let by_path = fs::metadata(&path)?;
    ensure_eq!(by_pid.ino(), by_path.ino(), "/proc/{pid}/ns/net and {path}");
    let id = pod.sleeper("app")?;
    let inside = pod.exec_sh(&id, "readlink /proc/self/ns/net")?;
    ensure_eq!(inside.trim(), format!("net:[{}]", by_pid.ino()), "inside");
    pod.remove()
}

fn pause_is_never_executed(cri: &Cri) -> Outcome {
    let pod = cri.pod("pause")?;
    pod.sleeper("app")?;
    let pid = details(&pod)?["pid"].as_u64().unwrap_or(0);
    let Ok(pid) = u32::try_from(pid) else {
        return fail("the pod's pid is no pid");
    };
    ensure!(procs::identity(pid).is_some(), "no process {pid}");
    let running = procs::with_command(catalog::PAUSE_PROGRAM);
    ensure!(running.is_empty(), "the pause program runs: {running:?}");
    // Neither the pod's process nor its container can see a file of the image.
    for member in procs::family(pid) {
        let file = format!("/proc/{}/root{}", member.pid, catalog::PAUSE_PROGRAM);
        ensure!(!Path::new(&file).exists(), "{file} exists");
    }
    let listed = cri
        .node
        .daemon
        .ctr("k8s.io")
        .run(&["task", "ls"], Duration::from_secs(20))?;
    let listed = listed.ok()?.out();
    let line = listed
        .lines()
        .find(|l| l.starts_with(&pod.id))
        .unwrap_or_default();
    ensure!(
        line.contains("RUNNING") && line.contains(&format!(" {pid} ")),
        "the task of the pod: {line:?}"
    );
    pod.remove()
}

/// The daemon runs `delete` after each normal removal too, 1.x for every
/// container: it must find nothing to complain of, and disturb no neighbour.
fn c143_c144_removal_is_quiet(cri: &Cri) -> Outcome {
    let pod = cri.pod("quiet")?;
    let (gone, stays) = (pod.sleeper("gone")?, pod.sleeper("stays")?);
    pod.stop_container(&gone, 0)?;
    pod.remove_container(&gone)?;
    ensure_eq!(pod.exec_sh(&stays, "echo here")?, "here\n", "the neighbour");
    let ids = [pod.id.clone(), gone, stays];
    pod.remove()?;
    let log = cri.node.daemon.log();
    let complaints: Vec<&str> = log
        .lines()
        .filter(|l| l.contains("level=error") || l.contains("level=warning"))
        .filter(|l| ids.iter().any(|id| l.contains(id.as_str())))
        // What policy takes away, the shim says once for each container.
        .filter(|l| !l.contains("beyond the policy"))
        // What 1.x says of every shim that goes, whoever's it is.
        .filter(|l| !l.contains("cleaning up after shim disconnected"))
        .filter(|l| !l.contains("status for container event"))
        .collect();
    ensure!(complaints.is_empty(), "in the daemon's log: {complaints:?}");
    Ok(())
}

fn c145_pause_killed_first(cri: &Cri) -> Outcome {
    let pod = cri.pod("killed")?;
    let app = pod.sleeper("app")?;
    let kill = ["task", "kill", "-s", "SIGKILL", pod.id.as_str()];
    let ctr = cri.node.daemon.ctr("k8s.io");
    ctr.run(&kill, Duration::from_secs(20))?.ok()?;
    until("the pod to be down", Duration::from_secs(20), || {
        pod_state(&pod).is_ok_and(|s| s == NOT_READY)
    })?;
    let after = pod.status(&app)?;
    ensure!(
        after.state != ContainerState::ContainerUnknown as i32,
        "{after:?}"
    );
    pod.remove()?;
    let left = leaks::with_mark(&app);
    ensure!(
        left.is_empty(),
        "left of the container: {}",
        left.join("; ")
    );
    Ok(())
}

fn killed_container_is_reported(cri: &Cri) -> Outcome {
    let pod = cri.pod("signal")?;
    // A shell that handles SIGTERM ends by itself, long before the grace period.
    let script = "trap 'echo bye; exit 5' TERM; while :; do sleep 0.1; done";
    let id = pod.run(container("app", &["/bin/sh", "-c", script]))?;
    pod.exec_sh(&id, "true")?;
    let begun = std::time::Instant::now();
    pod.stop_container(&id, 30)?;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(20), "stop took {took:?}");
    let status = pod.status(&id)?;
    ensure_eq!(status.exit_code, 5, "exit code");
    ensure_eq!(pod.log(&status, "stdout"), "bye\n", "log");
    pod.remove()
}

fn pause_image_is_pinned(cri: &Cri) -> Outcome {
    let Some(image) = cri.image(casemate_tests::generation::PAUSE)? else {
        return fail("no pause image");
    };
    // 1.6 knows no pinned images.
    let known = cri.generation > casemate_tests::generation::Generation::V1_6;
    ensure_eq!(image.pinned, known, "{image:?}");
    Ok(())
}

/// The other way to name a runtime: runc's type, with the path of our shim.
fn runtime_by_path(cri: &Cri) -> Outcome {
    let pod = cri.pod_of("casemate-by-path", config::pod(cri, "by-path"))?;
    let pid = pod.pid(&pod.sleeper("app")?)?;
    let map = fs::read_to_string(format!("/proc/{pid}/uid_map"))?;
    let base = map.split_whitespace().nth(1).unwrap_or("0").to_owned();
    ensure!(base != "0", "root inside is the host's: {map}");
    pod.remove()
}

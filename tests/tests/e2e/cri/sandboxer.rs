//! Pods that containerd 2.x makes by its sandbox API: a runtime class with
//! `sandboxer = "shim"`.

use std::fs;
use std::time::Duration;

use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, procs};
use k8s_cri::v1::*;
use rustix::process::Signal;
use serde_json::Value;

use super::Cri;
use super::client::Pod;
use super::config::{self, container};

crate::cri_tests![
    c140_pod_by_the_sandbox_api,
    c140_refused_container_leaves_the_pod,
    c140_refused_pod,
    c140_chosen_users,
    c140_killed_shim,
];

/// A daemon's restart.
pub const RESTARTS: &[(&str, super::Test)] = &[("c140_restart", c140_restart)];

/// The runtime class.
const CLASS: &str = casemate_tests::generation::BY_API;

const READY: i32 = PodSandboxState::SandboxReady as i32;
const NOT_READY: i32 = PodSandboxState::SandboxNotready as i32;

fn made<'a>(cri: &'a Cri, name: &str) -> Result<Pod<'a>, Stop> {
    cri.pod_of(CLASS, config::pod(cri, name))
}

fn state(pod: &Pod<'_>) -> Result<i32, Stop> {
    Ok(pod.sandbox(false)?.status.unwrap_or_default().state)
}

/// The pid that containerd was told of.
fn sandbox_pid(pod: &Pod<'_>) -> Result<u32, Stop> {
    let reply = pod.sandbox(true)?;
    let text = reply.info.get("info").map(String::as_str);
    let info: Value = serde_json::from_str(text.unwrap_or("null")).unwrap_or_default();
    let pid = info["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    ensure!(pid.is_some_and(|pid| pid > 0), "no pid in {info}");
    Ok(pid.unwrap_or_default())
}

fn c140_pod_by_the_sandbox_api(cri: &Cri) -> Outcome {
    let pod = made(cri, "by-api")?;
    ensure_eq!(state(&pod)?, READY, "state");
    let tasks = cri
        .node
        .daemon
        .ctr("k8s.io")
        .run(&["tasks", "ls", "-q"], Duration::from_secs(20))?;
    ensure!(
        !tasks.out().contains(&pod.id),
        "a pause task: {}",
        tasks.out()
    );
    let pid = sandbox_pid(&pod)?;
    let (one, two) = (pod.sleeper("one")?, pod.sleeper("two")?);
    // What containerd's own controller would have made.
    let files = pod.exec_sh(&one, "cat /etc/resolv.conf /etc/hostname; hostname")?;
    ensure_eq!(
        files,
        "search test.invalid\nnameserver 192.0.2.53\noptions ndots:5\nby-api\nby-api\n",
        "files"
    );
    pod.exec_sh(&one, "echo note > /dev/shm/note")?;
    ensure_eq!(pod.exec_sh(&two, "cat /dev/shm/note")?, "note\n", "memory");
    for kind in ["net", "ipc", "uts"] {
        let host = fs::read_link(format!("/proc/{pid}/ns/{kind}"))?;
        let look = format!("readlink /proc/self/ns/{kind}");
        for id in [&one, &two] {
            let inside = pod.exec_sh(id, &look)?;
            ensure_eq!(inside.trim(), host.to_string_lossy(), "{kind} namespace");
        }
    }
    let address = pod.exec_sh(&two, "ip -4 addr show eth0 || ifconfig eth0")?;
    ensure!(address.contains(&pod.ip()?), "address: {address}");
    pod.stop_container(&one, 0)?;
    pod.remove_container(&one)?;
    ensure_eq!(state(&pod)?, READY, "with one container less");
    ensure_eq!(pod.sh("three", "echo late", |_| ())?, "late\n", "a third");
    pod.stop()?;
    ensure_eq!(state(&pod)?, NOT_READY, "after stop");
    ensure!(procs::identity(pid).is_none(), "the agent lives on");
    pod.stop()?;
    pod.remove()
}

fn c140_refused_container_leaves_the_pod(cri: &Cri) -> Outcome {
    let pod = made(cri, "refused-one")?;
    let why = pod.refusal(container("bad", &["/no/such/program"]))?;
    ensure!(why.contains("/no/such/program"), "{why}");
    // containerd sends Shutdown for a task that could not be made.
    std::thread::sleep(Duration::from_millis(500));
    ensure_eq!(state(&pod)?, READY, "state");
    ensure_eq!(pod.sh("good", "echo fine", |_| ())?, "fine\n", "the next");
    pod.remove()
}

fn c140_refused_pod(cri: &Cri) -> Outcome {
    let mut config = config::pod(cri, "refused");
    config::pod_namespaces(&mut config).pid = NamespaceMode::Node as i32;
    let Err(Stop::Fail(why)) = cri.pod_of(CLASS, config) else {
        return casemate_tests::skip::fail("hostPID was accepted");
    };
    ensure!(why.contains("hostPID"), "{why}");
    Ok(())
}

/// `hostUsers: false`: containerd makes the network namespace in a user
/// namespace of the kubelet's range, and keeps only the former.
fn c140_chosen_users(cri: &Cri) -> Outcome {
    let first = crate::userns::range();
    let ids = || {
        vec![IdMapping {
            host_id: first,
            container_id: 0,
            length: 65536,
        }]
    };
    let users = UserNamespace {
        mode: NamespaceMode::Pod as i32,
        uids: ids(),
        gids: ids(),
    };
    let mut config = config::pod(cri, "chosen");
    config::pod_namespaces(&mut config).userns_options = Some(users.clone());
    let pod = cri.pod_of(CLASS, config)?;
    let mut app = container("app", &["/bin/probe", "sleep"]);
    config::security(&mut app)
        .namespace_options
        .get_or_insert_default()
        .userns_options = Some(users);
    let id = pod.run(app)?;
    let pid = pod.exec_sh(&id, "cat /proc/self/uid_map")?;
    ensure!(pid.ends_with("65536\n"), "map inside: {pid}");
    let agent = sandbox_pid(&pod)?;
    let map = fs::read_to_string(format!("/proc/{agent}/uid_map"))?;
    ensure!(map.contains(&first.to_string()), "the pod's map: {map}");
    pod.remove()
}

fn c140_killed_shim(cri: &Cri) -> Outcome {
    let mut pod = made(cri, "killed")?;
    // Nobody is left who promises anything.
    pod.posture = false;
    pod.sleeper("app")?;
    let agent = sandbox_pid(&pod)?;
    let shims = procs::with_command(&pod.id);
    ensure!(!shims.is_empty(), "no shim");
    for shim in shims {
        procs::signal(shim, Signal::KILL);
    }
    until("the agent to die", Duration::from_secs(5), || {
        procs::identity(agent).is_none()
    })?;
    until("containerd to notice", Duration::from_secs(20), || {
        state(&pod).is_ok_and(|state| state == NOT_READY)
    })?;
    // containerd marks the container only when it tries again, after a second.
    let request = ListContainersRequest {
        filter: Some(ContainerFilter {
            pod_sandbox_id: pod.id.clone(),
            ..Default::default()
        }),
    };
    until("the container to be ended", Duration::from_secs(20), || {
        let request = request.clone();
        cri.call("ListContainers", async |mut c| {
            c.list_containers(request).await
        })
        .is_ok_and(|all| {
            let running = ContainerState::ContainerRunning as i32;
            all.containers.iter().all(|c| c.state != running)
        })
    })?;
    pod.remove()
}

fn c140_restart(cri: &Cri) -> Outcome {
    let pod = made(cri, "restarted")?;
    let id = pod.sleeper("app")?;
    let (agent, shims) = (sandbox_pid(&pod)?, procs::with_command(&pod.id));
    cri.node.daemon.down();
    cri.node.daemon.up()?;
    cri.answers()?;
    ensure_eq!(state(&pod)?, READY, "state");
    ensure_eq!(sandbox_pid(&pod)?, agent, "pid");
    ensure_eq!(procs::with_command(&pod.id), shims, "processes of the shim");
    ensure_eq!(pod.exec_sh(&id, "echo back")?, "back\n", "output");
    ensure_eq!(pod.sh("late", "echo late", |_| ())?, "late\n", "a new one");
    pod.remove()
}

//! 140: containers in a pod of the sandbox API, by the task service of the same
//! shim.

use std::fs;
use std::time::{Duration, Instant};

use casemate_tests::sandbox_api::{self as api, Pod};
use casemate_tests::shim::SHORT;
use casemate_tests::skip::Outcome;
use casemate_tests::{ensure, ensure_eq, procs};
use ttrpc::Code;

use crate::common::{casemate_only, expect_code};

crate::trials![
    c140_containers_land_in_the_pod,
    c140_containers_share_files_and_memory,
    c140_stop_gives_containers_their_time,
    c140_a_container_that_fails_leaves_the_pod,
    c140_shutdown_ends_containers,
];

fn c140_containers_land_in_the_pod() -> Outcome {
    casemate_only()?;
    let (pod, agent) = Pod::ready("c140land", api::config("web-0", ""))?;
    let args = ["/bin/probe", "sleep"];
    let (one, two) = (
        pod.container("c140one", &args, agent)?,
        pod.container("c140two", &args, agent)?,
    );
    let mut pids = Vec::new();
    for app in [&one, &two] {
        let pid = app.create()?.pid;
        app.rpc()?.start(&app.id)?;
        pids.push(pid);
    }
    let link = |pid: u32, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    for pid in &pids {
        for kind in ["net", "ipc", "uts"] {
            ensure_eq!(link(*pid, kind)?, link(agent, kind)?, "{kind} namespace");
        }
        for kind in ["mnt", "pid"] {
            ensure!(
                link(*pid, kind)? != link(agent, kind)?,
                "the agent's {kind}"
            );
        }
    }
    ensure!(
        link(pids[0], "mnt")? != link(pids[1], "mnt")?,
        "both in one mount namespace"
    );
    // The namespaces of another pod, or of the host, are none of its own.
    let stranger = pod.container("c140stranger", &args, std::process::id())?;
    expect_code(
        "the host's namespaces",
        stranger.create(),
        Code::INVALID_ARGUMENT,
    )?;
    let info = api::info(&pod.status()?)?;
    let names = info["containers"].as_array().map_or(0, Vec::len);
    ensure_eq!(names, 2, "containers in {info}");
    for app in [&one, &two] {
        app.rpc()?.kill(&app.id, 9, true)?;
        app.rpc()?.wait(&app.id, SHORT)?;
        app.rpc()?.delete(&app.id)?;
    }
    // No pause, no container, and the pod is there.
    ensure_eq!(pod.status()?.state, "SANDBOX_READY", "without containers");
    pod.finish()?;
    for app in [&one, &two] {
        app.expect_clean(Duration::from_secs(2))?;
    }
    Ok(())
}

fn c140_containers_share_files_and_memory() -> Outcome {
    casemate_only()?;
    let (pod, agent) = Pod::ready("c140share", api::config("web-0", ""))?;
    let script = "cat /etc/hostname /etc/resolv.conf; hostname; \
                  grep localhost /etc/hosts >/dev/null && echo hosts; \
                  stat -c '%a %u %F' /dev/shm; echo from-one > /dev/shm/note; \
                  echo 10.0.0.9 other >> /etc/hosts && echo written";
    let mut one = pod.container("c140share1", &["/bin/sh", "-c", script], agent)?;
    // One without a mount there, the other with containerd's default.
    if let Some(mounts) = one.spec["mounts"].as_array_mut() {
        mounts.retain(|mount| mount["destination"] != "/dev/shm");
    }
    one.write_spec()?;
    one.create()?;
    ensure_eq!(one.start_and_wait()?.exit_status, 0, "the first container");
    let said = one.stdout.text(SHORT)?;
    let want = "web-0\nsearch pod.example\nnameserver 10.9.8.7\noptions ndots:5\nweb-0\nhosts\n\
                1777 0 directory\nwritten\n";
    ensure_eq!(said, want, "what the first sees");

    // Its own mounts come first: read-only, nothing can be changed but memory.
    let script = "cat /dev/shm/note; tail -n 1 /etc/hosts; \
                  (echo x >> /etc/hosts) 2>/dev/null || echo read-only; \
                  echo more > /dev/shm/two && echo memory; \
                  grep -c ' /dev/shm .*noexec' /proc/self/mounts";
    let mut two = pod.container("c140share2", &["/bin/sh", "-c", script], agent)?;
    two.spec["root"]["readonly"] = true.into();
    two.write_spec()?;
    two.create()?;
    ensure_eq!(two.start_and_wait()?.exit_status, 0, "the second container");
    let said = two.stdout.text(SHORT)?;
    let want = "from-one\n10.0.0.9 other\nread-only\nmemory\n1\n";
    ensure_eq!(said, want, "what the second sees");

    let host = fs::read_to_string("/etc/hosts").unwrap_or_default();
    ensure!(
        !host.contains("10.0.0.9 other"),
        "written to the host's file"
    );
    for app in [&one, &two] {
        app.rpc()?.delete(&app.id)?;
    }
    Ok(pod.finish()?)
}

fn c140_stop_gives_containers_their_time() -> Outcome {
    casemate_only()?;
    let (pod, agent) = Pod::ready("c140grace", Vec::new())?;
    let polite = "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done";
    let deaf = "trap '' TERM; echo up; while :; do sleep 0.05; done";
    let mut apps = Vec::new();
    for (name, script) in [("c140polite", polite), ("c140deaf", deaf)] {
        let app = pod.container(name, &["/bin/sh", "-c", script], agent)?;
        app.create()?;
        app.rpc()?.start(&app.id)?;
        app.stdout.until("up", SHORT)?;
        apps.push(app);
    }
    let begun = Instant::now();
    pod.stop(1)?;
    let took = begun.elapsed();
    ensure!(
        took >= Duration::from_millis(950) && took < Duration::from_secs(6),
        "a stop within 1 s took {took:?}"
    );
    for (app, status) in apps.iter().zip([7, 137]) {
        let answer = app.rpc()?.wait(&app.id, SHORT)?;
        ensure_eq!(answer.exit_status, status, "exit of {}", app.id);
    }
    // Records stay until they are deleted, and no more come.
    let late = pod.container("c140late", &["/bin/true"], agent)?;
    expect_code("a container after stop", late.create(), Code::UNAVAILABLE)?;
    for app in &apps {
        app.rpc()?.delete(&app.id)?;
    }
    let exits = |topic: &str| {
        let topics = pod.task.events.topics();
        topics.iter().filter(|seen| *seen == topic).count()
    };
    pod.task.events.wait_for("delete", SHORT)?;
    ensure_eq!(exits("exit"), 2, "exit events");
    pod.finish()?;
    for app in &apps {
        app.expect_clean(Duration::from_secs(2))?;
    }
    Ok(())
}

fn c140_a_container_that_fails_leaves_the_pod() -> Outcome {
    casemate_only()?;
    let (pod, agent) = Pod::ready("c140fails", Vec::new())?;
    let bad = pod.container("c140bad", &["/no/such/binary"], agent)?;
    ensure!(bad.create().is_err(), "a missing binary was created");
    // What containerd does then.
    expect_code("delete", bad.rpc()?.delete(&bad.id), Code::NOT_FOUND)?;
    bad.rpc()?.shutdown(&bad.id)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(
        procs::identity(pod.task.shim_pid()?).is_some(),
        "the shim went with a container that never was"
    );
    ensure_eq!(pod.status()?.state, "SANDBOX_READY", "state");
    let good = pod.container("c140good", &["/bin/true"], agent)?;
    good.create()?;
    ensure_eq!(good.start_and_wait()?.exit_status, 0, "the next container");
    good.rpc()?.delete(&good.id)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure_eq!(pod.status()?.state, "SANDBOX_READY", "after the last");
    Ok(pod.finish()?)
}

fn c140_shutdown_ends_containers() -> Outcome {
    casemate_only()?;
    let (pod, agent) = Pod::ready("c140end", Vec::new())?;
    let app = pod.container("c140endapp", &["/bin/probe", "sleep"], agent)?;
    let pid = app.create()?.pid;
    app.rpc()?.start(&app.id)?;
    let waiter = pod.waiter()?;
    std::thread::sleep(Duration::from_millis(100));
    let init = procs::identity(pid);
    pod.shutdown()?;
    pod.task.wait_gone(Duration::from_secs(5))?;
    ensure!(procs::identity(pid) != init, "the container lives on");
    pod.task.events.wait_for("exit", SHORT)?;
    // An answer, or the end of the connection: not a hang.
    let _either = waiter.join();
    pod.task.expect_clean(Duration::from_secs(2))?;
    Ok(app.expect_clean(Duration::from_secs(2))?)
}

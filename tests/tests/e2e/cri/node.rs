//! Items that a daemon has a part in, on each generation: through its `ctr`,
//! and through its restart.

use std::fs;
use std::path::Path;
use std::time::Duration;

use casemate_tests::ctr::{Ctr, Detached};
use casemate_tests::generation::Generation;
use casemate_tests::image::catalog;
use casemate_tests::run::{Output, until};
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, leaks, procs, world};
use k8s_cri::v1::ContainerState;

use super::config::container;
use super::{Cri, Test};
use crate::common::LONG;

/// Run beside others.
pub const TESTS: &[(&str, Test)] = &[
    ("c001_containerd_finds_and_runs_the_runtime", c001),
    ("c040_missing_executable_is_named", c040),
    ("c041_exit_codes_through_containerd", c041),
    ("c057_exec_through_containerd", c057),
    ("c073_kill_all_through_containerd", c073),
    ("c077_pause_and_resume_through_containerd", c077),
    ("c095_every_line_and_the_exit_code", c095),
    ("c113_nothing_is_left", c113),
];

/// 1.x never asks for features.
pub const SINCE_2: &[(&str, Test)] = &[("c003_c005_features_are_read", c005)];

/// Run alone on their daemon.
pub const RESTARTS: &[(&str, Test)] = &[
    ("c109_restart_with_living_pods", c109),
    ("c110_way_back_to_the_shim", c110),
];

fn ctr(cri: &Cri) -> Ctr {
    cri.node.daemon.ctr(world::NAMESPACE)
}

/// `ctr run --rm` of the base image.
fn run(cri: &Cri, name: &str, args: &[&str]) -> Result<(String, Output), Stop> {
    let (ctr, id) = (ctr(cri), cri.world.id(name));
    let output = ctr.run_task(cri.world.runtime(), &[], catalog::BASE, &id, args, LONG)?;
    Ok((id, output))
}

/// A task that runs until it is removed.
fn detached(cri: &Cri, name: &str, args: &[&str]) -> Result<Detached, Stop> {
    let (runtime, id) = (cri.world.runtime(), cri.world.id(name));
    Ok(Detached::start(
        &ctr(cri),
        runtime,
        &[],
        catalog::BASE,
        &id,
        args,
    )?)
}

fn expect_clean(id: &str) -> Outcome {
    Ok(leaks::expect_none(id, Duration::from_secs(5))?)
}

fn c001(cri: &Cri) -> Outcome {
    let (_, output) = run(cri, "c001", &["/bin/echo", "hello from inside"])?;
    ensure_eq!(output.ok()?.out(), "hello from inside\n", "output");
    Ok(())
}

/// `ctr` of 2.x asks the runtime by way of the daemon.
fn c005(cri: &Cri) -> Outcome {
    let output = cri
        .node
        .daemon
        .ctr("default")
        .run(
            &[
                "plugins",
                "inspect-runtime",
                "--runtime",
                cri.world.runtime(),
            ],
            LONG,
        )?
        .ok()?
        .out();
    for wanted in ["mountOptions", "rro", "\"user\"", "idmap"] {
        ensure!(output.contains(wanted), "no {wanted} in {output}");
    }
    Ok(())
}

fn c040(cri: &Cri) -> Outcome {
    let (id, output) = run(cri, "c040", &["/no/such/program"])?;
    ensure!(output.code() != 0, "a missing program ran");
    ensure!(
        output.err().contains("/no/such/program"),
        "{}",
        output.err()
    );
    expect_clean(&id)
}

fn c041(cri: &Cri) -> Outcome {
    for code in [0, 42, 255] {
        let (_, output) = run(cri, "c041", &["/bin/probe", "exit", &code.to_string()])?;
        ensure_eq!(output.code(), code, "exit code: {}", output.err());
    }
    Ok(())
}

fn c057(cri: &Cri) -> Outcome {
    let task = detached(cri, "c057", &["/bin/probe", "sleep"])?;
    let exec = |args: &[&str]| {
        let mut all = vec!["exec", "--exec-id", "x", &task.id];
        all.extend(args);
        task.task(&all)
    };
    let output = exec(&["/bin/sh", "-c", "echo inside; exit 5"])?;
    ensure_eq!(output.code(), 5, "exit code: {}", output.err());
    ensure_eq!(output.out(), "inside\n", "output");
    let output = exec(&["/no/such/program"])?;
    ensure!(output.code() != 0, "a missing program ran");
    ensure_eq!(exec(&["/bin/true"])?.code(), 0, "the same id again");
    Ok(task.remove()?)
}

fn c073(cri: &Cri) -> Outcome {
    let script = "for n in 1 2 3 4 5; do sleep 1000 & done; exec /bin/probe sleep";
    let task = detached(cri, "c073", &["/bin/sh", "-c", script])?;
    let pids = || -> Result<usize, Stop> {
        let text = task.task(&["ps", &task.id])?.ok()?.out();
        Ok(text.lines().skip(1).count())
    };
    until("six processes", LONG, || pids().is_ok_and(|n| n >= 6))?;
    task.task(&["kill", "-a", "-s", "SIGKILL", &task.id])?
        .ok()?;
    until("the task to stop", LONG, || {
        task.line()
            .is_ok_and(|l| l.last().is_some_and(|s| s == "STOPPED"))
    })?;
    Ok(task.remove()?)
}

fn c077(cri: &Cri) -> Outcome {
    let task = detached(cri, "c077", &["/bin/probe", "sleep"])?;
    task.task(&["pause", &task.id])?.ok()?;
    ensure_eq!(
        task.line()?.last().map(String::as_str),
        Some("PAUSED"),
        "state"
    );
    task.task(&["resume", &task.id])?.ok()?;
    ensure_eq!(
        task.line()?.last().map(String::as_str),
        Some("RUNNING"),
        "state"
    );
    Ok(task.remove()?)
}

fn c095(cri: &Cri) -> Outcome {
    let script = "/bin/probe lines 50 1; exit 3";
    let (_, output) = run(cri, "c095", &["/bin/sh", "-c", script])?;
    ensure_eq!(output.code(), 3, "exit code: {}", output.err());
    ensure_eq!(output.out().lines().count(), 50, "lines");
    Ok(())
}

fn c113(cri: &Cri) -> Outcome {
    let (id, output) = run(cri, "c113", &["/bin/sh", "-c", "echo x > /file; echo done"])?;
    ensure_eq!(output.ok()?.out(), "done\n", "output");
    expect_clean(&id)
}

fn c109(cri: &Cri) -> Outcome {
    let pods = [cri.pod("restart-one")?, cri.pod("restart-two")?];
    let script = "n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.1; done";
    let mut ids = Vec::new();
    for pod in &pods {
        ids.push(pod.run(container("ticks", &["/bin/sh", "-c", script]))?);
    }
    let ticks = |n: usize| {
        let (Some(pod), Some(id)) = (pods.get(n), ids.get(n)) else {
            return 0;
        };
        pod.status(id)
            .map(|status| pod.log(&status, "stdout").lines().count())
            .unwrap_or(0)
    };
    until("the first ticks", Duration::from_secs(20), || {
        ticks(0) > 2 && ticks(1) > 2
    })?;
    let inits: Vec<_> = {
        let mut all = Vec::new();
        for (pod, id) in pods.iter().zip(&ids) {
            all.push(pod.exec_sh(id, "cut -d' ' -f22 /proc/1/stat")?);
        }
        all
    };
    cri.node.daemon.down();
    // While nobody reads, the workload neither dies nor waits for ever.
    std::thread::sleep(Duration::from_secs(1));
    let begun = std::time::Instant::now();
    cri.node.daemon.up()?;
    cri.answers()?;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(30), "back after {took:?}");
    for ((pod, id), init) in pods.iter().zip(&ids).zip(&inits) {
        let status = pod.status(id)?;
        ensure_eq!(
            status.state,
            ContainerState::ContainerRunning as i32,
            "state after the restart: {status:?}"
        );
        let same = pod.exec_sh(id, "cut -d' ' -f22 /proc/1/stat")?;
        ensure_eq!(&same, init, "start time of process 1");
    }
    let before = (ticks(0), ticks(1));
    until("more ticks", Duration::from_secs(30), || {
        ticks(0) > before.0 + 2 && ticks(1) > before.1 + 2
    })?;
    // A new container in an old pod, and the end of all of it.
    let [one, two] = pods;
    ensure_eq!(
        one.sh("late", "echo late", |_| ())?,
        "late\n",
        "a new container"
    );
    if let Some(id) = ids.first() {
        one.stop_container(id, 0)?;
        ensure_eq!(one.ended(id)?.exit_code, 137, "exit code after the restart");
    }
    one.remove()?;
    two.remove()
}

/// 1.x finds the shim by `address`, 2.x by `bootstrap.json`; the former is
/// there for all, since a daemon may be downgraded.
fn c110(cri: &Cri) -> Outcome {
    let pod = cri.pod("way-back")?;
    let id = pod.sleeper("app")?;
    let bundle = cri.node.daemon.bundle("k8s.io", &pod.id);
    let address = fs::read_to_string(bundle.join("address"))?;
    ensure!(address.starts_with("unix:///"), "address {address:?}");
    let socket = Path::new(address.trim_start_matches("unix://"));
    ensure!(socket.exists(), "{} is not there", socket.display());
    let bootstrap = fs::read_to_string(bundle.join("bootstrap.json"));
    match (cri.generation, bootstrap) {
        (Generation::V1_6 | Generation::V1_7, _) => {}
        (_, Ok(text)) => ensure!(text.contains(&address), "bootstrap.json: {text}"),
        (_, Err(error)) => return fail(format!("bootstrap.json: {error}")),
    }
    let shims = procs::with_command(&pod.id);
    cri.node.daemon.down();
    cri.node.daemon.up()?;
    cri.answers()?;
    ensure_eq!(pod.exec_sh(&id, "echo back")?, "back\n", "output");
    ensure_eq!(procs::with_command(&pod.id), shims, "processes of the shim");
    pod.remove()
}

//! Many: rounds that leave no growth, and crowds that all start.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::node::Traces;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, leaks, pod, procs};

use crate::common::{LONG, casemate_only};
use crate::faults_wedge::children;

crate::trials![
    fault_rounds_in_a_pod_leave_no_growth,
    fault_rounds_of_pods_leave_nothing,
    fault_crowd_in_one_pod,
];

fn number(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(otherwise)
}

/// A line of `smaps_rollup`, kB.
fn kilobytes(pid: u32, field: &str) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .ok()
        .and_then(|text| procs::field(&text, field))
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn entries(dir: impl AsRef<Path>) -> u64 {
    fs::read_dir(dir).map(Iterator::count).unwrap_or(0) as u64
}

/// What must not grow.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    shim_fds: u64,
    agent_fds: u64,
    shim_anon: u64,
    agent_anon: u64,
    staged: u64,
    cgroups: u64,
    dying: u64,
    processes: u64,
}

fn sizes(shim: u32, agent: u32, parent: &str) -> Sizes {
    let dying = PathBuf::from("/sys/fs/cgroup/unified").join(parent);
    let dying = [dying, Path::new("/sys/fs/cgroup").join(parent)]
        .iter()
        .find_map(|dir| fs::read_to_string(dir.join("cgroup.stat")).ok())
        .and_then(|text| {
            let line = text
                .lines()
                .find(|l| l.starts_with("nr_dying_descendants"))?;
            line.split(' ').nth(1)?.parse().ok()
        });
    Sizes {
        shim_fds: entries(format!("/proc/{shim}/fd")),
        agent_fds: entries(format!("/proc/{agent}/fd")),
        shim_anon: kilobytes(shim, "Anonymous"),
        agent_anon: kilobytes(agent, "Anonymous"),
        staged: entries(format!("/proc/{agent}/root/staging")),
        cgroups: leaks::cgroups_with(parent).len() as u64,
        dying: dying.unwrap_or(0),
        processes: procs::family(shim).len() as u64,
    }
}

fn fault_rounds_in_a_pod_leave_no_growth() -> Outcome {
    casemate_only()?;
    let rounds = number("CASEMATE_TEST_ROUNDS", 200);
    let mut pause = pod::pause("rounds")?;
    let traces = Traces::of(&mut pause)?;
    pause.boot()?;
    pause.create()?;
    pause.rpc()?.start(&pause.id)?;
    let shim = pause.shim_pid()?;
    let agent = children(shim).first().copied().unwrap_or(0);
    let parent = format!("parent-{}", pause.id);
    let round = |n: usize| -> Outcome {
        let mut task = pod::container(&pause, "round", &["/bin/probe", "exit", "3"])?;
        task.spec["linux"]["cgroupsPath"] = format!("/{parent}/{}", task.id).into();
        task.boot()?;
        task.create()?;
        let status = task.start_and_wait()?.exit_status;
        ensure!(status == 3, "round {n}: status {status}");
        task.rpc()?.delete(&task.id)?;
        let (bundle, side) = (task.bundle().to_owned(), task.side.clone());
        task.forget();
        let _ = fs::remove_dir_all(bundle);
        let _ = fs::remove_dir_all(side);
        Ok(())
    };
    // Buffers and tables reach their size: with connections that are closed by and by,
    // the heap is largest only after some hundred rounds.
    for n in 0..150 {
        round(n)?;
    }
    let before = sizes(shim, agent, &parent);
    let begun = Instant::now();
    for n in 0..rounds {
        round(n)?;
    }
    let each = begun.elapsed() / u32::try_from(rounds).unwrap_or(1).max(1);
    // Connections that the test has dropped are closed by and by.
    let _ = until(
        "the last descriptors to close",
        Duration::from_secs(3),
        || sizes(shim, agent, &parent).shim_fds <= before.shim_fds,
    );
    let after = sizes(shim, agent, &parent);
    println!("{rounds} rounds, {each:?} each: before {before:?}, after {after:?}");
    for (what, more, allowed) in [
        ("shim's descriptors", [before.shim_fds, after.shim_fds], 0),
        (
            "agent's descriptors",
            [before.agent_fds, after.agent_fds],
            0,
        ),
        ("shim's memory", [before.shim_anon, after.shim_anon], 256),
        ("agent's memory", [before.agent_anon, after.agent_anon], 64),
        ("staged", [before.staged, after.staged], 0),
        ("cgroups", [before.cgroups, after.cgroups], 0),
        ("dying cgroups", [before.dying, after.dying], 8),
        ("processes", [before.processes, after.processes], 0),
    ] {
        let [before, after] = more;
        ensure!(after <= before + allowed, "{what}: {before}, then {after}");
    }
    let rpc = pause.rpc()?;
    rpc.kill(&pause.id, 9, true)?;
    rpc.wait(&pause.id, SHORT)?;
    rpc.delete(&pause.id)?;
    rpc.shutdown(&pause.id)?;
    pause.wait_gone(Duration::from_secs(3))?;
    pause.shim.delete()?;
    Ok(traces.expect(&Default::default(), Duration::from_secs(1))?)
}

fn fault_rounds_of_pods_leave_nothing() -> Outcome {
    casemate_only()?;
    let rounds = number("CASEMATE_TEST_ROUNDS", 200) / 5;
    let sockets = |traces: &[Traces]| -> Result<(), Stop> {
        for traces in traces {
            traces.expect(&Default::default(), Duration::from_secs(1))?;
        }
        Ok(())
    };
    let mut all = Vec::new();
    let begun = Instant::now();
    for n in 0..rounds {
        let mut task = Task::new("pods", &["/bin/probe", "exit", "3"])?;
        all.push(Traces::of(&mut task)?);
        let (deleted, _) = task.run_to_end()?;
        ensure!(
            deleted.exit_status == 3,
            "round {n}: {}",
            deleted.exit_status
        );
        task.rpc()?.shutdown(&task.id)?;
        task.wait_gone(Duration::from_secs(3))?;
        task.shim.delete()?;
    }
    println!("{rounds} pods in {:?}", begun.elapsed());
    sockets(&all)
}

/// Shim, agent, forkers and workloads together: PSS in kB.
fn pss(shims: &[u32]) -> u64 {
    let all = shims.iter().flat_map(|shim| procs::family(*shim));
    all.map(|who| kilobytes(who.pid, "Pss")).sum()
}

fn fault_crowd_in_one_pod() -> Outcome {
    casemate_only()?;
    let count = number("CASEMATE_TEST_CROWD", 100);
    let mut pause = pod::pause("crowd")?;
    pause.boot()?;
    pause.create()?;
    pause.rpc()?.start(&pause.id)?;
    let mut tasks = Vec::new();
    for _ in 0..count {
        let mut task = pod::container(&pause, "member", &["/bin/probe", "sleep"])?;
        task.boot()?;
        tasks.push(task);
    }
    let begun = Instant::now();
    let results: Vec<Result<(), String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = tasks
            .iter()
            .map(|task| {
                scope.spawn(move || {
                    let rpc = task.rpc().map_err(|e| e.to_string())?;
                    rpc.call::<containerd_shim_protos::api::CreateTaskResponse>(
                        "Create",
                        &task.create_request(),
                        LONG,
                    )
                    .map_err(|e| e.to_string())?;
                    rpc.start(&task.id).map(drop).map_err(|e| e.to_string())
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err("a panic".to_owned())))
            .collect()
    });
    let took = begun.elapsed();
    let failed: Vec<_> = results.iter().filter_map(|r| r.as_ref().err()).collect();
    ensure!(
        failed.is_empty(),
        "{} of {count} failed: {:?}",
        failed.len(),
        failed.first()
    );
    let shim = pause.shim_pid()?;
    println!(
        "{count} containers at once in one pod: {took:?}, {} kB PSS, {} descriptors of the shim",
        pss(&[shim]),
        entries(format!("/proc/{shim}/fd"))
    );
    // And execs at once in one of them.
    let execs: Vec<Exec> = (0..20)
        .map(|n| Exec::new(&tasks[0], &format!("x{n}"), &["/bin/probe", "exit", "5"]))
        .collect::<Result<_, _>>()?;
    let begun = Instant::now();
    let codes: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = execs
            .iter()
            .map(|exec| scope.spawn(|| exec.begin().and_then(|_| exec.wait())))
            .collect();
        threads.into_iter().map(|t| t.join().ok()).collect()
    });
    println!("20 execs at once: {:?}", begun.elapsed());
    let good = codes.iter().filter(|c| matches!(c, Some(Ok(5)))).count();
    ensure!(good == 20, "execs: {codes:?}");
    for task in tasks {
        pod::end(task)?;
    }
    Ok(pause.finish()?)
}

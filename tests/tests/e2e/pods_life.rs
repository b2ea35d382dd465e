//! 70, 71, 143–146: containers of a pod come and go, in the right order, and the
//! others don't notice.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::error::Failure;
use casemate_tests::pod::{Pids, Pod, exec, init, insiders, namespace, population, say};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, leaks, procs};
use containerd_shim_protos::api::Status;
use rustix::process::Signal;
use serde_json::json;
use ttrpc::Code;

use crate::common::{LONG, expect_code};

crate::trials![
    c070_exec_outlives_init_with_shared_pids,
    c071_exec_outlives_init_with_private_pids,
    c143_delete_of_one_container_v2,
    c144_delete_of_the_pod_v3,
    c145_pause_first_and_no_second_shutdown,
    c146_delete_while_a_container_lives,
    pod_execs_that_start_as_init_ends,
    pod_leftovers_go_with_their_container,
    pod_pids_are_one_containers,
    pod_init_containers_sidecar_and_restarts,
    pod_a_container_after_an_oom_kill,
    pod_pause_behaves_as_a_task,
    pod_pause_ends_after_the_answer,
    pod_a_create_that_is_given_up,
    pod_a_create_that_is_given_up_and_stuck,
];

const SLEEP: [&str; 2] = ["/bin/probe", "sleep"];
const SOON: Duration = Duration::from_secs(5);

fn exec_goes_before_init(name: &str, pids: Pids<'_>) -> Outcome {
    let pod = Pod::start(name)?;
    let a = pod.run("a", &SLEEP, pids)?;
    let b = pod.run("b", &SLEEP, Pids::Pod)?;
    let script = "sleep 1000 & exec sleep 1000";
    let (pid, _out) = exec(&a, "e1", &["/bin/sh", "-c", script])?;
    ensure!(procs::identity(pid).is_some(), "no exec'ed process {pid}");
    a.rpc()?.kill(&a.id, 15, false)?;
    // A pid 1 takes no SIGTERM that it doesn't handle; anybody else ends by it.
    if matches!(pids, Pids::Own) {
        a.rpc()?.kill(&a.id, 9, false)?;
    }
    let status = a.rpc()?.wait(&a.id, SOON)?.exit_status;
    let wanted = if matches!(pids, Pids::Own) { 137 } else { 143 };
    ensure_eq!(status, wanted, "exit status of init");
    let late = a.rpc()?.wait_exec((&a.id, "e1"))?.exit_status;
    ensure_eq!(late, 137, "exit status of the exec");
    let exits = pod.wait_for_exits(2)?;
    let wanted = [
        (a.id.clone(), "e1".to_owned(), 137),
        (a.id.clone(), a.id.clone(), wanted),
    ];
    ensure_eq!(exits, wanted, "exits in order");
    until("its processes to end", SOON, || {
        processes_of(&a).is_ok_and(|left| left.is_empty())
    })?;
    ensure!(procs::identity(init(&b)?).is_some(), "the sibling died too");
    pod.remove(a)?;
    pod.remove(b)?;
    Ok(pod.finish()?)
}

/// Host pids that `Pids` answers for a container.
fn processes_of(task: &Task) -> Result<Vec<u32>, Stop> {
    let answer = task.rpc()?.pids(&task.id)?;
    Ok(answer.processes.iter().map(|p| p.pid).collect())
}

fn c070_exec_outlives_init_with_shared_pids() -> Outcome {
    exec_goes_before_init("c070", Pids::Pod)
}

fn c071_exec_outlives_init_with_private_pids() -> Outcome {
    exec_goes_before_init("c071", Pids::Own)
}

fn pod_execs_that_start_as_init_ends() -> Outcome {
    let pod = Pod::start("race")?;
    for round in 0..20 {
        let a = pod.run("race-a", &SLEEP, Pids::Pod)?;
        let process = {
            let mut process = a.spec["process"].clone();
            process["args"] = json!(SLEEP);
            process
        };
        let rpc = a.rpc()?.clone();
        rpc.exec((&a.id, "late"), &process, "", "")?;
        let (client, id) = (rpc.clone(), a.id.clone());
        let start = std::thread::spawn(move || client.start_exec((&id, "late")).is_ok());
        // Now before it, now after, now in the middle.
        std::thread::sleep(Duration::from_micros(100 * round));
        rpc.kill(&a.id, 9, false)?;
        let started = start.join().unwrap_or(false);
        let status = rpc.wait(&a.id, SOON)?.exit_status;
        ensure_eq!(status, 137, "round {round}: exit status of init");
        if started {
            let late = rpc.wait_exec((&a.id, "late"))?.exit_status;
            ensure_eq!(late, 137, "round {round}: exit status of the exec");
        }
        until("its processes to end", SOON, || {
            processes_of(&a).is_ok_and(|left| left.is_empty())
        })?;
        pod.remove(a)?;
    }
    let left = population(namespace(pod.pid, "pid")?);
    ensure_eq!(left, [pod.pid], "processes left in the pod");
    Ok(pod.finish()?)
}

fn pod_leftovers_go_with_their_container() -> Outcome {
    let pod = Pod::start("leftovers")?;
    let b = pod.run("left-b", &SLEEP, Pids::Pod)?;
    // Children in sessions of their own, orphaned at once; init ends by itself.
    let script = "for i in 1 2 3 4 5; do setsid sleep 1000 & done; sleep 0.2; exit 5";
    let a = pod.run("left-a", &["/bin/sh", "-c", script], Pids::Pod)?;
    ensure_eq!(a.rpc()?.wait(&a.id, LONG)?.exit_status, 5, "exit status");
    let shared = namespace(pod.pid, "pid")?;
    until("what init left to end", SOON, || {
        population(shared).len() == 2
    })?;
    let deleted = pod.remove(a)?;
    ensure_eq!(deleted.exit_status, 5, "exit status in Delete");
    ensure!(procs::identity(init(&b)?).is_some(), "the sibling died too");
    pod.remove(b)?;
    Ok(pod.finish()?)
}

fn pod_pids_are_one_containers() -> Outcome {
    let pod = Pod::start("pids")?;
    let script = "sleep 1000 & sleep 1000 & wait";
    let a = pod.run("pids-a", &["/bin/sh", "-c", script], Pids::Pod)?;
    let b = pod.run("pids-b", &SLEEP, Pids::Pod)?;
    until("two children", SOON, || {
        processes_of(&a).is_ok_and(|pids| pids.len() == 3)
    })?;
    let all = population(namespace(pod.pid, "pid")?);
    ensure_eq!(all.len(), 5, "processes in the pod: {all:?}");
    let of_a = processes_of(&a)?;
    ensure!(of_a.contains(&init(&a)?), "init is missing: {of_a:?}");
    ensure_eq!(processes_of(&b)?, [init(&b)?], "processes of the second");
    ensure_eq!(processes_of(&pod.pause)?, [pod.pid], "of the pause");
    pod.remove(a)?;
    pod.remove(b)?;
    Ok(pod.finish()?)
}

fn c143_delete_of_one_container_v2() -> Outcome {
    let pod = Pod::start("c143")?;
    ensure_eq!(pod.pause.answer()?.version, 2, "version of the task API");
    let a = pod.run("c143a", &["/bin/probe", "exit", "7"], Pids::Own)?;
    let b = pod.run("c143b", &SLEEP, Pids::Own)?;
    let (shim, agent) = (pod.pause.shim_pid()?, insiders(&b)?.0);
    let before: Vec<_> = [shim, agent, init(&b)?]
        .into_iter()
        .filter_map(procs::identity)
        .collect();
    ensure_eq!(before.len(), 3, "shim, agent and init");
    a.rpc()?.wait(&a.id, SHORT)?;
    a.rpc()?.delete(&a.id)?;
    // In version 2 each Delete has a Shutdown after it, and the connection's end
    // a `delete`.
    a.rpc()?.shutdown(&a.id)?;
    let output = a.shim.run("delete")?;
    ensure_eq!(output.code(), 0, "exit of delete: {}", output.err());
    ensure_eq!(output.err(), "", "what delete says");
    ensure_eq!(a.shim.delete()?.exit_status, 7, "exit status in its answer");
    for process in before {
        ensure!(procs::alive(process), "{process:?} has ended");
    }
    ensure_eq!(say(&b, "still", &["/bin/echo", "here"])?, "here\n", "exec");
    a.forget();
    pod.remove(b)?;
    Ok(pod.finish()?)
}

fn c144_delete_of_the_pod_v3() -> Outcome {
    // After Shutdown, and during it.
    for during in [false, true] {
        let pod = Pod::with("c144", |pause| pause.spec["ociVersion"] = json!("1.2.0"))?;
        ensure_eq!(pod.pause.answer()?.version, 3, "version of the task API");
        let a = pod.run("c144a", &SLEEP, Pids::Pod)?;
        let id = a.id.clone();
        pod.remove(a)?;
        let pause = &pod.pause;
        pause.rpc()?.kill(&pause.id, 9, false)?;
        pause.rpc()?.wait(&pause.id, SHORT)?;
        let status = pause.rpc()?.delete(&pause.id)?.exit_status;
        let (client, pause_id) = (pause.rpc()?.clone(), pause.id.clone());
        let shutdown = std::thread::spawn(move || client.shutdown(&pause_id).is_ok());
        if !during {
            pause.wait_gone(SOON)?;
        }
        let output = pause.shim.run("delete")?;
        ensure_eq!(output.code(), 0, "exit of delete: {}", output.err());
        ensure_eq!(output.err(), "", "what delete says");
        ensure!(shutdown.join().unwrap_or(false), "Shutdown failed");
        pause.wait_gone(SOON)?;
        ensure_eq!(
            pause.shim.delete()?.exit_status,
            status,
            "exit status in its answer"
        );
        let exits = pod.exits()?;
        let wanted = [
            (id.clone(), id, 137),
            (pause.id.clone(), pause.id.clone(), 137),
        ];
        ensure_eq!(exits, wanted, "exits");
        pause.expect_clean(SOON)?;
    }
    Ok(())
}

fn c145_pause_first_and_no_second_shutdown() -> Outcome {
    let pod = Pod::with("c145", |pause| pause.spec["ociVersion"] = json!("1.2.0"))?;
    let a = pod.run("c145a", &SLEEP, Pids::Pod)?;
    let pause = &pod.pause;
    pause.rpc()?.kill(&pause.id, 9, true)?;
    let ended = pause.rpc()?.wait(&pause.id, SHORT)?.exit_status;
    ensure_eq!(ended, 137, "exit status of the pause");
    pause.rpc()?.delete(&pause.id)?;
    pause.rpc()?.shutdown(&pause.id)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(
        procs::identity(pause.shim_pid()?).is_some(),
        "the shim went while a container runs"
    );
    expect_code(
        "State of the pause",
        a.rpc()?.state(&pause.id),
        Code::NOT_FOUND,
    )?;
    // Its processes are all there, so is the namespace.
    ensure_eq!(say(&a, "still", &["/bin/echo", "here"])?, "here\n", "exec");
    a.rpc()?.kill(&a.id, 9, false)?;
    a.rpc()?.wait(&a.id, SHORT)?;
    a.rpc()?.delete(&a.id)?;
    pause.wait_gone(Duration::from_secs(3))?;
    a.expect_clean(SOON)?;
    a.forget();
    Ok(pause.expect_clean(SOON)?)
}

fn c146_delete_while_a_container_lives() -> Outcome {
    let pod = Pod::with("c146", |pause| pause.spec["ociVersion"] = json!("1.2.0"))?;
    let b = pod.run("c146b", &SLEEP, Pids::Pod)?;
    let pid = init(&b)?;
    // With the pause, and when it has gone.
    for gone in [false, true] {
        let pause = &pod.pause;
        if gone {
            pause.rpc()?.kill(&pause.id, 9, false)?;
            pause.rpc()?.wait(&pause.id, SHORT)?;
            pause.rpc()?.delete(&pause.id)?;
        }
        let output = pause.shim.run("delete")?;
        ensure_eq!(output.code(), 0, "exit of delete: {}", output.err());
        ensure_eq!(init(&b)?, pid, "pid in State");
        ensure!(procs::identity(pid).is_some(), "the container died");
        let still = say(&b, &format!("still{gone}"), &["/bin/echo", "here"])?;
        ensure_eq!(still, "here\n", "exec");
        ensure!(!leaks::cgroups_with(&b.id).is_empty(), "its cgroup is gone");
    }
    pod.remove(b)?;
    Ok(pod.finish()?)
}

fn pod_init_containers_sidecar_and_restarts() -> Outcome {
    let pod = Pod::start("stages")?;
    // What all of them share beside namespaces: a directory.
    let shared = pod.pause.side.join("shared");
    fs::create_dir_all(&shared)?;
    casemate_tests::world::set_mode(&shared, 0o777)?;
    let run = |name: &str, script: &str, pids: Pids<'_>| -> Result<Task, Stop> {
        let mut task = pod.member(name, &["/bin/sh", "-c", script], pids)?;
        if let Some(mounts) = task.spec["mounts"].as_array_mut() {
            mounts.push(json!({
                "destination": "/shared", "type": "bind", "source": shared,
                "options": ["rbind", "rw"]
            }));
        }
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        Ok(task)
    };
    let sidecar = run(
        "sidecar",
        "while :; do date > /shared/alive; sleep 0.1; done",
        Pids::Pod,
    )?;
    let side = procs::identity(init(&sidecar)?);
    for n in 1..=2 {
        let script = format!("echo {n} >> /shared/order");
        let step = run(&format!("init{n}"), &script, Pids::Pod)?;
        ensure_eq!(
            step.rpc()?.wait(&step.id, LONG)?.exit_status,
            0,
            "init container {n}"
        );
        pod.remove(step)?;
    }
    // The application crashes, and is made anew, under another id.
    for n in 1..=3 {
        let script = format!("echo app{n} >> /shared/order; exit 3");
        let app = run("app", &script, Pids::Pod)?;
        ensure_eq!(app.rpc()?.wait(&app.id, LONG)?.exit_status, 3, "run {n}");
        ensure_eq!(pod.remove(app)?.exit_status, 3, "Delete of run {n}");
    }
    let app = run("app", "exec sleep 1000", Pids::Pod)?;
    ensure_eq!(
        fs::read_to_string(shared.join("order"))?,
        "1\n2\napp1\napp2\napp3\n",
        "what ran"
    );
    ensure!(
        side.is_some_and(procs::alive),
        "the sidecar did not live through it"
    );
    // Then the sidecar is made anew.
    pod.remove(sidecar)?;
    ensure!(
        procs::identity(init(&app)?).is_some(),
        "the application went with the sidecar"
    );
    let sidecar = run("sidecar", "exec sleep 1000", Pids::Pod)?;
    ensure_eq!(
        population(namespace(pod.pid, "pid")?).len(),
        3,
        "processes of the pod"
    );
    pod.remove(sidecar)?;
    pod.remove(app)?;
    Ok(pod.finish()?)
}

fn pod_a_container_after_an_oom_kill() -> Outcome {
    let pod = Pod::start("oom")?;
    let b = pod.run("oom-b", &SLEEP, Pids::Pod)?;
    let hog = |name: &str| -> Result<Task, Stop> {
        let args = [
            "/bin/dd",
            "if=/dev/zero",
            "of=/dev/null",
            "bs=200M",
            "count=1",
        ];
        let mut task = pod.member(name, &args, Pids::Pod)?;
        task.spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        Ok(task)
    };
    for round in 1..=2 {
        let task = hog("oom-a")?;
        let status = task.rpc()?.wait(&task.id, LONG)?.exit_status;
        ensure_eq!(status, 137, "round {round}: exit status");
        let exits = pod.wait_for_exits(round)?;
        ensure_eq!(exits[round - 1].0, task.id, "round {round}: who ended");
        let victims: Vec<String> = pod
            .pause
            .events
            .events()
            .iter()
            .filter(|event| event.topic == "/tasks/oom")
            .map(|event| {
                event
                    .decode::<containerd_shim_protos::events::task::TaskOOM>()
                    .map(|oom| oom.container_id)
            })
            .collect::<Result<_, _>>()?;
        ensure_eq!(victims.len(), round, "OOM events: {victims:?}");
        ensure_eq!(victims[round - 1], task.id, "whose OOM event");
        pod.remove(task)?;
    }
    ensure!(procs::identity(init(&b)?).is_some(), "the sibling died too");
    ensure!(procs::identity(pod.pid).is_some(), "the pause died too");
    pod.remove(b)?;
    Ok(pod.finish()?)
}

fn pod_pause_behaves_as_a_task() -> Outcome {
    let pod = Pod::start("pause")?;
    let pause = &pod.pause;
    let rpc = pause.rpc()?;
    let state = rpc.state(&pause.id)?;
    ensure_eq!(state.pid, pod.pid, "pid in State");
    ensure_eq!(rpc.shim(&pause.id)?.task_pid, pod.pid, "pid in Connect");
    let name = fs::read_to_string(format!("/proc/{}/comm", pod.pid))?;
    ensure_eq!(name.trim(), "casemate-pause", "name of the process");
    expect_code(
        "Exec",
        rpc.exec((&pause.id, "e"), &pause.spec["process"], "", ""),
        Code::FAILED_PRECONDITION,
    )?;
    // Politely it ends as the pause binary does.
    rpc.kill(&pause.id, 15, false)?;
    ensure_eq!(
        rpc.wait(&pause.id, SHORT)?.exit_status,
        0,
        "exit status after SIGTERM"
    );
    expect_code("Kill", rpc.kill(&pause.id, 9, false), Code::NOT_FOUND)?;
    Ok(pod.finish()?)
}

/// CRI takes the pod away when it is told of that end, with the connection that Kill's
/// answer comes by.
fn pod_pause_ends_after_the_answer() -> Outcome {
    crate::common::casemate_only()?;
    let mut first = 0;
    for signal in [9, 15, 9, 15, 9] {
        let pod = Pod::start("answerfirst")?;
        let rpc = pod.pause.rpc()?;
        rpc.kill(&pod.pause.id, signal, false)?;
        first += u32::from(rpc.state(&pod.pause.id)?.status == Status::RUNNING.into());
        let status = rpc.wait(&pod.pause.id, SHORT)?.exit_status;
        ensure_eq!(
            status,
            if signal == 9 { 137 } else { 0 },
            "status after {signal}"
        );
        pod.finish()?;
    }
    // On a busy machine not each time.
    ensure!(first > 0, "the end came with the answer, each time");
    Ok(())
}

/// What a client does that can't wait for Create any more, as containerd whose own client
/// has gone: the container goes, in whichever order the two are done, and the pod lives.
fn pod_a_create_that_is_given_up() -> Outcome {
    let pod = Pod::start("givenup")?;
    let other = pod.run("givenup-a", &SLEEP, Pids::Own)?;
    for round in 0..6 {
        let mut task = pod.member("givenup-b", &SLEEP, Pids::Own)?;
        let path = task.side.join("stdin");
        task.stdio[0] = path.display().to_string();
        task.boot()?;
        let (created, deleted) = std::thread::scope(|scope| {
            let client = scope.spawn(|| -> Outcome {
                // Waits until Create opens it.
                let _input = File::options().write(true).open(&path)?;
                if round % 2 == 0 {
                    task.rpc()?.delete(&task.id)?;
                } else {
                    task.rpc()?.kill(&task.id, 9, false)?;
                }
                Ok(())
            });
            (task.create(), client.join())
        });
        created?;
        deleted.unwrap_or_else(|_| fail("the client panicked"))?;
        if round % 2 == 1 {
            let ended = task.rpc()?.wait(&task.id, SOON)?;
            ensure_eq!(ended.exit_status, 137, "exit status");
            task.rpc()?.delete(&task.id)?;
        }
        expect_code("State", task.rpc()?.state(&task.id), Code::NOT_FOUND)?;
        task.forget();
    }
    pod.remove(other)?;
    Ok(pod.finish()?)
}

/// Kill and Delete don't wait for a Create that is stuck, and it undoes itself.
fn pod_a_create_that_is_given_up_and_stuck() -> Outcome {
    let pod = Pod::start("stuck")?;
    let other = pod.run("stuck-a", &SLEEP, Pids::Own)?;
    let mut task = pod.member("stuck-b", &SLEEP, Pids::Own)?;
    task.boot()?;
    let agent = insiders(&other)?.0;
    procs::signal(agent, Signal::STOP);
    let (created, answers) = std::thread::scope(|scope| {
        let creates = scope.spawn(|| task.create());
        let rpc = task.rpc();
        let answers = rpc.map(|rpc| {
            // Until it has begun, both answer at once.
            std::thread::sleep(Duration::from_millis(200));
            let begun = Instant::now();
            let killed = rpc.kill(&task.id, 9, true).map(drop);
            let deleted = rpc.delete(&task.id).map(drop);
            (killed, deleted, begun.elapsed())
        });
        procs::signal(agent, Signal::CONT);
        (creates.join(), answers)
    });
    let (killed, deleted, took) = answers?;
    expect_code("Kill", killed, Code::NOT_FOUND)?;
    expect_code("Delete", deleted, Code::NOT_FOUND)?;
    ensure!(
        took < Duration::from_secs(2),
        "Kill and Delete took {took:?}"
    );
    let created = created.unwrap_or_else(|_| Err(Failure::Unexpected("a panic".to_owned())));
    let Err(error) = created else {
        return fail("a container was made that had been deleted");
    };
    let error = error.to_string();
    ensure!(
        error.contains("it was deleted meanwhile"),
        "Create: {error}"
    );
    expect_code("State", task.rpc()?.state(&task.id), Code::NOT_FOUND)?;
    ensure_eq!(
        processes_of(&other)?,
        [init(&other)?],
        "processes of the other"
    );
    task.forget();
    pod.remove(other)?;
    Ok(pod.finish()?)
}

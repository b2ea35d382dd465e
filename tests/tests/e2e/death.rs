//! 101–112: shutdown, violent ends, and the `delete` command.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::probe;
use casemate_tests::{ensure, ensure_eq, leaks, procs};
use containerd_shim_protos::api::{DeleteResponse, Empty, ShutdownRequest};
use protobuf::Message;
use rustix::process::Signal;
use serde_json::json;

use crate::common::{RUNNING, casemate_only, status};

crate::trials![
    c101_shutdown_with_a_container,
    c102_shutdown,
    c103_death_of_the_shim_kills_the_workload,
    c104_delete_after_the_shim_was_killed,
    c105_delete_twice,
    c105_two_deletes_at_once,
    c105_delete_with_garbage_in_the_journal,
    c106_delete_of_a_wedged_shim,
    c107_delete_speaks_protobuf_only,
    c108_death_of_the_agent,
    c112_delete_without_a_bundle,
    c143_delete_while_the_shim_serves,
];

fn c101_shutdown_with_a_container() -> Outcome {
    let task = Task::sleeping("c101")?;
    task.rpc()?.shutdown(&task.id)?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(
        procs::identity(task.shim_pid()?).is_some(),
        "the shim ended"
    );
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}

fn c102_shutdown() -> Outcome {
    let mut task = Task::new("c102", &["/bin/true"])?;
    task.run_to_end()?;
    let socket = task.answer()?.socket();
    // The answer itself is asked for here, which containerd could do without.
    let ask = ShutdownRequest {
        id: task.id.clone(),
        ..Default::default()
    };
    task.rpc()?.call::<Empty>("Shutdown", &ask, SHORT)?;
    task.wait_gone(Duration::from_secs(3))?;
    // containerd unlinks it too, from the answer of `delete`.
    until("the socket to go", Duration::from_secs(1), || {
        !socket.exists()
    })?;
    Ok(task.expect_clean(Duration::from_secs(1))?)
}

/// Everything that belongs to the task: the shim, its children, the workload.
fn members(task: &Task) -> casemate_tests::Result<Vec<procs::Identity>> {
    let mut all = procs::family(task.shim_pid()?);
    for process in task.rpc()?.pids(&task.id)?.processes {
        all.extend(procs::family(process.pid));
    }
    Ok(all)
}

fn kill_shim(task: &Task) -> casemate_tests::Result<()> {
    procs::signal(task.shim_pid()?, Signal::KILL);
    task.wait_gone(Duration::from_secs(2)).map(|_| ())
}

fn c103_death_of_the_shim_kills_the_workload() -> Outcome {
    casemate_only()?;
    let task = Task::running(
        "c103",
        &["/bin/sh", "-c", "probe sleep & echo up; exec probe sleep"],
    )?;
    task.stdout.until("up", SHORT)?;
    let all = members(&task)?;
    ensure!(all.len() >= 3, "only {} processes found", all.len());
    kill_shim(&task)?;
    let gone = until("all to die", Duration::from_secs(1), || {
        !all.iter().any(|p| procs::alive(*p))
    });
    let left: Vec<String> = all
        .iter()
        .filter(|p| procs::alive(**p))
        .map(|p| format!("{} {}", p.pid, procs::command_line(p.pid)))
        .collect();
    ensure!(gone.is_ok(), "alive 1 s after the shim: {left:?}");
    Ok(())
}

fn c104_delete_after_the_shim_was_killed() -> Outcome {
    let mut task = Task::new("c104", &["/bin/probe", "sleep"])?;
    task.boot()?;
    let pid = task.create()?.pid;
    task.rpc()?.start(&task.id)?;
    let all = members(&task)?;
    kill_shim(&task)?;
    let begun = Instant::now();
    let reply = task.shim.delete()?;
    ensure!(
        begun.elapsed() < Duration::from_secs(5),
        "delete took {:?}",
        begun.elapsed()
    );
    ensure_eq!((reply.pid, reply.exit_status), (pid, 137), "reply");
    ensure!(reply.exited_at.is_some(), "no time in the reply");
    ensure!(
        !all.iter().any(|p| procs::alive(*p)),
        "processes live after delete"
    );
    // The log fifo's reader is ours; everything else must be gone.
    Ok(task.expect_clean(Duration::from_secs(1))?)
}

fn c105_delete_twice() -> Outcome {
    let task = Task::sleeping("c105")?;
    kill_shim(&task)?;
    task.shim.delete()?;
    let second = task.shim.run("delete")?;
    ensure_eq!(second.code(), 0, "second delete: {}", second.err());
    ensure!(
        DeleteResponse::parse_from_bytes(&second.stdout).is_ok(),
        "second answer"
    );
    let mut other = task.shim.clone();
    other.id = format!("{}-app", task.id);
    let answer = other.run("delete")?;
    ensure_eq!(
        answer.code(),
        0,
        "delete of an app container: {}",
        answer.err()
    );
    ensure!(
        DeleteResponse::parse_from_bytes(&answer.stdout).is_ok(),
        "its answer"
    );
    Ok(())
}

/// Both answer, whoever does the work, and what was there is gone.
fn c105_two_deletes_at_once() -> Outcome {
    for _ in 0..5 {
        let task = Task::sleeping("c105b")?;
        let all = members(&task)?;
        kill_shim(&task)?;
        let answers = std::thread::scope(|scope| {
            let each: Vec<_> = (0..3)
                .map(|_| scope.spawn(|| task.shim.run("delete")))
                .collect();
            each.into_iter().map(|one| one.join()).collect::<Vec<_>>()
        });
        for answer in answers {
            let answer = answer.map_err(|_| Stop::Fail("a delete panicked".to_owned()))??;
            ensure_eq!(answer.code(), 0, "delete: {}", answer.err());
            let reply = DeleteResponse::parse_from_bytes(&answer.stdout)?;
            ensure_eq!(reply.exit_status, 137, "status");
        }
        ensure!(
            !all.iter().any(|p| procs::alive(*p)),
            "processes live after delete"
        );
        task.expect_clean(Duration::from_secs(1))?;
    }
    Ok(())
}

/// A disk that wrote nonsense, and processes that have the numbers of ours by now.
fn c105_delete_with_garbage_in_the_journal() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c105g")?;
    let all = members(&task)?;
    kill_shim(&task)?;
    let other = Command::new(probe()?)
        .arg("sleep")
        .process_group(0)
        .spawn()?;
    let identity = procs::identity(other.id())
        .ok_or_else(|| Stop::Fail("no process of our own".to_owned()))?;
    let journal = task.bundle().join("casemate.journal");
    let pid = identity.pid;
    let write = |start: u64| -> Outcome {
        let who = json!({"pid": pid, "start_time": start});
        let mut logger = who.clone();
        logger["container"] = task.id.clone().into();
        let mut bytes = fs::read(&journal)?;
        bytes.extend(b"\0\xff\xfe\n{\"agent\":\n[[[[[\n{\"socket\":7}\n{\"later\":{}}\n\n");
        bytes.extend("[".repeat(1 << 20).bytes());
        for line in [
            json!({"agent": who}),
            json!({"shim": who}),
            json!({"logger": logger}),
            json!({"init": {"container": task.id, "pid": pid}}),
            json!({"cgroup": {"container": "", "dirs": ["/no/such", "", "../.."]}}),
            json!({"registry": "/no/such"}),
            json!({"container": {"id": "x", "bundle": "/no/such"}}),
        ] {
            bytes.extend(format!("\n{line}").bytes());
        }
        bytes.extend(b"\n{\"exit\":{\"container\":\"torn");
        fs::write(&journal, bytes)?;
        let answer = task.shim.run("delete")?;
        ensure_eq!(answer.code(), 0, "delete: {}", answer.err());
        DeleteResponse::parse_from_bytes(&answer.stdout)?;
        Ok(())
    };
    let done = write(identity.start_time + 1);
    let spared = procs::alive(identity);
    // Control: with its own time of birth it is taken for the agent.
    let killed = done.and_then(|()| write(identity.start_time));
    let lives = procs::alive(identity);
    crate::posture::end(other);
    killed?;
    ensure!(spared, "a process that only has the number was killed");
    ensure!(!lives, "control: the journal's own process lives");
    ensure!(
        !all.iter().any(|p| procs::alive(*p)),
        "processes live after delete"
    );
    Ok(task.expect_clean(Duration::from_secs(2))?)
}

fn c106_delete_of_a_wedged_shim() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c106")?;
    let all = members(&task)?;
    procs::signal(task.shim_pid()?, Signal::STOP);
    let begun = Instant::now();
    let reply = task.shim.delete()?;
    ensure!(
        begun.elapsed() < Duration::from_secs(5),
        "delete took {:?}",
        begun.elapsed()
    );
    ensure_eq!(reply.exit_status, 137, "status");
    until("all to die", Duration::from_secs(1), || {
        !all.iter().any(|p| procs::alive(*p))
    })?;
    Ok(task.expect_clean(Duration::from_secs(1))?)
}

fn c107_delete_speaks_protobuf_only() -> Outcome {
    let task = Task::sleeping("c107")?;
    kill_shim(&task)?;
    let mut noisy = task.shim.clone();
    noisy.debug = true;
    noisy.env.push(("RUST_LOG".to_owned(), "trace".to_owned()));
    // A record cut short is what a crash leaves.
    let _ = fs::write(task.bundle().join("config.json"), b"{\"ociVersion\": \"1.0");
    let output = noisy.run("delete")?;
    ensure_eq!(output.code(), 0, "exit code: {}", output.err());
    let reply = DeleteResponse::parse_from_bytes(&output.stdout)?;
    ensure!(
        reply.unknown_fields().iter().next().is_none(),
        "stdout {:?}",
        output.out()
    );
    Ok(())
}

fn c108_death_of_the_agent() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c108")?;
    let shim = task.shim_pid()?;
    let agents: Vec<_> = procs::family(shim)
        .into_iter()
        .filter(|p| p.pid != shim)
        .collect();
    ensure!(!agents.is_empty(), "the shim has no children");
    procs::signal(agents[0].pid, Signal::KILL);
    ensure_eq!(
        task.rpc()?
            .wait(&task.id, Duration::from_secs(5))?
            .exit_status,
        137,
        "Wait"
    );
    task.events.wait_for("exit", SHORT)?;
    task.rpc()?.delete(&task.id)?;
    Ok(task.finish()?)
}

fn c112_delete_without_a_bundle() -> Outcome {
    let mut task = Task::new("c112", &["/bin/true"])?;
    task.run_to_end()?;
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(3))?;
    let _ = fs::remove_dir_all(task.bundle());
    let begun = Instant::now();
    let output = task.shim.run("delete")?;
    ensure_eq!(output.code(), 0, "exit code: {}", output.err());
    ensure!(
        begun.elapsed() < Duration::from_secs(1),
        "delete took {:?}",
        begun.elapsed()
    );
    ensure!(!output.err().contains("rror"), "stderr {:?}", output.err());
    Ok(())
}

fn c143_delete_while_the_shim_serves() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c143")?;
    let mut other = task.shim.clone();
    other.id = format!("{}-other", task.id);
    ensure_eq!(other.run("delete")?.code(), 0, "delete of a stranger");
    ensure_eq!(status(&task)?, RUNNING, "state of the one that serves");
    ensure!(
        !leaks::cgroups_with(&task.id).is_empty(),
        "its cgroup is gone"
    );
    Ok(task.finish()?)
}

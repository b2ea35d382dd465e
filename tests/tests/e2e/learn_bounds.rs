//! Learning is bounded: who answers for the calls is stopped, killed or flooded.

use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::operator::records;
use casemate_tests::pod::{Pids, Pod, insiders, say};
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, procs};
use rustix::process::Signal;
use seccomp_profiles::Recording;
use seccomp_profiles::recording::Container;

use crate::common::{LONG, RUNNING, casemate_only, status};
use crate::hostile_node::configure;
use crate::learn::{KEY, beside, directory, file, in_time, kinds, learner, of, recording, sleeper};

crate::trials![
    learn_stopped_ends_the_pod_in_time,
    learn_killed_ends_the_pod,
    learn_flood_starves_nobody,
    learn_many_sorts_are_bounded,
    learn_price_is_that_of_what_is_asked,
];

/// nanosleep, pause, clock_nanosleep, as /proc/PID/syscall has them.
const SLEEPS: [&str; 3] = ["35 ", "34 ", "230 "];

/// One more call waits for the learner; how long until the pod has ended.
fn ends(task: &Task) -> Result<Duration, Stop> {
    let exec = Exec::new(task, "e", &["/bin/true"])?;
    let begun = Instant::now();
    let waiting = std::thread::spawn(move || exec.begin().is_ok());
    let ended = task.rpc()?.wait(&task.id, Duration::from_secs(10))?;
    let took = begun.elapsed();
    ensure_eq!(ended.exit_status, 137, "exit status");
    let _refused = waiting.join();
    Ok(took)
}

fn loss(task: &Task, part: &str) -> Outcome {
    let all = records(task, "broker_loss")?;
    ensure_eq!(all.len(), 1, "records: {all:?}");
    let text = all[0]["text"].as_str().unwrap_or_default();
    ensure!(text.contains(part), "{text}");
    Ok(())
}

fn learn_stopped_ends_the_pod_in_time() -> Outcome {
    casemate_only()?;
    let task = sleeper("learnstop", "")?;
    let call = format!("/proc/{}/syscall", casemate_tests::pod::init(&task)?);
    until("init to be past its last call", LONG, || {
        let now = std::fs::read_to_string(&call).unwrap_or_default();
        SLEEPS.iter().any(|number| now.starts_with(number))
    })?;
    procs::signal(learner(&task)?, Signal::STOP);
    // While nothing waits for it, nothing happens.
    std::thread::sleep(Duration::from_millis(1500));
    ensure_eq!(status(&task)?, RUNNING, "state");
    let took = ends(&task)?;
    ensure!(took < Duration::from_secs(4), "it took {took:?}");
    loss(&task, "the learner is stopped")?;
    Ok(task.finish()?)
}

fn learn_killed_ends_the_pod() -> Outcome {
    casemate_only()?;
    let task = sleeper("learnkill", "")?;
    procs::signal(learner(&task)?, Signal::KILL);
    let ended = task.rpc()?.wait(&task.id, Duration::from_secs(5))?;
    ensure_eq!(ended.exit_status, 137, "exit status");
    loss(&task, "the learner has ended")?;
    let kept = Recording::read(&file(&task)).map_err(|e| Stop::Fail(e.to_string()))?;
    ensure!(kept.container(&task.id).is_some(), "{kept:?}");
    Ok(task.finish()?)
}

fn learn_flood_starves_nobody() -> Outcome {
    casemate_only()?;
    let mut configured = Ok(());
    let pod = Pod::with("learnflood", |task| {
        task.spec["annotations"][KEY] = "learn".into();
        let directory = directory(task);
        let text = format!(
            "[learn]\nallow = true\ndirectory = \"{}\"\n",
            directory.display()
        );
        configured = configure(task, &text).map(drop);
    })?;
    configured?;
    let script = "for n in 1 2 3 4; do (while :; do /bin/probe deeds 7007; done) & done; wait";
    let loud = pod.run("loud", &["/bin/sh", "-c", script], Pids::Own)?;
    let calls = || -> u64 {
        let seen = recording(&loud).ok();
        let counts = |seen: Recording| {
            let all = seen.containers().flat_map(|(_, c)| c.calls());
            all.map(|(_, count)| count).sum()
        };
        seen.map_or(0, counts)
    };
    until("a flood", LONG, || calls() > 5_000)?;
    let agent = insiders(&loud)?.0;
    let memory = |pid: u32| {
        let text = procs::status_field(pid, "VmRSS").unwrap_or_default();
        let number = text
            .split_whitespace()
            .next()
            .and_then(|n| n.parse::<u64>().ok());
        number.unwrap_or(0)
    };
    let before = memory(agent);
    for n in 0..5 {
        let begun = Instant::now();
        let quiet = pod.run(&format!("quiet{n}"), &["/bin/probe", "sleep"], Pids::Own)?;
        let took = begun.elapsed();
        ensure!(took < Duration::from_secs(3), "a launch took {took:?}");
        pod.remove(quiet)?;
    }
    let after = memory(agent);
    ensure!(
        after < before + 512,
        "the agent grew from {before} to {after} KiB"
    );
    pod.remove(loud)?;
    Ok(pod.finish()?)
}

fn learn_many_sorts_are_bounded() -> Outcome {
    casemate_only()?;
    let (task, _) = beside("learnmany", "many 1500", "profile = \"compat\"\n")?;
    in_time("what is kept", || {
        let after = of(&task)?;
        ensure_eq!(after.ports_connected().len(), Container::PORTS, "ports");
        ensure_eq!(
            after.directories().len(),
            Container::DIRECTORIES,
            "directories"
        );
        let all = kinds(&after);
        let requests = all.iter().filter(|k| k.starts_with("ioctl"));
        ensure_eq!(requests.count(), 512, "kinds of ioctl");
        let plain = |d: &String| !d.chars().any(char::is_control);
        ensure!(
            after.directories().iter().all(plain),
            "{:?}",
            after.directories()
        );
        Ok(())
    })?;
    until("what is lost to be counted", LONG, || {
        of(&task).is_ok_and(|seen| {
            let lost = seen.lost();
            lost.ports > 1000 && lost.directories > 2000
        })
    })?;
    Ok(task.finish()?)
}

/// What nobody asks about costs what it did; the rest some microseconds, or many on a
/// busy machine.
fn learn_price_is_that_of_what_is_asked() -> Outcome {
    casemate_only()?;
    let price = |task: &Task| -> Result<[u64; 3], Stop> {
        let said = say(task, "price", &["/bin/probe", "price"])?;
        let numbers: Vec<u64> = said.split_whitespace().flat_map(str::parse).collect();
        <[u64; 3]>::try_from(numbers).map_err(|_| Stop::Fail(format!("said {said}")))
    };
    let (learning, plain) = (sleeper("price", "")?, Task::sleeping("priceplain")?);
    let ([read, pread, open], [plain_read, plain_pread, plain_open]) =
        (price(&learning)?, price(&plain)?);
    println!(
        "ns, learning and not: read {read} {plain_read}, pread {pread} {plain_pread}, open {open} {plain_open}"
    );
    ensure!(
        read < plain_read * 3 + 1000,
        "a read took {read} ns, {plain_read} without"
    );
    ensure!(
        pread > plain_pread * 3,
        "a pread took {pread} ns, as if nobody was asked"
    );
    ensure!(
        pread < 1_000_000 && open < 1_000_000,
        "{pread} ns, {open} ns"
    );
    learning.finish()?;
    Ok(plain.finish()?)
}

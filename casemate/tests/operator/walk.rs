//! Pods that are not well, readers that leave, names that are not whole: what an operator
//! meets, and what the command says then.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::operator::{casemate, command, lines};
use casemate_tests::pod::{Pids, Pod, insiders};
use casemate_tests::run::{run, until};
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::world::binaries;
use casemate_tests::{World, ensure, ensure_eq, leaks, procs};
use containerd_shim_protos::api::{Empty, PauseRequest, ResumeRequest};
use rustix::process::Signal;

use crate::common::{LONG, ready};

crate::trials![
    walk_ps_tells_how_containers_are,
    walk_shims_that_are_stuck,
    walk_a_pod_without_its_agent,
    walk_readers_that_leave,
    walk_names_of_pods,
    walk_completes_pods,
    walk_bench_is_interrupted,
    walk_configuration_that_is_not_there,
];

/// The row of `casemate ps` about this task.
fn row(task: &Task) -> Result<String, Stop> {
    let table = casemate(&["ps"])?.ok()?.out();
    match table.lines().find(|line| line.contains(&task.id)) {
        Some(row) => Ok(row.to_owned()),
        None => fail(format!("no row of {} in {table}", task.id)),
    }
}

fn walk_ps_tells_how_containers_are() -> Outcome {
    ready()?;
    let mut ended = Task::new("walkended", &["/bin/sh", "-c", "exit 3"])?;
    ended.boot()?;
    ended.create()?;
    ended.start_and_wait()?;
    ensure!(row(&ended)?.contains(" stopped (3) "), "{}", row(&ended)?);
    let page = casemate(&["inspect", &ended.id])?.ok()?.out();
    ensure!(page.contains(" stopped (3)\n"), "{page}");

    let task = Task::sleeping("walkpaused")?;
    ensure!(row(&task)?.contains(" running "), "{}", row(&task)?);
    let pause = PauseRequest {
        id: task.id.clone(),
        ..PauseRequest::default()
    };
    task.rpc()?.call::<Empty>("Pause", &pause, SHORT)?;
    let seen = row(&task);
    let resume = ResumeRequest {
        id: task.id.clone(),
        ..ResumeRequest::default()
    };
    task.rpc()?.call::<Empty>("Resume", &resume, SHORT)?;
    ensure!(
        seen.as_ref().is_ok_and(|row| row.contains(" paused ")),
        "a paused one"
    );
    let ids = casemate(&["ps", "--quiet"])?.ok()?.out();
    for pod in [&ended, &task] {
        ensure!(
            ids.lines().any(|line| line == pod.id),
            "{} in {ids}",
            pod.id
        );
    }
    ended.finish()?;
    Ok(task.finish()?)
}

fn walk_shims_that_are_stuck() -> Outcome {
    ready()?;
    let stuck = [Task::sleeping("walkstuck")?, Task::sleeping("walkstuck")?];
    let all = |signal| -> Outcome {
        for task in &stuck {
            procs::signal(task.shim_pid()?, signal);
        }
        Ok(())
    };
    all(Signal::STOP)?;
    let begun = Instant::now();
    let listed = casemate(&["ps"]);
    let took = begun.elapsed();
    let begun = Instant::now();
    let page = casemate(&["report", "--html", "-"]);
    let told = begun.elapsed();
    let begun = Instant::now();
    let file = stuck[0].side.join("report.tar.gz").display().to_string();
    let packed = casemate(&["collect", "-o", &file]);
    let gathered = begun.elapsed();
    let [one, _] = &stuck;
    let asked =
        ["inspect", "events", "why", "posture"].map(|what| (what, casemate(&[what, &one.id])));
    all(Signal::CONT)?;
    let listed = listed?.ok()?;
    // One after the other would be ten seconds.
    ensure!(took < Duration::from_secs(9), "ps took {took:?}");
    ensure!(told < Duration::from_secs(9), "report took {told:?}");
    ensure!(
        gathered < Duration::from_secs(9),
        "collect took {gathered:?}"
    );
    let page = page?.ok()?.out();
    packed?.ok()?;
    for task in &stuck {
        let table = listed.out();
        let row = table.lines().find(|line| line.contains(&task.id));
        ensure!(row.is_some_and(|row| row.contains(" unknown ")), "{table}");
        let way = format!("kill -CONT {}", task.shim_pid()?);
        ensure!(page.contains(&way), "no {way} on the page");
        ensure!(listed.err().contains(&way), "no {way} in {}", listed.err());
    }
    let way = format!("kill -CONT {}", one.shim_pid()?);
    for (what, said) in asked {
        let said = said?;
        let named = said.err().contains(&one.id) && said.err().contains(&way);
        ensure!(
            said.code() == 125 && named,
            "{what}: {} {}",
            said.code(),
            said.err()
        );
    }
    for task in stuck {
        task.finish()?;
    }
    Ok(())
}

fn walk_a_pod_without_its_agent() -> Outcome {
    ready()?;
    let task = Task::sleeping("walklost")?;
    procs::signal(insiders(&task)?.0, Signal::KILL);
    task.rpc()?.wait(&task.id, SHORT)?;
    until("the loss to be told", LONG, || {
        casemate(&["inspect", &task.id]).is_ok_and(|said| said.out().contains("lost "))
    })?;
    let page = casemate(&["inspect", &task.id])?.ok()?.out();
    ensure!(page.contains("agent has ended"), "{page}");
    ensure!(page.contains(" stopped (137)\n"), "{page}");
    let row = row(&task)?;
    ensure!(!row.contains("null"), "{row}");
    Ok(task.finish()?)
}

/// As `| head` does it, earlier than any program would.
fn walk_readers_that_leave() -> Outcome {
    ready()?;
    let task = Task::sleeping("walkpipe")?;
    for words in [
        &["ps"][..],
        &["inspect", &task.id],
        &["why", &task.id],
        &["posture", "--json", &task.id],
        &["network", "--all", &task.id],
        &["metrics"],
        &["report", "--html", "-"],
        &["completion", "bash"],
        &["profile", "list"],
    ] {
        let (read, write) = std::io::pipe()?;
        drop(read);
        let mut said = command(words)?;
        said.stdin(Stdio::null())
            .stdout(write)
            .stderr(Stdio::piped());
        let said = said.output()?;
        // Of other trials' pods more may be told.
        let error = String::from_utf8_lossy(&said.stderr);
        ensure!(
            said.status.success() && !error.contains("standard output"),
            "{words:?}: {} {error}",
            said.status
        );
    }
    // Whatever else is wrong with it is.
    let full = fs::OpenOptions::new().write(true).open("/dev/full")?;
    let said = command(&["inspect", &task.id])?
        .stdout(full)
        .stderr(Stdio::piped())
        .output()?;
    ensure_eq!(said.status.code(), Some(125), "status with a full disk");
    Ok(task.finish()?)
}

fn walk_names_of_pods() -> Outcome {
    ready()?;
    let pod = Pod::start("walkpod")?;
    let member = pod.run("walkmember", &["/bin/sleep", "1000"], Pids::Own)?;
    let container = format!("containerd://{}", member.id);
    let namespaced = format!("{}/{}", pod.pause.shim.namespace, pod.pause.id);
    for name in [&pod.pause.id, &member.id, &container, &namespaced] {
        let found = lines(&["inspect", "--json", name])?;
        ensure!(
            found
                .first()
                .is_some_and(|found| found["pod"] == pod.pause.id),
            "{name} means {found:?}"
        );
    }
    let beginning = pod.pause.id.replace("walkpod", "walk");
    let (beginning, _) = beginning.split_at(beginning.find("walk").unwrap_or(0) + 4);
    let twin = Task::sleeping("walktwin")?;
    let said = casemate(&["inspect", beginning])?;
    ensure!(said.code() == 125, "{beginning} means one of several");
    for one in [&pod.pause.id, &twin.id] {
        ensure!(
            said.err().contains(one.as_str()),
            "no {one} in {}",
            said.err()
        );
    }
    twin.finish()?;
    pod.remove(member)?;
    Ok(pod.finish()?)
}

/// What bash makes of half a word.
fn completed(line: &[&str], script: &str) -> Result<String, Stop> {
    let ask = "source \"$0\"; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); \
               _casemate_with_pods casemate \"${COMP_WORDS[COMP_CWORD]}\" \
               \"${COMP_WORDS[COMP_CWORD - 1]}\"; echo \"${COMPREPLY[@]}\"";
    let path = std::env::var("PATH").unwrap_or_default();
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-c", ask, script, "casemate"])
        .args(line);
    bash.env("PATH", format!("{}:{path}", binaries().display()));
    Ok(run(&mut bash, &[], SHORT)?.ok()?.out().trim().to_owned())
}

fn walk_completes_pods() -> Outcome {
    ready()?;
    let task = Task::sleeping("walktab")?;
    let file = task.side.join("completion.bash").display().to_string();
    fs::write(&file, casemate(&["completion", "bash"])?.ok()?.out())?;
    let half = &task.id[..task.id.len() - 1];
    for line in [
        &["inspect", half][..],
        &["why", half],
        &["profile", "export", half],
    ] {
        ensure_eq!(completed(line, &file)?, task.id, "{line:?}");
    }
    // What isn't a pod's name is as it was, and nothing that is hidden is shown.
    ensure_eq!(completed(&["inspect", "--js"], &file)?, "--json", "a flag");
    ensure_eq!(
        completed(&["i"], &file)?,
        "inspect install",
        "commands with i"
    );
    Ok(task.finish()?)
}

fn walk_bench_is_interrupted() -> Outcome {
    ready()?;
    let daemon = World::get()?.daemon()?;
    let address = daemon.address().display().to_string();
    let shim = binaries()
        .join("containerd-shim-casemate-v2")
        .display()
        .to_string();
    let mut bench = command(&[
        "bench",
        "--rounds",
        "10000",
        "--against",
        "",
        "--runtime",
        &shim,
        "--address",
        &address,
    ])?
    .stdin(Stdio::null())
    .stdout(Stdio::piped())
    .spawn()?;
    let mark = format!("casemate-bench-{}-", bench.id());
    let second = format!("{mark}1-");
    let begun = until("the second round", LONG, || {
        !leaks::cgroups_with(&second).is_empty()
    });
    procs::signal(bench.id(), Signal::TERM);
    let ended = until("its end", LONG, || !matches!(bench.try_wait(), Ok(None)));
    let _gone = bench.kill();
    let said = bench.wait_with_output()?;
    begun?;
    ended?;
    ensure_eq!(said.status.code(), Some(128 + 15), "status");
    let table = String::from_utf8_lossy(&said.stdout);
    ensure!(
        table.contains("create a task"),
        "figures of the first round: {table}"
    );
    ensure_eq!(leaks::cgroups_with(&mark), Vec::<String>::new(), "cgroups");
    ensure_eq!(leaks::mounts_with(&mark), Vec::<String>::new(), "mounts");
    let ctr = daemon.ctr("casemate-bench");
    let left = ctr.run(&["container", "ls", "-q"], SHORT)?.out();
    ensure!(!left.contains(&mark), "containers: {left}");
    Ok(())
}

fn walk_configuration_that_is_not_there() -> Outcome {
    ready()?;
    let said = casemate(&["doctor", "--config", "/no/such/config.toml"])?;
    ensure!(
        said.code() == 1
            && said
                .out()
                .contains("/no/such/config.toml: there is no such file"),
        "{} {}",
        said.code(),
        said.out()
    );
    Ok(())
}

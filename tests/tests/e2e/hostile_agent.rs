//! 141: an agent, or a forker, that says what it must not: malformed, oversized,
//! repeated, out of order, unsolicited. The shim answers with an error, and the
//! pod is as it was, or ended.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::operator::{ask, records};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::binaries;
use casemate_tests::{World, ensure, ensure_eq, procs};
use rustix::process::Signal;
use serde_json::json;

use crate::common::{RUNNING, casemate_only, expect_code, status};
use crate::hostile_node::configure;

crate::trials![
    c141_agent_that_lies_of_itself,
    c141_agent_that_lies_as_a_forker,
    c141_forker_that_lies_of_an_exec,
    c141_forker_that_lies_of_an_exit,
    c141_flood_of_messages_stays_in_its_pod,
    c141_control_an_honest_relay,
    c141_agent_that_lies_of_denials,
    c141_agent_that_lies_as_the_pause,
];

/// The lying agent, with a real one behind its own bytes.
fn program() -> Result<PathBuf, Stop> {
    let path = World::get()?.dir().join("hostile-agent");
    let mut bytes = fs::read(binaries().join("hostile_agent"))?;
    let agent = fs::read(binaries().join("casemate-agent"))?;
    bytes.extend(&agent);
    bytes.extend((agent.len() as u64).to_le_bytes());
    bytes.extend(b"appended");
    // Written under a name of its own: trials run beside each other.
    let own = path.with_extension(format!("{:?}", std::thread::current().id()));
    fs::write(&own, bytes)?;
    fs::set_permissions(&own, fs::Permissions::from_mode(0o755))?;
    fs::rename(&own, &path)?;
    Ok(path)
}

/// A task whose agent lies as `word` says; not yet booted.
fn lying(word: &str) -> Result<Task, Stop> {
    lying_under(word, "")
}

/// The same, with more in the configuration.
pub fn lying_under(word: &str, config: &str) -> Result<Task, Stop> {
    with_lies(word, Task::new("lies", &["/bin/probe", "sleep"])?, config)
}

fn with_lies(word: &str, mut task: Task, config: &str) -> Result<Task, Stop> {
    let path = program()?;
    configure(
        &mut task,
        &format!("{config}\n[sandbox]\nagent_path = \"{}\"\n", path.display()),
    )?;
    task.spec["hostname"] = word.into();
    // A process between shim and agent is just what a look at the posture finds.
    task.posture = false;
    Ok(task)
}

pub fn in_case(word: &str, done: Outcome) -> Outcome {
    done.map_err(|stop| match stop {
        Stop::Fail(text) => Stop::Fail(format!("{word}: {text}")),
        skip @ Stop::Skip(_) => skip,
    })
}

/// The pod can't be, and says so in one line that a terminal can show.
pub fn refused(task: &mut Task) -> Outcome {
    let begun = Instant::now();
    // Until an agent that says nothing is given up, nobody is answered.
    if task.boot().is_err() {
        task.boot().or_else(|_| task.boot())?;
    }
    let Err(error) = task.create() else {
        return casemate_tests::skip::fail("Create succeeded");
    };
    let text = error.to_string();
    ensure!(error.code().is_some(), "no code: {text}");
    ensure_eq!(text.lines().count(), 1, "lines of {text:?}");
    ensure!(
        !text.chars().any(char::is_control),
        "control characters in {text:?}"
    );
    ensure!(text.len() < 3000, "{} bytes of text", text.len());
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(25), "it took {took:?}");
    expect_code("State", task.rpc()?.state(&task.id), ttrpc::Code::NOT_FOUND)?;
    ensure!(
        procs::identity(task.shim_pid()?).is_some(),
        "the shim has ended"
    );
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(5))?;
    Ok(task.expect_clean(Duration::from_secs(5))?)
}

fn c141_agent_that_lies_of_itself() -> Outcome {
    casemate_only()?;
    for word in [
        "agent-old",
        "agent-future",
        "agent-garbage",
        "agent-oversize",
        "agent-nothing",
        "agent-long-text",
    ] {
        in_case(word, refused(&mut lying(word)?))?;
    }
    // Ready it is, and more: what comes of the launch is no container.
    for word in ["agent-descriptors", "agent-ready-for-ever"] {
        in_case(word, refused(&mut lying(word)?))?;
    }
    Ok(())
}

fn c141_agent_that_lies_as_a_forker() -> Outcome {
    casemate_only()?;
    for word in [
        "launch-garbage",
        "launch-oversize",
        "launch-close",
        "launch-no-descriptor",
        "launch-no-pidfd",
        "launch-itself",
        "launch-spawned",
        "launch-exited",
        "launch-long-text",
        "launch-init-is-the-forker",
        "launch-init-is-the-agent",
        "launch-init-of-another-key",
        "launch-ready-twice",
        "launch-started",
    ] {
        in_case(word, refused(&mut lying(word)?))?;
    }
    Ok(())
}

/// CRI's sandbox container, which stands for the pause.
fn c141_agent_that_lies_as_the_pause() -> Outcome {
    casemate_only()?;
    for word in [
        "pause-garbage",
        "pause-oversize",
        "pause-close",
        "pause-no-descriptor",
        "pause-no-pidfd",
        "pause-many-pidfds",
        "pause-is-the-agent",
        "pause-long-text",
        "pause-nothing",
        "pause-unlocked",
        "pause-ready-for-ever",
    ] {
        let pause = casemate_tests::pod::pause("pauselies")?;
        in_case(word, refused(&mut with_lies(word, pause, "")?))?;
    }
    // Control: behind an honest relay it is made.
    let mut pause = with_lies("honest", casemate_tests::pod::pause("pausehonest")?, "")?;
    pause.boot()?;
    pause.create()?;
    pause.rpc()?.start(&pause.id)?;
    Ok(pause.finish()?)
}

/// A running container behind a lying relay.
fn running(word: &str) -> Result<Task, Stop> {
    let mut task = lying(word)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    Ok(task)
}

/// One exec behind the relay; then the container is as it was, or ended.
fn exec_behind(word: &str, ends: bool) -> Outcome {
    let task = running(word)?;
    let shim = task.shim_pid()?;
    let family = procs::family(shim);
    ensure!(family.len() >= 4, "only {} processes", family.len());
    let limits = fs::read_to_string(format!("/proc/{shim}/limits"))?;
    let exec = Exec::sh(&task, "e", "echo ran; exit 6")?;
    exec.add()?;
    match exec.start() {
        Ok(_) => drop(exec.wait()?),
        Err(error) => {
            let text = error.to_string();
            ensure_eq!(text.lines().count(), 1, "lines of {text:?}");
            ensure!(
                !text.chars().any(char::is_control),
                "control characters in {text:?}"
            );
            exec.wait()?;
        }
    }
    // Whatever stands for it: no signal goes where it must not.
    let _ = exec.kill(9);
    let _ = exec.resize(10, 10);
    exec.delete()?;
    std::thread::sleep(Duration::from_millis(200));
    ensure!(procs::identity(shim).is_some(), "the shim has ended");
    ensure_eq!(
        fs::read_to_string(format!("/proc/{shim}/limits"))?,
        limits,
        "limits of the shim"
    );
    if ends {
        let ended = task.rpc()?.wait(&task.id, Duration::from_secs(5))?;
        ensure_eq!(ended.exit_status, 137, "exit of the container");
        let pids = task.rpc()?.pids(&task.id)?.processes;
        let all: Vec<_> = pids.iter().filter_map(|p| procs::identity(p.pid)).collect();
        task.rpc()?.delete(&task.id)?;
        until("its processes to go", Duration::from_secs(2), || {
            !all.iter().any(|p| procs::alive(*p))
        })?;
    } else {
        ensure_eq!(status(&task)?, RUNNING, "state");
        // The pod's agent lives: nothing was aimed at it.
        ensure!(
            family.iter().filter(|p| procs::alive(**p)).count() >= 4,
            "some of the pod are gone"
        );
    }
    Ok(task.finish()?)
}

fn c141_control_an_honest_relay() -> Outcome {
    casemate_only()?;
    let task = running("honest")?;
    let exec = Exec::sh(&task, "e", "echo ran; exit 6")?;
    ensure_eq!(exec.run()?, (6, "ran\n".to_owned()), "an exec");
    exec_behind("honest", false)?;
    // Control: what stands between is a process of the pod.
    let family = procs::family(task.shim_pid()?);
    ensure_eq!(family.len(), 5, "shim, agent, relay, forker, init");
    for member in &family[1..] {
        procs::signal(member.pid, Signal::CONT);
    }
    Ok(task.finish()?)
}

fn c141_forker_that_lies_of_an_exec() -> Outcome {
    casemate_only()?;
    for (word, ends) in [
        ("exec-is-the-agent", true),
        ("exec-is-the-relay", true),
        ("exec-without-descriptor", true),
        ("exec-without-pidfd", true),
        ("exec-with-many-descriptors", false),
        ("exec-of-another-key", true),
        ("exec-twice", true),
        ("exec-garbage", true),
        ("exec-oversize", true),
        ("exec-ended-before", true),
        ("exec-ready-again", true),
        ("exec-long-text", true),
    ] {
        in_case(word, exec_behind(word, ends))?;
    }
    Ok(())
}

fn c141_forker_that_lies_of_an_exit() -> Outcome {
    casemate_only()?;
    for (word, ends) in [
        ("exit-twice", true),
        ("exit-of-nobody", true),
        ("exit-huge", false),
        ("exit-started", true),
        ("exit-launch-failed", true),
        ("exit-hang-up", true),
    ] {
        in_case(word, exec_behind(word, ends))?;
    }
    Ok(())
}

/// The most memory that the shim ever had, in KiB.
fn peak(shim: u32) -> u64 {
    let text = procs::status_field(shim, "VmHWM").unwrap_or_default();
    let number = text.split_whitespace().next().and_then(|n| n.parse().ok());
    number.unwrap_or(0)
}

/// A forker that floods: what it sends is neither kept nor answered, and other
/// pods go on.
fn c141_flood_of_messages_stays_in_its_pod() -> Outcome {
    casemate_only()?;
    let other = Task::sleeping("beside")?;
    for word in ["exec-flood", "exec-flood-of-descriptors"] {
        let task = running(word)?;
        let shim = task.shim_pid()?;
        let before = peak(shim);
        ensure!(before > 0, "no VmHWM of the shim");
        let descriptors = fs::read_dir(format!("/proc/{shim}/fd"))?.count();
        let exec = Exec::sh(&task, "e", "exit 6")?;
        exec.add()?;
        let begun = Instant::now();
        if exec.start().is_ok() {
            exec.wait()?;
        }
        let beside = Exec::sh(&other, word, "exit 7")?;
        ensure_eq!(beside.run()?.0, 7, "an exec in another pod");
        let took = begun.elapsed();
        ensure!(took < Duration::from_secs(5), "{word}: {took:?}");
        let ended = task.rpc()?.wait(&task.id, Duration::from_secs(5))?;
        ensure_eq!(ended.exit_status, 137, "exit of the container");
        let grown = peak(shim).saturating_sub(before);
        ensure!(grown < 4096, "{word}: the shim grew by {grown} KiB");
        let now = fs::read_dir(format!("/proc/{shim}/fd"))?.count();
        ensure!(
            now <= descriptors,
            "{word}: {descriptors} descriptors, now {now}"
        );
        exec.delete()?;
        task.finish()?;
    }
    Ok(other.finish()?)
}

fn c141_agent_that_lies_of_denials() -> Outcome {
    casemate_only()?;
    for (word, is_caught) in [
        ("denials-of-nobody", true),
        ("denials-of-no-rule", true),
        ("denials-of-no-call", true),
        ("denials-too-many", true),
        ("denials-of-no-filter", true),
        ("denials-that-never-end", false),
    ] {
        let check = || -> Outcome {
            let mut task = lying(word)?;
            task.boot()?;
            task.create()?;
            task.rpc()?.start(&task.id)?;
            until("its word", Duration::from_secs(10), || {
                let losses = records(&task, "broker_loss").map_or(0, |found| found.len());
                let told = task
                    .rpc()
                    .and_then(|rpc| ask(rpc, "Denials", &json!({}), SHORT));
                match is_caught {
                    true => losses == 1,
                    // The table is full, and the rest one number.
                    false => told.is_ok_and(|t| t["beyond"].as_u64() > Some(1 << 20)),
                }
            })?;
            let told = ask(task.rpc()?, "Denials", &json!({}), SHORT)?;
            let sorts = told["denials"].as_array().map_or(0, Vec::len);
            ensure!(sorts <= 512, "{sorts} sorts are kept");
            ensure!(is_caught == (sorts == 0), "{sorts} sorts are believed");
            // The rest of the pod is as it was.
            ensure_eq!(status(&task)?, RUNNING, "state");
            let (code, _) = Exec::new(&task, "e", &["/bin/true"])?.run()?;
            ensure_eq!(code, 0, "exit code of an exec");
            Ok(task.finish()?)
        };
        in_case(word, check())?;
    }
    Ok(())
}

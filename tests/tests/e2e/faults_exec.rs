//! An exec'ed process as the victim, at each of its own steps from its birth to
//! its exec: killed, it is an error or an exit, and its container goes on;
//! stopped, it delays neither the Kill of its container nor what follows.

use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::node::Traces;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, strike};
use containerd_shim_protos::api::{StartRequest, StartResponse};
use nix::sys::signal::Signal;

use crate::common::{RUNNING, casemate_only, status};
use crate::faults_wedge::victim;

crate::trials![
    fault_exec_killed_at_any_step,
    fault_exec_stopped_at_any_step,
];

/// What the promise says.
const PROMPT: Duration = Duration::from_secs(1);

fn stride() -> usize {
    match std::env::var_os("CASEMATE_TEST_FAULTS") {
        Some(_) => 1,
        None => 6,
    }
}

fn sleeper() -> Result<(Task, Traces), Stop> {
    let mut task = Task::new("fx", &["/bin/probe", "sleep"])?;
    let traces = Traces::of(&mut task)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    Ok((task, traces))
}

fn finish(task: Task, traces: &Traces) -> Outcome {
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(SHORT)?;
    task.shim.delete()?;
    Ok(traces.expect(&Default::default(), PROMPT)?)
}

fn within<T>(
    what: &str,
    limit: Duration,
    call: impl FnOnce() -> casemate_tests::Result<T>,
) -> Result<T, Stop> {
    let begun = Instant::now();
    let answer = call();
    let took = begun.elapsed();
    ensure!(took < limit, "{what} took {took:?}");
    answer.map_err(|error| Stop::Fail(format!("{what}: {error}")))
}

fn fault_exec_killed_at_any_step() -> Outcome {
    casemate_only()?;
    let (task, traces) = sleeper()?;
    let forker = victim(&task, "forker")?;
    let mut done = 0;
    loop {
        let name = format!("e{done}");
        let exec = Exec::new(&task, &name, &["/bin/probe", "sleep"])?;
        exec.add()?;
        let number = done * stride();
        let thread = strike::next_child(forker, number, Signal::SIGKILL)?;
        let begun = Instant::now();
        let started = task.rpc()?.start_exec((&task.id, &name));
        let took = begun.elapsed();
        let Ok(struck) = thread.join() else {
            return fail("the tracer panicked");
        };
        let struck = struck?;
        ensure!(
            took < PROMPT,
            "Start of one killed at stop {number} took {took:?}"
        );
        if struck.is_none() {
            ensure!(started.is_ok(), "unharmed, but {started:?}");
            exec.kill(9)?;
        }
        // Whether it was started or not: a Wait has its answer.
        let code = exec.wait_within(PROMPT);
        match started {
            Ok(_) => ensure_eq!(code?, 137, "status after stop {number}"),
            Err(_) => ensure!(code.is_ok(), "Wait after stop {number}: {code:?}"),
        }
        exec.delete()?;
        ensure_eq!(status(&task)?, RUNNING, "container after stop {number}");
        if struck.is_none() {
            break;
        }
        done += 1;
    }
    println!("killed at {done} stops");
    ensure!(done >= 10, "only {done} stops");
    let exec = Exec::sh(&task, "last", "echo fine")?;
    ensure_eq!(exec.run()?, (0, "fine\n".to_owned()), "an exec afterwards");
    let rpc = task.rpc()?;
    rpc.kill(&task.id, 9, true)?;
    rpc.wait(&task.id, PROMPT)?;
    rpc.delete(&task.id)?;
    finish(task, &traces)
}

/// `false`: it got to its exec before.
fn stopped_at(number: usize) -> Result<bool, Stop> {
    let (task, traces) = sleeper()?;
    let forker = victim(&task, "forker")?;
    let exec = Exec::new(&task, "e", &["/bin/probe", "sleep"])?;
    exec.add()?;
    let thread = strike::next_child(forker, number, Signal::SIGSTOP)?;
    let rpc = task.rpc()?.clone();
    let ask = StartRequest {
        id: task.id.clone(),
        exec_id: "e".to_owned(),
        ..Default::default()
    };
    let start = std::thread::spawn(move || rpc.call::<StartResponse>("Start", &ask, SHORT));
    let Ok(struck) = thread.join() else {
        return fail("the tracer panicked");
    };
    let struck = struck?.is_some();
    let rpc = task.rpc()?;
    within("State", PROMPT, || rpc.state(&task.id))?;
    within("Kill", PROMPT, || rpc.kill(&task.id, 9, true))?;
    let end = within("Wait after Kill", PROMPT, || rpc.wait(&task.id, SHORT))?;
    ensure_eq!(end.exit_status, 137, "status of init");
    within("Delete", PROMPT, || rpc.delete(&task.id))?;
    // It was told, one way or the other.
    let begun = Instant::now();
    let told = start.join();
    ensure!(
        begun.elapsed() < PROMPT,
        "Start was told after {:?}",
        begun.elapsed()
    );
    ensure!(told.is_ok(), "the call of Start panicked");
    finish(task, &traces)?;
    Ok(struck)
}

fn fault_exec_stopped_at_any_step() -> Outcome {
    casemate_only()?;
    let done = crate::faults::sweep(2, |number| {
        let at = number * stride();
        stopped_at(at).map_err(|stop| match stop {
            Stop::Fail(why) => Stop::Fail(format!("stopped at {at}: {why}")),
            skip => skip,
        })
    })?;
    println!("stopped at {done} stops");
    ensure!(done >= 10, "only {done} stops");
    Ok(())
}

//! Never stuck: what is stopped or killed inside a pod, at whatever moment,
//! delays no Kill, no Wait after it and no Delete beyond a second, and the node
//! is as before at the end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::node::Traces;
use casemate_tests::run::until;
use casemate_tests::shim::{Answer, Client, SHORT};
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::trace::{self, Then};
use casemate_tests::{ensure, ensure_eq, procs};
use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, KillRequest,
    StartRequest, StartResponse,
};
use rustix::process::Signal;

use crate::common::{LONG, casemate_only};
use crate::faults::sweep;

crate::trials![
    fault_victim_at_any_effect,
    fault_wedged_forker_with_execs,
    fault_wedged_forker_and_agent,
    fault_wedged_forker_tells_no_exit_code,
    fault_killed_forker_ends_its_container,
    fault_stopped_processes_die,
    fault_agent_loss_is_told_in_order,
];

/// What the promise says.
const PROMPT: Duration = Duration::from_secs(1);
/// What a request may take that needs the one that is wedged, and then its
/// undoing: the shim's own patience is 10 s.
const PATIENT: Duration = Duration::from_secs(14);

/// Children of a process, oldest first.
pub fn children(parent: u32) -> Vec<u32> {
    let mut found: Vec<_> = procs::all()
        .into_iter()
        .filter(|pid| procs::status_field(*pid, "PPid").is_some_and(|p| p.parse() == Ok(parent)))
        .filter_map(procs::identity)
        .collect();
    found.sort_by_key(|who| (who.start_time, who.pid));
    found.into_iter().map(|who| who.pid).collect()
}

/// Everybody in a pod with one container, as far as they exist.
fn inside(shim: u32) -> BTreeMap<&'static str, u32> {
    let first = |pid: Option<&u32>| pid.and_then(|pid| children(*pid).first().copied());
    let agent = children(shim)
        .into_iter()
        .find(|pid| procs::command_line(*pid).starts_with("casemate-agent"));
    let forker = first(agent.as_ref());
    let init = first(forker.as_ref());
    [("agent", agent), ("forker", forker), ("init", init)]
        .into_iter()
        .filter_map(|(name, pid)| Some((name, pid?)))
        .collect()
}

fn timed<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    let answer = call();
    (answer, begun.elapsed())
}

fn brief<R: protobuf::Message>(
    rpc: &Client,
    method: &str,
    ask: &dyn casemate_tests::shim::Ask,
) -> casemate_tests::Result<R> {
    rpc.call(method, ask, PROMPT)
}

/// A client that gives up after a second, and then cleans up as containerd does.
fn persevere(id: &str, printed: &[u8], create: &CreateTaskRequest) -> Result<(), String> {
    let text = |error: casemate_tests::Failure| error.to_string();
    let Ok(answer) = Answer::parse(printed) else {
        return Ok(());
    };
    let Ok(rpc) = Client::connect(&answer.address, answer.version) else {
        return Ok(());
    };
    if rpc.shim(id).is_err() {
        // Wedged before it serves: `delete` will find that.
        return Ok(());
    }
    let created = brief::<CreateTaskResponse>(&rpc, "Create", create).is_ok();
    if created {
        let ask = StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let _ = brief::<StartResponse>(&rpc, "Start", &ask);
    }
    let kill = KillRequest {
        id: id.to_owned(),
        signal: 9,
        all: true,
        ..Default::default()
    };
    let delete = DeleteRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let (killed, kill_took) = timed(|| brief::<Empty>(&rpc, "Kill", &kill));
    let mut waited = None;
    if created {
        waited = Some(timed(|| rpc.wait(id, PROMPT)));
    }
    let (deleted, delete_took) = timed(|| brief::<DeleteResponse>(&rpc, "Delete", &delete));
    rpc.shutdown(id).map_err(text)?;
    if kill_took > PROMPT || delete_took > PROMPT {
        return Err(format!("Kill took {kill_took:?}, Delete {delete_took:?}"));
    }
    if let Some((waited, took)) = waited {
        let known = Some(ttrpc::Code::NOT_FOUND);
        if let Err(error) = killed
            && error.code() != known
        {
            return Err(format!("Kill: {error}"));
        }
        waited.map_err(|e| format!("Wait after Kill, {took:?}: {e}"))?;
        deleted.map_err(|e| format!("Delete: {e}"))?;
    }
    Ok(())
}

fn one(victim: &'static str, signal: Signal, number: usize) -> Result<bool, Stop> {
    let mut task = Task::new("fv", &["/bin/probe", "sleep"])?;
    let traces = Traces::of(&mut task)?;
    task.write_spec()?;
    let before = traces.look();
    let at: Arc<Mutex<Option<String>>> = Arc::default();
    let note = at.clone();
    let traced = trace::start(&task.shim, move |step| {
        if step.number < number || step.action != "serve" {
            return Then::Go;
        }
        if let Some(pid) = inside(step.pid).get(victim)
            && let Ok(mut at) = note.lock()
        {
            procs::signal(*pid, signal);
            *at = Some(format!("{} ({})", step.number, step.what));
        }
        Then::Release
    })?;
    let (id, create) = (task.id.clone(), task.create_request());
    let life = std::thread::spawn(move || {
        let (printed, tracer) = traced.answer();
        let lived = persevere(&id, &printed, &create);
        (lived, tracer.join())
    });
    until("the end of a life", LONG, || life.is_finished())?;
    let Ok((lived, Ok(Ok(steps)))) = life.join() else {
        return fail("a life or its tracer failed");
    };
    let at = at.lock().map(|at| at.clone()).unwrap_or_default();
    let named = |what: String| {
        let at = at.as_deref().unwrap_or("nowhere");
        Stop::Fail(format!("{signal:?} for the {victim} at {at}: {what}"))
    };
    lived.map_err(named)?;
    let (answer, took) = timed(|| task.shim.delete());
    answer.map_err(|error| named(format!("delete: {error}")))?;
    ensure!(took < Duration::from_millis(2500), "delete took {took:?}");
    traces
        .expect(&before, PATIENT)
        .map_err(|error| named(error.to_string()))?;
    Ok(steps > number)
}

fn fault_victim_at_any_effect() -> Outcome {
    casemate_only()?;
    let stride = match std::env::var_os("CASEMATE_TEST_FAULTS") {
        Some(_) => 1,
        None => 8,
    };
    let combinations = [
        ("agent", Signal::STOP),
        ("agent", Signal::KILL),
        ("forker", Signal::STOP),
        ("forker", Signal::KILL),
        ("init", Signal::STOP),
        ("init", Signal::KILL),
    ];
    // Before there is an agent nobody can be hit.
    let first = 60;
    let done = sweep(6, move |number| {
        let (victim, signal) = combinations[number % combinations.len()];
        one(victim, signal, first + number / combinations.len() * stride)
    })?;
    println!("{done} lives with a victim");
    ensure!(done >= 48, "only {done} lives");
    Ok(())
}

/// Kill, Wait and Delete of a running task, each within the promise.
fn ends_promptly(task: &Task) -> Outcome {
    let rpc = task.rpc()?;
    let (killed, took) = timed(|| rpc.kill(&task.id, 9, false));
    killed?;
    ensure!(took < PROMPT, "Kill took {took:?}");
    let (waited, took) = timed(|| rpc.wait(&task.id, SHORT));
    ensure_eq!(waited?.exit_status, 137, "status");
    ensure!(took < PROMPT, "Wait after Kill took {took:?}");
    let (deleted, took) = timed(|| rpc.delete(&task.id));
    deleted?;
    ensure!(took < PROMPT, "Delete took {took:?}");
    Ok(())
}

fn finish(task: Task, traces: &Traces) -> Outcome {
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(3))?;
    task.shim.delete()?;
    Ok(traces.expect(&Default::default(), PROMPT)?)
}

fn traced_sleeper(name: &str) -> Result<(Task, Traces), Stop> {
    let mut task = Task::new(name, &["/bin/probe", "sleep"])?;
    let traces = Traces::of(&mut task)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    Ok((task, traces))
}

fn victim(task: &Task, name: &str) -> Result<u32, Stop> {
    match inside(task.shim_pid()?).get(name) {
        Some(pid) => Ok(*pid),
        None => fail(format!("no {name} found")),
    }
}

/// What containerd is told of ends, in order: ids.
fn exits(task: &Task) -> Vec<String> {
    use protobuf::Message;
    let events = task.events.events();
    let exits = events.iter().filter(|event| event.topic == "/tasks/exit");
    exits
        .filter_map(|event| {
            containerd_shim_protos::events::task::TaskExit::parse_from_bytes(&event.payload).ok()
        })
        .map(|exit| exit.id)
        .collect()
}

fn fault_wedged_forker_with_execs() -> Outcome {
    casemate_only()?;
    let (task, traces) = traced_sleeper("fw")?;
    let execs: Vec<Exec> = (0..2)
        .map(|n| Exec::new(&task, &format!("e{n}"), &["/bin/probe", "sleep"]))
        .collect::<Result<_, _>>()?;
    for exec in &execs {
        exec.begin()?;
    }
    procs::signal(victim(&task, "forker")?, Signal::STOP);
    // A request that the forker doesn't answer is under way.
    let blocked = Exec::new(&task, "blocked", &["/bin/true"])?;
    blocked.add()?;
    let (rpc, id) = (task.rpc()?.clone(), task.id.clone());
    let start = std::thread::spawn(move || rpc.start_exec((&id, "blocked")).is_err());
    std::thread::sleep(Duration::from_millis(100));
    ends_promptly(&task)?;
    ensure!(
        start.join().unwrap_or(false),
        "the blocked exec was answered as started"
    );
    task.events.wait_for("delete", SHORT)?;
    let mut told = exits(&task);
    ensure_eq!(told.pop(), Some(task.id.clone()), "last exit");
    told.sort();
    ensure_eq!(told, ["e0", "e1"], "exits before it");
    finish(task, &traces)
}

fn fault_wedged_forker_and_agent() -> Outcome {
    casemate_only()?;
    let (task, traces) = traced_sleeper("fwa")?;
    let exec = Exec::new(&task, "e", &["/bin/probe", "sleep"])?;
    exec.begin()?;
    for name in ["agent", "forker", "init"] {
        procs::signal(victim(&task, name)?, Signal::STOP);
    }
    ends_promptly(&task)?;
    finish(task, &traces)
}

fn fault_wedged_forker_tells_no_exit_code() -> Outcome {
    casemate_only()?;
    let mut task = Task::new(
        "fwc",
        &[
            "/bin/sh",
            "-c",
            "trap 'exit 6' USR1; echo up; while :; do sleep 0.1; done",
        ],
    )?;
    let traces = Traces::of(&mut task)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    task.stdout.until("up", SHORT)?;
    let exec = Exec::sh(&task, "e", "sleep 0.3; exit 7")?;
    exec.begin()?;
    procs::signal(victim(&task, "forker")?, Signal::STOP);
    ensure_eq!(
        exec.wait_within(Duration::from_millis(1300))?,
        7,
        "status of the exec"
    );
    task.rpc()?.kill(&task.id, 10, false)?;
    // What its own exec left unreaped keeps a pid namespace's first process from
    // ending: it is Kill that brings its end about.
    let _ = task.rpc()?.wait(&task.id, Duration::from_millis(500));
    let _ = task.rpc()?.kill(&task.id, 9, true);
    task.rpc()?.wait(&task.id, PROMPT)?;
    task.rpc()?.delete(&task.id)?;
    finish(task, &traces)
}

fn fault_killed_forker_ends_its_container() -> Outcome {
    casemate_only()?;
    let (task, traces) = traced_sleeper("fkf")?;
    let init = victim(&task, "init")?;
    let who = procs::identity(init);
    procs::signal(victim(&task, "forker")?, Signal::KILL);
    let (waited, took) = timed(|| task.rpc().and_then(|rpc| rpc.wait(&task.id, SHORT)));
    ensure_eq!(waited?.exit_status, 137, "status");
    ensure!(took < PROMPT, "Wait took {took:?}");
    until("init to die", PROMPT, || {
        who.is_none_or(|w| !procs::alive(w))
    })?;
    task.rpc()?.delete(&task.id)?;
    finish(task, &traces)
}

fn fault_stopped_processes_die() -> Outcome {
    casemate_only()?;
    let (task, traces) = traced_sleeper("fsp")?;
    let exec = Exec::new(&task, "e", &["/bin/probe", "sleep"])?;
    let pid = exec.begin()?;
    procs::signal(pid, Signal::STOP);
    let (killed, _) = timed(|| exec.kill(9));
    killed?;
    ensure_eq!(exec.wait_within(PROMPT)?, 137, "status of a stopped exec");
    exec.delete()?;
    procs::signal(victim(&task, "init")?, Signal::STOP);
    ends_promptly(&task)?;
    finish(task, &traces)
}

fn fault_agent_loss_is_told_in_order() -> Outcome {
    casemate_only()?;
    let (task, traces) = traced_sleeper("fal")?;
    let execs: Vec<Exec> = (0..3)
        .map(|n| Exec::new(&task, &format!("e{n}"), &["/bin/probe", "sleep"]))
        .collect::<Result<_, _>>()?;
    for exec in &execs {
        exec.begin()?;
    }
    let begun = Instant::now();
    procs::signal(victim(&task, "agent")?, Signal::KILL);
    until("all exits", PROMPT, || exits(&task).len() == 4)?;
    let took = begun.elapsed();
    ensure!(took < PROMPT, "events after {took:?}");
    ensure_eq!(exits(&task).last(), Some(&task.id), "last exit");
    for exec in &execs {
        ensure_eq!(exec.wait()?, 137, "status of an exec");
    }
    task.rpc()?.delete(&task.id)?;
    finish(task, &traces)
}

//! Never leaking: a shim that is killed or stopped after any of its effects on
//! the host, from the first of `start` to the last of Shutdown, leaves what
//! `delete` takes away to the last trace.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::ensure;
use casemate_tests::node::Traces;
use casemate_tests::run::until;
use casemate_tests::shim::{Answer, Client, SHORT};
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::trace::{self, Step, Then};
use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse};
use serde_json::json;

use crate::common::{LONG, casemate_only};

crate::trials![
    fault_killed_shim_after_every_effect,
    fault_stopped_shim_after_every_journal_line,
];

/// For `delete`, whatever it finds. containerd gives it 5 s.
const DELETE_WITHIN: Duration = Duration::from_millis(2500);

/// Everything a task goes through, up to the first call that fails.
fn live(id: &str, printed: &[u8], create: &CreateTaskRequest) -> casemate_tests::Result<()> {
    let answer = Answer::parse(printed)?;
    let rpc = Client::connect(&answer.address, answer.version)?;
    rpc.shim(id)?;
    rpc.call::<CreateTaskResponse>("Create", create, SHORT)?;
    rpc.start(id)?;
    let exec = (id, "e");
    let process = json!({
        "args": ["/bin/probe", "sleep"],
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "env": ["PATH=/bin"],
    });
    rpc.exec(exec, &process, "", "")?;
    rpc.start_exec(exec)?;
    rpc.kill_exec(exec, 9)?;
    rpc.wait_exec(exec)?;
    rpc.delete_exec(exec)?;
    rpc.kill(id, 9, true)?;
    rpc.wait(id, SHORT)?;
    rpc.delete(id)?;
    rpc.shutdown(id)
}

/// One life in which `decide` has its way; then `delete`. The last step seen.
fn one(
    name: &str,
    mut decide: impl FnMut(&Step) -> Then + Send + 'static,
) -> Result<Option<Step>, Stop> {
    let mut task = Task::new(name, &["/bin/probe", "sleep"])?;
    let traces = Traces::of(&mut task)?;
    task.write_spec()?;
    let before = traces.look();
    let hit: Arc<Mutex<Option<Step>>> = Arc::default();
    let note = hit.clone();
    let traced = trace::start(&task.shim, move |step| {
        let then = decide(step);
        if then != Then::Go
            && let Ok(mut hit) = note.lock()
        {
            *hit = Some(step.clone());
        }
        then
    })?;
    let (id, create) = (task.id.clone(), task.create_request());
    let life = std::thread::spawn(move || {
        let (printed, tracer) = traced.answer();
        let lived = live(&id, &printed, &create);
        // After the last call the shim has yet to end by itself.
        let traced = lived.is_ok().then(|| tracer.join());
        (lived, traced)
    });
    // It fails where the fault strikes, or hangs until the shim is dead.
    let struck = || hit.lock().is_ok_and(|hit| hit.is_some());
    until("the end of a life", LONG, || life.is_finished() || struck())?;
    let _ = until("an error", Duration::from_millis(100), || {
        life.is_finished()
    });
    let hit = hit.lock().map(|hit| hit.clone()).unwrap_or_default();
    let at = match &hit {
        Some(step) => format!("{} {} ({})", step.action, step.number, step.what),
        None => "nowhere".to_owned(),
    };
    let named = |what: &str| Stop::Fail(format!("fault at {at}: {what}"));
    for time in ["first", "second"] {
        let begun = Instant::now();
        let answer = task.shim.delete();
        let took = begun.elapsed();
        answer.map_err(|error| named(&format!("{time} delete: {error}")))?;
        ensure!(
            took < DELETE_WITHIN,
            "fault at {at}: the {time} delete took {took:?}"
        );
    }
    traces
        .expect(&before, Duration::from_secs(1))
        .map_err(|error| named(&error.to_string()))?;
    let Ok((lived, traced)) = life.join() else {
        return fail("a life panicked");
    };
    if hit.is_none() {
        lived.map_err(|error| named(&error.to_string()))?;
    }
    match traced {
        None | Some(Ok(Ok(_))) => Ok(hit),
        Some(Ok(Err(error))) => Err(named(&error.to_string())),
        Some(Err(_)) => fail("the tracer panicked"),
    }
}

/// Runs `body` with rising numbers, several at a time, until one says that
/// there are no more.
pub fn sweep(
    workers: usize,
    body: impl Fn(usize) -> Result<bool, Stop> + Send + Sync + 'static,
) -> Result<usize, Stop> {
    let body = Arc::new(body);
    let next = Arc::new(AtomicUsize::new(0));
    let end = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..workers)
        .map(|_| {
            let (body, next, end) = (body.clone(), next.clone(), end.clone());
            std::thread::spawn(move || -> Result<usize, String> {
                let mut done = 0;
                while !end.load(Ordering::Relaxed) {
                    match body(next.fetch_add(1, Ordering::Relaxed)) {
                        Ok(true) => done += 1,
                        Ok(false) => end.store(true, Ordering::Relaxed),
                        Err(Stop::Fail(why) | Stop::Skip(why)) => {
                            end.store(true, Ordering::Relaxed);
                            return Err(why);
                        }
                    }
                }
                Ok(done)
            })
        })
        .collect();
    let mut done = 0;
    for thread in threads {
        match thread.join() {
            Ok(Ok(count)) => done += count,
            Ok(Err(why)) => return fail(why),
            Err(_) => return fail("a worker panicked"),
        }
    }
    Ok(done)
}

fn fault_killed_shim_after_every_effect() -> Outcome {
    casemate_only()?;
    let done = sweep(2, |number| {
        let hit = one("fk", move |step| {
            if step.number == number {
                Then::Kill
            } else {
                Then::Go
            }
        })?;
        Ok(hit.is_some())
    })?;
    println!("killed after {done} effects");
    ensure!(done > 100, "only {done} effects");
    Ok(())
}

fn fault_stopped_shim_after_every_journal_line() -> Outcome {
    casemate_only()?;
    let done = sweep(4, |number| {
        let mut lines = 0;
        let hit = one("fs", move |step| {
            if step.journal.is_none() {
                return Then::Go;
            }
            lines += 1;
            if lines == number + 1 {
                Then::Stop
            } else {
                Then::Go
            }
        })?;
        Ok(hit.is_some())
    })?;
    println!("stopped after {done} lines");
    ensure!(done >= 8, "only {done} lines of journal");
    Ok(())
}

//! Every call in every state: its code, and that a refused one changes nothing.

use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::error::Failure;
use casemate_tests::exec::Exec;
use casemate_tests::run::until;
use casemate_tests::shim::{Ask, Client, SHORT};
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq};
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, DeleteRequest, Empty, KillRequest,
    PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StateRequest, StatsRequest, UpdateTaskRequest, WaitRequest,
};
use protobuf::Enum;
use protobuf::well_known_types::any::Any;

use crate::calls::{pause, resume};
use crate::common::{casemate_only, expect_code};

crate::trials![
    rpc_every_call_in_every_state,
    rpc_every_call_of_an_exec_in_every_state,
    rpc_calls_with_a_deadline_of_a_millisecond,
];

/// What a call is to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Fine,
    /// No answer: it waits for an exit.
    Pends,
    /// A gRPC code.
    Code(ttrpc::Code),
}

const OK: Want = Want::Fine;
const NF: Want = Want::Code(ttrpc::Code::NOT_FOUND);
const FP: Want = Want::Code(ttrpc::Code::FAILED_PRECONDITION);
const AE: Want = Want::Code(ttrpc::Code::ALREADY_EXISTS);
const UN: Want = Want::Code(ttrpc::Code::UNIMPLEMENTED);

/// A request of the method for (container, exec); the signal of Kill harms nobody.
fn request(method: &str, id: &str, exec_id: &str) -> Box<dyn Ask> {
    let (id, exec_id) = (id.to_owned(), exec_id.to_owned());
    macro_rules! ask {
        ($type:ident { $($field:ident $(: $value:expr)?),* }) => {
            Box::new($type { $($field $(: $value)?,)* ..Default::default() })
        };
    }
    match method {
        "State" => ask!(StateRequest { id, exec_id }),
        "Wait" => ask!(WaitRequest { id, exec_id }),
        "Kill" => ask!(KillRequest {
            id,
            exec_id,
            signal: 18
        }),
        "Start" => ask!(StartRequest { id, exec_id }),
        "Delete" => ask!(DeleteRequest { id, exec_id }),
        "ResizePty" => ask!(ResizePtyRequest {
            id,
            exec_id,
            width: 80,
            height: 24
        }),
        "CloseIO" => ask!(CloseIORequest {
            id,
            exec_id,
            stdin: true
        }),
        "Pids" => ask!(PidsRequest { id }),
        "Stats" => ask!(StatsRequest { id }),
        "Connect" => ask!(ConnectRequest { id }),
        "Pause" => ask!(PauseRequest { id }),
        "Resume" => ask!(ResumeRequest { id }),
        "Checkpoint" => ask!(CheckpointTaskRequest { id }),
        "Shutdown" => ask!(ShutdownRequest { id }),
        _ => ask!(UpdateTaskRequest {
            id,
            resources: Some(Any {
                value: b"{\"pids\":{\"limit\":100}}".to_vec(),
                ..Default::default()
            })
            .into()
        }),
    }
}

/// Makes one call and compares its answer.
fn check(client: &Client, method: &str, ask: &dyn Ask, want: Want, what: &str) -> Outcome {
    let limit = match want {
        Want::Pends => Duration::from_millis(250),
        _ => SHORT,
    };
    let answer = client.call::<Empty>(method, ask, limit);
    let right = match (&answer, want) {
        (Ok(_), Want::Fine) => true,
        (Err(error), Want::Code(code)) => error.code() == Some(code),
        (Err(error), Want::Pends) => error.code().is_none() || is_late(error),
        _ => false,
    };
    ensure!(right, "{method}, {what}: {answer:?}, want {want:?}");
    if let (Err(error), Want::Code(_)) = (&answer, want) {
        let text = error.to_string();
        ensure_eq!(text.lines().count(), 1, "lines of {text:?}");
    }
    Ok(())
}

fn is_late(error: &Failure) -> bool {
    error.code() == Some(ttrpc::Code::DEADLINE_EXCEEDED)
}

fn phase(client: &Client, id: &str) -> i32 {
    client.state(id).map_or(-1, |state| {
        state.status.enum_value().map_or_else(|n| n, |s| s.value())
    })
}

/// Containerd's `Status` of each state below, -1 where there is no record.
const STATES: [(&str, i32); 6] = [
    ("unknown", -1),
    ("created", 1),
    ("running", 2),
    ("paused", 4),
    ("stopped", 3),
    ("deleted", -1),
];

/// Method: its answer in each of [`STATES`].
const CALLS: [(&str, [Want; 6]); 12] = [
    ("State", [NF, OK, OK, OK, OK, NF]),
    ("Wait", [NF, Want::Pends, Want::Pends, Want::Pends, OK, NF]),
    ("Pids", [NF, OK, OK, OK, OK, NF]),
    ("Stats", [NF, OK, OK, OK, OK, NF]),
    ("Connect", [OK, OK, OK, OK, OK, OK]),
    ("Update", [NF, OK, OK, OK, FP, NF]),
    ("ResizePty", [NF, OK, OK, OK, OK, NF]),
    ("CloseIO", [NF, OK, OK, OK, OK, NF]),
    ("Checkpoint", [NF, UN, UN, UN, UN, NF]),
    ("Kill", [NF, OK, OK, OK, NF, NF]),
    // With a container there, only remembered.
    ("Shutdown", [OK, OK, OK, OK, OK, OK]),
    ("Create", [OK, AE, AE, AE, AE, OK]),
];

/// Those that change the state where they succeed: only their refusals here.
const MOVES: [(&str, [Want; 6]); 4] = [
    ("Start", [NF, OK, FP, FP, FP, NF]),
    ("Pause", [NF, FP, OK, FP, FP, NF]),
    ("Resume", [NF, FP, FP, OK, FP, NF]),
    ("Delete", [NF, OK, FP, FP, OK, NF]),
];

/// A task in one of [`STATES`].
fn in_state(name: &str) -> Result<Task, Stop> {
    let mut task = Task::new("rpc", &["/bin/probe", "sleep"])?;
    task.boot()?;
    if name == "unknown" {
        return Ok(task);
    }
    task.create()?;
    if name == "created" {
        return Ok(task);
    }
    task.rpc()?.start(&task.id)?;
    match name {
        "running" => return Ok(task),
        "paused" => drop(pause(&task)?),
        _ => {
            task.rpc()?.kill(&task.id, 9, false)?;
            task.rpc()?.wait(&task.id, SHORT)?;
        }
    }
    if name == "deleted" {
        task.rpc()?.delete(&task.id)?;
    }
    Ok(task)
}

fn rpc_every_call_in_every_state() -> Outcome {
    casemate_only()?;
    for (n, (name, number)) in STATES.into_iter().enumerate() {
        let task = in_state(name)?;
        let (rpc, id) = (task.rpc()?, task.id.as_str());
        let refused = |want: &Want| matches!(want, Want::Code(_));
        for (method, wants) in CALLS.iter().chain(&MOVES) {
            let (want, moves) = (wants[n], MOVES.iter().any(|m| m.0 == *method));
            if (moves || *method == "Create") && !refused(&want) {
                continue;
            }
            if *method == "Shutdown" && number < 0 {
                continue;
            }
            let ask = match *method {
                "Create" => Box::new(task.create_request()),
                _ => request(method, id, ""),
            };
            check(rpc, method, &*ask, want, name)?;
            ensure_eq!(phase(rpc, id), number, "state after {method}, {name}");
        }
        // And an exec of it, where there is none.
        for method in [
            "State",
            "Wait",
            "Kill",
            "Start",
            "Delete",
            "ResizePty",
            "CloseIO",
        ] {
            check(rpc, method, &*request(method, id, "nobody"), NF, name)?;
        }
        let exec = Exec::new(&task, "new", &["/bin/true"])?;
        let want = match name {
            "created" | "running" => OK,
            "unknown" | "deleted" => NF,
            _ => FP,
        };
        check(rpc, "Exec", &exec.request(), want, name)?;
        if name == "created" {
            // Registered, but there is nothing yet that it could join.
            check(rpc, "Start", &*request("Start", id, "new"), FP, name)?;
        }
        ensure_eq!(phase(rpc, id), number, "state after Exec, {name}");
        // What is right in this state still works.
        for (method, wants) in &MOVES {
            if wants[n] == OK {
                let again = in_state(name)?;
                let ask = request(method, &again.id, "");
                check(again.rpc()?, method, &*ask, OK, name)?;
                again.finish()?;
            }
        }
        if name == "paused" {
            resume(&task)?;
        }
        task.finish()?;
    }
    Ok(())
}

/// unknown, added, running, stopped.
const EXEC_CALLS: [(&str, [Want; 4]); 7] = [
    ("State", [NF, OK, OK, OK]),
    ("Wait", [NF, Want::Pends, Want::Pends, OK]),
    ("ResizePty", [NF, OK, OK, OK]),
    ("CloseIO", [NF, OK, OK, OK]),
    ("Kill", [NF, FP, OK, NF]),
    ("Start", [NF, OK, FP, FP]),
    ("Delete", [NF, OK, FP, OK]),
];

fn rpc_every_call_of_an_exec_in_every_state() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("rpcexec")?;
    let (rpc, id) = (task.rpc()?, task.id.as_str());
    for (n, name) in ["unknown", "added", "running", "stopped"]
        .into_iter()
        .enumerate()
    {
        let exec = Exec::new(&task, name, &["/bin/probe", "sleep"])?;
        if n > 0 {
            exec.add()?;
        }
        if n > 1 {
            exec.start()?;
        }
        if n > 2 {
            exec.kill(9)?;
            exec.wait()?;
        }
        let number = || {
            exec.state().map_or(-1, |state| {
                state.status.enum_value().map_or_else(|n| n, |s| s.value())
            })
        };
        let before = number();
        for (method, wants) in EXEC_CALLS {
            let want = wants[n];
            if matches!(method, "Start" | "Delete") && want == OK {
                continue;
            }
            check(rpc, method, &*request(method, id, name), want, name)?;
            ensure_eq!(number(), before, "state after {method}, {name}");
        }
        if n > 0 {
            check(rpc, "Exec", &exec.request(), AE, name)?;
            if n == 2 {
                exec.kill(9)?;
                exec.wait()?;
            }
            exec.delete()?;
        }
        ensure_eq!(phase(rpc, id), 2, "the container, after {name}");
    }
    Ok(task.finish()?)
}

const MOMENT: Duration = Duration::from_millis(1);

fn rpc_calls_with_a_deadline_of_a_millisecond() -> Outcome {
    casemate_only()?;
    for round in 0..5 {
        let mut task = Task::new("rpcms", &["/bin/probe", "sleep"])?;
        task.boot()?;
        let (rpc, id) = (task.rpc()?.clone(), task.id.clone());
        // The answer is lost or not; the effect is whole, and a retry says so.
        let hasty = |method: &str, ask: &dyn Ask| {
            let answer = rpc.call::<Empty>(method, ask, MOMENT);
            match answer {
                Err(error)
                    if error
                        .code()
                        .is_some_and(|c| c != ttrpc::Code::DEADLINE_EXCEEDED) =>
                {
                    fail(format!("{method} in round {round}: {error}"))
                }
                _ => Ok(()),
            }
        };
        let reach = |number: i32, what: &str| {
            until(&format!("state {number} after {what}"), SHORT, || {
                phase(&rpc, &id) == number
            })
        };
        hasty("Create", &task.create_request())?;
        reach(1, "Create")?;
        expect_code("Create", task.create(), ttrpc::Code::ALREADY_EXISTS)?;
        hasty("Start", &*request("Start", &id, ""))?;
        reach(2, "Start")?;
        expect_code("Start", rpc.start(&id), ttrpc::Code::FAILED_PRECONDITION)?;
        for method in [
            "State",
            "Pids",
            "Stats",
            "Connect",
            "Wait",
            "Update",
            "ResizePty",
        ] {
            hasty(method, &*request(method, &id, ""))?;
        }
        let exec = Exec::new(&task, "e", &["/bin/probe", "sleep"])?;
        hasty("Exec", &exec.request())?;
        until("the exec", SHORT, || exec.state().is_ok())?;
        hasty("Start", &*request("Start", &id, "e"))?;
        until("the exec to run", SHORT, || {
            exec.state().is_ok_and(|s| s.pid != 0)
        })?;
        hasty("Pause", &*request("Pause", &id, ""))?;
        reach(4, "Pause")?;
        hasty("Resume", &*request("Resume", &id, ""))?;
        reach(2, "Resume")?;
        exec.kill(9)?;
        ensure_eq!(exec.wait()?, 137, "exec");
        hasty("Delete", &*request("Delete", &id, "e"))?;
        until("the exec to go", SHORT, || exec.state().is_err())?;
        hasty("CloseIO", &*request("CloseIO", &id, ""))?;
        let kill = KillRequest {
            id: id.clone(),
            signal: 9,
            ..Default::default()
        };
        hasty("Kill", &kill)?;
        reach(3, "Kill")?;
        ensure_eq!(rpc.wait(&id, SHORT)?.exit_status, 137, "Wait");
        hasty("Delete", &*request("Delete", &id, ""))?;
        reach(-1, "Delete")?;
        expect_code("Delete", rpc.delete(&id), ttrpc::Code::NOT_FOUND)?;
        let want = [
            "create",
            "start",
            "exec-added",
            "exec-started",
            "paused",
            "resumed",
            "exit",
            "exit",
            "delete",
        ];
        until("the events", SHORT, || {
            task.events.topics().len() >= want.len()
        })?;
        ensure_eq!(task.events.topics(), want, "topics in round {round}");
        hasty("Shutdown", &*request("Shutdown", &id, ""))?;
        task.wait_gone(Duration::from_secs(5))?;
        task.expect_clean(SHORT)?;
    }
    Ok(())
}

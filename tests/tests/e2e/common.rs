//! What several groups of tests use.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use casemate_tests::World;
use casemate_tests::bundle::Task;
use casemate_tests::shim::{Client, SHORT};
use casemate_tests::skip::{Outcome, Stop, fail, skip};

/// Makes the list of trials of a module out of function names.
#[macro_export]
macro_rules! trials {
    ($($name:ident),+ $(,)?) => {
        pub fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$(casemate_tests::skip::trial(stringify!($name), $name)),+]
        }
    };
}

/// Containerd's enum `Status`.
pub const CREATED: i32 = 1;
pub const RUNNING: i32 = 2;
pub const STOPPED: i32 = 3;

/// The status of a task as a number of containerd's enum.
pub fn status(task: &Task) -> Result<i32, Stop> {
    use protobuf::Enum;
    let state = task.rpc()?.state(&task.id)?;
    Ok(state.status.enum_value().map_or_else(|n| n, |s| s.value()))
}

/// Fails unless the call failed with that code.
pub fn expect_code<T>(what: &str, result: casemate_tests::Result<T>, code: ttrpc::Code) -> Outcome {
    match result {
        Ok(_) => fail(format!("{what}: succeeded, want {code:?}")),
        Err(error) if error.code() == Some(code) => Ok(()),
        Err(error) => fail(format!("{what}: {error}, want {code:?}")),
    }
}

/// Fails unless the call failed with a text that has `part` in it.
pub fn expect_text<T>(what: &str, result: casemate_tests::Result<T>, part: &str) -> Outcome {
    match result {
        Ok(_) => fail(format!("{what}: succeeded, want an error with {part:?}")),
        Err(error) if error.to_string().contains(part) => Ok(()),
        Err(error) => fail(format!("{what}: {error}; want {part:?} in it")),
    }
}

/// Runs `args` by hand to the end; exit status and standard output.
pub fn run(name: &str, args: &[&str]) -> Result<(u32, String), Stop> {
    let mut task = Task::new(name, args)?;
    let (deleted, out) = task.run_to_end()?;
    task.rpc()?.shutdown(&task.id)?;
    Ok((deleted.exit_status, out))
}

/// Runs a shell script by hand; standard output, exit code 0 required.
pub fn sh(name: &str, script: &str) -> Result<String, Stop> {
    let mut task = Task::new(name, &["/bin/sh", "-c", script])?;
    let (deleted, out) = task.run_to_end()?;
    let errors = String::from_utf8_lossy(&task.stderr.so_far()).into_owned();
    if deleted.exit_status != 0 {
        return fail(format!(
            "{script}: exit {} {out} {errors}",
            deleted.exit_status
        ));
    }
    task.rpc()?.shutdown(&task.id)?;
    Ok(out)
}

/// A pending `Wait`; yields exit status, seconds and nanoseconds.
pub type Waiter = std::thread::JoinHandle<Option<(u32, i64, i32)>>;

/// A `Wait` in a thread of its own.
pub fn waiter(task: &Task) -> Result<Waiter, Stop> {
    let (client, id): (Client, String) = (task.rpc()?.clone(), task.id.clone());
    Ok(std::thread::spawn(move || {
        let reply = client.wait(&id, Duration::from_secs(60)).ok()?;
        let at = reply.exited_at.unwrap_or_default();
        Some((reply.exit_status, at.seconds, at.nanos))
    }))
}

/// Skips on a stock runtime what only casemate promises.
pub fn casemate_only() -> Outcome {
    let world = World::get()?;
    if world.is_casemate() {
        return Ok(());
    }
    skip(format!("{} makes no such promise", world.runtime()))
}

/// Mode bits of the host's /dev/null.
pub fn null_mode() -> u32 {
    std::fs::metadata("/dev/null").map_or(0, |m| m.permissions().mode() & 0o7777)
}

/// The limit of a step that waits for a workload.
pub const LONG: Duration = Duration::from_secs(60);

/// Waits for the end of standard output.
pub fn output(task: &Task) -> Result<String, Stop> {
    Ok(task.stdout.text(SHORT)?)
}

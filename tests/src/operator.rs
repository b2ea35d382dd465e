//! What an operator has: the `casemate` command, and the shim's own service for
//! it.

use std::process::Command;
use std::time::Duration;

use casemate_posture::{Depth, Deviation, Promise};
use serde_json::{Value, json};

use crate::bundle::Task;
use crate::error::{Failure, Result};
use crate::run::{Output, run};
use crate::shim::{Client, SHORT};
use crate::world::{World, binaries};

/// The command with these arguments.
pub fn command(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(binaries().join("casemate"));
    command.args(args).env("PATH", World::get()?.path());
    Ok(command)
}

/// Runs `casemate` with these arguments to the end.
pub fn casemate(args: &[&str]) -> Result<Output> {
    run(&mut command(args)?, &[], SHORT)
}

/// What `casemate` says, one JSON value a line.
pub fn lines(args: &[&str]) -> Result<Vec<Value>> {
    let output = casemate(args)?.ok()?;
    output.out().lines().map(parse).collect()
}

fn parse(line: &str) -> Result<Value> {
    serde_json::from_str(line)
        .map_err(|error| Failure::Unexpected(format!("{line:?} is no JSON: {error}")))
}

/// Asks the shim's operator service.
pub fn ask(client: &Client, method: &str, ask: &Value, limit: Duration) -> Result<Value> {
    let service = "casemate.operator.v1.Operator";
    let answer = client.raw(service, method, ask.to_string().into_bytes(), limit)?;
    parse(&String::from_utf8_lossy(&answer))
}

/// Records of the task's pod that are of a kind.
pub fn records(task: &Task, kind: &str) -> Result<Vec<Value>> {
    let page = ask(task.rpc()?, "Records", &json!({}), SHORT)?;
    let all = page["records"].as_array().cloned().unwrap_or_default();
    Ok(all.into_iter().filter(|r| r["kind"] == kind).collect())
}

/// What isn't as the shim of this task promised.
pub fn deviations(task: &Task, depth: Depth) -> Result<Vec<Deviation>> {
    let said = ask(task.rpc()?, "Promise", &json!({}), SHORT)?;
    let promise: Promise = serde_json::from_value(said)
        .map_err(|error| Failure::Unexpected(format!("a promise that can't be read: {error}")))?;
    Ok(casemate_posture::compare(&promise, depth))
}

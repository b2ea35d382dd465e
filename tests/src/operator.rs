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
    deviations_from(task.rpc()?, depth)
}

/// The same of the pod whose shim this is a connection to.
pub fn deviations_from(shim: &Client, depth: Depth) -> Result<Vec<Deviation>> {
    let (_, found) = casemate_posture::compare_with(|| promise(shim), depth)?;
    Ok(found.deviations)
}

/// What the shim promises of its pod.
pub fn promise(shim: &Client) -> Result<Promise> {
    let said = ask(shim, "Promise", &json!({}), SHORT)?;
    serde_json::from_value(said)
        .map_err(|error| Failure::Unexpected(format!("a promise that can't be read: {error}")))
}

/// Fails if something isn't as the pod's shim promised; nobody is stopped for it.
/// Nothing is said of a shim that doesn't answer, and of a pod that has lost its agent.
pub fn expect_as_promised(shim: &Client) -> Result<()> {
    let found = match deviations_from(shim, Depth::Glance) {
        Ok(found) => found,
        Err(lie @ Failure::Unexpected(_)) => return Err(lie),
        Err(_) => return Ok(()),
    };
    let lost = |d: &Deviation| d.what.starts_with("agent (") && d.promised == "alive";
    match found.iter().any(lost) {
        true => Ok(()),
        false => as_promised(&found),
    }
}

fn as_promised(found: &[Deviation]) -> Result<()> {
    let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
    match lines.as_slice() {
        [] => Ok(()),
        lines => Err(Failure::Unexpected(format!(
            "the pod is not as promised: {}",
            lines.join("; ")
        ))),
    }
}

/// Fails unless the living pod with this id, as the node's registry has it, is all that
/// its shim promises.
pub fn expect_pod_as_promised(pod: &str) -> Result<()> {
    as_promised(&deviations_from(&shim_of(pod)?, Depth::Glance)?)
}

/// The shim of the living pod with this id, as the node's registry has it.
fn shim_of(pod: &str) -> Result<Client> {
    let entries = std::fs::read_dir("/run/casemate/pods")
        .into_iter()
        .flatten();
    let socket = entries.flatten().find_map(|entry| {
        let entry = parse(&std::fs::read_to_string(entry.path()).ok()?).ok()?;
        let socket = entry["socket"].as_str()?;
        (entry["pod"] == pod).then(|| socket.to_owned())
    });
    let socket = socket
        .ok_or_else(|| Failure::Unexpected(format!("pod {pod} has no entry in the registry")))?;
    Client::connect(&format!("unix://{socket}"), 2)
}

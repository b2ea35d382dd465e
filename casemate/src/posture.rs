//! `casemate posture`: whether a living pod still is what its shim promised.

use std::io::{IsTerminal, Write};

use casemate_posture::{Depth, Findings, Promise};
use clap::Args;
use serde_json::json;

use crate::error::RunError;
use crate::operator::{self, Operator, Pod};
use crate::out;

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate posture POD            what is not as promised, a line each; on a terminal
                                  also that nothing is
  casemate posture --json POD     the same, with the promise

The host's kernel is asked about every process of the pod: ids, capabilities,
no_new_privs, filters and their hashes, namespaces, cgroups and limits, mounts and
their flags, open files; so about agent and shim. Each process is stopped for the
moment in which its filters are read. Exit status: 0 if all is as promised, 1 if
something is not, 125 if that can't be told.";

/// Of which pod.
#[derive(Debug, Args)]
pub struct Posture {
    /// Its id or the beginning of it, or Kubernetes' name
    pod: String,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Stop no process: filters are counted, not compared
    #[arg(long)]
    glance: bool,
}

/// What the pod's shim promised, and what isn't so.
pub fn compared(pod: &Pod, depth: Depth) -> Result<(Promise, Findings), RunError> {
    let ask = || -> Result<Promise, RunError> {
        let said = operator::block_on(async { Operator::connect(pod).await?.promise().await })?;
        serde_json::from_value(said).map_err(|e| RunError::Shim {
            step: "Promise",
            reason: format!(
                "the answer is not understood ({e}): install shim and casemate of one release"
            ),
        })
    };
    casemate_posture::compare_with(ask, depth)
}

/// Compares; 1 if something isn't as promised.
pub fn run(options: &Posture) -> Result<i32, RunError> {
    operator::needs_root("posture")?;
    let pod = operator::find(&options.pod)?;
    let depth = if options.glance {
        Depth::Glance
    } else {
        Depth::Whole
    };
    let (promise, found) = compared(&pod, depth)?;
    let text = if options.json {
        let all = json!({
            "pod": pod.id,
            "deviations": found.deviations,
            "unseen": found.unseen,
            "promise": promise,
        });
        format!("{all}\n")
    } else {
        for what in &found.unseen {
            let _lost = writeln!(
                std::io::stderr(),
                "casemate: posture: not to be seen on this node: {what}"
            );
        }
        found
            .deviations
            .iter()
            .map(|deviation| format!("{deviation}\n"))
            .collect()
    };
    out::say(text)?;
    // Scripts look at the status, and at lines; people at a terminal want a word.
    if found.deviations.is_empty() && !options.json && std::io::stdout().is_terminal() {
        out::say("all that could be seen is as promised\n")?;
    }
    Ok(i32::from(!found.deviations.is_empty()))
}

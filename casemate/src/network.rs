//! `casemate network`: what a pod's guard has let through and refused, read from
//! the kernel itself.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;

use casemate_netguard::Counter;
use clap::Args;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

use crate::error::{RunError, Step};
use crate::operator::{self, Operator};

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate network POD           packets and bytes of each rule that has met any
  casemate network --all POD     of each rule
  casemate network --json POD    of each rule, as one JSON object

POD is an id, or the beginning of one, or Kubernetes' name. docs/network.md says
what the rules are.";

/// Of which pod, and how.
#[derive(Debug, Args)]
pub struct Network {
    /// As one JSON object
    #[arg(long)]
    json: bool,
    /// Rules that no packet has met, too
    #[arg(long)]
    all: bool,
    /// The pod
    pod: String,
}

/// Prints its counters.
pub fn run(options: &Network) -> Result<i32, RunError> {
    operator::needs_root("network")?;
    let pod = operator::find(&options.pod)?;
    let said = operator::block_on(async { Operator::connect(&pod).await?.inspect().await })?;
    let Some(agent) = said["sandbox"]["agent"]["pid"].as_u64() else {
        return Err(RunError::Refused(format!(
            "read the network of pod {}: its shim names no agent; is it ending?",
            pod.id
        )));
    };
    let counters = counters(agent)?;
    let text = if options.json {
        let rules = counters.as_deref().map(|all| all.iter().map(as_json));
        let rules: Option<Vec<Value>> = rules.map(Iterator::collect);
        format!("{}\n", json!({ "pod": pod.id, "rules": rules }))
    } else {
        table(&pod.id, counters.as_deref(), options.all)
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .step("write to", "standard output")?;
    Ok(0)
}

/// Those of the network namespace that a process is in; `None` without a guard,
/// as on the host's network.
fn counters(pid: u64) -> Result<Option<Vec<Counter>>, RunError> {
    let open = |path: &str| File::open(path).step("open", path);
    let path = format!("/proc/{pid}/ns/net");
    let namespace = open(&path)?;
    let own = rustix::fs::fstat(open("/proc/self/ns/net")?).step("look at", "network namespace")?;
    let pods = rustix::fs::fstat(&namespace).step("look at", &path)?;
    // The node's filters are no guard of ours, whatever they are called.
    if (own.st_dev, own.st_ino) == (pods.st_dev, pods.st_ino) {
        return Ok(None);
    }
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .step("enter", path)?;
    casemate_netguard::counters()
        .map_err(|e| RunError::Refused(format!("read the pod's counters: {e}")))
}

fn as_json(counter: &Counter) -> Value {
    json!({
        "rule": counter.name,
        "packets": counter.packets,
        "bytes": counter.bytes,
    })
}

fn table(pod: &str, counters: Option<&[Counter]>, all: bool) -> String {
    let Some(counters) = counters else {
        return format!(
            "pod {pod} has no guard: it is on the host's network, or was made without\n"
        );
    };
    let mut text = String::from("   PACKETS        BYTES  RULE\n");
    for Counter {
        name,
        packets,
        bytes,
    } in counters.iter().filter(|c| all || c.packets > 0)
    {
        // Writing to a String doesn't fail.
        let _ = writeln!(text, "{packets:>10} {bytes:>12}  {name}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_met_nothing_are_left_out() {
        let counter = |name: &str, packets| Counter {
            name: name.into(),
            packets,
            bytes: packets * 60,
        };
        let both = [counter("egress denied 192.0.2.7", 2), counter("other", 0)];
        let text = table("x", Some(&both), false);
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("         2          120  egress denied 192.0.2.7"));
        assert_eq!(table("x", Some(&both), true).lines().count(), 3);
        assert!(table("x", None, false).contains("no guard"));
    }
}

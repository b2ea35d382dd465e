//! `casemate network`: what a pod's guard has let through and refused, and where
//! that wanted to go, read from the kernel itself.

use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::AsFd;

use casemate_netguard::{Counter, Direction, Refused};
use casemate_spec::network_rules::{Destination, denied_by};
use clap::Args;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

use crate::error::{RunError, Step};
use crate::operator::{self, Operator};
use crate::out;

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate network POD           packets and bytes of each rule that has met any,
                                 and destinations refused within the last hour
  casemate network --all POD     of each rule
  casemate network --json POD    of each rule, as one JSON object

POD is an id, or the beginning of one, or Kubernetes' name. docs/network.md says
what the rules are. Exit status: 0, or 125 if casemate itself failed.";

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
    let seen = seen(&pod.id, &said)?;
    let (counters, refused) = match &seen {
        Some(seen) => (Some(&seen.counters[..]), &seen.refused[..]),
        None => (None, &[][..]),
    };
    let locks = &said["sandbox"]["port_lock"];
    let text = if options.json {
        let rules = counters.map(|all| all.iter().map(as_json));
        let rules: Option<Vec<Value>> = rules.map(Iterator::collect);
        let refused = seen.as_ref().map(Seen::as_json);
        let said = json!({
            "pod": pod.id, "rules": rules, "refused": refused, "port_lock": locks,
        });
        format!("{said}\n")
    } else {
        let mut text = table(&pod.id, counters, options.all);
        text.push_str(&port_locks(locks));
        let shown = if options.all { usize::MAX } else { SHOWN };
        if !refused.is_empty() {
            text.push_str("refused within the last hour:\n");
        }
        text.push_str(
            &seen
                .as_ref()
                .map_or_else(String::new, |seen| seen.explained(shown)),
        );
        text
    };
    out::say(text)?;
    Ok(0)
}

/// Refused destinations that are shown unless all are asked for.
pub const SHOWN: usize = 20;

/// What the kernel has of a pod's guard.
pub struct Seen {
    counters: Vec<Counter>,
    refused: Vec<Refused>,
}

impl Seen {
    /// Each refused destination, with the rule and what would allow it.
    fn each(&self) -> impl Iterator<Item = (&Refused, Destination, [String; 2])> {
        self.refused.iter().map(|refused| {
            let to = Destination {
                egress: refused.direction == Direction::Out,
                address: refused.address,
                protocol: refused.protocol,
                port: refused.port,
            };
            let counted = self.counters.iter();
            let of = to.explain(counted.filter_map(|counter| denied_by(&counter.name)));
            (refused, to, [of.rule, of.allow])
        })
    }

    /// As lines, so many destinations at most.
    pub fn explained(&self, most: usize) -> String {
        let mut text = String::new();
        for (refused, to, [rule, allow]) in self.each().take(most) {
            let way = if to.egress { "to" } else { "from" };
            // Writing to a String doesn't fail.
            let _ = writeln!(
                text,
                "{}x packets {way} {to}\n  rule   {rule}\n  allow  {allow}",
                refused.packets
            );
        }
        match self.refused.len().saturating_sub(most) {
            0 => {}
            more => {
                let _ = writeln!(text, "{more} more destinations: casemate network --all");
            }
        }
        text
    }

    /// The same as JSON.
    pub fn as_json(&self) -> Vec<Value> {
        self.each()
            .map(|(refused, to, [rule, allow])| {
                json!({
                    "direction": if to.egress { "egress" } else { "ingress" },
                    "destination": to.to_string(),
                    "packets": refused.packets,
                    "bytes": refused.bytes,
                    "rule": rule,
                    "allow": allow,
                })
            })
            .collect()
    }
}

/// What the kernel has of the guard of a pod, of which its shim has `said` this.
/// The calling thread is in the pod's network namespace afterwards.
pub fn seen(pod: &str, said: &Value) -> Result<Option<Seen>, RunError> {
    match said["sandbox"]["agent"]["pid"].as_u64() {
        Some(agent) => read(agent),
        None => Err(RunError::Refused(format!(
            "read the network of pod {pod}: its shim names no agent; is it ending?"
        ))),
    }
}

/// The counters of the network namespace that a process is in, for who stays in the
/// network that it is in itself.
pub fn counters_from_afar(pid: u64) -> Result<Option<Vec<Counter>>, RunError> {
    // setns(2) is a thread's own affair.
    let asked = std::thread::spawn(move || read(pid)).join();
    let seen = asked.unwrap_or_else(|_| {
        Err(RunError::Refused(
            "read the pod's counters: no answer".to_owned(),
        ))
    });
    Ok(seen?.map(|seen| seen.counters))
}

/// Of the network namespace that a process is in; `None` without a guard, as on the
/// host's network.
fn read(pid: u64) -> Result<Option<Seen>, RunError> {
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
    let failed = |e| RunError::Refused(format!("read the pod's counters: {e}"));
    match casemate_netguard::counters().map_err(failed)? {
        None => Ok(None),
        Some(counters) => Ok(Some(Seen {
            counters,
            refused: casemate_netguard::refused().map_err(failed)?,
        })),
    }
}

/// What Landlock holds of TCP's ports.
fn port_locks(locks: &Value) -> String {
    let mut text = String::new();
    for (key, what) in [("connect", "connects to"), ("listen", "listens on")] {
        let lock = &locks[key];
        let said = match (lock["ports"].as_array(), lock["off"].as_str()) {
            (Some(ports), _) if ports.is_empty() => "no port".to_owned(),
            (Some(ports), _) => ports.iter().map(range).collect::<Vec<_>>().join(", "),
            (None, Some(why)) => format!("any port, as {why}"),
            // Of a shim that is older than this.
            (None, None) => continue,
        };
        let _ = writeln!(text, "port lock: TCP {what} {said}");
    }
    text
}

fn range(range: &Value) -> String {
    match (&range[0], &range[1]) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    }
}

/// A counter, for programs.
pub fn as_json(counter: &Counter) -> Value {
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

    #[test]
    fn a_refused_destination_is_explained() {
        let to = |address: &str, packets| Refused {
            direction: Direction::Out,
            address: address.parse().unwrap(),
            protocol: 6,
            port: Some(443),
            packets,
            bytes: 60,
        };
        let seen = Seen {
            counters: vec![Counter {
                name: "egress denied 192.0.2.7 (metadata)".into(),
                packets: 1,
                bytes: 60,
            }],
            refused: vec![to("192.0.2.8", 3), to("192.0.2.7", 1)],
        };
        let text = seen.explained(2);
        assert!(
            text.starts_with(
                "3x packets to 192.0.2.8:443/tcp\n  rule   egress denied: not on the list\n  \
                 allow  casemate.io/egress: \"192.0.2.8:443/tcp\""
            ),
            "{text}"
        );
        assert!(text.contains("network.metadata"), "{text}");
        assert!(
            seen.explained(1)
                .ends_with("1 more destinations: casemate network --all\n")
        );
        assert_eq!(seen.as_json()[0]["packets"], 3);
    }

    #[test]
    fn the_lock_on_ports_is_told() {
        let locks = json!({
            "connect": { "ports": [[53, 53], [8000, 8003]] },
            "listen": { "off": "there is no list" },
        });
        assert_eq!(
            port_locks(&locks),
            "port lock: TCP connects to 53, 8000-8003\n\
             port lock: TCP listens on any port, as there is no list\n"
        );
        assert_eq!(port_locks(&Value::Null), "");
    }
}

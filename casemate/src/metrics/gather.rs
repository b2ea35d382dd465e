//! Asks the shims of living pods, a bounded time each.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_netguard::Counter;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;

use super::text::{Id, Samples};
use crate::clock;
use crate::error::RunError;
use crate::network;
use crate::operator::{self, Operator, Pod};

/// Pods that have labels of their own.
const PODS: usize = 512;
/// Containers of a pod, and rules of a container, that have.
const CONTAINERS: usize = 64;
const RULES: usize = 64;
/// For the answers of one shim.
const EACH: Duration = Duration::from_secs(1);
/// Shims that are asked at a time.
const AT_ONCE: usize = 16;

/// What one pod came to.
struct Told {
    pod: Pod,
    said: Option<(Value, Value)>,
    guard: Vec<Counter>,
    overhead: [(&'static str, Option<u64>); 2],
}

/// All numbers, as they are now.
pub async fn gather() -> Result<Samples, RunError> {
    let begun = Instant::now();
    let mut samples = Samples::default();
    samples.add(Id::BuildInfo, &[env!("CARGO_PKG_VERSION")], 1.0);
    let mut pods = operator::pods()?;
    samples.add(Id::Sandboxes, &[], number(pods.len() as u64));
    samples.add(
        Id::Untold,
        &[],
        number(pods.len().saturating_sub(PODS) as u64),
    );
    pods.truncate(PODS);
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut asked = JoinSet::new();
    for pod in pods {
        let room = room.clone();
        asked.spawn(async move {
            // Never closed; without a place it would only be less polite.
            let _place = room.acquire().await;
            tell(pod).await
        });
    }
    while let Some(told) = asked.join_next().await {
        if let Ok(told) = told {
            add(&mut samples, &told);
        }
    }
    for refusal in operator::refusals() {
        let rule = refusal["rule"].as_str().unwrap_or("none");
        samples.add(Id::Refusals, &[rule], 1.0);
    }
    samples.add(Id::Scrape, &[], begun.elapsed().as_secs_f64());
    Ok(samples)
}

async fn tell(pod: Pod) -> Told {
    let ask = async {
        let shim = Operator::connect(&pod).await?;
        Ok::<_, RunError>((shim.inspect().await?, shim.denials().await?))
    };
    let said = timeout(EACH, ask).await.ok().and_then(Result::ok);
    let agent = said
        .as_ref()
        .and_then(|(pod, _)| pod["sandbox"]["agent"]["pid"].as_u64());
    let shim = pod.shim;
    // The kernel's own answers; of a shim that is stuck, too.
    let own = spawn_blocking(move || {
        let guard = agent.and_then(|pid| network::counters_from_afar(pid).ok().flatten());
        let overhead = [("shim", Some(u64::from(shim))), ("agent", agent)];
        let overhead = overhead.map(|(name, pid)| (name, pid.and_then(pss)));
        (guard.unwrap_or_default(), overhead)
    });
    let (guard, overhead) = own.await.unwrap_or_default();
    Told {
        pod,
        said,
        guard,
        overhead,
    }
}

/// Proportional set size in bytes (proc_pid_smaps(5)).
pub fn pss(pid: u64) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[allow(clippy::cast_precision_loss)]
fn number(n: u64) -> f64 {
    n as f64
}

fn add(samples: &mut Samples, told: &Told) {
    let pod = &told.pod;
    let (namespace, name) = match &pod.kubernetes {
        Some((namespace, name)) => (namespace.as_str(), name.as_str()),
        None => ("", ""),
    };
    let own = [namespace, name, pod.id.as_str()];
    let mut with = |id: Id, more: &[&str], value: f64| {
        let labels: Vec<&str> = own.iter().chain(more).copied().collect();
        samples.add(id, &labels, value);
    };
    with(Id::Up, &[], f64::from(u8::from(told.said.is_some())));
    if let Some(since) = clock::seconds(&pod.since) {
        with(Id::Started, &[], number(since));
    }
    for (process, bytes) in told.overhead {
        if let Some(bytes) = bytes {
            with(Id::Overhead, &[process], number(bytes));
        }
    }
    for counter in &told.guard {
        // `egress denied 192.0.2.7`: whom it is about would be a label without end.
        let mut words = counter.name.split([' ', ':']);
        if let (Some(direction), Some(verdict)) = (words.next(), words.next()) {
            with(Id::Guard, &[direction, verdict], number(counter.packets));
        }
    }
    let Some((said, denials)) = &told.said else {
        return;
    };
    let version = said["version"].as_str().unwrap_or_default();
    with(Id::Info, &[version, &pod.namespace], 1.0);
    for (reason, count) in said["dropped"].as_object().into_iter().flatten() {
        with(Id::Dropped, &[reason], number(count.as_u64().unwrap_or(0)));
    }
    let containers = said["containers"].as_array().into_iter().flatten();
    let mut execs = 0;
    for (n, container) in containers.filter(|c| c["pause"] != true).enumerate() {
        let id = match n {
            0..CONTAINERS => container["id"].as_str().unwrap_or_default(),
            _ => "other",
        };
        let state = container["state"].as_str().unwrap_or("unknown");
        with(Id::Containers, &[state], 1.0);
        execs += container["execs"].as_array().map_or(0, Vec::len);
        let usage = &container["sandbox"]["usage"];
        for (metric, key) in [
            (Id::Memory, "memory"),
            (Id::MemoryLimit, "memory_limit"),
            (Id::Processes, "processes"),
        ] {
            if let Some(value) = usage[key].as_u64() {
                with(metric, &[id], number(value));
            }
        }
    }
    with(Id::Execs, &[], number(execs as u64));
    for ((container, rule), count) in by_rule(denials) {
        with(Id::Denied, &[&container, &rule], number(count));
    }
}

/// Refused calls by container and rule, as many of both as have labels.
fn by_rule(denials: &Value) -> BTreeMap<(String, String), u64> {
    let mut all: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    for denial in denials["denials"].as_array().into_iter().flatten() {
        let text = |key: &str| denial[key].as_str().unwrap_or("none").to_owned();
        let mut container = text("container");
        if !all.contains_key(&container) && all.len() >= CONTAINERS {
            "other".clone_into(&mut container);
        }
        let rules = all.entry(container).or_default();
        let mut rule = text("rule");
        if !rules.contains_key(&rule) && rules.len() >= RULES {
            "other".clone_into(&mut rule);
        }
        let count = rules.entry(rule).or_default();
        *count = count.saturating_add(denial["count"].as_u64().unwrap_or(0));
    }
    let flat = all.into_iter().flat_map(|(container, rules)| {
        let each = rules.into_iter();
        each.map(move |(rule, count)| ((container.clone(), rule), count))
            .collect::<Vec<_>>()
    });
    flat.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn labels_of_rules_are_bounded_and_no_call_is_lost() {
        let denials: Vec<Value> = (0..10_000)
            .map(|n| json!({ "container": format!("c{}", n % 200), "rule": format!("r{}", n % 999), "count": 2 }))
            .collect();
        let all = by_rule(&json!({ "denials": denials }));
        assert!(all.len() <= (CONTAINERS + 1) * (RULES + 1), "{}", all.len());
        assert_eq!(all.values().sum::<u64>(), 20_000);
        assert!(all.keys().any(|(container, _)| container == "other"));
        assert!(all.keys().any(|(_, rule)| rule == "other"));
    }
}

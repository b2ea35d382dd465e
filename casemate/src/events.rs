//! `casemate events`: what happened in pods, as JSON lines.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use tokio::sync::mpsc::{Sender, channel};

use crate::error::{RunError, Step};
use crate::operator::{self, Operator, Pod};

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate events                     what living pods have kept, and refusals
  casemate events --follow            the same, and then as it comes
  casemate events --follow POD        of one pod, by id or Kubernetes' name
  casemate events | jq 'select(.kind == \"denial\")'

One JSON object a line: at, namespace, pod, kind (denial, exec, exec_end, oom,
policy_refusal, agent_loss, broker_loss, network), and what belongs to it. A
line of kind \"dropped\" has the number of records that were lost: pushed out by
later ones, or too many at a time; one of kind \"unheard\" is of a pod whose shim
doesn't answer. Needs root. Exit status: 0, or 125 if casemate itself failed, or
the one pod that was named isn't heard.";

/// One round of a pod that is followed.
const ROUND: Duration = Duration::from_secs(20);
/// How often new pods and refusals are looked for.
const LOOK: Duration = Duration::from_millis(500);

/// Of which pods, and for how long.
#[derive(Debug, Args)]
pub struct Events {
    /// Go on until interrupted
    #[arg(short, long)]
    follow: bool,
    /// As JSON lines, which is the only form there is
    #[arg(long)]
    json: bool,
    /// A pod: its id or the beginning of it, or Kubernetes' name
    #[arg(value_name = "POD")]
    pod: Option<String>,
}

/// Prints them.
pub fn run(options: &Events) -> Result<i32, RunError> {
    operator::needs_root("events")?;
    let written = operator::block_on(print(options));
    match written {
        // Whoever read us has what it wanted.
        Err(RunError::Host { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        other => other.map(|()| 0),
    }
}

fn line(value: &Value) -> Result<(), RunError> {
    writeln!(io::stdout(), "{value}").step("write to", "standard output")
}

/// A refusal of a pod that is meant, which may have gone.
fn is_meant(refusal: &Value, wanted: Option<&str>) -> bool {
    let pod = refusal["pod"].as_str().unwrap_or_default();
    wanted.is_none_or(|wanted| !wanted.is_empty() && pod.starts_with(wanted))
}

async fn print(options: &Events) -> Result<(), RunError> {
    let wanted = options.pod.as_deref();
    let refusals: Vec<Value> = operator::refusals()
        .into_iter()
        .filter(|refusal| is_meant(refusal, wanted))
        .collect();
    let chosen = match wanted {
        None => None,
        Some(name) => match operator::find(name) {
            Ok(pod) => Some(pod),
            // Its refusal is all that is left of it.
            Err(_) if !refusals.is_empty() => None,
            Err(error) => return Err(error),
        },
    };
    for refusal in &refusals {
        line(refusal)?;
    }
    let only_refusals = wanted.is_some() && chosen.is_none();
    if only_refusals && !options.follow {
        return Ok(());
    }
    if !options.follow {
        if let Some(pod) = &chosen {
            return once(pod).await;
        }
        for pod in operator::pods()? {
            match once(&pod).await {
                Err(error) if error.is(io::ErrorKind::BrokenPipe) => return Err(error),
                Err(error) => line(&unheard(&pod, &error))?,
                Ok(()) => {}
            }
        }
        return Ok(());
    }
    follow(chosen, wanted, refusals.last().cloned()).await
}

/// What a pod has now.
async fn once(pod: &Pod) -> Result<(), RunError> {
    let shim = Operator::connect(pod).await?;
    let mut since = 0;
    let mut told = Value::Null;
    loop {
        let page = shim.records(since, Duration::ZERO).await?;
        let records = page["records"].as_array().cloned().unwrap_or_default();
        if let Some(dropped) = dropped(pod, &page, &mut told) {
            line(&dropped)?;
        }
        for record in records.iter().filter(|record| !is_kept_twice(record)) {
            line(record)?;
        }
        if records.is_empty() {
            return Ok(());
        }
        since = page["next"].as_u64().unwrap_or(u64::MAX);
    }
}

/// Refusals are told from where they outlive their pods.
fn is_kept_twice(record: &Value) -> bool {
    record["kind"] == "policy_refusal"
}

fn unheard(pod: &Pod, error: &RunError) -> Value {
    json!({
        "namespace": pod.namespace, "pod": pod.id, "kind": "unheard", "text": error.to_string(),
    })
}

/// The drop counters, when they have changed.
fn dropped(pod: &Pod, page: &Value, told: &mut Value) -> Option<Value> {
    let counts = &page["dropped"];
    let is_zero = counts
        .as_object()
        .is_none_or(|counts| counts.values().all(|count| count == 0));
    if is_zero || told == counts {
        return None;
    }
    told.clone_from(counts);
    Some(json!({
        "namespace": pod.namespace, "pod": pod.id, "kind": "dropped",
        "dropped": counts, "missed": page["missed"],
    }))
}

async fn follow(
    chosen: Option<Pod>,
    wanted: Option<&str>,
    mut last: Option<Value>,
) -> Result<(), RunError> {
    let (sender, mut lines) = channel::<Value>(256);
    let mut known = BTreeSet::new();
    let mut tick = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            Some(value) = lines.recv() => line(&value)?,
            _ = tick.tick() => {
                let pods = operator::pods()?;
                // Another pod's shim may have the number, one day.
                known.retain(|one| pods.iter().any(|pod| which(pod) == *one));
                for pod in pods {
                    let is_chosen = match (&chosen, wanted) {
                        (Some(chosen), _) => chosen.id == pod.id && chosen.namespace == pod.namespace,
                        (None, Some(name)) => pod.id.starts_with(name),
                        (None, None) => true,
                    };
                    if is_chosen && known.insert(which(&pod)) {
                        tokio::spawn(feed(pod, sender.clone()));
                    }
                }
                for refusal in later(operator::refusals(), last.as_ref()) {
                    if is_meant(&refusal, wanted) {
                        line(&refusal)?;
                    }
                    last = Some(refusal);
                }
            }
        }
    }
}

/// Those after the last that was told; all of them if that is there no more.
fn later(all: Vec<Value>, last: Option<&Value>) -> Vec<Value> {
    let after = all.iter().rposition(|refusal| Some(refusal) == last);
    all.into_iter().skip(after.map_or(0, |at| at + 1)).collect()
}

/// What tells a pod from all others, later ones too.
fn which(pod: &Pod) -> (String, String, String, u32) {
    let (namespace, id) = (pod.namespace.clone(), pod.id.clone());
    (namespace, id, pod.since.clone(), pod.shim)
}

/// Follows one pod to its end. A shim that doesn't answer, for a while, is asked again.
async fn feed(pod: Pod, lines: Sender<Value>) {
    let (mut since, mut told) = (0, Value::Null);
    let lives = || operator::pods().is_ok_and(|all| all.iter().any(|p| which(p) == which(&pod)));
    loop {
        if let Ok(shim) = Operator::connect(&pod).await {
            while let Ok(page) = shim.records(since, ROUND).await {
                let records = page["records"].as_array().cloned().unwrap_or_default();
                // The ring may have refused it: ask again where we were.
                since = page["next"].as_u64().unwrap_or(since);
                let lost = dropped(&pod, &page, &mut told);
                for value in lost.into_iter().chain(records) {
                    if !is_kept_twice(&value) && lines.send(value).await.is_err() {
                        return;
                    }
                }
            }
        }
        tokio::time::sleep(LOOK).await;
        if !lives() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_later_refusals_are_told_again() {
        let all: Vec<Value> = (1..=3).map(|n| json!({ "n": n })).collect();
        assert_eq!(later(all.clone(), Some(&all[1])), [json!({ "n": 3 })]);
        assert_eq!(later(all.clone(), None).len(), 3);
        assert_eq!(later(all.clone(), Some(&json!({ "n": 0 }))).len(), 3);
    }
}

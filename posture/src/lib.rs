//! The posture of a living pod: what its shim promised of each process, beside
//! what the host's kernel says. Nothing inside is asked, and nothing is changed;
//! processes whose filters are compared are stopped for that moment.
#![forbid(unsafe_code)]

mod descriptors;
mod guard;
mod landlock;
mod limits;
mod mounts;
mod place;
mod process;
mod promise;
mod status;

use std::collections::BTreeSet;
use std::time::Duration;

pub use promise::{Container, Limits, Mount, Network, Process, Promise, Rule, hash};

/// Something that isn't as it was promised.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Deviation {
    /// Of whom, and what.
    pub what: String,
    /// As promised.
    pub promised: String,
    /// As found.
    pub found: String,
}

impl std::fmt::Display for Deviation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            what,
            promised,
            found,
        } = self;
        write!(f, "{what}: promised {promised}, found {found}")
    }
}

/// What a look has found.
#[derive(Debug, Default, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Findings {
    /// What isn't as promised.
    pub deviations: Vec<Deviation>,
    /// What was promised and can't be seen on this node, and why.
    pub unseen: Vec<String>,
}

/// What has been found so far.
#[derive(Default)]
struct Report(Findings);

impl Report {
    fn add(&mut self, what: impl ToString, promised: impl ToString, found: impl ToString) {
        self.0.deviations.push(Deviation {
            what: what.to_string(),
            promised: promised.to_string(),
            found: found.to_string(),
        });
    }

    fn equal<T: PartialEq + ToString>(&mut self, what: impl ToString, promised: &T, found: &T) {
        if promised != found {
            self.add(what, promised.to_string(), found.to_string());
        }
    }

    fn unseen(&mut self, what: String) {
        self.0.unseen.push(what);
    }
}

/// How much is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// All, for which processes are stopped for a moment each (ptrace(2)).
    Whole,
    /// Without a comparison of filters: only how many there are.
    Glance,
}

/// How often is looked again before something is a deviation, and when: a process may
/// be just starting, ending, or at work for the shim.
const LOOKS: u32 = 3;
const BETWEEN: Duration = Duration::from_millis(20);

/// Compares. Without deviations everything that can be seen is as it was promised.
/// Processes that end meanwhile are left out, and what is no more when it is looked
/// at again.
pub fn compare(promise: &Promise, depth: Depth) -> Findings {
    let mut findings = look(promise, depth);
    for _ in 1..LOOKS {
        if findings.deviations.is_empty() {
            break;
        }
        std::thread::sleep(BETWEEN);
        let again = look(promise, depth);
        findings
            .deviations
            .retain(|d| again.deviations.iter().any(|a| a.what == d.what));
    }
    findings
}

/// Compares with what the pod's shim says, and where something differs with what it
/// says then: a container may begin or end between the word and the look.
///
/// # Errors
/// Those of `ask`.
pub fn compare_with<E>(
    mut ask: impl FnMut() -> Result<Promise, E>,
    depth: Depth,
) -> Result<(Promise, Findings), E> {
    let promise = ask()?;
    let mut findings = compare(&promise, depth);
    if findings.deviations.is_empty() {
        return Ok((promise, findings));
    }
    let promise = ask()?;
    let again = compare(&promise, depth).deviations;
    findings
        .deviations
        .retain(|d| again.iter().any(|a| a.what == d.what));
    Ok((promise, findings))
}

fn look(promise: &Promise, depth: Depth) -> Findings {
    let mut report = Report::default();
    let all = process::all();
    process::runtime(&mut report, "shim", &promise.shim, depth);
    process::runtime(&mut report, "agent", &promise.agent, depth);
    let mut known = BTreeSet::from([promise.agent.pid]);
    known.extend(&promise.forkers);
    known.extend(promise.pause.iter().map(|p| p.pid));
    if let Some(pause) = &promise.pause {
        process::runtime(&mut report, "pause", pause, depth);
    }
    for learner in &promise.learners {
        known.insert(learner.pid);
        process::runtime(&mut report, "learner", learner, depth);
    }
    process::pod(&mut report, promise);
    guard::check(&mut report, promise);
    for container in &promise.containers {
        known.insert(container.forker);
        process::container(&mut report, (promise, container), &all, &mut known, depth);
        let witness = mounts::check(&mut report, container);
        landlock::check(&mut report, container, witness);
        limits::check(&mut report, container);
    }
    process::strangers(&mut report, promise, &all, &known);
    report.0
}

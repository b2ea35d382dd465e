//! The posture of a living pod: what its shim promised of each process, beside
//! what the host's kernel says. Nothing inside is asked, and nothing is changed;
//! processes whose filters are compared are stopped for that moment.
#![forbid(unsafe_code)]

mod mounts;
mod process;
mod promise;

use std::collections::BTreeSet;

pub use promise::{Container, Limits, Mount, Process, Promise, hash};

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

/// What has been found so far.
#[derive(Default)]
struct Report(Vec<Deviation>);

impl Report {
    fn add(&mut self, what: impl ToString, promised: impl ToString, found: impl ToString) {
        self.0.push(Deviation {
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
}

/// How much is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// All, for which processes are stopped for a moment each (ptrace(2)).
    Whole,
    /// Without a comparison of filters: only how many there are.
    Glance,
}

/// Compares. Empty: everything is as it was promised. Processes that end
/// meanwhile are left out.
pub fn compare(promise: &Promise, depth: Depth) -> Vec<Deviation> {
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
    for container in &promise.containers {
        known.insert(container.forker);
        process::container(&mut report, container, &all, &mut known, depth);
        mounts::check(&mut report, container);
        for (file, promised) in &container.limits.0 {
            let found = promise::limit(file.as_ref());
            let found = found.unwrap_or_else(|| "nothing".to_owned());
            let name = file.rsplit('/').next().unwrap_or(file);
            let what = format!("container {}: limit {name} ({file})", container.id);
            report.equal(what, promised, &found);
        }
    }
    process::strangers(&mut report, promise, &all, &known);
    report.0
}

//! What each trial came to and through which containerd it went: the source of
//! `docs/conformance.md`.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::{Failure, Result, file};
use crate::skip::{Outcome, Stop};

/// The end of one trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// `passed`, `failed` or `skipped`.
    pub outcome: String,
    /// Lines of containerd that it went through; none: a shim started by hand.
    pub daemons: BTreeSet<String>,
    /// How long it took, in milliseconds.
    #[serde(default)]
    pub took: u64,
}

static ENTRIES: Mutex<BTreeMap<String, Entry>> = Mutex::new(BTreeMap::new());

thread_local! {
    static TOUCHED: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
    static BEGUN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// A trial begins on this thread. It counts as failed until it ends.
pub fn begin(name: &str) {
    TOUCHED.with_borrow_mut(BTreeSet::clear);
    BEGUN.set(Some(Instant::now()));
    put(name, "failed");
}

/// The trial of this thread went through a containerd of that line.
pub fn touched(version: &str) {
    TOUCHED.with_borrow_mut(|all| all.insert(version.to_owned()));
}

/// The trial of this thread came to its end.
pub fn end(name: &str, outcome: &Outcome) {
    put(
        name,
        match outcome {
            Ok(()) => "passed",
            Err(Stop::Fail(_)) => "failed",
            Err(Stop::Skip(_)) => "skipped",
        },
    );
}

fn put(name: &str, outcome: &str) {
    let entry = Entry {
        outcome: outcome.to_owned(),
        daemons: TOUCHED.with_borrow(BTreeSet::clone),
        took: BEGUN.get().map_or(0, |begun| {
            u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX)
        }),
    };
    if let Ok(mut all) = ENTRIES.lock() {
        all.insert(name.to_owned(), entry);
    }
}

/// Name and milliseconds of the trials of this run, the longest first.
pub fn longest() -> Vec<(String, u64)> {
    let mut all: Vec<(String, u64)> = match ENTRIES.lock() {
        Ok(all) => all.iter().map(|(name, e)| (name.clone(), e.took)).collect(),
        Err(_) => Vec::new(),
    };
    all.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    all
}

/// Writes the results of this run to `path`; after a run of only some trials,
/// those of the others stay as they are there.
pub fn write(path: &Path, whole: bool) -> Result<()> {
    let mut all = if whole {
        BTreeMap::new()
    } else {
        read(path).unwrap_or_default()
    };
    if let Ok(entries) = ENTRIES.lock() {
        all.extend(entries.clone());
    }
    let text = serde_json::to_string_pretty(&all)
        .map_err(|e| Failure::Unexpected(format!("results: {e}")))?;
    fs::write(path, text + "\n").map_err(file("write", path))
}

/// Reads what [`write`] wrote.
pub fn read(path: &Path) -> Result<BTreeMap<String, Entry>> {
    let text = fs::read_to_string(path).map_err(file("read", path))?;
    serde_json::from_str(&text).map_err(|e| Failure::Unexpected(format!("{}: {e}", path.display())))
}

//! How a test ends, and the count of tests that could not run.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;
use std::sync::Mutex;

use libtest_mimic::{Completion, Failed, Trial};

use crate::results;

/// Why a test stopped early.
#[derive(Debug)]
pub enum Stop {
    /// The machine lacks something; the reason goes into the report.
    Skip(String),
    /// The thing under test is wrong.
    Fail(String),
}

impl<E: std::error::Error> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Fail(error.to_string())
    }
}

/// What a test function returns.
pub type Outcome = Result<(), Stop>;

/// Stops the test as skipped.
pub fn skip<T>(reason: impl Display) -> Result<T, Stop> {
    Err(Stop::Skip(reason.to_string()))
}

/// Stops the test as failed.
pub fn fail<T>(reason: impl Display) -> Result<T, Stop> {
    Err(Stop::Fail(reason.to_string()))
}

/// Fails the test unless the condition holds; the rest is a `format!`.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return $crate::skip::fail(format!($($why)+));
        }
    };
}

/// Fails the test unless both sides are equal; shows both.
#[macro_export]
macro_rules! ensure_eq {
    ($left:expr, $right:expr, $($why:tt)+) => {
        match (&$left, &$right) {
            (left, right) => if left != right {
                return $crate::skip::fail(format!(
                    "{}: got {left:?}, want {right:?}", format_args!($($why)+)
                ));
            }
        }
    };
}

static SKIPPED: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());

/// First failures of trials that then passed.
static UNSTEADY: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
/// The most trials of a run that may be tried again.
const UNSTEADY_MAX: usize = 4;

/// Trials that failed once and passed when tried again, with the first reason.
fn unsteady() -> BTreeMap<String, String> {
    UNSTEADY.lock().map(|all| all.clone()).unwrap_or_default()
}

/// Says which those were.
pub fn tell_unsteady() {
    for (name, reason) in unsteady() {
        println!("{name}: unsteady: tried again after: {reason}");
    }
}

/// Whether `name`, which has failed, may be tried once more. In CI, where a moment of a busy machine
/// would cost everything, a few may; each is told at the end.
pub fn once_more(name: &str, why: &str) -> bool {
    std::env::var_os("CI").is_some()
        && UNSTEADY.lock().is_ok_and(|mut all| {
            let more = all.len() < UNSTEADY_MAX;
            if more {
                all.insert(name.to_owned(), why.to_owned());
            }
            more
        })
}

/// Wraps a test function for the harness.
pub fn trial(name: &str, test: impl Fn() -> Outcome + Send + 'static) -> Trial {
    let name = name.to_owned();
    Trial::ignorable_test(name.clone(), move || {
        results::begin(&name);
        let mut outcome = test();
        if let Err(Stop::Fail(why)) = &outcome
            && once_more(&name, why)
        {
            outcome = test();
        }
        results::end(&name, &outcome);
        match outcome {
            Ok(()) => Ok(Completion::Completed),
            Err(Stop::Fail(why)) => Err(Failed::from(why)),
            Err(Stop::Skip(reason)) => {
                note(&name, &reason);
                Ok(Completion::ignored_with(format!("skipped: {reason}")))
            }
        }
    })
}

/// Counts a test as skipped.
pub fn note(name: &str, reason: &str) {
    if let Ok(mut all) = SKIPPED.lock() {
        all.insert(name.to_owned(), reason.to_owned());
    }
}

/// Every skipped test with its reason.
pub fn skipped() -> BTreeMap<String, String> {
    SKIPPED.lock().map(|all| all.clone()).unwrap_or_default()
}

/// Skipped tests that the list at `path` (`name: reason` a line) does not name;
/// a name that ends in `*` stands for all that begin so.
pub fn not_allowed(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let allowed: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(':').map(|(name, _)| name.trim()))
        .collect();
    skipped()
        .into_keys()
        .filter(|name| {
            !allowed.iter().any(|entry| match entry.strip_suffix('*') {
                Some(begin) => name.starts_with(begin),
                None => name == entry,
            })
        })
        .collect()
}

//! The list of what a shim owes to containerd, which trials show it, and on
//! which daemons they passed: `docs/conformance.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use crate::error::{Failure, Result, file};
use crate::results::Entry;

/// How many items there are.
pub const ITEMS: u32 = 146;

/// Items with their texts, and what is missing of them with the reasons.
pub struct List {
    items: BTreeMap<u32, String>,
    gaps: BTreeMap<u32, String>,
}

/// The directory of this crate, with the lists in it.
fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where a test run writes its results.
pub fn results() -> PathBuf {
    here().join("../target/e2e-results.json")
}

/// The document.
pub fn document() -> PathBuf {
    here().join("../docs/conformance.md")
}

fn numbered(path: &Path, end: char) -> Result<BTreeMap<u32, String>> {
    let text = std::fs::read_to_string(path).map_err(file("read", path))?;
    let mut all = BTreeMap::new();
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let wrong = || Failure::Unexpected(format!("{}: {line:?}", path.display()));
        let (number, rest) = line.split_once(end).ok_or_else(wrong)?;
        let number = number.parse().map_err(|_| wrong())?;
        if all.insert(number, rest.trim().to_owned()).is_some() {
            return Err(wrong());
        }
    }
    Ok(all)
}

/// The numbers in a trial's name: 81 and 82 of `cri21_c081_c082_stats`.
pub fn numbers(trial: &str) -> BTreeSet<u32> {
    trial
        .split('_')
        .filter_map(|word| word.strip_prefix('c'))
        .filter(|digits| digits.len() == 3)
        .filter_map(|digits| digits.parse().ok())
        .filter(|number| (1..=ITEMS).contains(number))
        .collect()
}

/// The name without the daemon that some begin with: `cri21_x` and `cri16_x`
/// are one trial on two.
fn plain(trial: &str) -> String {
    for kind in ["cri", "ctr"] {
        if let Some(rest) = trial.strip_prefix(kind)
            && let Some((tag, name)) = rest.split_once('_')
            && tag.len() == 2
            && tag.bytes().all(|b| b.is_ascii_digit())
        {
            return format!("{kind}_{name}");
        }
    }
    trial.to_owned()
}

/// What several runs of one trial came to together.
#[derive(Default)]
struct Sum {
    passed: BTreeSet<String>,
    failed: BTreeSet<String>,
    skipped: bool,
}

impl Sum {
    fn add(&mut self, name: &str, entry: &Entry) {
        match entry.outcome.as_str() {
            "passed" if entry.daemons.is_empty() => {
                self.passed.insert("by hand".to_owned());
            }
            "passed" => self.passed.extend(entry.daemons.iter().cloned()),
            "skipped" => self.skipped = true,
            _ => {
                self.failed.insert(name.to_owned());
            }
        }
    }

    fn show(&self) -> String {
        let mut parts: Vec<String> = self.passed.iter().cloned().collect();
        parts.extend(self.failed.iter().map(|name| format!("**failed: {name}**")));
        if parts.is_empty() {
            let none = if self.skipped { "skipped" } else { "not run" };
            parts.push(none.to_owned());
        }
        parts.join(", ")
    }
}

impl List {
    /// Reads both files.
    pub fn read() -> Result<Self> {
        let items = numbered(&here().join("conformance.txt"), ' ')?;
        if items.keys().copied().ne(1..=ITEMS) {
            let what = format!("tests/conformance.txt doesn't have the items 1 to {ITEMS}");
            return Err(Failure::Unexpected(what));
        }
        let gaps = numbered(&here().join("conformance-gaps.txt"), ':')?;
        Ok(Self { items, gaps })
    }

    /// Items that no trial is named after and no reason is given for.
    pub fn uncovered<'a>(&self, trials: impl Iterator<Item = &'a str>) -> Vec<u32> {
        let named: BTreeSet<u32> = trials.flat_map(numbers).collect();
        (1..=ITEMS)
            .filter(|n| !named.contains(n) && !self.gaps.contains_key(n))
            .collect()
    }

    /// The document, from the results of a run.
    pub fn render(&self, results: &BTreeMap<String, Entry>) -> String {
        let mut by_item: BTreeMap<u32, (BTreeSet<String>, Sum)> = BTreeMap::new();
        let mut pods: BTreeMap<String, Sum> = BTreeMap::new();
        for (name, entry) in results {
            for number in numbers(name) {
                let (names, sum) = by_item.entry(number).or_default();
                names.insert(plain(name));
                sum.add(name, entry);
            }
            if plain(name).starts_with("cri_") {
                pods.entry(plain(name)).or_default().add(name, entry);
            }
        }
        let mut text = String::from(HEAD);
        let shown = by_item
            .values()
            .filter(|(_, s)| !s.passed.is_empty())
            .count();
        let _ = writeln!(
            text,
            "{shown} of {ITEMS} items have trials that passed in the run behind this list.\n"
        );
        text.push_str("| | Item | Trials | Passed |\n| --: | --- | --- | --- |\n");
        for (number, item) in &self.items {
            let gap = self.gaps.get(number).map(|g| format!(" *{g}*"));
            let (names, passed) = match by_item.get(number) {
                Some((names, sum)) => {
                    let names: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
                    (names.join(" "), sum.show())
                }
                None => ("–".to_owned(), "–".to_owned()),
            };
            let gap = gap.unwrap_or_default();
            let _ = writeln!(text, "| {number} | {item}{gap} | {names} | {passed} |");
        }
        text.push_str(PODS);
        text.push_str("| Trial | Passed |\n| --- | --- |\n");
        for (name, sum) in &pods {
            let _ = writeln!(text, "| `{name}` | {} |", sum.show());
        }
        text
    }
}

const HEAD: &str = "\
# Conformance

What containerd and its clients count on in a shim, the end-to-end trials named
after each item, and where they passed: the line of containerd that a trial went
through, or *by hand*, which is a shim that the trial itself started and spoke to
as containerd does, with the bytes of each protocol. *Italics*: what is missing.

Made by `make conformance` from `tests/conformance.txt`, `tests/conformance-gaps.txt`
and the results of `make e2e`. `make e2e` fails when an item has neither a trial
nor a reason. Trials whose names begin with `cri_` go over the CRI socket and those
with `ctr_` through `ctr`, of each daemon named; in `make e2e T=…` their names have
the daemon in them, as in `cri21_`.

";

const PODS: &str = "
## Pods over CRI

";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_names() {
        let of = |name: &str| numbers(name).into_iter().collect::<Vec<_>>();
        assert_eq!(of("c041_exit_codes"), [41]);
        assert_eq!(of("cri21_c081_c082_stats"), [81, 82]);
        assert_eq!(of("sandbox_cgroup_limits"), Vec::<u32>::new());
        assert_eq!(of("c147_c000_clone3_c12"), Vec::<u32>::new());
    }

    #[test]
    fn daemons_are_taken_off_names() {
        assert_eq!(plain("cri21_lifecycle"), "cri_lifecycle");
        assert_eq!(plain("ctr16_c001_x"), "ctr_c001_x");
        assert_eq!(plain("ctr_stdin_reaches"), "ctr_stdin_reaches");
        assert_eq!(plain("c041_exit_codes"), "c041_exit_codes");
    }

    #[test]
    fn an_item_without_trial_and_reason_is_found() {
        let list = List {
            items: BTreeMap::new(),
            gaps: BTreeMap::from([(2, "why".to_owned())]),
        };
        let missing = list.uncovered(["c001_x", "cri17_c003_y"].into_iter());
        assert_eq!(missing.first(), Some(&4));
        assert_eq!(missing.len(), 143);
    }

    #[test]
    fn a_failure_is_shown_beside_what_passed() {
        let entry = |outcome: &str, daemons: &[&str]| Entry {
            outcome: outcome.to_owned(),
            daemons: daemons.iter().map(|d| (*d).to_owned()).collect(),
            took: 0,
        };
        let results = BTreeMap::from([
            ("c001_x".to_owned(), entry("passed", &[])),
            ("ctr16_c001_x".to_owned(), entry("passed", &["1.6"])),
            ("ctr21_c001_x".to_owned(), entry("failed", &["2.1"])),
            ("cri23_c002_y".to_owned(), entry("skipped", &[])),
        ]);
        let list = List::read().unwrap();
        let text = list.render(&results);
        let row = |n: &str| text.lines().find(|l| l.starts_with(n)).unwrap();
        assert!(
            row("| 1 |")
                .ends_with("| `c001_x` `ctr_c001_x` | 1.6, by hand, **failed: ctr21_c001_x** |")
        );
        assert!(row("| 2 |").ends_with("| `cri_c002_y` | skipped |"));
        assert!(text.contains("\n1 of 146 items"));
    }
}

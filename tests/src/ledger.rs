//! The ledger of known vulnerabilities (`tests/cve-ledger.tsv`): for each its way
//! in, the lock that stands there in `profile = "default"`, and the probes that
//! show it; and the page of it, `docs/cve-ledger.md`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::error::{Failure, Result, file};
use crate::probes::{Accepted, Answers, own_file};

/// One vulnerability.
#[derive(Debug, Clone)]
pub struct Row {
    /// CVE, or GitHub's advisory.
    pub id: String,
    /// Year and month.
    pub date: String,
    /// Class of way in; `runtime`: not the kernel.
    pub class: String,
    /// `closed`, `narrowed`, `open`, `unjudged`, `design`.
    pub verdict: String,
    /// How it is reached.
    pub entry: String,
    /// What stands there.
    pub lock: String,
    /// Probes that show it; trials for runtimes.
    pub proofs: Vec<String>,
}

impl Row {
    /// A fault of the kernel, not of a runtime.
    pub fn is_kernel(&self) -> bool {
        self.class != "runtime"
    }
}

/// All rows.
///
/// # Errors
/// The file can't be read, or a line hasn't seven fields and a known verdict.
pub fn rows() -> Result<Vec<Row>> {
    let path = own_file("cve-ledger.tsv");
    let text = std::fs::read_to_string(&path).map_err(file("read", &path))?;
    let lines = text
        .lines()
        .filter(|l| !l.starts_with('#') && !l.is_empty());
    lines
        .map(|line| {
            let fields: Vec<&str> = line.split('\t').collect();
            let [id, date, class, verdict, entry, lock, proofs] = fields[..] else {
                return Err(Failure::Unexpected(format!("{}: {line:?}", path.display())));
            };
            let row = Row {
                id: id.to_owned(),
                date: date.to_owned(),
                class: class.to_owned(),
                verdict: verdict.to_owned(),
                entry: entry.to_owned(),
                lock: lock.to_owned(),
                proofs: proofs.split_whitespace().map(str::to_owned).collect(),
            };
            let known = ["closed", "narrowed", "open", "unjudged", "design"];
            if !known.contains(&verdict) || (verdict == "closed" && row.proofs.is_empty()) {
                return Err(Failure::Unexpected(format!("{}: {line:?}", path.display())));
            }
            Ok(row)
        })
        .collect()
}

/// Closed rows whose probes don't show it: one that isn't made, can't succeed on
/// the host, or isn't refused in each of `columns`. A kernel that lacks what a
/// probe is after shows nothing either way; only with `whole` that is wrong too.
pub fn unproved(
    rows: &[Row],
    control: &Answers,
    columns: &BTreeMap<&str, &Answers>,
    whole: bool,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for row in rows.iter().filter(|r| r.verdict == "closed") {
        for proof in &row.proofs {
            let outside = control.get(proof);
            let lacks = matches!(outside, Some(crate::probes::Answer::Absent(_))) && !whole;
            if !lacks && !outside.is_some_and(crate::probes::Answer::succeeded) {
                wrong.push(format!("{}: {proof} on the host: {outside:?}", row.id));
            }
            for (column, answers) in columns {
                let answer = answers.get(proof);
                let held = answer.is_some_and(|a| a.held(outside) || lacks && !a.succeeded());
                if !held {
                    wrong.push(format!("{}: {proof} in {column}: {answer:?}", row.id));
                }
            }
        }
    }
    wrong
}

/// Closed and all rows that are about the kernel.
pub fn figures(rows: &[Row]) -> (usize, usize) {
    let kernel = rows.iter().filter(|r| r.is_kernel());
    let closed = kernel.clone().filter(|r| r.verdict == "closed");
    (closed.count(), kernel.count())
}

/// Whether one of the probes succeeds in `compat`.
fn not_in_compat(row: &Row, accepted: &[Accepted]) -> bool {
    row.proofs
        .iter()
        .any(|p| accepted.iter().any(|a| a.covers(p, "compat")))
}

/// The page.
pub fn page(rows: &[Row], accepted: &[Accepted]) -> String {
    let (closed, all) = figures(rows);
    let mut out = format!(
        "# Ledger of known vulnerabilities\n\n\
         <!-- Made by `make probes` from tests/cve-ledger.tsv; changes here are lost. -->\n\n\
         {} vulnerabilities of the kernel and of container runtimes that were used to break \
         out, or could have been, as published from 2016 to 2026 (one CVE with two public \
         exploits is there twice); what each needs, and what stands there in \
         `profile = \"default\"`. Ids and dates are those of the CVE list (cve.org) and of \
         GitHub's advisories, the reading is ours.\n\n\
         *Closed*: the faulty code can't be entered by the way it was; every probe that is \
         named succeeds on the host and is refused in the sandbox, as root, as root with all \
         capabilities, and as a user. *Narrowed*: the known ways are closed, but the fault is \
         in code that other ways lead to. *Open*: not blocked, as the code is needed by all \
         programs; ids, capabilities and the kernel's own defences are what is left. \
         *Unjudged*: not known well enough to say. *By design*: a fault of another runtime's.\n\n\
         **{closed} of the {all} of the kernel are closed ({} %).** \"Not in compat\": that \
         profile lets one of the probes through.\n\n",
        rows.len(),
        closed * 100 / all.max(1)
    );
    out.push_str(&classes(rows, accepted));
    out.push_str(
        "\n## All\n\n| Id | Published | Class | Way in | State | By what | Probes |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for row in rows {
        let proofs: Vec<String> = row.proofs.iter().map(|p| format!("`{p}`")).collect();
        let state = match row.verdict.as_str() {
            "closed" if not_in_compat(row, accepted) => "closed, not in compat",
            "open" => "**open**",
            "design" => "by design",
            other => other,
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {state} | {} | {} |",
            row.id,
            row.date,
            row.class,
            row.entry,
            row.lock,
            proofs.join(" ")
        );
    }
    out
}

/// The table by class, most frequent first.
pub fn classes(rows: &[Row], accepted: &[Accepted]) -> String {
    let mut all: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        all.entry(&row.class).or_default().push(row);
    }
    let mut order: Vec<_> = all.into_iter().collect();
    order.sort_by_key(|(name, rows)| (std::cmp::Reverse(rows.len()), *name));
    let mut out = String::from(
        "| Class | Known | Closed | Not in compat | Narrowed | Open | Else |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for (name, rows) in order {
        let count = |verdict: &str| rows.iter().filter(|r| r.verdict == verdict).count();
        let (closed, narrowed, open) = (count("closed"), count("narrowed"), count("open"));
        let compat = rows
            .iter()
            .filter(|r| r.verdict == "closed" && not_in_compat(r, accepted))
            .count();
        let _ = writeln!(
            out,
            "| {name} | {} | {closed} | {compat} | {narrowed} | {open} | {} |",
            rows.len(),
            rows.len() - closed - narrowed - open
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{figures, page, rows, unproved};
    use crate::probes::{accepted, own_file, parse};

    #[test]
    fn the_pages_say_what_the_ledger_does() {
        let rows = rows().unwrap();
        let path = own_file("../docs/cve-ledger.md");
        let made = page(&rows, &accepted().unwrap());
        if std::env::var_os("CASEMATE_WRITE_DOCS").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        let is = std::fs::read_to_string(&path).unwrap();
        assert_eq!(is, made, "docs/cve-ledger.md: run make docs-tables");
        let security = std::fs::read_to_string(own_file("../SECURITY.md")).unwrap();
        let (closed, all) = figures(&rows);
        let figure = format!("{closed} of {all}");
        assert!(
            security.contains(&figure),
            "SECURITY.md doesn't say {figure}"
        );
        assert!(closed * 100 >= all * 85, "{figure} is below 85 %");
    }

    #[test]
    fn a_closed_row_needs_probes_that_could_succeed_and_do_not() {
        let rows = rows().unwrap();
        let nothing = parse("").unwrap();
        let columns = [("default", &nothing)].into();
        let closed = rows.iter().filter(|r| r.verdict == "closed").count();
        assert!(unproved(&rows, &nothing, &columns, false).len() >= closed);
    }
}

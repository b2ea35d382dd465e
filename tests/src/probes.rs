//! What the probes (`tests/src/bin/checks`) answered, what of it is accepted
//! (`tests/probes-accepted.txt`), and the table of it (`docs/security-probes.md`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{Failure, Result, file};

/// How one attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The attacker has it.
    Gained(String),
    /// The lock was passed; what is behind it then failed, with that error.
    Entered(String),
    /// Refused, with that error.
    Refused(String),
    /// The kernel has no such thing, or a lock says so.
    Absent(String),
    /// The process was killed.
    Died(String),
    /// It makes no sense there.
    NotApplicable(String),
}

impl Answer {
    fn parse(text: &str, detail: &str) -> Option<Self> {
        let (kind, error) = text.split_once(' ').unwrap_or((text, ""));
        Some(match kind {
            "ok" => Self::Gained(detail.to_owned()),
            "entered" => Self::Entered(error.to_owned()),
            "refused" => Self::Refused(error.to_owned()),
            "absent" => Self::Absent(error.to_owned()),
            "died" => Self::Died(error.to_owned()),
            "n/a" => Self::NotApplicable(detail.to_owned()),
            _ => return None,
        })
    }

    /// The attacker got what the probe is after.
    pub fn succeeded(&self) -> bool {
        matches!(self, Self::Gained(_) | Self::Entered(_))
    }

    /// A lock held, given how the same ended without locks.
    pub fn held(&self, control: Option<&Self>) -> bool {
        match self {
            Self::Refused(_) | Self::Died(_) => true,
            Self::Absent(_) => control.is_some_and(Self::succeeded),
            _ => false,
        }
    }

    fn cell(&self, control: Option<&Self>) -> String {
        match self {
            Self::Gained(_) => "**yes**".to_owned(),
            Self::Entered(error) => format!("**yes** ({error})"),
            Self::Refused(error) | Self::Died(error) => error.clone(),
            Self::Absent(error) if control.is_some_and(Self::succeeded) => error.clone(),
            Self::Absent(_) => "not built".to_owned(),
            Self::NotApplicable(_) => "–".to_owned(),
        }
    }
}

/// Answers of one run, by id.
pub type Answers = BTreeMap<String, Answer>;

/// Reads what `checks run` writes.
///
/// # Errors
/// [`Failure::Unexpected`] names a line that can't be read, or an id given twice.
pub fn parse(text: &str) -> Result<Answers> {
    let mut all = Answers::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, '\t');
        let (Some(id), Some(answer)) = (fields.next(), fields.next()) else {
            return Err(Failure::Unexpected(format!(
                "no answer of a probe: {line:?}"
            )));
        };
        let answer = Answer::parse(answer, fields.next().unwrap_or_default())
            .ok_or_else(|| Failure::Unexpected(format!("no answer of a probe: {line:?}")))?;
        if all.insert(id.to_owned(), answer).is_some() {
            return Err(Failure::Unexpected(format!("two probes are called {id}")));
        }
    }
    Ok(all)
}

/// One line of `tests/probes-accepted.txt`.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// Id, or its beginning and `*`.
    pub pattern: String,
    /// Columns, or their beginnings and `*`: `default`, `compat-all`, `*`.
    pub columns: Vec<String>,
    /// Why that is no breach.
    pub reason: String,
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => pattern == name,
    }
}

impl Accepted {
    /// Whether it is about that probe in that column.
    pub fn covers(&self, id: &str, column: &str) -> bool {
        matches(&self.pattern, id) && self.columns.iter().any(|c| matches(c, column))
    }
}

/// Where a file of this crate is.
pub fn own_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The accepted successes.
///
/// # Errors
/// The file can't be read, or a line is not `PATTERN COLUMNS REASON`.
pub fn accepted() -> Result<Vec<Accepted>> {
    let path = own_file("probes-accepted.txt");
    let text = std::fs::read_to_string(&path).map_err(file("read", &path))?;
    let lines = text
        .lines()
        .filter(|l| !l.starts_with('#') && !l.is_empty());
    lines
        .map(|line| {
            let mut words = line.splitn(3, char::is_whitespace);
            match (words.next(), words.next(), words.next()) {
                (Some(pattern), Some(columns), Some(reason)) => Ok(Accepted {
                    pattern: pattern.to_owned(),
                    columns: columns.split(',').map(str::to_owned).collect(),
                    reason: reason.trim().to_owned(),
                }),
                _ => Err(Failure::Unexpected(format!("{}: {line:?}", path.display()))),
            }
        })
        .collect()
}

/// Successes of one column that nobody accepted.
pub fn unexpected(answers: &Answers, column: &str, accepted: &[Accepted]) -> Vec<String> {
    answers
        .iter()
        .filter(|(_, answer)| answer.succeeded())
        .filter(|(id, _)| !accepted.iter().any(|a| a.covers(id, column)))
        .map(|(id, answer)| format!("{id}: {answer:?}"))
        .collect()
}

/// Lines of the list of accepted successes that nothing needs in these columns.
pub fn stale<'a>(columns: &BTreeMap<&str, &Answers>, accepted: &'a [Accepted]) -> Vec<&'a str> {
    let needed = |line: &Accepted| {
        columns.iter().any(|(column, answers)| {
            answers
                .iter()
                .any(|(id, answer)| answer.succeeded() && line.covers(id, column))
        })
    };
    accepted
        .iter()
        .filter(|line| !needed(line))
        .map(|line| line.pattern.as_str())
        .collect()
}

/// What the threat model's topics are called.
pub const TOPICS: [(&str, &str); 38] = [
    ("T01", "user ids"),
    ("T02", "capability sets"),
    ("T03", "no_new_privs"),
    ("T04", "one filter for all processes"),
    ("T05", "seccomp profiles of the specification"),
    ("T06", "foreign ABIs"),
    ("T07", "nested containers and namespaces"),
    ("T08", "mounts"),
    ("T09", "read-only volumes and roots"),
    ("T10", "mounts below read-only volumes"),
    ("T11", "masked and read-only paths"),
    ("T12", "hostile links at mount targets"),
    ("T13", "racing renames of a volume's path"),
    ("T14", "working directories beyond the root"),
    ("T15", "descriptors"),
    ("T16", "the runtime's binaries"),
    ("T17", "the agent, and processes outside"),
    ("T18", "other processes and containers"),
    ("T19", "ipc, sockets and names between pods"),
    ("T20", "devices"),
    ("T21", "terminals"),
    ("T22", "network"),
    ("T23", "the metadata endpoint"),
    ("T24", "sysctls"),
    ("T25", "cgroups"),
    ("T26", "limits"),
    ("T27", "core dumps"),
    ("T28", "what tells of the host"),
    ("T29", "key rings"),
    ("T30", "system calls of the node's business"),
    ("T31", "the broker"),
    ("T32", "a hostile agent"),
    ("T33", "death of shim and daemon"),
    ("T34", "fork storms and memory"),
    ("T35", "kernels that lack something"),
    ("T36", "set-uid files and file capabilities on disk"),
    ("T37", "specifications that ask for too much"),
    ("T38", "the verified state is shown"),
];

/// Columns of the table, with what they are.
pub struct Column<'a> {
    /// `native`, `runc`, `default`, `default-all` …
    pub name: &'a str,
    /// Its answers.
    pub answers: &'a Answers,
}

/// Profiles in the table.
pub const PROFILES: [&str; 3] = ["strict", "default", "compat"];
/// As whom a workload tries: root with the policy's capabilities, root with all
/// that there are, a user without any.
pub const WHO: [&str; 3] = ["", "-all", "-user"];

/// The table, and what the figures are.
pub struct Table<'a> {
    /// Of all runs.
    pub columns: &'a BTreeMap<String, Answers>,
    /// What each probe is after.
    pub means: &'a BTreeMap<String, String>,
    /// The accepted successes.
    pub accepted: &'a [Accepted],
    /// Trials of the end-to-end tests by topic.
    pub trials: &'a BTreeMap<String, Vec<String>>,
    /// Topics that nothing stands for yet, and why.
    pub open: &'a [(&'a str, &'a str)],
    /// `uname -r`, and runc's version.
    pub on: (String, String),
}

impl Table<'_> {
    fn of(&self, column: &str, id: &str) -> Option<&Answer> {
        self.columns.get(column)?.get(id)
    }

    /// A profile's cell: as root, and what differs as another.
    fn profile(&self, profile: &str, id: &str) -> String {
        let control = self.of("native", id);
        let cells: Vec<String> = WHO
            .iter()
            .map(|who| {
                self.of(&format!("{profile}{who}"), id)
                    .map_or_else(|| "–".to_owned(), |a| a.cell(control))
            })
            .collect();
        let mut out = cells[0].clone();
        for (cell, who) in cells[1..].iter().zip(["all", "user"]) {
            if *cell != cells[0] {
                let _ = write!(out, "; {who}: {cell}");
            }
        }
        out
    }

    /// Counts of successes, locks that held, and what can't be said, in a column.
    fn count(&self, column: &str) -> (usize, usize, usize) {
        let Some(answers) = self.columns.get(column) else {
            return (0, 0, 0);
        };
        let mut counts = (0, 0, 0);
        for (id, answer) in answers {
            if answer.succeeded() {
                counts.0 += 1;
            } else if answer.held(self.of("native", id)) {
                counts.1 += 1;
            } else {
                counts.2 += 1;
            }
        }
        counts
    }

    fn ids(&self) -> BTreeSet<&str> {
        self.columns
            .values()
            .flat_map(|a| a.keys().map(String::as_str))
            .collect()
    }

    /// The page.
    pub fn page(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(
            out,
            "# Probes\n\n\
             <!-- Made by `make probes`; changes here are lost. -->\n\n\
             What an attacker inside a container tries, one thing at a time, and how it ends: \
             natively as control (root of the host, in mount, network, ipc and uts namespaces \
             of its own), under runc with containerd's default specification and default \
             seccomp profile, and under casemate with each profile. **yes**: it succeeds; with an \
             error in brackets: it got past the lock, to code that then refused it for other \
             reasons. An error alone: a lock held. *not built*: this kernel has no such thing, so \
             nothing is shown. Where the control doesn't say yes, a refusal inside proves \
             nothing by itself. `all`: root that asks for, and is allowed, every capability; \
             `user`: user 1000, without any; where nothing is said they fare as root with \
             casemate's default capabilities does.\n\n\
             Seen on Linux {}, with {}. What each probe does: `tests/src/bin/checks`. Each \
             success that is accepted has a reason in `tests/probes-accepted.txt`, and is below; \
             any other fails the end-to-end tests.\n",
            self.on.0, self.on.1
        );
        let _ = writeln!(
            out,
            "| Run | Attacker succeeds | A lock held | Nothing shown |\n| --- | ---: | ---: | ---: |"
        );
        let mut names = vec!["native".to_owned(), "runc".to_owned()];
        for profile in PROFILES {
            names.extend(WHO.iter().map(|who| format!("{profile}{who}")));
        }
        for name in &names {
            let (yes, held, rest) = self.count(name);
            let _ = writeln!(out, "| {name} | {yes} | {held} | {rest} |");
        }
        let _ = writeln!(out, "\n## By topic\n");
        for (topic, called) in TOPICS {
            self.topic(&mut out, topic, called);
        }
        self.reasons(&mut out);
        out
    }

    fn topic(&self, out: &mut String, topic: &str, called: &str) {
        let _ = writeln!(out, "### {topic} {called}\n");
        if let Some(trials) = self.trials.get(topic) {
            let list: Vec<String> = trials.iter().map(|t| format!("`{t}`")).collect();
            let _ = writeln!(out, "End-to-end tests: {}.\n", list.join(", "));
        }
        if let Some((_, why)) = self.open.iter().find(|(t, _)| *t == topic) {
            let _ = writeln!(out, "Nothing: {why}.\n");
        }
        let prefix = format!("{topic}.");
        let ids: Vec<&str> = self
            .ids()
            .into_iter()
            .filter(|id| id.starts_with(&prefix))
            .collect();
        if ids.is_empty() {
            return;
        }
        let _ = writeln!(
            out,
            "| Probe | After | native | runc | strict | default | compat |\n\
             | --- | --- | --- | --- | --- | --- | --- |"
        );
        for id in ids {
            let control = self.of("native", id);
            let cell = |column: &str| {
                self.of(column, id)
                    .map_or_else(|| "–".to_owned(), |a| a.cell(control))
            };
            let name = id.strip_prefix(&prefix).unwrap_or(id);
            let _ = write!(
                out,
                "| {name} | {} | {} | {} |",
                self.means.get(id).map_or("", String::as_str),
                match control {
                    Some(Answer::Refused(error)) => format!("no control ({error})"),
                    _ => cell("native"),
                },
                cell("runc")
            );
            for profile in PROFILES {
                let _ = write!(out, " {} |", self.profile(profile, id));
            }
            out.push('\n');
        }
        out.push('\n');
    }

    fn reasons(&self, out: &mut String) {
        let _ = writeln!(
            out,
            "## Accepted successes\n\n| Probes | Where | Why |\n| --- | --- | --- |"
        );
        for line in self.accepted {
            let _ = writeln!(
                out,
                "| `{}` | {} | {} |",
                line.pattern,
                line.columns.join(", ").replace('*', "\\*"),
                line.reason
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Accepted, Answer, parse, stale, unexpected};

    #[test]
    fn an_absence_is_a_lock_only_where_the_control_succeeded() {
        let absent = Answer::Absent("ENOSYS".into());
        assert!(absent.held(Some(&Answer::Gained(String::new()))));
        assert!(!absent.held(Some(&absent)));
        assert!(!absent.held(None));
        assert!(Answer::Refused("EPERM".into()).held(None));
        assert!(!Answer::Entered("EINVAL".into()).held(None));
    }

    #[test]
    fn successes_need_a_line_and_lines_a_success() {
        let answers =
            parse("T01.a\tok\tx\nT01.b\tentered EINVAL\t\nT02.c\trefused EPERM\t\n").unwrap();
        let line = |pattern: &str, column: &str| Accepted {
            pattern: pattern.into(),
            columns: vec![column.into()],
            reason: String::new(),
        };
        let lines = [line("T01.a", "default"), line("T02.*", "*")];
        let left = unexpected(&answers, "default", &lines);
        assert_eq!(left.len(), 1, "{left:?}");
        assert!(left[0].starts_with("T01.b"));
        assert_eq!(unexpected(&answers, "strict", &lines).len(), 2);
        let columns = [("default", &answers)].into();
        assert_eq!(stale(&columns, &lines), ["T02.*"]);
        assert!(parse("T01.a\tok\t\nT01.a\tok\t\n").is_err());
        assert!(parse("rubbish").is_err());
    }
}

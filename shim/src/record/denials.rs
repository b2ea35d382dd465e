//! Refused calls of a pod's containers, by container, rule and class. What comes
//! in is an agent's word, which may be a lie: it is bounded, and only counted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use casemate_protocol::Denial;
use seccomp_profiles::interp::SeccompData;
use seccomp_profiles::node::WORKLOADS;
use seccomp_profiles::{Action, Kind, Prepared, RuleInfo, errno, export, shipped_explainer};
use serde_json::{Value, json};

use super::{Record, class};

/// Sorts kept of a pod; what is beyond is one number.
const SORTS: usize = 512;
/// Numbers of calls are below this.
const NR_MAX: u32 = 1 << 16;
/// More than this at a time is no honest count.
const COUNT_MAX: u64 = 1 << 32;
/// Between two records of one sort.
const RECORD_EACH: Duration = Duration::from_secs(10);

/// A container whose refusals are counted.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its profile.
    pub profile: Arc<Prepared>,
    /// The specification has a filter of its own.
    pub own: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Sort {
    container: u32,
    rule: u16,
    own: Option<u16>,
    nr: u32,
    args: [u32; 3],
    others: bool,
}

#[derive(Debug)]
struct Count {
    container: Arc<Container>,
    total: u64,
    told: u64,
    first: SystemTime,
    last: SystemTime,
    recorded: Instant,
}

/// The table.
#[derive(Debug, Default)]
pub struct Denials {
    sorts: BTreeMap<Sort, Count>,
    /// Those of which there was no room to tell more.
    beyond: u64,
}

fn rule_of(container: &Container, rule: u16) -> Option<&RuleInfo> {
    container.profile.explainer().rules().get(usize::from(rule))
}

/// What stands for a rule where only the specification's filter refuses.
const OWN_RULE: &str = "specification";
const OWN_REASON: &str = "the pod's own filter refuses it (securityContext.seccompProfile, \
                          linux.seccomp)";

fn rule_id<'a>(sort: &Sort, rule: Option<&'a RuleInfo>) -> Option<&'a str> {
    match (rule, sort.own) {
        (Some(rule), _) => Some(&rule.id),
        (None, Some(_)) => Some(OWN_RULE),
        (None, None) => None,
    }
}

fn errno_of(sort: &Sort, rule: Option<&RuleInfo>) -> &'static str {
    let number = match (sort.own, rule.map(|rule| rule.action)) {
        (Some(number), _) | (None, Some(Action::Errno(number))) => number,
        _ => return "EPERM",
    };
    errno::name(number).unwrap_or("?")
}

impl Denials {
    /// Adds what an agent says of a container; what is to be recorded of it. An
    /// error is a lie that can be told from the truth.
    pub fn add(
        &mut self,
        number: u32,
        container: &Arc<Container>,
        list: &[Denial],
    ) -> Result<Vec<Record>, &'static str> {
        let now = Instant::now();
        let mut records = Vec::new();
        for denial in list {
            let known = usize::from(denial.rule) < container.profile.explainer().rules().len();
            if !known && denial.rule != u16::MAX {
                return Err("a rule that the profile doesn't have");
            }
            if denial.own.is_some() && !container.own {
                return Err("what a filter refuses that the container doesn't have");
            }
            if denial.nr >= NR_MAX {
                return Err("a call that can't be");
            }
            if denial.count == 0 || denial.count > COUNT_MAX {
                return Err("a count that can't be");
            }
            let sort = Sort {
                container: number,
                rule: denial.rule,
                own: denial.own,
                nr: denial.nr,
                args: denial.args,
                others: denial.others,
            };
            let full = self.sorts.len() >= SORTS;
            let count = match self.sorts.entry(sort) {
                std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::btree_map::Entry::Vacant(_) if full => {
                    self.beyond = self.beyond.saturating_add(denial.count);
                    continue;
                }
                std::collections::btree_map::Entry::Vacant(entry) => entry.insert(Count {
                    container: container.clone(),
                    total: 0,
                    told: 0,
                    first: SystemTime::now(),
                    last: SystemTime::now(),
                    recorded: now,
                }),
            };
            count.total = count.total.saturating_add(denial.count);
            count.last = SystemTime::now();
            if count.told == 0 || now.duration_since(count.recorded) >= RECORD_EACH {
                records.push(record(&sort, count));
                count.told = count.total;
                count.recorded = now;
            }
        }
        Ok(records)
    }

    /// How many of a container.
    pub fn total(&self, container: &str) -> u64 {
        let of = self.sorts.values().filter(|c| c.container.id == container);
        of.fold(0, |sum, count| sum.saturating_add(count.total))
    }

    /// All, the most frequent first, each with what would allow it.
    pub fn list(&self) -> Value {
        let mut all: Vec<(&Sort, &Count)> = self.sorts.iter().collect();
        all.sort_by_key(|(_, count)| std::cmp::Reverse(count.total));
        let list: Vec<Value> = all
            .into_iter()
            .map(|(sort, count)| told(sort, count))
            .collect();
        json!({ "denials": list, "beyond": self.beyond })
    }
}

fn class_of(sort: &Sort) -> String {
    match sort.others {
        true => "and others, of more sorts than are told apart".to_owned(),
        false => class::describe(sort.nr, sort.args),
    }
}

fn record(sort: &Sort, count: &Count) -> Record {
    let rule = rule_of(&count.container, sort.rule);
    Record::Denial {
        container: count.container.id.clone(),
        syscall: class::syscall(sort.nr),
        class: class_of(sort),
        rule: rule_id(sort, rule).unwrap_or("none").to_owned(),
        errno: errno_of(sort, rule).to_owned(),
        count: count.total - count.told,
        total: count.total,
    }
}

fn told(sort: &Sort, count: &Count) -> Value {
    let rule = rule_of(&count.container, sort.rule);
    let reason = rule.map(|rule| &*rule.reason);
    json!({
        "container": count.container.id,
        "profile": count.container.profile.name(),
        "syscall": class::syscall(sort.nr),
        "class": class_of(sort),
        "rule": rule_id(sort, rule),
        "reason": reason.or(sort.own.map(|_| OWN_REASON)),
        "own": sort.own.is_some(),
        "errno": errno_of(sort, rule),
        "count": count.total,
        "first": crate::log::rfc3339(count.first),
        "last": crate::log::rfc3339(count.last),
        "allowed_by": match sort.others || rule.is_none() {
            true => None,
            false => allowed_by(sort, &count.container.profile),
        },
        "file": count.container.profile.node().map(|(file, _)| file),
        "lines": match sort.others || rule.is_none() {
            true => None,
            false => lines(sort, &count.container.profile),
        },
    })
}

/// The tightest of the shipped profiles looser than `profile` under which the call
/// passes; of those of the node, all are.
fn allowed_by(sort: &Sort, profile: &Prepared) -> Option<&'static str> {
    let data = SeccompData::x86_64(sort.nr, class::restore(sort.nr, sort.args));
    let own = WORKLOADS.iter().position(|name| *name == profile.name());
    WORKLOADS
        .into_iter()
        .skip(own.map_or(0, |own| own + 1))
        .find(|name| shipped_explainer(name).is_some_and(|e| e.explain(&data).is_none()))
}

/// What a profile of the node's would need to allow the call, and nothing else; `None`
/// where the shipped one that it is within refuses it.
fn lines(sort: &Sort, profile: &Prepared) -> Option<String> {
    let (_, within) = profile.node()?;
    let args = class::restore(sort.nr, sort.args);
    let data = SeccompData::x86_64(sort.nr, args);
    match shipped_explainer(within)?.explain(&data) {
        Some(_) => None,
        None => Some(export::lines_to_allow(&Kind::of(sort.nr, &args))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use seccomp_profiles::table;

    fn container(profile: &str) -> Arc<Container> {
        Arc::new(Container {
            id: "c".into(),
            profile: Arc::new(Prepared::shipped(profile).unwrap()),
            own: false,
        })
    }

    fn denial(name: &str, args: [u32; 3], count: u64) -> Denial {
        let nr = table::number(name).unwrap();
        let explainer = shipped_explainer("default").unwrap();
        let data = SeccompData::x86_64(nr, class::restore(nr, args));
        let found = explainer.explain(&data).unwrap();
        let rule = explainer.rules().iter().position(|r| r.id == found.id);
        Denial {
            rule: rule.unwrap() as u16,
            own: None,
            nr,
            args,
            others: false,
            count,
        }
    }

    #[test]
    fn the_first_is_recorded_and_the_rest_are_counted() {
        let (mut denials, c) = (Denials::default(), container("default"));
        let mount = denial("mount", [0; 3], 1);
        let first = denials.add(1, &c, &[mount]).unwrap();
        assert!(
            matches!(&first[..], [Record::Denial { syscall, count: 1, .. }] if syscall == "mount")
        );
        for _ in 0..5 {
            assert_eq!(denials.add(1, &c, &[mount]).unwrap(), []);
        }
        let list = denials.list();
        assert_eq!(list["denials"][0]["count"], 6);
        assert!(list["denials"][0]["reason"].as_str().unwrap().len() > 10);
        assert_eq!(denials.total("c"), 6);
    }

    #[test]
    fn lies_are_refused_and_the_table_is_bounded() {
        let (mut denials, c) = (Denials::default(), container("default"));
        let honest = denial("mount", [0; 3], 1);
        for lie in [
            Denial {
                rule: 60_000,
                ..honest
            },
            Denial {
                nr: u32::MAX,
                ..honest
            },
            Denial { count: 0, ..honest },
            Denial {
                own: Some(1),
                ..honest
            },
            Denial {
                count: u64::MAX,
                ..honest
            },
        ] {
            denials.add(1, &c, &[lie]).unwrap_err();
        }
        for n in 0..10_000 {
            denials.add(n, &c, &[honest]).unwrap();
        }
        assert_eq!(denials.sorts.len(), SORTS);
        assert_eq!(denials.beyond, 10_000 - SORTS as u64);
    }

    #[test]
    fn what_would_allow_a_call_is_the_tightest_that_does() {
        let c = container("default");
        let of = |denial: &Denial| {
            let mut denials = Denials::default();
            denials.add(1, &c, &[*denial]).unwrap();
            denials.list()["denials"][0]["allowed_by"].clone()
        };
        assert_eq!(of(&denial("mount", [0; 3], 1)), Value::Null);
        // Some call is in compat and not in default: else compat had no reason.
        let compat = shipped_explainer("compat").unwrap();
        let default = shipped_explainer("default").unwrap();
        let more = table::SYSCALLS.iter().find(|(nr, _)| {
            let data = SeccompData::x86_64(*nr, [0; 6]);
            default.explain(&data).is_some() && compat.explain(&data).is_none()
        });
        let (_, name) = more.unwrap();
        assert_eq!(of(&denial(name, [0; 3], 1)), "compat");
    }
}

//! What an operator wants to know of a pod: refused calls, executions, kills
//! for want of memory, policy refusals, a lost agent.
//!
//! The ring is bounded in number and bytes, what would flood it is limited by
//! kind, and what is lost by either is counted. No record has arguments,
//! environment or file contents of a workload.

pub mod class;
pub mod denials;
pub mod learned;
pub mod limit;
pub mod spool;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use serde::Serialize;
use tokio::sync::watch;

use casemate_protocol::Denial;
use denials::Denials;
use limit::Limits;

/// Records kept.
const CAPACITY: usize = 512;
/// Bytes kept, of all records together.
const BYTES: usize = 128 * 1024;
/// The longest record, in bytes; one that is longer is dropped, and counted.
const LONGEST: usize = 4096;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// Calls that the pod's filter refused. The first of its sort is told at
    /// once, more of them as a number.
    Denial {
        /// Container id.
        container: String,
        /// Name of the system call, or its number.
        syscall: String,
        /// What of its arguments mattered, as the profile has it.
        class: String,
        /// Id of the rule.
        rule: String,
        /// Name of the error that was answered.
        errno: String,
        /// How many since the last record of this sort.
        count: u64,
        /// How many in all.
        total: u64,
    },
    /// A process was run in a container by request.
    Exec {
        /// Container id.
        container: String,
        /// Its id.
        exec: String,
        /// SHA-256 of its arguments, each ended by a zero byte.
        argv_sha256: String,
        /// The arguments, where the configuration has them recorded.
        #[serde(skip_serializing_if = "Option::is_none")]
        argv: Option<Vec<String>>,
        /// User and group in the container.
        user: String,
        /// It has a terminal.
        terminal: bool,
        /// Whose container it is.
        #[serde(skip_serializing_if = "Option::is_none")]
        kubernetes: Option<Kubernetes>,
    },
    /// Such a process has ended.
    ExecEnd {
        /// Container id.
        container: String,
        /// Its id.
        exec: String,
        /// Exit code, or 128 + signal.
        status: u32,
    },
    /// The kernel killed something of a container for want of memory.
    Oom {
        /// Container id.
        container: String,
    },
    /// The policy refused a request.
    PolicyRefusal {
        /// Container id.
        container: String,
        /// Id of the rule, where it has one.
        #[serde(skip_serializing_if = "Option::is_none")]
        rule: Option<String>,
        /// The line that the caller got.
        text: String,
    },
    /// The agent has ended, and the pod with it.
    AgentLoss {
        /// Containers that ended with it.
        containers: Vec<String>,
    },
    /// Refused calls of a container are no longer counted, or its pod was ended
    /// because nobody answered them.
    BrokerLoss {
        /// Container id.
        container: String,
        /// What happened.
        text: String,
    },
    /// The network guard refused a connection: the first to that destination.
    Network {
        /// `egress` or `ingress`.
        direction: &'static str,
        /// Of the other side, with the destination port.
        destination: String,
        /// Which of its rules.
        rule: String,
        /// What would allow it.
        allow: String,
    },
}

/// What CRI says of a container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Kubernetes {
    /// Name of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Its namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its uid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// Name of the container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

impl Record {
    /// Its place among the limits, and how it is called in the drop counters.
    fn kind(&self) -> (usize, &'static str) {
        match self {
            Record::Denial { .. } => (0, "denial"),
            Record::Exec { .. } => (1, "exec"),
            Record::ExecEnd { .. } => (2, "exec_end"),
            Record::Oom { .. } => (3, "oom"),
            Record::PolicyRefusal { .. } => (4, "policy_refusal"),
            Record::AgentLoss { .. } => (5, "agent_loss"),
            Record::BrokerLoss { .. } => (6, "broker_loss"),
            Record::Network { .. } => (7, "network"),
        }
    }
}

/// How many kinds there are.
const KINDS: usize = 8;

/// A record with its number and time, ready to be told.
#[derive(Debug, Clone)]
struct Stored {
    seq: u64,
    json: Box<str>,
}

/// What was lost, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Pushed out of the ring by later ones.
    pub overwritten: u64,
    /// Too many of their kind at a time.
    pub limited: u64,
    /// Longer than a record may be.
    pub oversized: u64,
}

#[derive(Debug)]
struct Ring {
    records: VecDeque<Stored>,
    bytes: usize,
    next: u64,
    dropped: Dropped,
    limits: Limits<KINDS>,
}

/// A part of the ring.
#[derive(Debug, Serialize)]
pub struct Page {
    /// Records, oldest first, each an object.
    pub records: Vec<serde_json::Value>,
    /// Number to ask from next.
    pub next: u64,
    /// Records that the asker has missed: they were pushed out before.
    pub missed: u64,
    /// What was lost in the pod's life.
    pub dropped: Dropped,
}

/// The records of one pod; clones are handles to the same.
#[derive(Debug, Clone)]
pub struct Records {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    namespace: String,
    pod: String,
    ring: Mutex<Ring>,
    last: watch::Sender<u64>,
    denials: Mutex<Denials>,
}

/// A record as it is told.
#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    at: String,
    namespace: &'a str,
    pod: &'a str,
    #[serde(flatten)]
    record: &'a Record,
}

impl Records {
    /// Of a pod of a containerd namespace.
    pub fn new(namespace: &str, pod: &str) -> Records {
        Records {
            shared: Arc::new(Shared {
                namespace: namespace.to_owned(),
                pod: pod.to_owned(),
                ring: Mutex::new(Ring {
                    records: VecDeque::new(),
                    bytes: 0,
                    next: 1,
                    dropped: Dropped::default(),
                    limits: Limits::new(Instant::now()),
                }),
                last: watch::Sender::new(0),
                denials: Mutex::default(),
            }),
        }
    }

    /// containerd's namespace, and the pod's id.
    pub fn place(&self) -> (&str, &str) {
        (&self.shared.namespace, &self.shared.pod)
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        let ring = self.shared.ring.lock();
        ring.unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a record, unless there are too many of its kind.
    pub fn push(&self, record: &Record) {
        let mut ring = self.ring();
        if !ring.limits.admit(record.kind().0, Instant::now()) {
            ring.dropped.limited += 1;
            return;
        }
        let seq = ring.next;
        let line = Line {
            seq,
            at: crate::log::rfc3339(SystemTime::now()),
            namespace: &self.shared.namespace,
            pod: &self.shared.pod,
            record,
        };
        let json = match serde_json::to_string(&line) {
            Ok(json) if json.len() <= LONGEST => json.into_boxed_str(),
            _ => {
                ring.dropped.oversized += 1;
                return;
            }
        };
        ring.next += 1;
        ring.bytes += json.len();
        ring.records.push_back(Stored { seq, json });
        while ring.records.len() > CAPACITY || ring.bytes > BYTES {
            if let Some(old) = ring.records.pop_front() {
                ring.bytes -= old.json.len();
                ring.dropped.overwritten += 1;
            }
        }
        drop(ring);
        self.shared.last.send_replace(seq);
    }

    /// At most `limit` records from number `since` on.
    pub fn page(&self, since: u64, limit: usize) -> Page {
        let ring = self.ring();
        let first = ring.records.front().map_or(ring.next, |record| record.seq);
        let chosen: Vec<_> = ring
            .records
            .iter()
            .filter(|record| record.seq >= since)
            .take(limit)
            .collect();
        Page {
            next: chosen
                .last()
                .map_or(ring.next.max(since), |record| record.seq + 1),
            missed: first.saturating_sub(since.max(1)),
            records: chosen
                .iter()
                .filter_map(|record| serde_json::from_str(&record.json).ok())
                .collect(),
            dropped: ring.dropped,
        }
    }

    fn denials(&self) -> MutexGuard<'_, Denials> {
        let denials = self.shared.denials.lock();
        denials.unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts refused calls of a container, which has this number with its agent.
    pub fn denied(
        &self,
        number: u32,
        container: &Arc<denials::Container>,
        list: &[Denial],
    ) -> Result<(), &'static str> {
        let records = self.denials().add(number, container, list)?;
        for record in &records {
            self.push(record);
        }
        Ok(())
    }

    /// All refused calls.
    pub fn denial_list(&self) -> serde_json::Value {
        self.denials().list()
    }

    /// How many calls of a container were refused.
    pub fn denial_total(&self, container: &str) -> u64 {
        self.denials().total(container)
    }

    /// What was lost.
    pub fn dropped(&self) -> Dropped {
        self.ring().dropped
    }

    /// Resolves when there is a record with number `since` or a later one.
    pub async fn wait(&self, since: u64) {
        let mut last = self.shared.last.subscribe();
        // Its sender lives in `self`.
        let _never = last.wait_for(|last| *last >= since.max(1)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oom(name: &str) -> Record {
        Record::Oom {
            container: name.to_owned(),
        }
    }

    #[test]
    fn records_come_back_in_order_and_by_number() {
        let records = Records::new("ns", "p");
        for name in ["a", "b", "c"] {
            records.push(&oom(name));
        }
        let page = records.page(2, 10);
        let names: Vec<_> = page.records.iter().map(|r| &r["container"]).collect();
        assert_eq!(names, ["b", "c"]);
        assert_eq!((page.next, page.missed), (4, 0));
        assert_eq!(page.records[0]["kind"], "oom");
        assert_eq!(page.records[0]["seq"], 2);
        assert_eq!(page.records[0]["pod"], "p");
        assert_eq!(records.page(1, 1).next, 2);
        assert_eq!(records.page(4, 10).records.len(), 0);
    }

    #[test]
    fn the_ring_is_bounded_in_bytes_and_tells_what_is_lost() {
        let records = Records::new("ns", "p");
        let long = Record::AgentLoss {
            containers: vec!["x".repeat(3000)],
        };
        for _ in 0..60 {
            records.push(&long);
        }
        let page = records.page(0, 1000);
        assert!(page.records.len() < 45, "{}", page.records.len());
        assert_eq!(page.missed, 60 - page.records.len() as u64);
        assert_eq!(page.dropped.overwritten, page.missed);
    }

    #[test]
    fn one_kind_is_limited_and_does_not_take_from_another() {
        let records = Records::new("ns", "p");
        for _ in 0..1000 {
            records.push(&oom("a"));
        }
        records.push(&Record::ExecEnd {
            container: "a".into(),
            exec: "e".into(),
            status: 0,
        });
        let page = records.page(0, 2000);
        assert!(page.records.len() < 200, "{}", page.records.len());
        assert!(page.dropped.limited > 800);
        assert_eq!(page.records.last().unwrap()["kind"], "exec_end");
    }

    #[test]
    fn an_oversized_record_is_counted_and_not_kept() {
        let records = Records::new("ns", "p");
        records.push(&oom(&"x".repeat(LONGEST)));
        let page = records.page(0, 10);
        assert_eq!((page.records.len(), page.dropped.oversized), (0, 1));
    }
}

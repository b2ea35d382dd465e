//! Prometheus' text format (exposition_formats, version 0.0.4), and what there is
//! to tell in it. The crate that Prometheus keeps writes OpenMetrics alone, which
//! textfile collectors don't read.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What a family's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only goes up, in the life of a pod.
    Counter,
}

/// A family of numbers.
pub struct Metric {
    /// Its name, for ever.
    pub name: &'static str,
    /// What its numbers are.
    pub kind: Kind,
    /// What they mean.
    pub help: &'static str,
    /// Labels, in order.
    pub labels: &'static [&'static str],
}

/// Labels of what is a sandbox's.
const SANDBOX: &[&str] = &["namespace", "pod", "sandbox"];

macro_rules! metrics {
    ($($id:ident $kind:ident $name:literal $help:literal $labels:expr;)+) => {
        /// Families by name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        #[allow(missing_docs)]
        pub enum Id { $($id),+ }

        /// All of them, in order of [`Id`].
        pub static METRICS: &[Metric] = &[$(Metric {
            name: $name, kind: Kind::$kind, help: $help, labels: $labels,
        }),+];
    };
}

metrics! {
    BuildInfo Gauge "casemate_build_info"
        "1; the release that answers" &["version"];
    Sandboxes Gauge "casemate_sandboxes"
        "Living pods on this node" &[];
    Untold Gauge "casemate_sandboxes_untold"
        "Living pods beyond those that have labels of their own" &[];
    Up Gauge "casemate_sandbox_up"
        "1 if the pod's shim answered in time, else 0" SANDBOX;
    Info Gauge "casemate_sandbox_info"
        "1; the release that runs the pod, and its containerd namespace"
        &["namespace", "pod", "sandbox", "version", "containerd_namespace"];
    Started Gauge "casemate_sandbox_start_time_seconds"
        "When the pod began, in seconds since 1970" SANDBOX;
    Containers Gauge "casemate_sandbox_containers"
        "Containers by state; CRI's sandbox container is none" &["namespace", "pod", "sandbox", "state"];
    Execs Gauge "casemate_sandbox_execs"
        "Processes that were run in containers and haven't been deleted" SANDBOX;
    Overhead Gauge "casemate_sandbox_overhead_bytes"
        "Memory of the runtime's own processes: proportional set size"
        &["namespace", "pod", "sandbox", "process"];
    Memory Gauge "casemate_container_memory_bytes"
        "Memory in use, as the container's cgroup counts" &["namespace", "pod", "sandbox", "container"];
    MemoryLimit Gauge "casemate_container_memory_limit_bytes"
        "Its limit; absent without one" &["namespace", "pod", "sandbox", "container"];
    Processes Gauge "casemate_container_processes"
        "Processes and threads, the forker among them" &["namespace", "pod", "sandbox", "container"];
    Denied Counter "casemate_denied_calls_total"
        "System calls that the pod's profile refused, by rule"
        &["namespace", "pod", "sandbox", "container", "rule"];
    Guard Counter "casemate_guard_packets_total"
        "Packets that met the pod's network guard, by direction and verdict"
        &["namespace", "pod", "sandbox", "direction", "verdict"];
    Dropped Counter "casemate_records_dropped_total"
        "Records of the pod that were lost, by reason" &["namespace", "pod", "sandbox", "reason"];
    Refusals Gauge "casemate_policy_refusals_kept"
        "Requests that the policy refused, of those that are still kept, by rule" &["rule"];
    Scrape Gauge "casemate_scrape_duration_seconds"
        "How long it took to gather this" &[];
}

impl Id {
    /// The family.
    pub fn metric(self) -> &'static Metric {
        &METRICS[self as usize]
    }
}

/// Numbers that were gathered.
#[derive(Debug, Default)]
pub struct Samples(BTreeMap<Id, BTreeMap<Vec<String>, f64>>);

impl Samples {
    /// A number; those of the same labels are added up.
    pub fn add(&mut self, id: Id, labels: &[&str], value: f64) {
        debug_assert_eq!(labels.len(), id.metric().labels.len());
        let labels = labels.iter().map(|&label| label.to_owned()).collect();
        *self.0.entry(id).or_default().entry(labels).or_default() += value;
    }

    /// The page.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a String doesn't fail.
        for (id, samples) in &self.0 {
            let Metric {
                name,
                kind,
                help,
                labels,
            } = id.metric();
            let kind = match kind {
                Kind::Gauge => "gauge",
                Kind::Counter => "counter",
            };
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (values, number) in samples {
                text.push_str(name);
                if !labels.is_empty() {
                    let pairs: Vec<String> = labels
                        .iter()
                        .zip(values)
                        .map(|(label, value)| format!("{label}=\"{}\"", escaped(value)))
                        .collect();
                    let _ = write!(text, "{{{}}}", pairs.join(","));
                }
                let _ = writeln!(text, " {number}");
            }
        }
        text
    }
}

/// The most characters of a label's value.
const LABEL: usize = 128;

fn escaped(value: &str) -> String {
    let mut text = String::new();
    for c in value.chars().take(LABEL) {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            other => text.push(other),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_can_not_end_its_label() {
        let mut samples = Samples::default();
        samples.add(Id::Up, &["a\"b", "c\\d\ne", "x"], 1.0);
        samples.add(Id::Sandboxes, &[], 1_900_000_000.0);
        assert_eq!(
            samples.render(),
            "# HELP casemate_sandboxes Living pods on this node\n\
             # TYPE casemate_sandboxes gauge\n\
             casemate_sandboxes 1900000000\n\
             # HELP casemate_sandbox_up 1 if the pod's shim answered in time, else 0\n\
             # TYPE casemate_sandbox_up gauge\n\
             casemate_sandbox_up{namespace=\"a\\\"b\",pod=\"c\\\\d\\ne\",sandbox=\"x\"} 1\n"
        );
    }

    #[test]
    fn names_are_as_prometheus_wants_them() {
        for metric in METRICS {
            let counts = metric.kind == Kind::Counter;
            assert_eq!(metric.name.ends_with("_total"), counts, "{}", metric.name);
            assert!(metric.name.starts_with("casemate_"), "{}", metric.name);
        }
    }

    #[test]
    fn the_page_is_that_of_the_metrics() {
        let mut page = String::from(
            "# Metrics\n\n\
             Made from the code by `make docs-tables`.\n\n\
             `casemate metrics` prints them once, `--textfile FILE` writes them for node_exporter's\n\
             textfile collector, `--listen ADDRESS` answers `GET /metrics`. Each time the shims of\n\
             living pods are asked, sixteen at a time and each for a second at most; one that\n\
             doesn't answer has `casemate_sandbox_up` 0 and keeps nobody waiting. Nothing runs, and\n\
             no shim is asked, while nobody scrapes.\n\n\
             Labels are bounded: at most 512 pods have labels of their own, with 64 containers each\n\
             and 64 rules of a container; what is beyond is in `casemate_sandboxes_untold` or has\n\
             `other`. `namespace` and `pod` are Kubernetes' and empty without it; `sandbox` is the\n\
             pod's id.\n\n\
             | name | kind | labels | meaning |\n| --- | --- | --- | --- |\n",
        );
        for Metric {
            name,
            kind,
            help,
            labels,
        } in METRICS
        {
            let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
            let kind = format!("{kind:?}").to_lowercase();
            page += &format!("| `{name}` | {kind} | {} | {help} |\n", labels.join(", "));
        }
        crate::pages::same("metrics.md", &page);
    }
}

//! `casemate collect`: what a bug report needs, and nothing that a workload was
//! given.

mod node;
mod redact;

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_posture::{Depth, Promise};
use casemate_spec::Config;
use clap::Args;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::clock;
use crate::doctor;
use crate::error::{RunError, Step};
use crate::inspect;
use crate::metrics;
use crate::operator::{self, AT_ONCE, Operator, Pod};
use crate::out;
use crate::paint::plain;
use crate::progress::Progress;
use redact::{Secrets, strip};

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate collect                      casemate-report-TIME.tar.gz, here
  casemate collect -o report.tar.gz     there; a file that exists is refused
  casemate collect -o - | tar tz        to standard output
  casemate collect --log FILE           containerd's log, where systemd's journal has none

In it: what doctor, ps, inspect, events, why, posture --glance and metrics say; the
node's configuration of casemate; releases; settings of the kernel that matter; lines of
containerd's log about casemate. Not in it: arguments, environment, values of annotations,
contents of volumes, containerd's configuration, the kernel's command line. Names of
pods, containers and host paths of volumes are in it: look before you send it.
Exit status: 0, or 125 if there is no report; parts that failed are in errors.txt.";

/// For one pod.
const EACH: Duration = Duration::from_secs(10);
/// Pods of which all is told.
const PODS: usize = 200;
/// Events of one pod.
const EVENTS: usize = 512;

/// Where to.
#[derive(Debug, Args)]
pub struct Collect {
    /// The file to make; - for standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// containerd's log, if it isn't in systemd's journal
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    #[command(flatten)]
    at: doctor::At,
}

/// The parts, by file name.
#[derive(Default)]
struct Report {
    files: Vec<(String, String)>,
    errors: Vec<String>,
    secrets: Secrets,
}

impl Report {
    fn json(&mut self, name: &str, mut value: Value) {
        strip(&mut value);
        let text = serde_json::to_string_pretty(&value).unwrap_or_default();
        self.files.push((name.to_owned(), text + "\n"));
    }

    fn text(&mut self, name: &str, text: String) {
        self.files.push((name.to_owned(), text));
    }

    fn error(&mut self, what: &str, error: impl std::fmt::Display) {
        self.errors.push(format!("{what}: {error}"));
    }
}

/// Gathers and writes.
pub fn run(options: &Collect) -> Result<i32, RunError> {
    operator::needs_root("collect")?;
    let name = format!("casemate-report-{}", clock::now());
    let path = match &options.output {
        Some(path) => path.clone(),
        None => PathBuf::from(format!("{name}.tar.gz")),
    };
    let mut report = Report::default();
    // First, as it has children while there is one thread.
    let (found, facts) = doctor::whole_json(&options.at);
    report.json("doctor.json", found);
    report.json(
        "node.json",
        json!({ "kernel": node::kernel(), "system": node::system() }),
    );
    report.json("releases.json", facts);
    match Config::read(&doctor::config_path()) {
        Ok(config) => report.json(
            "config.json",
            serde_json::to_value(config).unwrap_or_default(),
        ),
        Err(error) => report.error("config.json", error),
    }
    let pods = operator::pods()?;
    operator::block_on(of_pods(&mut report, &pods))?;
    let ids: Vec<String> = pods.iter().map(|pod| pod.id.clone()).collect();
    match node::log(options.log.as_deref(), "containerd", &ids) {
        Ok(text) => report.text("log.txt", text),
        Err(error) => report.error("log.txt", error),
    }
    if let Some(n) = pods.len().checked_sub(PODS).filter(|n| *n > 0) {
        report.error("pods", format!("{n} more than are told of"));
    }
    let errors = report.errors.join("\n");
    report.text("errors.txt", errors);
    let bytes = pack(&name, &report).step("make", "the report")?;
    if path == Path::new("-") {
        out::say(&bytes)?;
        return Ok(0);
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .step("make", path.display())?;
    file.write_all(&bytes).step("write", path.display())?;
    let line = format!(
        "{}: {} pods; look into it before you send it\n",
        path.display(),
        pods.len()
    );
    out::say(line)?;
    Ok(0)
}

async fn of_pods(report: &mut Report, pods: &[Pod]) -> Result<(), RunError> {
    let mut list = Vec::new();
    let mut events: Vec<Value> = operator::refusals();
    let progress = Progress::of(pods.len().min(PODS) as u64, "pod");
    // A shim that is stuck takes its time, and no more, and none of the others'.
    let mut told = stream::iter(pods.iter().take(PODS))
        .map(|pod| timeout(EACH, one(pod)))
        .buffered(AT_ONCE);
    for (n, pod) in pods.iter().take(PODS).enumerate() {
        let Some(said) = told.next().await else { break };
        progress.step(&plain(&pod.id));
        let at = format!("pods/{n}");
        list.push(json!({
            "pod": pod.id, "namespace": pod.namespace, "since": pod.since, "files": at,
            "kubernetes": pod.kubernetes,
        }));
        match said {
            Ok(Ok((inspected, denials, promise, page))) => {
                for bundle in bundles(&inspected) {
                    report.secrets.of_bundle(&bundle);
                }
                report.json(&format!("{at}/inspect.json"), inspected);
                report.json(&format!("{at}/why.json"), denials);
                report.json(&format!("{at}/posture.json"), posture(promise));
                let records = page["records"].as_array().cloned();
                events.extend(records.unwrap_or_default().into_iter().take(EVENTS));
            }
            Ok(Err(error)) => report.error(&at, error),
            Err(_) => report.error(&at, format!("no answer within {} s", EACH.as_secs())),
        }
    }
    report.json("ps.json", list.into());
    let lines: Vec<String> = events
        .into_iter()
        .map(|mut event| {
            strip(&mut event);
            event.to_string()
        })
        .collect();
    report.text("events.jsonl", lines.join("\n"));
    match metrics::render().await {
        Ok(text) => report.text("metrics.txt", text),
        Err(error) => report.error("metrics.txt", error),
    }
    Ok(())
}

type Said = (Value, Value, Value, Value);

async fn one(pod: &Pod) -> Result<Said, RunError> {
    let inspected = inspect::whole(pod).await?;
    let shim = Operator::connect(pod).await?;
    Ok((
        inspected,
        shim.denials().await?,
        shim.promise().await?,
        shim.records(0, Duration::ZERO).await?,
    ))
}

/// Directories with specifications.
fn bundles(inspected: &Value) -> Vec<PathBuf> {
    let containers = inspected["containers"].as_array().into_iter().flatten();
    containers
        .map(|container| &container["bundle"])
        .chain([&inspected["bundle"]])
        .filter_map(|bundle| bundle.as_str().map(PathBuf::from))
        .collect()
}

/// Nobody is stopped for it.
fn posture(promise: Value) -> Value {
    match serde_json::from_value::<Promise>(promise) {
        Ok(promise) => json!({
            "found": casemate_posture::compare(&promise, Depth::Glance), "promise": promise,
        }),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

fn pack(name: &str, report: &Report) -> std::io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
    for (file, text) in &report.files {
        let text = report.secrets.scrub(text);
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(clock::now());
        tar.append_data(&mut header, format!("{name}/{file}"), text.as_bytes())?;
    }
    tar.into_inner()?.finish()
}

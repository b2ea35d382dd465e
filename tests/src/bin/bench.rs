//! `make bench`: casemate beside the runtimes that the machine has, in one run,
//! taking turns, so that a busy moment of the machine hits all of them.

#[path = "../bench/mod.rs"]
mod bench;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bench::peer::{NAMES, OURS, Peer};
use bench::report::{self, Absent};
use bench::samples::{Samples, quantile};
use bench::{clock, phases, through};
use casemate_tests::World;
use casemate_tests::error::{Failure, Result, file};
use clap::Parser;
use serde_json::{Value, json};

/// Measures casemate against runc, crun and runsc, interleaved.
#[derive(Parser)]
struct Options {
    /// Rounds; every runtime has its turn in each.
    #[arg(long, default_value_t = 25)]
    rounds: usize,
    /// Execs in one old pod of each runtime.
    #[arg(long, default_value_t = 50)]
    execs: usize,
    /// Idle containers at once for the memory of each.
    #[arg(long, default_value_t = 20)]
    containers: usize,
    /// Where the figures go as JSON.
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
    /// Where the pod's overhead goes, as runtimeclass/ has it.
    #[arg(long)]
    overhead: Option<PathBuf>,
    /// Where else to look for peers; scripts/peers.sh fills it.
    #[arg(long, default_value = "target/peers/bin")]
    peers: PathBuf,
    /// Only these runtimes.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Fail if a bar is not held.
    #[arg(long)]
    strict: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if !rustix::process::geteuid().is_root() {
        eprintln!("bench: needs root: containers are started");
        return ExitCode::FAILURE;
    }
    let outcome = measure(&options);
    let left = World::get().map(World::close).unwrap_or_default();
    if !left.is_empty() {
        eprintln!("left on the host: {}", left.join("; "));
    }
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Everything; whether the caller asked for no more than was reached.
fn measure(options: &Options) -> Result<bool> {
    let mut run = Run::default();
    let tools = fs::canonicalize(&options.peers).unwrap_or_else(|_| options.peers.clone());
    let mut peers = Vec::new();
    for name in NAMES {
        if !options.only.is_empty() && !options.only.iter().any(|only| only == name) {
            run.absent.insert(name, "left out by --only".to_owned());
            continue;
        }
        match Peer::find(name, &tools) {
            Ok(peer) => {
                eprintln!("{name}: {}", peer.version);
                through::import(&peer)?;
                peers.push(peer);
            }
            Err(reason) => {
                run.absent.insert(name, reason);
            }
        }
    }
    let load_before = load();
    for round in 0..options.rounds {
        eprint!("\rround {} of {} ", round + 1, options.rounds);
        for turn in 0..peers.len() {
            // Whoever is second today is first tomorrow.
            if let Some(peer) = peers.get((turn + round) % peers.len()) {
                run.round(peer);
            }
        }
    }
    eprintln!();
    eprintln!("{} execs of each", options.execs);
    if let Err(error) = phases::execs(&peers, options.execs, &mut run.samples) {
        run.failures
            .insert("execs".to_owned(), (1, error.to_string()));
    }
    for peer in &peers {
        eprintln!("{} x {}", options.containers, peer.name);
        let crowd = phases::crowd(peer, options.containers, &mut run.samples);
        run.note(peer, "crowd", crowd);
    }
    let failures: Vec<String> = run
        .failures
        .iter()
        .map(|(what, (times, error))| format!("{what}: {times} times, first: {error}"))
        .collect();
    println!("{}", report::table(&run.samples, &run.absent, &failures));
    if !run.weights.is_empty() {
        println!(
            "PSS of a lone casemate pod by process, kB: {:?}",
            run.weights
        );
    }
    if let (Some(path), false) = (&options.overhead, run.overheads.is_empty()) {
        write(path, &overhead(&run))?;
    }
    let about = json!({
        "rounds": options.rounds,
        "containers": options.containers,
        "kernel": read("/proc/sys/kernel/osrelease"),
        "load_before": load_before,
        "load_after": load(),
        "versions": peers.iter().map(|p| (p.name, p.version.as_str())).collect::<BTreeMap<_, _>>(),
        "without_unified_cgroup": peers.iter().filter(|p| p.is_apart()).map(|p| p.name)
            .collect::<Vec<_>>(),
        "casemate_pss_kb": run.weights,
    });
    let value = report::json(&run.samples, &run.absent, &failures, about);
    write(&options.json, &value)?;
    println!(
        "load average {load_before} before, {} after; figures in {}",
        load(),
        options.json.display()
    );
    for peer in peers.iter().filter(|p| p.has_own_daemon()) {
        peer.daemon.stop();
    }
    let ours_failed = run.failures.keys().any(|what| what.starts_with(OURS));
    Ok(!ours_failed && (!options.strict || report::held(&run.samples)))
}

/// Names of shim, agent and forker.
const OWN: [&str; 2] = ["containerd-shim", "casemate"];

/// What a pod costs beside its workload: medians, and in one decimal, so that a run
/// like the last one changes nothing.
fn overhead(run: &Run) -> Value {
    let tenths = |value: f64| (value * 10.0).round() / 10.0;
    let memory = quantile(&run.overheads, 0.5).unwrap_or_default() / 1024.0;
    let cpu = run.samples.row(phases::IDLE);
    let cpu = cpu.and_then(|row| row.median(OURS)).unwrap_or_default();
    json!({
        "about": "made by `make bench`: PSS of shim, agent and forker of a lone pod, and the \
                  processor time of an idle pod; classes/classes.yaml has a quarter more, \
                  rounded up",
        "memory_mib": tenths(memory),
        "cpu_milli": tenths(cpu),
    })
}

#[derive(Default)]
struct Run {
    samples: Samples,
    absent: Absent,
    /// By runtime and step: how often, and the first error.
    failures: BTreeMap<String, (usize, String)>,
    weights: BTreeMap<String, u64>,
    /// PSS in kB of our own processes of a lone pod, round by round.
    overheads: Vec<f64>,
}

impl Run {
    fn round(&mut self, peer: &Peer) {
        clock::gap();
        let done = through::run(peer, &mut self.samples);
        self.note(peer, "ctr run", done);
        clock::gap();
        let done = through::start(peer, &mut self.samples);
        self.note(peer, "ctr task start", done);
        clock::gap();
        let done = phases::round(peer, &mut self.samples);
        if let Some(weights) = self.note(peer, "shim phases", done)
            && peer.name == OURS
        {
            // Without the workload's own.
            let own = weights
                .iter()
                .filter(|(name, _)| OWN.iter().any(|n| name.starts_with(n)));
            let sum: u64 = own.map(|(_, kb)| kb).sum();
            self.overheads.push(sum as f64);
            self.weights = weights;
        }
        clock::gap();
        let done = through::inside(peer, &mut self.samples);
        self.note(peer, "inside", done);
    }

    /// One runtime's failure is a line of the report and no reason to stop.
    fn note<T>(&mut self, peer: &Peer, step: &str, done: Result<T>) -> Option<T> {
        done.map_err(|error| {
            let key = format!("{} {step}", peer.name);
            let text = error.to_string().chars().take(300).collect();
            let entry = self.failures.entry(key).or_insert((0, text));
            entry.0 += 1;
        })
        .ok()
    }
}

fn read(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

/// The load averages, so that a reader knows how quiet the machine was.
fn load() -> String {
    let text = read("/proc/loadavg");
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

fn write(path: &Path, value: &Value) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(file("make", dir))?;
    }
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::Unexpected(format!("encode {}: {e}", path.display())))?;
    fs::write(path, text + "\n").map_err(file("write", path))
}

//! `casemate bench`: what a container costs on this node, beside the node's runc,
//! both by the node's own containerd and taking turns.

mod figures;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::Run;
use crate::clock;
use crate::error::{RunError, Step};
use crate::install::task::{Daemon, Exec};
use crate::metrics::pss;
use crate::operator;
use crate::out;
use crate::progress::Progress;
use crate::rootfs;
use figures::Figures;

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate bench                               beside runc, 20 rounds
  casemate bench --rounds 100 --json f.json    more of them, and every figure
  casemate bench --against ''                  casemate alone
  casemate bench --address /run/k3s/containerd/containerd.sock

Each round makes a container of the host's busybox by each runtime, in turn, through
containerd: what it takes to run, an exec in it, its memory (proportional set size of
all of its processes), its end. Rows of the JSON are those of make bench, for casemate
report --bench. Let the node rest meanwhile. All is taken away at the end; Ctrl-C and
SIGTERM end it after the round that runs, with the figures of those that are done (a
second one ends it at once, and leaves what is there). Exit status: 0, 128 + signal if
one ended it, or 125 if casemate itself failed.";

/// containerd's namespace of it all.
const NAMESPACE: &str = "casemate-bench";
/// What casemate is called in the figures.
const OURS: &str = "casemate";
/// The shortest and the longest run.
const ROUNDS: std::ops::RangeInclusive<u32> = 1..=10_000;

/// How much to measure.
#[derive(Debug, Args)]
pub struct Bench {
    /// Rounds; each runtime has its turn in each
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(
        *ROUNDS.start() as i64..=*ROUNDS.end() as i64))]
    rounds: u32,
    /// Every figure, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// casemate's runtime, as containerd knows it
    #[arg(
        long,
        value_name = "RUNTIME",
        default_value = "io.containerd.casemate.v2"
    )]
    runtime: String,
    /// The other runtime; '' for none
    #[arg(long, value_name = "RUNTIME", default_value = "io.containerd.runc.v2")]
    against: String,
    /// containerd's socket
    #[arg(
        long,
        value_name = "SOCKET",
        default_value = "/run/containerd/containerd.sock"
    )]
    address: PathBuf,
}

/// A runtime that takes turns.
struct Runtime {
    /// In the figures.
    name: String,
    /// To containerd.
    kind: String,
}

/// Measures, and tells.
pub fn run(options: &Bench) -> Result<i32, RunError> {
    operator::root_only("bench", "containerd answers nobody else")?;
    let mut runtimes = vec![Runtime {
        name: OURS.to_owned(),
        kind: options.runtime.clone(),
    }];
    if !options.against.is_empty() {
        // `io.containerd.runc.v2` or a path: what people call it.
        let name = options.against.rsplit('.').nth(1);
        runtimes.push(Runtime {
            name: name.unwrap_or(&options.against).to_owned(),
            kind: options.against.clone(),
        });
    }
    let mut daemon = Daemon::connect(&options.address, NAMESPACE)?;
    let version = daemon.version()?;
    let dir = tempfile::Builder::new()
        .prefix("casemate-bench-")
        .tempdir()
        .step("make a directory in", std::env::temp_dir().display())?;
    let root = dir.path().join("root");
    rootfs::make(&root)?;
    // Ids of a sandbox come in where only root could.
    open_to_all(dir.path())?;
    let mut found = Figures::default();
    let asked = Arc::new(AtomicI32::new(0));
    watch(&asked)?;
    let progress = Progress::of(u64::from(options.rounds), "round");
    let ended = || asked.load(Ordering::Relaxed);
    let mut done = 0;
    let measured = (0..options.rounds).try_for_each(|round| {
        if ended() != 0 {
            return Ok(());
        }
        progress.step("");
        for turn in 0..runtimes.len() {
            // Who is second today is first tomorrow.
            let at = (turn + round as usize) % runtimes.len();
            if let Some(runtime) = runtimes.get(at) {
                one(&mut daemon, runtime, &root, round, &mut found)?;
            }
        }
        done += 1;
        Ok(())
    });
    drop(progress);
    daemon.forget_namespace();
    measured?;
    let names: Vec<String> = runtimes.iter().map(|r| r.name.clone()).collect();
    let about = json!({
        "at": clock::rfc3339(clock::now()), "rounds": done, "containerd": version,
        "casemate": env!("CARGO_PKG_VERSION"),
        "kernel": rustix::system::uname().release().to_string_lossy(),
        "load": fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        "runtimes": runtimes.iter().map(|r| (r.name.clone(), r.kind.clone().into()))
            .collect::<serde_json::Map<String, Value>>(),
    });
    out::say(found.table(&names))?;
    if let Some(path) = &options.json {
        let text = found.json(&about).to_string() + "\n";
        fs::write(path, text).step("write", path.display())?;
    }
    Ok(match ended() {
        0 => 0,
        signal => 128 + signal,
    })
}

/// From here on a signal that asks for the end is kept in `asked`; a second one ends
/// all at once.
fn watch(asked: &Arc<AtomicI32>) -> Result<(), RunError> {
    let asked = asked.clone();
    let (ready, begun) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            operator::block_on(async {
                let watch = |kind| signal(kind).step("watch", "signals");
                let (mut interrupt, mut terminate) = match (
                    watch(SignalKind::interrupt()),
                    watch(SignalKind::terminate()),
                ) {
                    (Ok(one), Ok(other)) => (one, other),
                    (Err(error), _) | (_, Err(error)) => {
                        let _gone = ready.send(Err(error));
                        return Ok(());
                    }
                };
                let _gone = ready.send(Ok(()));
                loop {
                    let kind = tokio::select! {
                        _ = interrupt.recv() => SignalKind::interrupt(),
                        _ = terminate.recv() => SignalKind::terminate(),
                    };
                    let number = kind.as_raw_value();
                    if asked.swap(number, Ordering::Relaxed) != 0 {
                        std::process::exit(128 + number);
                    }
                }
            })
        })
        .step("start the thread for", "signals")?;
    begun.recv().unwrap_or(Ok(()))
}

fn open_to_all(dir: &Path) -> Result<(), RunError> {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(dir, mode).step("open", dir.display())
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// One container's life.
fn one(
    daemon: &mut Daemon,
    runtime: &Runtime,
    root: &Path,
    round: u32,
    found: &mut Figures,
) -> Result<(), RunError> {
    let id = format!(
        "casemate-bench-{}-{round}-{}",
        std::process::id(),
        runtime.name
    );
    let options = Run {
        rootfs: None,
        writable: false,
        terminal: false,
        command: ["/bin/sleep", "3600"].map(str::to_owned).to_vec(),
    };
    let ran = life(daemon, runtime, (&id, &options, root), found);
    daemon.clean(&id);
    ran
}

fn life(
    daemon: &mut Daemon,
    runtime: &Runtime,
    (id, options, root): (&str, &Run, &Path),
    found: &mut Figures,
) -> Result<(), RunError> {
    let name = &runtime.name;
    daemon.container(id, &runtime.kind, options)?;
    let begun = Instant::now();
    let pid = daemon.create(id, root)?;
    found.add("containerd: create a task", "ms", name, ms(begun));
    daemon.start(id)?;
    found.add("containerd: create and start", "ms", name, ms(begun));
    let begun = Instant::now();
    let exec = Exec {
        container: id,
        id: "bench",
        options,
        args: &["/bin/true"],
    };
    daemon.exec(&exec)?;
    found.add("containerd: exec true, to its end", "ms", name, ms(begun));
    if let Some(mib) = weight(pid, id) {
        found.add("PSS of one idle container", "MiB", name, mib);
    }
    let begun = Instant::now();
    daemon.end(id)?;
    found.add("containerd: kill and delete", "ms", name, ms(begun));
    Ok(())
}

/// Memory of all processes that are there for a container: those in its cgroups,
/// its shim, and what the shim has started.
#[allow(clippy::cast_precision_loss)]
fn weight(init: u32, id: &str) -> Option<f64> {
    let all = processes();
    let parent = |pid: u32| {
        all.iter()
            .find(|(own, _)| *own == pid)
            .map(|(_, parent)| *parent)
    };
    // Init's ancestors up to pid 1 are the shim and what it has in between; of a shim
    // that is a subreaper the last.
    let mut top = init;
    while let Some(next) = parent(top).filter(|next| *next > 1) {
        top = next;
        if top == std::process::id() {
            return None;
        }
    }
    let mut family = BTreeSet::from([top]);
    loop {
        let more: Vec<u32> = all
            .iter()
            .filter(|(pid, parent)| family.contains(parent) && !family.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            break;
        }
        family.extend(more);
    }
    let named = all.iter().map(|(pid, _)| *pid).filter(|pid| {
        let file = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let has = |bytes: Vec<u8>| bytes.windows(id.len()).any(|part| part == id.as_bytes());
        has(file("cgroup")) || has(file("cmdline"))
    });
    family.extend(named);
    family.remove(&std::process::id());
    let bytes: u64 = family.iter().filter_map(|pid| pss(u64::from(*pid))).sum();
    (bytes > 0).then_some(bytes as f64 / f64::from(1u32 << 20))
}

/// Pids, each with its parent's (proc_pid_stat(5), field 4).
fn processes() -> Vec<(u32, u32)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let (_, rest) = stat.rsplit_once(')')?;
            Some((pid, rest.split_ascii_whitespace().nth(1)?.parse().ok()?))
        })
        .collect()
}

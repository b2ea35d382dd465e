//! containerd itself as the victim: killed, or stopped for a while, after any
//! line of the journal and between them, while a task of its is made, started,
//! entered and deleted. A stopped daemon's tasks go on as if nothing had been. A
//! killed one's are known to its successor or cleaned up, and once removed leave
//! nothing.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use casemate_tests::ctr::Ctr;
use casemate_tests::daemon::{Daemon, NODE_CONFIG};
use casemate_tests::generation::Generation;
use casemate_tests::image::catalog;
use casemate_tests::image::oci::sha256;
use casemate_tests::node::{Config, Traces};
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::trace::{self, Step, Then};
use casemate_tests::world::{self, NAMESPACE, World, set_mode};
use casemate_tests::{Failure, ensure};
use rustix::process::Signal;

use crate::common::{LONG, casemate_only};

crate::trials![fault_daemon_16_at_any_step, fault_daemon_21_at_any_step];

/// How long a daemon stays stopped.
const PAUSED: Duration = Duration::from_millis(300);
/// From a daemon's return to a node without what it doesn't know.
/// 1.6 leaves it to the shim to go, which waits half a minute for a request.
const CLEANED_WITHIN: Duration = Duration::from_secs(40);

/// A daemon of its own, whose shims' `start` stops for us to step through.
struct Node {
    daemon: Daemon,
    ctr: Ctr,
    config: Config,
    shell: PathBuf,
}

impl Node {
    fn make(generation: Generation) -> Result<Self, Stop> {
        let world = World::get()?;
        let Some(programs) = generation.binaries() else {
            return skip(generation.missing());
        };
        casemate_tests::results::touched(generation.version());
        let dir = world.dir().join(format!("f{}", generation.tag()));
        let (bin, shell) = (dir.join("bin"), dir.join("shell"));
        fs::create_dir_all(&bin)?;
        let wrapper = bin.join("containerd-shim-casemate-v2");
        fs::write(
            &wrapper,
            format!(
                "#!/bin/sh\nfor last; do :; done\nif [ \"$last\" = start ]; then\n\
                 echo $$ > {shell}.new; mv {shell}.new {shell}; kill -STOP $$\nfi\n\
                 exec {shim} \"$@\"\n",
                shell = shell.display(),
                shim = world.shim()?.display()
            ),
        )?;
        set_mode(&wrapper, 0o755)?;
        let config = Config::next();
        let node_config = dir.join(NODE_CONFIG);
        fs::create_dir_all(dir.join("casemate"))?;
        fs::write(&node_config, &config.text)?;
        let path = format!("{}:{}:{}", bin.display(), programs.display(), world.path());
        let daemon = Daemon::start(&dir, &path)?;
        let ctr = daemon.ctr(NAMESPACE);
        ctr.import(&catalog::base(Some(&world::probe()?))?, &dir)?;
        Ok(Self {
            daemon,
            ctr,
            config,
            shell,
        })
    }

    fn traces(&self, id: &str) -> Traces {
        let name = format!("{}/{NAMESPACE}/{id}", self.daemon.address().display());
        let socket = format!("/run/containerd/s/{}", sha256(name.as_bytes()));
        Traces::of_other(id, &self.config, socket.into())
    }

    /// Steps through the next `start` and its server.
    fn step_through(&self, decide: &mut dyn FnMut(&Step) -> Then) -> casemate_tests::Result<usize> {
        until("containerd to run its shim", LONG, || self.shell.exists())?;
        let text = fs::read_to_string(&self.shell).unwrap_or_default();
        match text.trim().parse() {
            Ok(pid) => trace::follow(pid, decide),
            Err(_) => Err(Failure::Unexpected(format!("no pid: {text:?}"))),
        }
    }

    fn do_all(&self, commands: &[&[&str]]) -> casemate_tests::Result<()> {
        for command in commands {
            self.ctr.run(command, LONG)?.ok()?;
        }
        Ok(())
    }

    /// A task's life, up to the first command that fails.
    fn live(&self, id: &str) -> casemate_tests::Result<()> {
        let runtime = World::get()?.runtime();
        self.do_all(&[
            &[
                "run",
                "-d",
                "--null-io",
                "--runtime",
                runtime,
                catalog::BASE,
                id,
                "/bin/probe",
                "sleep",
            ],
            &["task", "exec", "--exec-id", "e", id, "/bin/true"],
            &["task", "kill", "-s", "SIGKILL", id],
        ])?;
        let mut failed = None;
        until("the task to stop", LONG, || match self.task(id) {
            Ok(line) => line.is_some_and(|line| line.contains("STOPPED")),
            Err(error) => {
                failed = Some(error);
                true
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        // Its exit code is init's.
        let _ = self.ctr.run(&["task", "delete", id], LONG)?;
        self.do_all(&[&["container", "delete", id]])
    }

    /// The daemon's line of the task, if it knows it.
    fn task(&self, id: &str) -> casemate_tests::Result<Option<String>> {
        let text = self.ctr.run(&["task", "ls"], LONG)?.ok()?.out();
        let line = text.lines().find(|line| line.starts_with(id));
        Ok(line.map(str::to_owned))
    }

    /// What an operator does with a task that a crash has left.
    fn remove(&self, id: &str) -> Outcome {
        let _ = self.ctr.run(&["task", "kill", "-s", "SIGKILL", id], LONG)?;
        until("the task to be deleted", LONG, || {
            let _ = self.ctr.run(&["task", "delete", "-f", id], LONG);
            self.task(id).is_ok_and(|line| line.is_none())
        })?;
        Ok(self.do_all(&[&["container", "delete", id]])?)
    }
}

#[derive(Debug, Clone, Copy)]
enum At {
    /// After the line of the journal with this number.
    Line(usize),
    /// After the effect with this number.
    Effect(usize),
}

#[derive(Debug, Default)]
struct Seen {
    hit: Option<String>,
    steps: usize,
    lines: usize,
}

/// One life with at most one fault; what was stepped through.
fn one(node: &Node, fault: Option<(At, Signal)>) -> Result<Seen, Stop> {
    let id = World::get()?.id("fd");
    let traces = node.traces(&id);
    let before = traces.look();
    let _ = fs::remove_file(&node.shell);
    let mut seen = Seen::default();
    let (lived, traced) = std::thread::scope(|scope| {
        let seen = &mut seen;
        let tracer = scope.spawn(move || {
            node.step_through(&mut |step| {
                seen.steps = step.number + 1;
                seen.lines += usize::from(step.journal.is_some());
                let Some((at, signal)) = fault else {
                    return Then::Go;
                };
                let here = match at {
                    At::Line(n) => step.journal.is_some() && seen.lines == n + 1,
                    At::Effect(n) => step.number == n,
                };
                if !here {
                    return Then::Go;
                }
                seen.hit = Some(format!("{} {} ({})", step.action, step.number, step.what));
                if signal == Signal::KILL {
                    node.daemon.crash();
                } else {
                    node.daemon.signal(signal);
                    scope.spawn(move || {
                        std::thread::sleep(PAUSED);
                        node.daemon.signal(Signal::CONT);
                    });
                }
                Then::Release
            })
        });
        let lived = node.live(&id);
        (lived, tracer.join())
    });
    let place = seen.hit.clone().unwrap_or_else(|| "nowhere".to_owned());
    let named = |what: String| Stop::Fail(format!("{fault:?} at {place}: {what}"));
    match traced {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(named(format!("the stepper: {error}; {lived:?}"))),
        Err(_) => return fail("the stepper panicked"),
    }
    let killed = seen.hit.is_some() && fault.is_some_and(|(_, signal)| signal == Signal::KILL);
    if killed {
        node.daemon.up()?;
        // What was under way when it died may come to its end a little later.
        let settled = || match node.task(&id) {
            Ok(Some(_)) => true,
            _ => traces.look() == before,
        };
        if until("a known or a clean state", CLEANED_WITHIN, settled).is_err() {
            traces
                .expect(&before, Duration::ZERO)
                .map_err(|e| named(format!("the new daemon doesn't know the task, but {e}")))?;
        }
        node.remove(&id).map_err(|stop| match stop {
            Stop::Fail(why) => named(why),
            Stop::Skip(why) => Stop::Skip(why),
        })?;
    } else {
        lived.map_err(|error| named(error.to_string()))?;
    }
    traces
        .expect(&before, CLEANED_WITHIN)
        .map_err(|error| named(error.to_string()))?;
    Ok(seen)
}

fn at_any_step(generation: Generation) -> Outcome {
    casemate_only()?;
    let node = Node::make(generation)?;
    let done = sweep(&node);
    node.daemon.stop();
    done
}

fn sweep(node: &Node) -> Outcome {
    let all = std::env::var_os("CASEMATE_TEST_FAULTS").is_some();
    let whole = one(node, None)?;
    ensure!(
        whole.lines >= 8 && whole.steps > 100,
        "only {} lines and {} effects",
        whole.lines,
        whole.steps
    );
    let (stride, spare) = if all { (3, 1) } else { (48, 3) };
    let lines = (0..whole.lines).map(|n| (n, At::Line(n)));
    let effects = (0..whole.steps)
        .step_by(stride)
        .map(|n| (n / stride, At::Effect(n)));
    let mut hits = 0;
    for (n, at) in lines.chain(effects) {
        for signal in [Signal::KILL, Signal::STOP] {
            if signal == Signal::STOP && n % spare != 0 {
                continue;
            }
            hits += usize::from(one(node, Some((at, signal)))?.hit.is_some());
        }
    }
    println!(
        "{hits} lives with a fault of their daemon, {} lines, {} effects",
        whole.lines, whole.steps
    );
    ensure!(hits > whole.lines, "only {hits} faults struck");
    Ok(())
}

fn fault_daemon_16_at_any_step() -> Outcome {
    at_any_step(Generation::V1_6)
}

fn fault_daemon_21_at_any_step() -> Outcome {
    at_any_step(Generation::V2_1)
}

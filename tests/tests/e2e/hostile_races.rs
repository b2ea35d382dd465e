//! Paths that change while the runtime uses them: a container exchanges a directory
//! with a link, as fast as it can, while another is made that has a mount through
//! it, or an exec starts in it. Each trial has as its control the naive way, by the
//! host's root on the same path, which the race does mislead.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::pod::{Pids, Pod};
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::world::set_mode;
use casemate_tests::{ensure, ensure_eq};
use rustix::fs::{Mode, OFlags};
use serde_json::json;

use crate::common::{RUNNING, casemate_only, status};
use crate::hostile::add_mount;

crate::trials![
    hostile_race_of_a_volumes_source,
    hostile_race_of_a_volumes_parent,
    hostile_race_of_a_mounts_target,
    hostile_race_of_an_execs_directory,
];

/// At least so many tries, and so many of each outcome.
const TRIES: u32 = 40;
const EACH: u32 = 3;
/// Not for longer than this: on a busy machine one outcome may be rare.
const WHILE: Duration = Duration::from_secs(90);

/// A volume in which `a` and `b` are exchanged all the time by a container.
struct Race {
    volume: PathBuf,
    pod: Pod,
    attacker: Task,
}

impl Race {
    /// `a` is a directory with what `fill` puts there, `b` a link to `target`.
    fn start(name: &str, target: &str, fill: impl FnOnce(&Path) -> Outcome) -> Result<Race, Stop> {
        casemate_only()?;
        let pod = Pod::start(name)?;
        let volume = pod.pause.side.join("racing");
        let directory = volume.join("a");
        fs::create_dir_all(&directory)?;
        fill(&directory)?;
        symlink(target, volume.join("b"))?;
        set_mode(&volume, 0o777)?;
        let mut attacker = pod.member(
            "attacker",
            &["/bin/probe", "exchange", "/vol/a", "/vol/b"],
            Pids::Own,
        )?;
        share(&mut attacker, &volume);
        attacker.boot()?;
        attacker.create()?;
        attacker.rpc()?.start(&attacker.id)?;
        attacker.stdout.until("exchanging", SHORT)?;
        Ok(Race {
            volume,
            pod,
            attacker,
        })
    }

    /// The naive way: looks where the path leads, finds that harmless, and uses the
    /// path. True once that led to `elsewhere`.
    fn misleads(&self, path: &Path, elsewhere: &str) -> Outcome {
        let leads_to = || -> Option<PathBuf> {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let opened = rustix::fs::open(path, flags, Mode::empty()).ok()?;
            fs::read_link(casemate_sys::mount::own_link(&opened)).ok()
        };
        let begun = Instant::now();
        while begun.elapsed() < WHILE {
            let is_harmless = leads_to().is_some_and(|seen| !seen.starts_with(elsewhere));
            if is_harmless && leads_to().is_some_and(|used| used.starts_with(elsewhere)) {
                return Ok(());
            }
        }
        fail(format!(
            "{}: the race misleads nobody, so it proves nothing",
            path.display()
        ))
    }

    /// Runs `one` until both outcomes were seen; it says which.
    fn both(&self, mut one: impl FnMut(u32) -> Result<bool, Stop>) -> Outcome {
        let begun = Instant::now();
        let (mut passed, mut refused) = (0, 0);
        for n in 0.. {
            if n >= TRIES && passed.min(refused) >= EACH {
                break;
            }
            ensure!(
                begun.elapsed() < WHILE,
                "{passed} passed and {refused} were refused: the race isn't met"
            );
            match one(n)? {
                true => passed += 1,
                false => refused += 1,
            }
        }
        println!("{passed} passed, {refused} refused");
        ensure_eq!(status(&self.attacker)?, RUNNING, "the attacker's state");
        Ok(())
    }

    fn finish(self) -> Outcome {
        self.pod.remove(self.attacker)?;
        Ok(self.pod.finish()?)
    }

    /// Runs a container that has `mount` beside the volume; what it wrote, or why it
    /// wasn't made.
    fn victim(&self, n: u32, mount: serde_json::Value, script: &str) -> Result<Victim, Stop> {
        let args = ["/bin/sh", "-c", script];
        let mut victim = self.pod.member(&format!("v{n}"), &args, Pids::Own)?;
        share(&mut victim, &self.volume);
        add_mount(&mut victim, mount);
        victim.boot()?;
        if let Err(error) = victim.create() {
            victim.forget();
            return Ok(Err(error.to_string()));
        }
        victim.rpc()?.start(&victim.id)?;
        victim.rpc()?.wait(&victim.id, SHORT)?;
        let text = victim.stdout.text(SHORT)?;
        self.pod.remove(victim)?;
        Ok(Ok(text))
    }
}

type Victim = Result<String, String>;

fn share(task: &mut Task, volume: &Path) {
    add_mount(
        task,
        json!({"destination": "/vol", "type": "bind", "source": volume, "options": ["rbind"]}),
    );
}

fn marked(directory: &Path) -> Outcome {
    Ok(fs::write(directory.join("mark"), "inside\n")?)
}

/// What is judged is what is mounted: `/etc`, which the node doesn't show, is
/// refused by name or not there, whatever the path is meanwhile.
fn source(name: &str, target: &str, below: &str, fill: impl FnOnce(&Path) -> Outcome) -> Outcome {
    let race = Race::start(name, target, fill)?;
    let path = race.volume.join(below);
    race.misleads(&path, "/etc")?;
    race.both(|n| {
        let mount = json!({
            "destination": "/data", "type": "bind", "source": path, "options": ["rbind", "ro"]
        });
        match race.victim(n, mount, "ls -A /data; cat /data/mark")? {
            Ok(text) => {
                ensure_eq!(text, "mark\ninside\n", "what was mounted");
                Ok(true)
            }
            Err(error) => {
                let is_named = error.contains("/etc") || error.contains(below);
                ensure!(is_named, "{error}");
                Ok(false)
            }
        }
    })?;
    race.finish()
}

fn hostile_race_of_a_volumes_source() -> Outcome {
    source("racesource", "/etc", "a", marked)
}

/// The same with the path's parent: `/` in place of a directory with an `etc`.
fn hostile_race_of_a_volumes_parent() -> Outcome {
    source("raceparent", "/", "a/etc", |directory| {
        let etc = directory.join("etc");
        fs::create_dir(&etc)?;
        marked(&etc)
    })
}

/// A mount lands where its target is by then, inside of its container, and never
/// in /proc.
fn hostile_race_of_a_mounts_target() -> Outcome {
    let race = Race::start("racetarget", "/proc/self", |directory| {
        Ok(fs::create_dir(directory.join("cwd"))?)
    })?;
    let path = race.volume.join("a/cwd");
    race.misleads(&path, &std::env::current_dir()?.display().to_string())?;
    let data = race.pod.pause.side.join("data");
    fs::create_dir(&data)?;
    marked(&data)?;
    race.both(|n| {
        let mount = json!({
            "destination": "/vol/a/cwd", "type": "bind", "source": data, "options": ["rbind", "ro"]
        });
        let script = "grep -c /data /proc/self/mountinfo; grep /data /proc/self/mountinfo";
        match race.victim(n, mount, script)? {
            Ok(text) => {
                let mut lines = text.lines();
                ensure_eq!(lines.next(), Some("1"), "mounts: {text}");
                let at = lines.next().and_then(|line| line.split(' ').nth(4));
                // By the name that its directory has at the moment.
                let known = matches!(at, Some("/vol/a/cwd" | "/vol/b/cwd"));
                ensure!(known, "mounted at {at:?}: {text}");
                Ok(true)
            }
            Err(error) => {
                ensure!(error.contains("/vol/a/cwd"), "{error}");
                Ok(false)
            }
        }
    })?;
    let host = fs::read_to_string("/proc/self/mountinfo")?;
    let volume = race.volume.display().to_string();
    ensure!(!host.contains(&volume), "mounts on the host: {host}");
    race.finish()
}

/// An exec's working directory is in its container, or the exec is refused.
fn hostile_race_of_an_execs_directory() -> Outcome {
    // The host's for whoever follows it from there.
    let race = Race::start("racecwd", "/etc", |directory| {
        // The container's own /etc lacks this.
        Ok(fs::create_dir(directory.join("work"))?)
    })?;
    let pid = race.attacker.rpc()?.state(&race.attacker.id)?.pid;
    let path = PathBuf::from(format!("/proc/{pid}/root/vol/a"));
    race.misleads(&path, "/etc")?;
    race.both(|n| {
        let id = format!("e{n}");
        let mut exec = Exec::sh(&race.attacker, &id, "pwd -P; ls -di . /vol/a /vol/b")?;
        exec.process["cwd"] = json!("/vol/a/work");
        exec.add()?;
        let started = exec.start();
        if started.is_ok() {
            exec.wait()?;
        }
        exec.delete()?;
        match started {
            Ok(_) => {
                let text = exec.stdout.text(SHORT)?;
                let at = text.lines().next().unwrap_or_default();
                let known = ["/vol/a/work", "/vol/b/work"].contains(&at);
                ensure!(known, "an exec in {at:?}: {text:?}");
                Ok(true)
            }
            Err(error) => {
                ensure!(error.to_string().contains("cwd"), "{error}");
                Ok(false)
            }
        }
    })?;
    race.finish()
}

//! Every probe, in each profile, as whoever a workload can be. A success that
//! `tests/probes-accepted.txt` doesn't give a reason for is a failure.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use casemate_spec::caps;
use casemate_tests::bundle::Task;
use casemate_tests::ledger;
use casemate_tests::probes::{self, Answers, PROFILES, Table, WHO};
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::{binaries, set_mode};
use casemate_tests::{World, ensure, run};
use rustix::fs::{CWD, FileType, makedev, mknodat};
use serde_json::{Value, json};

use crate::common::casemate_only;
use crate::hostile_node::configure;
use crate::probes_topics;

crate::trials![
    probes_strict,
    probes_default,
    probes_compat,
    probes_controls_succeed,
];

/// The trial that needs the others' answers; comes after them.
pub fn last_trials() -> Vec<libtest_mimic::Trial> {
    vec![
        casemate_tests::skip::trial("probes_ledger_is_proved", probes_ledger_is_proved),
        casemate_tests::skip::trial("probes_table", probes_table),
    ]
}

/// Answers by column, as far as they are known in this run.
static KNOWN: Mutex<BTreeMap<String, Answers>> = Mutex::new(BTreeMap::new());

const LIMIT: Duration = Duration::from_secs(120);

pub fn checks() -> PathBuf {
    binaries().join("checks")
}

/// A task with everything in it that probes are after.
pub fn task(name: &str) -> Result<Task, Stop> {
    let mut task = Task::new(name, &["/bin/checks", "run"])?;
    let upper = task.side.join("upper");
    fs::create_dir_all(upper.join("bin"))?;
    fs::copy(checks(), upper.join("bin/checks"))?;
    set_mode(&upper.join("bin/checks"), 0o755)?;
    fs::create_dir_all(upper.join("smuggled"))?;
    for (name, kind, major, minor) in [
        ("mem", FileType::CharacterDevice, 1, 1),
        ("kmsg", FileType::CharacterDevice, 1, 11),
        ("zero", FileType::CharacterDevice, 1, 5),
        ("fuse", FileType::CharacterDevice, 10, 229),
        ("loop0", FileType::BlockDevice, 7, 0),
    ] {
        let path = upper.join("smuggled").join(name);
        mknodat(CWD, &path, kind, 0o666.into(), makedev(major, minor))?;
        set_mode(&path, 0o666)?;
    }
    let volume = task.side.join("volume");
    let other = task.side.join("below");
    for dir in [&volume, &other, &volume.join("below")] {
        fs::create_dir_all(dir)?;
        set_mode(dir, 0o777)?;
    }
    for dir in [&volume, &other] {
        fs::write(dir.join("file"), "content")?;
        set_mode(&dir.join("file"), 0o666)?;
    }
    // Unmounted when the task is dropped: its path has the task's id.
    rustix::mount::mount_bind(&other, volume.join("below"))?;
    task.spec["root"]["readonly"] = json!(true);
    if let Some(mounts) = task.spec["mounts"].as_array_mut() {
        mounts.extend([
            json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
                "options": ["mode=1777", "size=65536k"]}),
            json!({"destination": "/vol", "type": "bind", "source": volume,
                "options": ["rbind", "rro"]}),
            // As CRI adds it.
            json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}),
        ]);
    }
    Ok(task)
}

/// Runs it to its end; what it wrote.
pub fn said_by(mut task: Task) -> Result<String, Stop> {
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let ended = task.rpc()?.wait(&task.id, LIMIT)?;
    task.rpc()?.delete(&task.id)?;
    let out = task.stdout.text(LIMIT)?;
    let errors = String::from_utf8_lossy(&task.stderr.so_far()).into_owned();
    rustix::mount::unmount(
        task.side.join("volume/below"),
        rustix::mount::UnmountFlags::DETACH,
    )?;
    task.finish()?;
    ensure!(
        ended.exit_status == 0,
        "status {}: {out} {errors}",
        ended.exit_status
    );
    Ok(out)
}

fn answers_of(task: Task) -> Result<Answers, Stop> {
    let out = said_by(task)?;
    let answers = probes::parse(&out)?;
    ensure!(answers.len() > 600, "only {} answers: {out}", answers.len());
    Ok(answers)
}

fn under_casemate(profile: &str, who: &str) -> Result<Answers, Stop> {
    let mut task = task("probes")?;
    let mut config = format!("profile = \"{profile}\"\n");
    let sets = ["bounding", "effective", "permitted", "inheritable"];
    match who {
        "-all" => {
            for set in sets {
                task.spec["process"]["capabilities"][set] = json!(caps::NAMES.as_slice());
            }
            config += &format!("[capabilities]\nallow = {:?}\n", caps::NAMES);
        }
        "-user" => {
            task.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            task.spec["process"]["capabilities"] = json!({});
        }
        _ => {}
    }
    configure(&mut task, &config)?;
    answers_of(task)
}

/// containerd's default seccomp profile, as it writes it into a specification.
pub fn default_seccomp() -> Result<Value, Stop> {
    let ctr = crate::daemon::ctr()?;
    let id = World::get()?.id("seccomp");
    let short = Duration::from_secs(20);
    let image = casemate_tests::image::catalog::BASE;
    ctr.run(
        &["container", "create", "--seccomp", image, &id, "true"],
        short,
    )?
    .ok()?;
    let shown = ctr.run(&["container", "info", &id], short)?.ok();
    ctr.run(&["container", "delete", &id], short)?.ok()?;
    let shown: Value = serde_json::from_slice(&shown?.stdout)
        .map_err(|e| Stop::Fail(format!("ctr container info: {e}")))?;
    let profile = shown["Spec"]["linux"]["seccomp"].clone();
    ensure!(profile.is_object(), "no seccomp profile in {shown}");
    Ok(profile)
}

fn under_runc() -> Result<Answers, Stop> {
    let mut task = task("peer")?;
    as_runc(&mut task)?;
    answers_of(task)
}

/// Has runc run it, with containerd's default profile.
pub fn as_runc(task: &mut Task) -> Outcome {
    let path = World::get()?.path();
    let mut dirs = path
        .split(':')
        .map(|d| PathBuf::from(d).join("containerd-shim-runc-v2"));
    let Some(shim) = dirs.find(|p| p.exists()) else {
        return casemate_tests::skip::skip("no containerd-shim-runc-v2");
    };
    task.shim.program = shim;
    task.spec["linux"]["seccomp"] = default_seccomp()?;
    Ok(())
}

fn natively() -> Result<Answers, Stop> {
    // Descriptor 9 is what T15 is after.
    let script = format!("exec 9</dev/null; exec {} control", checks().display());
    let mut command = Command::new("sh");
    command.args(["-c", &script]);
    let out = run::run(&mut command, &[], LIMIT)?.ok()?.out();
    Ok(probes::parse(&out)?)
}

/// The answers of a column, from this run if they are known.
pub fn column(name: &str) -> Result<Answers, Stop> {
    let poisoned = |_| Stop::Fail("another trial panicked".to_owned());
    if let Some(known) = KNOWN.lock().map_err(poisoned)?.get(name) {
        return Ok(known.clone());
    }
    let (profile, who) = match name.split_once('-') {
        Some((profile, _)) => (profile, &name[profile.len()..]),
        None => (name, ""),
    };
    let answers = match profile {
        "native" => natively()?,
        "runc" => under_runc()?,
        _ => under_casemate(profile, who)?,
    };
    KNOWN
        .lock()
        .map_err(poisoned)?
        .insert(name.to_owned(), answers.clone());
    Ok(answers)
}

fn profile(profile: &str) -> Outcome {
    casemate_only()?;
    let accepted = probes::accepted()?;
    let control = column("native")?;
    let mut wrong = Vec::new();
    for who in WHO {
        let name = format!("{profile}{who}");
        let answers = column(&name)?;
        for found in probes::unexpected(&answers, &name, &accepted) {
            wrong.push(format!("{name} {found}"));
        }
        // What succeeds on the host and neither succeeds nor is refused inside
        // was not tried there.
        for (id, answer) in &answers {
            let untried = !answer.succeeded()
                && !answer.held(control.get(id))
                && control.get(id).is_some_and(probes::Answer::succeeded);
            let why = probes_topics::NOT_TRIED
                .iter()
                .any(|(start, _)| id.starts_with(start));
            if untried && !why {
                wrong.push(format!("{name} {id}: {answer:?}, which shows nothing"));
            }
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} of the probes:\n  {}",
        wrong.len(),
        wrong.join("\n  ")
    );
    Ok(())
}

fn probes_strict() -> Outcome {
    profile("strict")
}

fn probes_default() -> Outcome {
    profile("default")
}

fn probes_compat() -> Outcome {
    profile("compat")
}

/// A probe that can't succeed proves nothing. Most must, outside.
fn probes_controls_succeed() -> Outcome {
    let control = column("native")?;
    let (mut yes, mut no) = (0, Vec::new());
    for (id, answer) in &control {
        match answer {
            probes::Answer::Refused(_) | probes::Answer::Died(_) => no.push(id.as_str()),
            answer if answer.succeeded() => yes += 1,
            _ => {}
        }
    }
    ensure!(yes >= 400, "only {yes} probes succeed on the host");
    // Read-only volumes refuse the host's root too, and so on: a few.
    ensure!(no.len() * 10 < yes, "refused on the host: {no:?}");
    Ok(())
}

/// What the ledger calls closed is closed.
fn probes_ledger_is_proved() -> Outcome {
    casemate_only()?;
    let control = column("native")?;
    let mut columns = BTreeMap::new();
    for name in ["default", "default-all", "default-user"] {
        columns.insert(name, column(name)?);
    }
    let columns = columns
        .iter()
        .map(|(name, answers)| (*name, answers))
        .collect();
    let whole = std::env::var_os("CASEMATE_WRITE_DOCS").is_some();
    let wrong = ledger::unproved(&ledger::rows()?, &control, &columns, whole);
    ensure!(wrong.is_empty(), "{}", wrong.join("\n  "));
    Ok(())
}

/// All ids.
pub fn ids() -> Result<Vec<String>, Stop> {
    Ok(means()?.into_keys().collect())
}

fn means() -> Result<BTreeMap<String, String>, Stop> {
    let mut command = Command::new(checks());
    command.arg("list");
    let list = run::run(&mut command, &[], LIMIT)?.ok()?.out();
    Ok(list
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .map(|(id, means)| (id.to_owned(), means.to_owned()))
        .collect())
}

/// The page, when it is asked for; and that no line of the accepted ones is idle.
fn probes_table() -> Outcome {
    casemate_only()?;
    if std::env::var_os("CASEMATE_WRITE_DOCS").is_none() {
        return Ok(());
    }
    let mut columns = BTreeMap::new();
    for name in ["native", "runc"] {
        columns.insert(name.to_owned(), column(name)?);
    }
    for profile in PROFILES {
        for who in WHO {
            let name = format!("{profile}{who}");
            let answers = column(&name)?;
            columns.insert(name, answers);
        }
    }
    let accepted = probes::accepted()?;
    let ours: BTreeMap<&str, &Answers> = columns
        .iter()
        .filter(|(name, _)| *name != "native" && *name != "runc")
        .map(|(name, answers)| (name.as_str(), answers))
        .collect();
    let stale = probes::stale(&ours, &accepted);
    ensure!(
        stale.is_empty(),
        "lines of tests/probes-accepted.txt that nothing needs: {stale:?}"
    );
    let means = means()?;
    let runc = run::run(Command::new("runc").arg("--version"), &[], LIMIT)?.out();
    let kernel = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let table = Table {
        columns: &columns,
        means: &means,
        accepted: &accepted,
        trials: &probes_topics::trials(),
        open: probes_topics::OPEN,
        on: (
            kernel.split('-').next().unwrap_or(&kernel).to_owned(),
            runc.lines().next().unwrap_or_default().to_owned(),
        ),
    };
    let page = probes::own_file("../docs/security-probes.md");
    fs::write(page, table.page())?;
    Ok(())
}

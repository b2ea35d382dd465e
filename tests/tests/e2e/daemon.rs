//! Through a real containerd and `ctr`: 1, 31, 41, 109, 110, 113, and bad input.

use std::fs;
use std::io::Read;
use std::process::Stdio;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use casemate_tests::ctr::{Ctr, Detached};
use casemate_tests::image::{Image, catalog};
use casemate_tests::run::{Output, until};
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{World, ensure, ensure_eq, leaks, world};

use crate::common::LONG;

crate::trials![
    c001_containerd_finds_and_runs_the_runtime,
    c041_exit_codes_through_containerd,
    c109_containerd_restarts,
    c113_nothing_is_left,
    ctr_exec_follows_the_rules,
    ctr_stdin_reaches_the_container,
    ctr_output_waits_for_a_slow_reader,
    ctr_missing_program,
    ctr_bad_cwd,
    ctr_hostile_links,
    ctr_hostile_passwd,
];

/// containerd namespace of these tests.
const NAMESPACE: &str = "casemate-e2e";

static IMPORTED: LazyLock<Mutex<Vec<String>>> = LazyLock::new(Mutex::default);
/// A test that restarts the daemon must not cut off another one's calls.
static DAEMON: LazyLock<Arc<std::sync::RwLock<()>>> = LazyLock::new(Arc::default);

/// Keeps the daemon from being restarted while a test uses it.
pub fn hold() -> Result<std::sync::RwLockReadGuard<'static, ()>, Stop> {
    DAEMON
        .read()
        .or_else(|_| casemate_tests::skip::fail("a test panicked in a restart"))
}

/// A `ctr` of the private daemon, with the base image imported.
pub fn ctr() -> Result<Ctr, Stop> {
    let probe = world::probe()?;
    import(catalog::BASE, || catalog::base(Some(&probe)))
}

/// A `ctr` of the private daemon, with that image imported.
pub fn import(
    name: &str,
    make: impl FnOnce() -> casemate_tests::Result<Image>,
) -> Result<Ctr, Stop> {
    let world = World::get()?;
    let ctr = world.daemon()?.ctr(NAMESPACE);
    let Ok(mut done) = IMPORTED.lock() else {
        return casemate_tests::skip::fail("an import panicked");
    };
    if !done.iter().any(|n| n == name) {
        ctr.import(&make()?, world.dir())?;
        done.push(name.to_owned());
    }
    Ok(ctr)
}

/// `ctr run --rm` of the base image.
pub fn run(name: &str, flags: &[&str], args: &[&str]) -> Result<(String, Output), Stop> {
    let _hold = hold()?;
    let world = World::get()?;
    let ctr = ctr()?;
    let id = world.id(name);
    let output = ctr.run_task(world.runtime(), flags, catalog::BASE, &id, args, LONG)?;
    Ok((id, output))
}

fn expect_clean(id: &str) -> Outcome {
    Ok(leaks::expect_none(id, Duration::from_secs(5))?)
}

fn c001_containerd_finds_and_runs_the_runtime() -> Outcome {
    let (_, output) = run("c001", &[], &["/bin/echo", "hello from inside"])?;
    let output = output.ok()?;
    ensure_eq!(output.out(), "hello from inside\n", "output");
    Ok(())
}

fn c041_exit_codes_through_containerd() -> Outcome {
    for code in [0, 1, 42, 255] {
        let (_, output) = run("c041", &[], &["/bin/probe", "exit", &code.to_string()])?;
        ensure_eq!(output.code(), code, "exit code: {}", output.err());
    }
    Ok(())
}

fn c109_containerd_restarts() -> Outcome {
    let world = World::get()?;
    let ctr = ctr()?;
    let Ok(_alone) = DAEMON.write() else {
        return casemate_tests::skip::fail("a test panicked in a restart");
    };
    let daemon = world.daemon()?;
    let id = world.id("c109");
    let sleep = ["/bin/probe", "sleep"];
    let task = Detached::start(&ctr, world.runtime(), &[], catalog::BASE, &id, &sleep)?;
    let listed = |when: &str| -> Result<Vec<String>, Stop> {
        let line = task.line()?;
        ensure!(!line.is_empty(), "no task {id} {when}");
        Ok(line)
    };
    let before = listed("before the restart")?;
    // Item 110: the way back that 1.6 and 1.7 use.
    let address = fs::read_to_string(daemon.bundle(NAMESPACE, &id).join("address"))?;
    ensure!(
        address.starts_with("unix://"),
        "<bundle>/address is {address:?}"
    );
    daemon.down();
    daemon.up()?;
    ensure_eq!(
        listed("after the restart")?,
        before,
        "the task after the restart"
    );
    ensure!(before.contains(&"RUNNING".to_owned()), "state {before:?}");
    Ok(task.remove()?)
}

/// `ctr task exec`, in containers that deny and that record execs.
fn ctr_exec_follows_the_rules() -> Outcome {
    crate::common::casemate_only()?;
    let _hold = hold()?;
    let (world, ctr) = (World::get()?, ctr()?);
    let with = |policy: &str, check: &dyn Fn(&str) -> Outcome| -> Outcome {
        let id = world.id(&format!("ctrexec{policy}"));
        let annotation = format!("casemate.io/exec={policy}");
        let flags = ["--annotation", &annotation];
        let sleep = ["/bin/probe", "sleep"];
        let task = Detached::start(&ctr, world.runtime(), &flags, catalog::BASE, &id, &sleep)?;
        let checked = check(&id);
        task.remove()?;
        checked
    };
    let exec = |id: &str, script: &str| {
        let args = [
            "task",
            "exec",
            "--exec-id",
            "e1",
            id,
            "/bin/sh",
            "-c",
            script,
        ];
        ctr.run(&args, LONG)
    };
    with("deny", &|id| {
        let denied = exec(id, "echo ran")?;
        ensure!(denied.code() != 0, "it has status {}", denied.code());
        let (out, said) = (denied.out(), denied.err());
        ensure!(
            said.contains("execs are refused in this container"),
            "{said}"
        );
        ensure!(!out.contains("ran"), "it ran: {out}");
        let events = casemate_tests::operator::lines(&["events", "--json", id])?;
        let is_it = |e: &serde_json::Value| e["rule"] == "exec-denied";
        ensure!(events.iter().any(is_it), "no record: {events:?}");
        Ok(())
    })?;
    with("record", &|id| {
        let ran = exec(id, "echo ran; exit 7")?;
        ensure_eq!(
            (ran.code(), ran.out().as_str()),
            (7, "ran\n"),
            "recorded exec"
        );
        until("the record of its end", LONG, || {
            let events = casemate_tests::operator::lines(&["events", "--json", id]);
            let events = events.unwrap_or_default();
            let has = |kind: &str| events.iter().any(|e| e["kind"] == kind);
            has("exec")
                && events
                    .iter()
                    .any(|e| e["kind"] == "exec_end" && e["status"] == 7)
        })?;
        Ok(())
    })
}

fn c113_nothing_is_left() -> Outcome {
    let script = "mount; (sleep 100)& echo data > /written; exit 5";
    let (id, output) = run("c113", &[], &["/bin/sh", "-c", script])?;
    ensure_eq!(output.code(), 5, "exit code: {}", output.err());
    expect_clean(&id)
}

fn ctr_stdin_reaches_the_container() -> Outcome {
    let _hold = hold()?;
    let world = World::get()?;
    let ctr = ctr()?;
    let id = world.id("stdin");
    let args = [
        "run",
        "--rm",
        "--runtime",
        world.runtime(),
        catalog::BASE,
        &id,
        "/bin/head",
        "-c",
        "14000",
    ];
    // Counted, for 1.6's ctr does not always pass on the end of its input.
    let text = "one\ntwo\nthree\n".repeat(1000);
    let output = casemate_tests::run::run(&mut ctr.command(&args), text.as_bytes(), LONG)?.ok()?;
    ensure_eq!(output.out().len(), text.len(), "bytes that came back");
    ensure_eq!(output.out(), text, "text");
    Ok(())
}

/// The run fails, names `part` in one error, and leaves nothing.
fn refused(name: &str, flags: &[&str], args: &[&str], part: &str) -> Outcome {
    let (id, output) = run(name, flags, args)?;
    ensure!(output.code() != 0, "{args:?} with {flags:?} ran");
    ensure!(
        output.err().contains(part),
        "no {part:?} in {:?}",
        output.err()
    );
    expect_clean(&id)
}

fn ctr_missing_program() -> Outcome {
    refused("missing", &[], &["/no/such/program"], "/no/such/program")
}

fn ctr_bad_cwd() -> Outcome {
    refused(
        "cwd",
        &["--cwd", "/etc/passwd/nowhere"],
        &["/bin/true"],
        "/etc/passwd/nowhere",
    )
}

fn ctr_hostile_links() -> Outcome {
    let _hold = hold()?;
    let world = World::get()?;
    let victim = world.dir().join("victim");
    fs::create_dir_all(&victim)?;
    let kept = victim.join("kept");
    fs::write(&kept, b"kept")?;
    let probe = world::probe()?;
    let shown = victim.display().to_string();
    let ctr = import(catalog::HOSTILE_LINKS, || {
        catalog::hostile_links(&probe, &shown)
    })?;
    let id = world.id("links");
    let output = ctr.run_task(
        world.runtime(),
        &[],
        catalog::HOSTILE_LINKS,
        &id,
        &["/bin/true"],
        LONG,
    )?;
    // To refuse and to mount on a directory inside are both right; to touch the
    // host, or to hang, is not.
    ensure!(output.status.is_some(), "the run hung");
    let names: Vec<_> = fs::read_dir(&victim)?
        .flatten()
        .map(|e| e.file_name().display().to_string())
        .collect();
    ensure_eq!(names, ["kept"], "files in the host's directory");
    let mounts = leaks::mounts_with(&shown);
    ensure!(mounts.is_empty(), "mounted over the host: {mounts:?}");
    let _ = ctr.run(&["container", "delete", &id], LONG);
    expect_clean(&id)
}

fn ctr_hostile_passwd() -> Outcome {
    let _hold = hold()?;
    let world = World::get()?;
    let probe = world::probe()?;
    let ctr = import(catalog::HOSTILE_PASSWD, || catalog::hostile_passwd(&probe))?;
    let id = world.id("passwd");
    let args = ["/bin/stat", "-c", "%u %s", "/etc/passwd"];
    let output = ctr
        .run_task(
            world.runtime(),
            &[],
            catalog::HOSTILE_PASSWD,
            &id,
            &args,
            LONG,
        )?
        .ok()?;
    ensure_eq!(output.out(), "0 16777216\n", "owner and size inside");
    expect_clean(&id)
}

/// ctr closes its ends of the fifos when it is told of the end, with what is in them.
fn ctr_output_waits_for_a_slow_reader() -> Outcome {
    crate::common::casemate_only()?;
    let _hold = hold()?;
    let (world, ctr) = (World::get()?, ctr()?);
    let id = world.id("slowreader");
    let words = [
        "run",
        "--rm",
        "--runtime",
        world.runtime(),
        catalog::BASE,
        &id,
        "seq",
        "20000",
    ];
    let mut child = ctr
        .command(&words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut text = Vec::new();
    let mut part = [0; 4096];
    // More than the pipe between ctr and us takes, and less than all pipes together: the
    // program is over long before its output is read.
    std::thread::sleep(Duration::from_millis(300));
    if let Some(mut out) = child.stdout.take() {
        loop {
            match out.read(&mut part)? {
                0 => break,
                n => text.extend_from_slice(&part[..n]),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "{status}");
    let lines = String::from_utf8_lossy(&text).lines().count();
    ensure_eq!(lines, 20_000, "lines");
    expect_clean(&id)
}

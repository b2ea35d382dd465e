//! Probes that need a look from outside, or two pods.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use casemate_sys::seccomp;
use casemate_tests::bundle::Task;
use casemate_tests::ctr::Detached;
use casemate_tests::exec::Exec;
use casemate_tests::image::{catalog, oci::sha256};
use casemate_tests::pod::{init, insiders};
use casemate_tests::run::{run, until};
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::{binaries, set_mode};
use casemate_tests::{World, ensure, ensure_eq, pod, procs};
use serde_json::json;

use crate::common::casemate_only;
use crate::locks::sleeper;
use crate::probes::checks;

crate::trials![
    probes_t01_ids_of_two_pods,
    probes_t04_filters_are_the_same,
    probes_t16_a_hundred_hostile_execs,
    probes_t19_pods_find_nothing_of_each_other,
    probes_t34_a_storm_of_forks_and_memory,
    probes_t36_files_with_privilege_stay_where_they_are,
];

/// First host id and count of what a process' user namespace maps.
fn range(pid: u32, file: &str) -> Result<(u64, u64), Stop> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
    let numbers: Vec<u64> = text
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    ensure_eq!(numbers.len(), 3, "lines of {file} of {pid}: {text:?}");
    Ok((numbers[1], numbers[2]))
}

fn probes_t01_ids_of_two_pods() -> Outcome {
    casemate_only()?;
    let (one, two) = (sleeper("idsone")?, sleeper("idstwo")?);
    let mut seen = Vec::new();
    for task in [&one, &two] {
        let (agent, _) = insiders(task)?;
        let (exec, _out) = pod::exec(task, "more", &["/bin/probe", "sleep"])?;
        for file in ["uid_map", "gid_map"] {
            let of_init = range(init(task)?, file)?;
            ensure_eq!(range(exec, file)?, of_init, "{file} of an exec'ed process");
            let own: u64 = fs::read_to_string(format!("/proc/{agent}/{file}"))?
                .split_whitespace()
                .nth(1)
                .and_then(|n| n.parse().ok())
                .unwrap_or(0);
            ensure!(
                of_init.0 >= 65_536,
                "{file}: {of_init:?} are the host's ids"
            );
            ensure!(
                !(of_init.0..of_init.0 + of_init.1).contains(&own),
                "{file}: the agent's {own} is in {of_init:?}"
            );
            seen.push((file, of_init));
        }
        let uid = procs::status_field(exec, "Uid").unwrap_or_default();
        let first = range(exec, "uid_map")?.0;
        ensure_eq!(
            uid,
            format!("{first}\t{first}\t{first}\t{first}"),
            "ids of root"
        );
    }
    let [(_, a), _, (_, b), _] = seen[..] else {
        return casemate_tests::skip::fail(format!("{seen:?}"));
    };
    ensure!(
        a.0 + a.1 <= b.0 || b.0 + b.1 <= a.0,
        "{a:?} and {b:?} have ids in common"
    );
    one.finish()?;
    Ok(two.finish()?)
}

fn hashes(pid: u32) -> Result<Vec<String>, Stop> {
    let filters = seccomp::filters_of(pid)?;
    Ok(filters.iter().map(|program| sha256(program)).collect())
}

fn probes_t04_filters_are_the_same() -> Outcome {
    casemate_only()?;
    let task = sleeper("filters")?;
    let of_init = hashes(init(&task)?)?;
    ensure!(of_init.len() >= 2, "filters of init: {of_init:?}");
    let mut process = task.spec["process"].clone();
    process["args"] = json!(["/bin/probe", "sleep"]);
    process["noNewPrivileges"] = json!(false);
    let id = (task.id.as_str(), "other");
    task.rpc()?.exec(id, &process, "", "")?;
    let exec = task.rpc()?.start_exec(id)?.pid;
    ensure_eq!(hashes(exec)?, of_init, "filters of an exec'ed process");
    let (agent, forker) = insiders(&task)?;
    ensure_eq!(hashes(forker)?, of_init, "filters of the forker");
    let own = hashes(agent)?;
    ensure_eq!(own.len(), 1, "filters of the agent");
    ensure_eq!(of_init.first(), own.first(), "the first filter of the pod");
    // They are let go again: both run and can be ended as ever.
    ensure_eq!(
        procs::status_field(exec, "TracerPid"),
        Some("0".into()),
        "tracer"
    );
    Ok(task.finish()?)
}

fn probes_t16_a_hundred_hostile_execs() -> Outcome {
    casemate_only()?;
    let world = World::get()?;
    let files = [world.shim()?, binaries().join("casemate-agent")];
    let sums = || -> Result<Vec<String>, Stop> {
        let read = files.iter().map(|f| Ok(sha256(&fs::read(f)?)));
        read.collect()
    };
    let before = sums()?;
    // Whoever executes /bin/evil executes itself; meanwhile everything that can
    // be seen is opened for writing through /proc.
    let script = "while :; do for p in /proc/[0-9]* /proc/self; do \
                  (echo x >> $p/exe) 2>/dev/null && echo WROTE $p; done; done";
    let mut task = Task::new("evil", &["/bin/sh", "-c", script])?;
    std::os::unix::fs::symlink("/proc/self/exe", task.side.join("upper/evil"))?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    for n in 0..100 {
        let exec = Exec::new(&task, &format!("e{n}"), &["/evil", "true"])?;
        exec.add()?;
        // Which program that is, is the kernel's business; it must be no way out.
        if exec.start().is_ok() {
            exec.wait()?;
        }
        exec.delete()?;
    }
    ensure_eq!(sums()?, before, "the runtime's binaries");
    let out = String::from_utf8_lossy(&task.stdout.so_far()).into_owned();
    ensure!(
        !out.contains("WROTE"),
        "a program was opened for writing: {out}"
    );
    Ok(task.finish()?)
}

/// A task with the probes in it.
fn with_checks(name: &str, args: &[&str]) -> Result<Task, Stop> {
    let task = Task::new(name, args)?;
    let bin = task.side.join("upper/bin");
    fs::create_dir_all(&bin)?;
    fs::copy(checks(), bin.join("checks"))?;
    set_mode(&bin.join("checks"), 0o755)?;
    Ok(task)
}

fn probes_t19_pods_find_nothing_of_each_other() -> Outcome {
    casemate_only()?;
    let name = format!("casemate-{}", std::process::id());
    let found = |out: &str| -> Result<usize, Stop> {
        let lines: Vec<_> = out.lines().filter(|l| l.starts_with("T19.")).collect();
        ensure_eq!(lines.len(), 7, "answers: {out}");
        Ok(lines.iter().filter(|l| l.contains("\tok\t")).count())
    };
    // Control: two processes of one ipc and network namespace.
    let program = checks();
    let script = format!(
        "mount -t tmpfs tmpfs /dev/shm && ip link set lo up && {{ {0} plant {name} & }} && sleep 1; \
         {0} look {name}; kill $!",
        program.display()
    );
    let mut control = Command::new("unshare");
    control.args(["--ipc", "--net", "--mount", "--fork", "sh", "-c", &script]);
    let out = run(&mut control, &[], SHORT)?.out();
    ensure_eq!(found(&out)?, 7, "control: {out}");

    let mut one = with_checks("plant", &["/bin/checks", "plant", &name])?;
    one.boot()?;
    one.create()?;
    one.rpc()?.start(&one.id)?;
    until("the first pod to plant", SHORT, || {
        String::from_utf8_lossy(&one.stdout.so_far()).contains("planted")
    })
    .map_err(|e| {
        Stop::Fail(format!(
            "{e}: {}",
            String::from_utf8_lossy(&one.stderr.so_far())
        ))
    })?;
    let mut two = with_checks("look", &["/bin/checks", "look", &name])?;
    let (deleted, out) = two.run_to_end()?;
    ensure_eq!(deleted.exit_status, 0, "exit: {out}");
    ensure_eq!(found(&out)?, 0, "what the second pod found: {out}");
    two.finish()?;
    Ok(one.finish()?)
}

fn probes_t34_a_storm_of_forks_and_memory() -> Outcome {
    casemate_only()?;
    // tail keeps all that it reads until the end of it.
    let script = "(while :; do (tail /dev/zero &) 2>/dev/null; (sleep 100 &) 2>/dev/null; done) & \
                  while :; do sleep 100; done";
    let mut task = Task::new("storm", &["/bin/sh", "-c", script])?;
    task.spec["linux"]["resources"]["pids"] = json!({"limit": 100});
    task.spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    task.boot()?;
    task.create()?;
    let other = sleeper("calm")?;
    task.rpc()?.start(&task.id)?;
    std::thread::sleep(Duration::from_millis(1500));
    for (what, of) in [("its", &task), ("another pod's", &other)] {
        let begun = Instant::now();
        of.rpc()?.state(&of.id)?;
        let took = begun.elapsed();
        ensure!(
            took < Duration::from_secs(2),
            "State of {what} shim took {took:?}"
        );
    }
    let begun = Instant::now();
    task.rpc()?.kill(&task.id, 9, true)?;
    task.rpc()?.wait(&task.id, SHORT)?;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(2), "Kill took {took:?}");
    task.finish()?;
    Ok(other.finish()?)
}

/// Files of that name below `dir`.
fn find(dir: &Path, name: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let kind = entry.file_type();
        if kind.as_ref().is_ok_and(std::fs::FileType::is_dir) {
            find(&entry.path(), name, found);
        } else if entry.file_name() == name {
            found.push(entry.path());
        }
    }
}

fn probes_t36_files_with_privilege_stay_where_they_are() -> Outcome {
    casemate_only()?;
    let world = World::get()?;
    let ctr = crate::daemon::ctr()?;
    let id = world.id("suid");
    let name = format!("evil-{id}");
    let script = format!("cp /bin/busybox /{name} && chmod 6755 /{name} && sleep 100");
    let args = ["sh", "-c", &script];
    let task = Detached::start(&ctr, world.runtime(), &[], catalog::BASE, &id, &args)?;
    let mut found = Vec::new();
    let there = until("the file on disk", SHORT, || {
        found.clear();
        find(&world.dir().join("d"), &name, &mut found);
        let set = |p: &PathBuf| fs::metadata(p).is_ok_and(|m| m.permissions().mode() & 0o6000 != 0);
        found.iter().any(set)
    });
    let reached: Vec<_> = found
        .iter()
        .map(|path| {
            // A user of the host without any privilege.
            let mut test = Command::new("test");
            test.args(["-e", &path.display().to_string()])
                .uid(65_534)
                .gid(65_534);
            test.status().is_ok_and(|s| s.success())
        })
        .collect();
    task.remove()?;
    there?;
    ensure!(!found.is_empty(), "control: no set-uid file on disk");
    ensure!(
        !reached.contains(&true),
        "users of the host reach {found:?}"
    );
    Ok(())
}

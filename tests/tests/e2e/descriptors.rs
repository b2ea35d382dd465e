//! Open files: a pod's size isn't bound to the soft limit that the shim was
//! started with, whoever runs for the pod gets that limit back, and a hard limit
//! that is too low is told and harms nobody.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::world::set_mode;
use casemate_tests::{ensure, ensure_eq, pod};
use serde_json::json;

use crate::common::{RUNNING, casemate_only, status};
use crate::faults_wedge::children;
use crate::hostile_node::{configure, wrap, wrapped};

crate::trials![
    fault_crowd_beyond_the_soft_limit,
    sandbox_soft_limit_is_the_original,
    bad_low_hard_limit_of_open_files,
];

fn open_files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Soft and hard limit of open files, as the kernel shows them.
fn limits(pid: u32) -> Result<(String, String), Stop> {
    let text = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let line = text.lines().find(|line| line.starts_with("Max open files"));
    let mut words = line.unwrap_or_default().split_whitespace().skip(3);
    match (words.next(), words.next()) {
        (Some(soft), Some(hard)) => Ok((soft.to_owned(), hard.to_owned())),
        _ => fail(format!("no limit of open files in {text:?}")),
    }
}

/// A pod whose shim was started with these limits.
fn limited(name: &str, ulimit: &str) -> Result<Task, Stop> {
    let mut pause = pod::pause(name)?;
    wrap(&mut pause, ulimit, "")?;
    pause.boot()?;
    pause.create()?;
    pause.rpc()?.start(&pause.id)?;
    Ok(pause)
}

fn member(pause: &Task) -> Result<Task, Stop> {
    let mut task = pod::container(pause, "member", &["/bin/probe", "sleep"])?;
    if let Some(process) = task.spec["process"].as_object_mut() {
        process.remove("rlimits");
    }
    task.boot()?;
    Ok(task)
}

fn fault_crowd_beyond_the_soft_limit() -> Outcome {
    casemate_only()?;
    const SOFT: usize = 256;
    let pause = limited("softcrowd", &format!("ulimit -Sn {SOFT}"))?;
    let shim = pause.shim_pid()?;
    // What the first container has made is kept for the others.
    let first = member(&pause)?;
    first.create()?;
    pod::end(first)?;
    let before = open_files(shim);
    let mut tasks = Vec::new();
    for n in 0..120 {
        let task = member(&pause)?;
        let created = task.create().and_then(|_| task.rpc()?.start(&task.id));
        if let Err(error) = created {
            return fail(format!("container {n}: {error}"));
        }
        tasks.push(task);
    }
    let now = open_files(shim);
    println!("120 containers: {before} descriptors before, {now} with them");
    ensure!(now > SOFT, "only {now} descriptors: the test shows nothing");
    for task in tasks {
        pod::end(task)?;
    }
    until("the descriptors to go back", SHORT, || {
        open_files(shim) <= before
    })?;
    Ok(pause.finish()?)
}

fn sandbox_soft_limit_is_the_original() -> Outcome {
    casemate_only()?;
    let mut task = wrapped(
        "softlimit",
        &["/bin/sh", "-c", "ulimit -Sn; exec probe sleep"],
        "ulimit -Sn 333; ulimit -Hn 4000",
        "",
    )?;
    if let Some(process) = task.spec["process"].as_object_mut() {
        process.remove("rlimits");
    }
    // On the host: a hook, and a logging binary.
    let hooks = task.side.join("hooks");
    fs::create_dir_all(&hooks)?;
    let of_hook = task.side.join("of-hook");
    let of_logger = task.side.join("of-logger");
    for (name, script) in [
        ("hook", format!("ulimit -Sn > {}", of_hook.display())),
        (
            "logger",
            format!(
                "ulimit -Sn > {}; exec 5>&-; exec cat <&3",
                of_logger.display()
            ),
        ),
    ] {
        fs::write(hooks.join(name), format!("#!/bin/sh\n{script}\n"))?;
        set_mode(&hooks.join(name), 0o755)?;
    }
    set_mode(&hooks, 0o755)?;
    configure(
        &mut task,
        &format!(
            "[hooks]\nallow = [\"{}/\"]\ntimeout = 20\n",
            hooks.display()
        ),
    )?;
    task.spec["hooks"] = json!({"createRuntime": [{"path": hooks.join("hook")}]});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let shim = task.shim_pid()?;
    let both = |soft: &str| (soft.to_owned(), "4000".to_owned());
    ensure_eq!(limits(shim)?, both("4000"), "limits of the shim");
    for child in children(shim) {
        // The runner of hooks is a part of the shim, of the same name.
        let name = fs::read_to_string(format!("/proc/{child}/comm"))?;
        if name.starts_with("casemate-agent") {
            for member in casemate_tests::procs::family(child) {
                ensure_eq!(limits(member.pid)?, both("333"), "limits inside");
            }
        }
    }
    task.stdout.until("333\n", SHORT)?;
    let init = task.rpc()?.state(&task.id)?.pid;
    ensure_eq!(limits(init)?, both("333"), "limits of init");
    ensure_eq!(
        Exec::sh(&task, "e", "ulimit -Sn")?.run()?,
        (0, "333\n".to_owned()),
        "limit of an exec"
    );
    let mut logged = Exec::sh(&task, "l", "echo x")?;
    logged.stdio = [
        String::new(),
        format!("binary://{}", hooks.join("logger").display()),
        String::new(),
    ];
    logged.begin()?;
    logged.wait()?;
    logged.delete()?;
    for path in [of_hook, of_logger] {
        let text = fs::read_to_string(&path).unwrap_or_default();
        ensure_eq!(text.trim(), "333", "limit told in {}", path.display());
    }
    Ok(task.finish()?)
}

fn bad_low_hard_limit_of_open_files() -> Outcome {
    casemate_only()?;
    const HARD: usize = 160;
    let pause = limited("hardlimit", &format!("ulimit -n {HARD}"))?;
    let shim = pause.shim_pid()?;
    let mut tasks = Vec::new();
    let (refused, error) = loop {
        let task = member(&pause)?;
        match task.create().and_then(|_| task.rpc()?.start(&task.id)) {
            Ok(_) => tasks.push(task),
            Err(error) => break (task, error),
        }
        ensure!(tasks.len() < 20, "no limit was met");
    };
    let text = error.to_string();
    ensure!(
        text.contains("RLIMIT_NOFILE") && text.contains("LimitNOFILE"),
        "{text:?} names neither the limit nor the way out"
    );
    ensure_eq!(text.lines().count(), 1, "lines of {text:?}");
    let count = tasks.len();
    println!("{count} containers with {HARD} descriptors: {text}");
    ensure!(count >= 3, "only {count} containers");
    refused.forget();
    for task in &tasks {
        ensure_eq!(status(task)?, RUNNING, "state of another container");
    }
    // Whoever connects beyond that is hung up on; who is connected is answered.
    let path = pause.answer()?.socket();
    let mut guests = Vec::new();
    let mut hung_up = 0;
    for _ in 0..HARD {
        let mut guest = UnixStream::connect(&path)?;
        guest.set_read_timeout(Some(Duration::from_millis(20)))?;
        if matches!(guest.read(&mut [0; 1]), Ok(0)) {
            hung_up += 1;
            if hung_up > 3 {
                break;
            }
        }
        guests.push(guest);
    }
    ensure!(hung_up > 3, "all {} connections are open", guests.len());
    let full = open_files(shim);
    for task in &tasks {
        ensure_eq!(status(task)?, RUNNING, "state with {full} open files");
    }
    drop(guests);
    until("the connections to close", SHORT, || {
        open_files(shim) + 16 < full
    })?;
    // Room for one, and one is made again.
    if let Some(task) = tasks.pop() {
        pod::end(task)?;
    }
    let task = member(&pause)?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    tasks.push(task);
    for task in tasks {
        pod::end(task)?;
    }
    Ok(pause.finish()?)
}

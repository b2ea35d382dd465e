//! Refused calls: answered as the profile says, counted, and told.

use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::operator::{ask, casemate, lines, records};
use casemate_tests::pod::{Pids, Pod, insiders, say};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, procs};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::{LONG, RUNNING, casemate_only, status};
use crate::hostile_node::configure;

crate::trials![
    broker_counts_by_rule_and_class,
    broker_counts_of_init_the_older_way,
    broker_answers_what_the_filter_would,
    broker_hears_what_the_specification_refuses,
    broker_leaves_the_forker_what_the_specification_refuses,
    broker_without_no_new_privs,
    broker_dead_is_a_dead_pod,
    broker_stopped_ends_the_pod_in_time,
    broker_flood_starves_nobody,
    broker_many_sorts_are_bounded,
    broker_answers_fast,
];

/// What is counted of a task's refused calls.
fn denials(task: &Task) -> Result<Vec<Value>, Stop> {
    let told = ask(task.rpc()?, "Denials", &json!({}), SHORT)?;
    Ok(told["denials"].as_array().cloned().unwrap_or_default())
}

/// Waits until a call has been counted so often.
fn counted(task: &Task, syscall: &str, count: u64) -> Result<Value, Stop> {
    let find = || {
        let all = denials(task).ok()?;
        let of = |d: &Value| d["syscall"] == syscall && d["count"] == count;
        all.into_iter().find(of)
    };
    until(&format!("{count} of {syscall}"), LONG, || find().is_some())
        .map_err(|error| Stop::Fail(format!("{error}: {:?}", denials(task))))?;
    find().ok_or_else(|| Stop::Fail(format!("{syscall}: gone")))
}

fn sleeper(name: &str, change: impl FnOnce(&mut Task) -> Outcome) -> Result<Task, Stop> {
    let mut task = Task::new(name, &["/bin/probe", "sleep"])?;
    change(&mut task)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    Ok(task)
}

fn broker_counts_by_rule_and_class() -> Outcome {
    casemate_only()?;
    let script = "/bin/probe refused 3 mount ptrace socket-packet io_uring_setup clone3; \
                  exec /bin/probe sleep";
    let task = Task::running("denied", &["/bin/sh", "-c", script])?;
    counted(&task, "mount", 3)?;
    say(&task, "e", &["/bin/probe", "refused", "2", "mount"])?;
    counted(&task, "mount", 5)?;
    counted(&task, "ptrace", 3)?;
    counted(&task, "io_uring_setup", 3)?;
    let packet = counted(&task, "socket", 3)?;
    let class = packet["class"].as_str().unwrap_or_default();
    ensure!(
        class.contains("family=AF_PACKET type=0x3"),
        "class {class:?}"
    );
    let all = denials(&task)?;
    for denial in &all {
        let rule = denial["rule"].as_str().unwrap_or_default();
        ensure!(rule.starts_with("default/"), "rule of {denial}");
        let reason = denial["reason"].as_str().unwrap_or_default();
        ensure!(reason.len() > 10, "reason of {denial}");
        ensure_eq!(denial["container"], task.id.as_str(), "container");
    }
    // Expected probing is the kernel's to answer, and nobody hears of it.
    ensure!(
        all.iter().all(|d| d["syscall"] != "clone3"),
        "clone3 is told: {all:?}"
    );
    let rules: std::collections::BTreeSet<_> = all.iter().map(|d| d["rule"].to_string()).collect();
    ensure!(rules.len() >= 3, "rules aren't told apart: {rules:?}");

    // Once at once, as an event; the count is in `why`.
    let first = records(&task, "denial")?;
    ensure_eq!(first.len(), all.len(), "records of denials: {first:?}");
    let why = casemate(&["why", &task.id])?.ok()?.out();
    for part in [
        "5x mount",
        "3x socket (family=AF_PACKET",
        "rule   default/",
        "no profile lets it",
    ] {
        ensure!(why.contains(part), "{part:?} is not in {why}");
    }
    let json = lines(&["why", "--json", &task.id])?;
    ensure_eq!(
        json[0]["denials"].as_array().map(Vec::len),
        Some(all.len()),
        "why --json"
    );
    let pods = lines(&["ps", "--json"])?;
    let own = pods[0]
        .as_array()
        .and_then(|all| all.iter().find(|p| p["pod"] == task.id));
    ensure_eq!(
        own.map(|p| p["containers"][0]["denied"].clone()),
        Some(json!(14)),
        "ps"
    );
    Ok(task.finish()?)
}

/// Before Linux 6.17 init has a filter, and so a listener, of its own.
fn broker_counts_of_init_the_older_way() -> Outcome {
    casemate_only()?;
    let script = "/bin/probe refused 3 mount; exec /bin/probe sleep";
    let mut task = Task::new("deniedolder", &["/bin/sh", "-c", script])?;
    configure(&mut task, "[kernel]\nolder_ways = true\n")?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    counted(&task, "mount", 3)?;
    say(&task, "e", &["/bin/probe", "refused", "2", "mount"])?;
    counted(&task, "mount", 5)?;
    Ok(task.finish()?)
}

fn broker_answers_what_the_filter_would() -> Outcome {
    casemate_only()?;
    for profile in ["strict", "default", "compat"] {
        let with = |enabled: bool| -> Result<String, Stop> {
            let text = format!("profile = \"{profile}\"\n[broker]\nenabled = {enabled}\n");
            let task = sleeper("answers", |task| configure(task, &text).map(drop))?;
            let said = say(&task, "calls", &["/bin/probe", "calls"])?;
            ensure!(
                enabled != denials(&task)?.is_empty() || enabled,
                "denials without a broker: {:?}",
                denials(&task)?
            );
            if enabled {
                counted(&task, "mount", 1)?;
            }
            task.finish()?;
            Ok(said)
        };
        let (broker, kernel) = (with(true)?, with(false)?);
        ensure!(broker.lines().count() > 30, "only {broker}");
        ensure_eq!(broker, kernel, "answers under {profile}");
    }
    Ok(())
}

/// Refuses these calls, with EACCES, which no profile answers.
fn refusing(names: &[&str]) -> Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [
        {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
    ]})
}

fn broker_hears_what_the_specification_refuses() -> Outcome {
    casemate_only()?;
    let with = |enabled: bool| -> Result<(Task, String), Stop> {
        let task = sleeper("both", |task| {
            task.spec["linux"]["seccomp"] =
                refusing(&["mount", "mkdir", "mkdirat", "io_uring_setup", "getppid"]);
            configure(task, &format!("[broker]\nenabled = {enabled}\n")).map(drop)
        })?;
        let said = say(&task, "calls", &["/bin/probe", "calls"])?;
        Ok((task, said))
    };
    let (task, with_broker) = with(true)?;
    let (other, kernel) = with(false)?;
    ensure_eq!(with_broker, kernel, "answers with a broker, and without");
    other.finish()?;

    // By both: the profile's rule and the specification's error.
    say(&task, "e", &["/bin/probe", "refused", "4", "mount"])?;
    let mount = counted(&task, "mount", 5)?;
    ensure_eq!(mount["errno"], "EACCES", "errno");
    ensure_eq!(mount["own"], true, "whether the specification refuses it");
    ensure!(
        mount["rule"]
            .as_str()
            .is_some_and(|r| r.starts_with("default/refused/")),
        "rule of {mount}"
    );
    // containerd's default profile, which refuses most of what ours does.
    let own = crate::probes::default_seccomp()?;
    let usual = sleeper("usual", |task| {
        task.spec["linux"]["seccomp"] = own;
        Ok(())
    })?;
    say(
        &usual,
        "e",
        &["/bin/probe", "refused", "4", "mount", "keyctl"],
    )?;
    ensure_eq!(counted(&usual, "mount", 4)?["own"], true, "of mount");
    // ENOSYS by ours alone.
    ensure_eq!(counted(&usual, "keyctl", 4)?["errno"], "EPERM", "of keyctl");
    usual.finish()?;

    // By the profile alone.
    say(&task, "p", &["/bin/probe", "refused", "2", "ptrace"])?;
    ensure_eq!(counted(&task, "ptrace", 3)?["own"], false, "of ptrace");
    // By the specification alone.
    let made = say(&task, "m", &["/bin/sh", "-c", "mkdir /tmp/x 2>&1; echo $?"])?;
    ensure!(
        made.contains("Permission denied") && made.ends_with("1\n"),
        "mkdir: {made:?}"
    );
    let mkdir = counted(&task, "mkdir", 1)?;
    ensure_eq!(mkdir["rule"], "specification", "rule of mkdir");
    ensure_eq!(mkdir["allowed_by"], Value::Null, "what allows mkdir");
    let why = casemate(&["why", &task.id])?.ok()?.out();
    for part in [
        "1x mkdir -> EACCES",
        "5x mount -> EACCES",
        "the pod's own filter refuses it",
    ] {
        ensure!(why.contains(part), "{part:?} is not in {why}");
    }
    Ok(task.finish()?)
}

/// A filter that lets a program run, and not much more: nothing of what makes one.
fn broker_leaves_the_forker_what_the_specification_refuses() -> Outcome {
    casemate_only()?;
    let names = [
        "execve",
        "brk",
        "arch_prctl",
        "mmap",
        "munmap",
        "mprotect",
        "read",
        "write",
        "writev",
        "open",
        "openat",
        "close",
        "fstat",
        "newfstatat",
        "lseek",
        "ioctl",
        "exit",
        "exit_group",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlink",
        "readlinkat",
        "getrandom",
        "getuid",
        "getgid",
        "geteuid",
        "getegid",
        "getgroups",
        "rt_sigaction",
        "rt_sigprocmask",
        "rt_sigreturn",
        "sigaltstack",
        "nanosleep",
        "clock_nanosleep",
        "poll",
        "futex",
        "pause",
        "uname",
        "getpid",
        "getcwd",
        "fcntl",
        "sched_getaffinity",
        "statx",
    ];
    for older in [false, true] {
        let task = sleeper("narrow", |task| {
            task.spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": names.as_slice(), "action": "SCMP_ACT_ALLOW"}],
            });
            configure(task, &format!("[kernel]\nolder_ways = {older}\n")).map(drop)
        })?;
        let said = say(&task, "id", &["/bin/id", "-u"])?;
        ensure_eq!(said, "0\n", "id");
        let mut user = Exec::new(&task, "user", &["/bin/id", "-u"])?;
        user.process["user"] = json!({"uid": 1000, "gid": 1000});
        let (code, said) = user.run()?;
        ensure_eq!((code, said.as_str()), (0, "1000\n"), "another user's id");
        let (code, _) = Exec::new(&task, "mk", &["/bin/mkdir", "/tmp/x"])?.run()?;
        ensure!(code != 0, "mkdir works");
        counted(&task, "mkdir", 1)?;
        task.finish()?;
    }
    Ok(())
}

fn broker_without_no_new_privs() -> Outcome {
    casemate_only()?;
    let task = sleeper("deniedprivs", |task| {
        task.spec["process"]["noNewPrivileges"] = false.into();
        configure(task, "profile = \"compat\"\n").map(drop)
    })?;
    let status = say(&task, "s", &["/bin/cat", "/proc/self/status"])?;
    ensure!(status.contains("NoNewPrivs:\t0"), "no_new_privs is set");
    say(&task, "e", &["/bin/probe", "refused", "4", "mount"])?;
    counted(&task, "mount", 4)?;
    Ok(task.finish()?)
}

fn broker_dead_is_a_dead_pod() -> Outcome {
    casemate_only()?;
    let script = "while :; do /bin/probe refused 1000 mount; done";
    let task = Task::running("brokerdead", &["/bin/sh", "-c", script])?;
    until("denials", LONG, || {
        denials(&task).is_ok_and(|d| !d.is_empty())
    })?;
    procs::signal(insiders(&task)?.0, Signal::KILL);
    let status = task.rpc()?.wait(&task.id, Duration::from_secs(5))?;
    ensure_eq!(status.exit_status, 137, "exit status");
    Ok(task.finish()?)
}

fn broker_stopped_ends_the_pod_in_time() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("brokerstopped")?;
    procs::signal(insiders(&task)?.0, Signal::STOP);
    // While nothing waits for it, nothing happens.
    std::thread::sleep(Duration::from_millis(1500));
    ensure_eq!(status(&task)?, RUNNING, "state");
    let exec = Exec::new(&task, "e", &["/bin/probe", "refused", "1", "mount"])?;
    let begun = Instant::now();
    exec.begin()?;
    let ended = task.rpc()?.wait(&task.id, Duration::from_secs(10))?;
    let took = begun.elapsed();
    ensure_eq!(ended.exit_status, 137, "exit status");
    ensure!(took < Duration::from_secs(4), "it took {took:?}");
    // What waits is answered by the kernel, when the last listener has gone.
    let out = String::from_utf8_lossy(&exec.stdout.so_far()).into_owned();
    ensure!(
        out.is_empty() || out == "mount 38\n",
        "the call was answered: {out:?}"
    );
    let [loss] = &records(&task, "broker_loss")?[..] else {
        return fail(format!("records: {:?}", records(&task, "broker_loss")?));
    };
    ensure!(
        loss["text"]
            .as_str()
            .is_some_and(|t| t.contains("is stopped")),
        "{loss}"
    );
    Ok(task.finish()?)
}

fn broker_flood_starves_nobody() -> Outcome {
    casemate_only()?;
    let pod = Pod::start("flood")?;
    let script =
        "for n in 1 2 3 4; do (while :; do /bin/probe refused 10000 mount; done) & done; wait";
    let loud = pod.run("loud", &["/bin/sh", "-c", script], Pids::Own)?;
    until("a flood", LONG, || {
        denials(&loud).is_ok_and(|d| d.iter().any(|d| d["count"].as_u64() > Some(20_000)))
    })?;
    let agent = insiders(&loud)?.0;
    let memory = || {
        let text = procs::status_field(agent, "VmRSS").unwrap_or_default();
        text.split_whitespace()
            .next()
            .and_then(|n| n.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let before = memory();
    for n in 0..5 {
        let begun = Instant::now();
        let quiet = pod.run(&format!("quiet{n}"), &["/bin/probe", "sleep"], Pids::Own)?;
        let took = begun.elapsed();
        ensure!(took < Duration::from_secs(3), "a launch took {took:?}");
        pod.remove(quiet)?;
    }
    let after = memory();
    ensure!(
        after < before + 512,
        "the agent grew from {before} to {after} KiB"
    );
    // Events are few, whatever the flood.
    let told = records(&loud, "denial")?;
    ensure!(told.len() < 20, "{} records of denials", told.len());
    pod.remove(loud)?;
    Ok(pod.finish()?)
}

fn broker_many_sorts_are_bounded() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("sorts")?;
    say(&task, "e", &["/bin/probe", "refused-sorts", "5000"])?;
    let total = || -> u64 {
        let all = denials(&task).unwrap_or_default();
        all.iter().filter_map(|d| d["count"].as_u64()).sum()
    };
    until("all to be counted", LONG, || total() == 5000)
        .map_err(|error| Stop::Fail(format!("{error}: {}", total())))?;
    let all = denials(&task)?;
    ensure_eq!(all.len(), 65, "sorts");
    Ok(task.finish()?)
}

/// How fast, on the processor that the test has; `make bench` has the figures.
fn broker_answers_fast() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("brokertime")?;
    let said = say(&task, "t", &["/bin/probe", "refused-time", "20000"])?;
    let median: u64 = said
        .split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    // Ten times what it takes on an idle machine; others are at work on this one.
    ensure!(
        median > 100 && median < 100_000,
        "a refused call took {said} ns"
    );
    Ok(task.finish()?)
}

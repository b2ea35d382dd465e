//! The least profiles: that they have all that who makes processes calls, and nothing
//! that could be left out.

use std::fs;

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, spec};
use seccomp_profiles::profile::Profile;
use seccomp_profiles::{Kind, Observed, minimal, table};
use serde_json::json;

use crate::common::casemate_only;
use crate::profiles::{ANNOTATION, as_promised, one, profiles, put, unseen};

crate::trials![
    profiles_least_has_what_forkers_need,
    profiles_least_has_nothing_else,
];

/// What the probe calls that not every program does.
pub const PROBE: &[&str] = &[
    "clock_nanosleep",
    "getrandom",
    "gettid",
    "poll",
    "prlimit64",
    "readlink",
    "rseq",
    "sched_getaffinity",
    "set_robust_list",
    "sigaltstack",
];

/// What busybox calls beside that.
pub const PROGRAMS: &[&str] = &[
    "access",
    "chdir",
    "clone",
    "dup",
    "dup2",
    "faccessat",
    "fcntl",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getpgrp",
    "getpid",
    "getppid",
    "getuid",
    "kill",
    "nanosleep",
    "open",
    "sendfile",
    "setgid",
    "setuid",
    "stat",
    "umask",
    "uname",
    "wait4",
    "writev",
];

/// What these programs call, and all that every profile has.
fn calls(programs: bool) -> Observed {
    let mut seen = Observed::default();
    let busybox: &[&str] = if programs { PROGRAMS } else { &[] };
    let all = PROBE.iter().chain(busybox);
    for number in all.filter_map(|name| table::number(name)) {
        seen.add(number, &[0; 6]);
    }
    let ioctl = table::number("ioctl").unwrap_or(0);
    // TCGETS, TIOCGWINSZ, TCSETS: what a shell does with its terminal.
    for request in [0x5401, 0x5413, 0x5402] {
        seen.add(ioctl, &[0, request, 0, 0, 0, 0]);
    }
    seen
}

/// A container under that profile, and no_new_privs or not.
fn start(least: &Profile, base: &str, older: bool, privileges: bool) -> Result<Task, Stop> {
    let mut task = Task::new("least", &["/bin/probe", "sleep"])?;
    let text = format!("profile = \"{base}\"\n[kernel]\nolder_ways = {older}\n");
    put(&profiles(&mut task, &text)?, least)?;
    spec::annotate(&mut task.spec, ANNOTATION, "least");
    task.spec["process"]["noNewPrivileges"] = (!privileges).into();
    // A filter of its own.
    task.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{
            "names": ["ptrace"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
        }],
    });
    task.boot()?;
    Ok(task)
}

/// Has all kinds of processes made, each of which says what it should, and no call be
/// refused that the profile's own base allows. Without `shell` they are all the least
/// program there is.
fn all_kinds_are_made(task: &Task, shell: bool) -> Outcome {
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let exec = |name: &str, args: &[&str]| -> Result<Exec, Stop> {
        let args = if shell { args } else { &["/bin/probe"] };
        Ok(Exec::new(task, name, args)?)
    };
    let expect = |exec: &Exec, said: &str| -> Outcome {
        let (status, text) = exec.run()?;
        let right = status == 0 && (!shell || text.contains(said));
        ensure!(right, "{}: {status}, {text:?}", exec.exec_id);
        Ok(())
    };
    expect(&exec("plain", &["echo", "x"])?, "x\n")?;
    let mut user = exec("user", &["/bin/sh", "-c", "id -u; umask"])?;
    user.process["user"] = json!({"uid": 1234, "gid": 5678, "additionalGids": [9], "umask": 0o77});
    expect(&user, "1234\n0077\n")?;
    let mut bare = exec("bare", &["/bin/grep", "Cap", "/proc/self/status"])?;
    bare.process["capabilities"] = json!({});
    expect(&bare, "CapEff:\t0000000000000000")?;
    let mut never = exec("never", &["/bin/grep", "NoNewPrivs", "/proc/self/status"])?;
    never.process["noNewPrivileges"] = true.into();
    expect(&never, "NoNewPrivs:\t1")?;
    let mut limited = exec("limited", &["/bin/sh", "-c", "ulimit -n"])?;
    limited.process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 99}]);
    expect(&limited, "99\n")?;
    let mut elsewhere = exec("elsewhere", &["/bin/pwd"])?;
    elsewhere.process["cwd"] = "/proc".into();
    expect(&elsewhere, "/proc\n")?;
    let handles = "trap 'echo took' USR1; kill -USR1 $$; echo end";
    expect(&exec("signal", &["/bin/sh", "-c", handles])?, "took\nend\n")?;
    expect(
        &exec("terminal", &["/bin/tty"])?.with_terminal(24, 80)?,
        "/dev/",
    )?;
    let input = exec("input", &["/bin/cat"])?.with_stdin()?;
    input.begin()?;
    fs::write(input.stdin(), "through\n")?;
    input.close_stdin()?;
    ensure_eq!(input.wait()?, 0, "input");
    let told = unseen(task)?;
    ensure!(told.is_empty(), "refused: {told:?}");
    Ok(())
}

/// The least profiles are as good for who makes processes as for the processes:
/// all kinds of them are made and none of their calls is refused. (What is the forker's
/// alone is in none of them, but for what these programs call themselves.)
fn profiles_least_has_what_forkers_need() -> Outcome {
    casemate_only()?;
    // Without a shell there are only the forker's calls and those of the least program.
    for (base, older, shell) in [
        ("strict", false, true),
        ("default", false, false),
        ("default", true, true),
        ("default", true, false),
        ("compat", false, false),
        ("compat", true, true),
    ] {
        let least = minimal("least", &calls(shell), &one(base)?);
        let task = start(&least, base, older, base == "compat")?;
        all_kinds_are_made(&task, shell).map_err(|stop| match stop {
            Stop::Fail(text) => Stop::Fail(format!(
                "least of {base}, older {older}, shell {shell}: {text}"
            )),
            other => other,
        })?;
        as_promised(&task)?;
        task.finish()?;
    }
    Ok(())
}

/// What these few processes do without, and why it is in every profile all the same.
const NOT_SHOWN: &[(&str, &str)] = &[
    (
        "exit",
        "a thread's end, which may come later than what is learned from",
    ),
    (
        "futex",
        "threads that wait for each other, which may first happen under load",
    ),
    (
        "restart_syscall",
        "the kernel's own, after a stop in the midst of a wait",
    ),
    (
        "arch_prctl(option 0x3001)",
        "how programs with glibc before 2.39 start",
    ),
    (
        "arch_prctl(option 0x5005)",
        "how programs with glibc since 2.39 start",
    ),
];

/// Without any of what all have, some process isn't made, or is refused a call.
fn profiles_least_has_nothing_else() -> Outcome {
    casemate_only()?;
    let all = minimal::base();
    let all: Vec<&Kind> = all.kinds().collect();
    // Several at a time: without some, who waits for an answer waits for seconds.
    let results: Vec<Result<(String, bool), Stop>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|n| {
                let part = all.iter().skip(n).step_by(4);
                let run = part.map(|kind| Ok((kind.to_string(), runs_without(kind)?)));
                scope.spawn(move || run.collect::<Vec<_>>())
            })
            .collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_default());
        joined.flatten().collect()
    });
    let mut wrong = Vec::new();
    ensure_eq!(results.len(), all.len(), "calls");
    for result in results {
        let (kind, runs) = result?;
        let known = NOT_SHOWN.iter().any(|(name, _)| *name == kind);
        if runs != known {
            wrong.push(kind);
        }
    }
    ensure!(wrong.is_empty(), "not as NOT_SHOWN says: {wrong:?}");
    Ok(())
}

/// Whether all is well where what every profile has lacks this.
fn runs_without(without: &Kind) -> Result<bool, Stop> {
    let mut seen = Observed::default();
    let base = minimal::base();
    for kind in base.kinds().chain(calls(true).kinds()) {
        if kind != without {
            seen.add(kind.number, &kind.args);
        }
    }
    let least = minimal::cut_down("least", &seen, &one("compat")?);
    let mut task = start(&least, "compat", false, true)?;
    task.posture = false;
    let made = all_kinds_are_made(&task, true);
    let _gone = task.finish();
    Ok(made.is_ok())
}

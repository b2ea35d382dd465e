//! Learning: what a container calls is written down before it runs, and what it may
//! not call stays refused.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use casemate_posture::Depth;
use casemate_tests::bundle::{NAMESPACE, Task};
use casemate_tests::exec::Exec;
use casemate_tests::operator::{ask, casemate, deviations};
use casemate_tests::pod::{exec, insiders, say};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, procs};
use seccomp_profiles::interp::SeccompData;
use seccomp_profiles::recording::Container;
use seccomp_profiles::{Action, Program, Recording, marked, minimal, reference, shipped, table};
use serde_json::{Value, json};

use crate::common::{LONG, RUNNING, casemate_only, status};
use crate::hostile_node::configure;

crate::trials![
    learn_takes_leave,
    learn_writes_down_what_is_done,
    learn_writes_down_a_real_program,
    learn_the_older_way,
    learn_refuses_the_same,
    learn_refuses_every_refused_number,
    learn_execs_and_terminals,
    learn_with_a_filter_of_the_specification,
    learn_without_no_new_privs,
    learn_is_told_and_as_promised,
    learn_outlives_the_pod,
];

pub const KEY: &str = "casemate.io/profile";

/// A task that is to be learned from, under this configuration.
pub fn learning(name: &str, args: &[&str], config: &str) -> Result<Task, Stop> {
    let mut task = Task::new(name, args)?;
    task.spec["annotations"][KEY] = "learn".into();
    let directory = directory(&task);
    let text = format!(
        "{config}\n[learn]\nallow = true\ndirectory = \"{}\"\n",
        directory.display()
    );
    configure(&mut task, &text)?;
    Ok(task)
}

pub fn directory(task: &Task) -> PathBuf {
    task.side.join("learned")
}

pub fn start(mut task: Task) -> Result<Task, Stop> {
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    Ok(task)
}

pub fn sleeper(name: &str, config: &str) -> Result<Task, Stop> {
    start(learning(name, &["/bin/probe", "sleep"], config)?)
}

/// What is known of a living pod.
pub fn recording(task: &Task) -> Result<Recording, Stop> {
    let told = ask(task.rpc()?, "Recording", &json!({}), SHORT)?;
    Recording::parse(&told["recording"].to_string()).map_err(|e| Stop::Fail(format!("{e}: {told}")))
}

pub fn of(task: &Task) -> Result<Container, Stop> {
    let all = recording(task)?;
    let own = all.container(&task.id);
    own.cloned()
        .ok_or_else(|| Stop::Fail(format!("nothing of {}: {all:?}", task.id)))
}

pub fn kinds(container: &Container) -> BTreeSet<String> {
    container
        .calls()
        .map(|(kind, _)| kind.to_string())
        .collect()
}

/// Host pid of the only learner of a task's pod.
pub fn learner(task: &Task) -> Result<u32, Stop> {
    let agent = insiders(task)?.0;
    let is_learner = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|n| n == "casemate-learn\n")
    };
    let family = procs::family(agent).into_iter().map(|who| who.pid);
    let all: Vec<u32> = family.filter(is_learner).collect();
    match all[..] {
        [pid] => Ok(pid),
        _ => fail(format!("learners of {agent}: {all:?}")),
    }
}

fn set<T: Ord + Clone>(all: &[T]) -> BTreeSet<T> {
    all.iter().cloned().collect()
}

fn learn_takes_leave() -> Outcome {
    casemate_only()?;
    for config in ["", "[annotations]\nallow = [\"profile\"]\n"] {
        let mut task = Task::new("noleave", &["/bin/true"])?;
        task.spec["annotations"][KEY] = "learn".into();
        configure(&mut task, config)?;
        task.boot()?;
        let Err(error) = task.create() else {
            return fail("it was created");
        };
        let text = error.to_string();
        ensure!(text.contains("learn.allow = true"), "{text}");
        ensure!(text.contains(KEY), "{text}");
        let why = casemate(&["why", &task.id])?.ok()?.out();
        ensure!(why.contains("by learn"), "{why}");
        task.rpc()?.shutdown(&task.id)?;
        task.wait_gone(Duration::from_secs(5))?;
    }
    // Nor a directory that others can read.
    let task = learning("openly", &["/bin/true"], "")?;
    fs::create_dir(directory(&task))?;
    fs::set_permissions(directory(&task), fs::Permissions::from_mode(0o755))?;
    let mut task = task;
    task.boot()?;
    let text = task
        .create()
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    ensure!(text.contains("chmod it 700"), "{text:?}");
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(5))?;
    Ok(())
}

/// What the probe does where it does next to nothing, and then by `words`.
pub fn beside(name: &str, words: &str, config: &str) -> Result<(Task, Container), Stop> {
    let task = sleeper(name, config)?;
    say(&task, "idle", &["/bin/probe", "lines", "1", "0"])?;
    let known = || of(&task).map(|seen| kinds(&seen)).unwrap_or_default();
    until("what it did to be known", LONG, || {
        let before = known();
        std::thread::sleep(Duration::from_millis(300));
        !before.is_empty() && before == known()
    })?;
    let before = of(&task)?;
    let mut args = vec!["/bin/probe"];
    args.extend(words.split(' '));
    let said = say(&task, "e", &args)?;
    ensure_eq!(said, "done\n", "what {words} said");
    Ok((task, before))
}

/// Waits until what was told is taken, and looks once more where that is in vain.
pub fn in_time(what: &str, check: impl Fn() -> Outcome) -> Outcome {
    let _in_vain = until(what, SHORT, || check().is_ok());
    check()
}

fn check_deeds(before: &Container, after: &Container) -> Outcome {
    let mut new: BTreeSet<String> = kinds(after).difference(&kinds(before)).cloned().collect();
    // On the way to relative paths.
    new.remove("chdir");
    let wanted = [
        "socket(family 2, type 1, protocol 0)",
        "socket(family 2, type 2, protocol 0)",
        "bind",
        "listen",
        "connect",
        "sendto",
        "sendmsg",
        "unlinkat",
    ];
    let wanted = set(&wanted.map(str::to_owned));
    let often = ["openat", "newfstatat"].map(str::to_owned);
    let beyond: Vec<_> = new
        .difference(&wanted)
        .filter(|k| !often.contains(k))
        .collect();
    ensure!(beyond.is_empty(), "not done: {beyond:?}");
    let missing: Vec<_> = wanted.difference(&new).collect();
    ensure!(missing.is_empty(), "done, and not seen: {missing:?}");
    ensure!(
        often.iter().all(|k| kinds(after).contains(k)),
        "{:?}",
        kinds(after)
    );
    ensure!(
        before.families().is_empty(),
        "families before: {:?}",
        before.families()
    );
    ensure_eq!(after.families(), set(&[2]), "families");
    ensure_eq!(*after.ports_bound(), set(&[7007]), "bound");
    ensure_eq!(
        *after.ports_connected(),
        set(&[7007, 7008, 7009]),
        "connected"
    );
    let new: BTreeSet<String> = after
        .directories()
        .difference(before.directories())
        .cloned()
        .collect();
    ensure_eq!(
        new,
        set(&["/etc", "/mnt", "/opt", "/srv", "/tmp", "/var"].map(str::to_owned)),
        "directories"
    );
    // What the runtime looks at on the way to its execve is nobody's.
    ensure_eq!(after.lost().unread, 0, "unread");
    let count = |name: &str| {
        after
            .calls()
            .find(|(k, _)| k.to_string() == name)
            .map(|(_, n)| n)
    };
    ensure_eq!(count("connect"), Some(1), "connects");
    Ok(())
}

fn learn_writes_down_what_is_done() -> Outcome {
    casemate_only()?;
    for profile in ["strict", "default", "compat"] {
        let config = format!("profile = \"{profile}\"\n");
        let (task, before) = beside("deeds", "deeds 7007", &config)?;
        let done = in_time("the deeds", || check_deeds(&before, &of(&task)?));
        done.map_err(|stop| match stop {
            Stop::Fail(text) => Stop::Fail(format!("{profile}: {text}")),
            other => other,
        })?;
        let after = of(&task)?;
        ensure_eq!(after.base.name, profile, "base");
        let own = seccomp_profiles::shipped_program(profile).unwrap_or_default();
        ensure_eq!(
            after.base.hash,
            seccomp_profiles::Hash::of(own).to_string(),
            "hash of the base"
        );
        // Nothing that every profile has, but for what names files.
        let base = minimal::base();
        let often = ["openat", "newfstatat", "faccessat", "execve"];
        for (kind, _) in after.calls() {
            let name = table::name(kind.number).unwrap_or_default();
            let is_base = base.of(kind.number).any(|known| known == kind);
            ensure!(!is_base || often.contains(&name), "{kind} is written down");
        }
        task.finish()?;
    }
    Ok(())
}

fn learn_the_older_way() -> Outcome {
    casemate_only()?;
    let (task, before) = beside("deedsolder", "deeds 7007", "[kernel]\nolder_ways = true\n")?;
    in_time("the deeds", || check_deeds(&before, &of(&task)?))?;
    Ok(task.finish()?)
}

/// Of busybox: a shell that serves a port, asks another, and reads files.
fn learn_writes_down_a_real_program() -> Outcome {
    casemate_only()?;
    let script = "nc -l -p 7007 </dev/null & n=$!; echo x | nc -w 1 127.0.0.1 7009; \
                  ls /usr >/dev/null; cat /etc/passwd >/dev/null; kill $n; wait $n; echo end; \
                  exec /bin/probe sleep";
    let task = start(learning("busybox", &["/bin/sh", "-c", script], "")?)?;
    until("the script's end", LONG, || {
        String::from_utf8_lossy(&task.stdout.so_far()).contains("end")
    })?;
    let seen = of(&task)?;
    ensure_eq!(*seen.ports_bound(), set(&[7007]), "bound");
    ensure_eq!(*seen.ports_connected(), set(&[7009]), "connected");
    let all = kinds(&seen);
    for kind in ["bind", "listen", "connect", "kill", "execve", "getdents64"] {
        ensure!(all.contains(kind), "{kind} is missing: {all:?}");
    }
    ensure!(
        seen.families().contains(&2),
        "families: {:?}",
        seen.families()
    );
    for directory in ["/usr", "/etc"] {
        ensure!(
            seen.directories().contains(directory),
            "{:?}",
            seen.directories()
        );
    }
    ensure!(seen.directories().len() < 10, "{:?}", seen.directories());
    ensure_eq!(
        seen.lost().calls + seen.lost().ports + seen.lost().directories,
        0,
        "lost"
    );
    // And it would do with what was seen, and with less than what it has.
    let node = shipped("default").ok_or_else(|| Stop::Fail("no profile".into()))?;
    let least = minimal::minimal("busybox", &seen.observed(), &node);
    let denied = seccomp_profiles::check(&least, &seen.observed());
    let denied = denied.map_err(|e| Stop::Fail(e.to_string()))?;
    ensure!(denied.is_empty(), "its own profile would refuse {denied:?}");
    Ok(task.finish()?)
}

fn learn_refuses_the_same() -> Outcome {
    casemate_only()?;
    for profile in ["strict", "default", "compat"] {
        let config = format!("profile = \"{profile}\"\n[broker]\nenabled = false\n");
        let learning = sleeper("refused", &config)?;
        let mut plain = Task::new("refusedplain", &["/bin/probe", "sleep"])?;
        configure(&mut plain, &config)?;
        let plain = start(plain)?;
        let calls = |task: &Task| say(task, "calls", &["/bin/probe", "calls"]);
        let (with, without) = (calls(&learning)?, calls(&plain)?);
        ensure!(with.lines().count() > 30, "only {with}");
        ensure_eq!(with, without, "answers under {profile}");
        learning.finish()?;
        plain.finish()?;
    }
    Ok(())
}

/// All numbers that the profile refuses whatever their arguments are.
fn learn_refuses_every_refused_number() -> Outcome {
    casemate_only()?;
    // They end, double or redirect who makes them, and the probe leaves them out. And
    // uretprobe and uprobe, which no filter is asked about: the kernel ends who makes
    // them by itself.
    const LEFT_OUT: [u32; 9] = [15, 56, 57, 58, 60, 231, 335, 336, 435];
    for name in ["strict", "default", "compat"] {
        let profile = shipped(name).ok_or_else(|| Stop::Fail(format!("no {name}")))?;
        let answer = |nr: u32| match reference::decide(&profile, &SeccompData::x86_64(nr, [0; 6])) {
            Action::Errno(number) => Some((nr, number)),
            _ => None,
        };
        let refused: Vec<(u32, u16)> = (0..=1023)
            .filter(|nr| !LEFT_OUT.contains(nr))
            .filter_map(answer)
            .collect();
        ensure!(refused.len() > 600, "{name}: only {}", refused.len());
        let task = sleeper("numbers", &format!("profile = \"{name}\"\n"))?;
        let numbers: Vec<String> = refused.iter().map(|(nr, _)| nr.to_string()).collect();
        let mut args = vec!["/bin/probe", "refused-numbers"];
        args.extend(numbers.iter().map(String::as_str));
        let said = say(&task, "n", &args)?;
        let wanted: Vec<String> = refused.iter().map(|(n, e)| format!("{n} {e}")).collect();
        let wrong: Vec<_> = said
            .lines()
            .zip(&wanted)
            .filter(|(is, w)| is != w)
            .collect();
        ensure!(wrong.is_empty(), "{name}: {wrong:?}");
        ensure_eq!(said.lines().count(), wanted.len(), "{name}: answers");
        // None of them got as far as to be written down.
        let seen = of(&task)?;
        let refused: BTreeSet<u32> = refused.iter().map(|(nr, _)| *nr).collect();
        let beyond = seen
            .calls()
            .filter(|(kind, _)| refused.contains(&kind.number) && kind.args == [0; 6]);
        let beyond: Vec<String> = beyond.map(|(kind, _)| kind.to_string()).collect();
        ensure!(
            beyond.is_empty(),
            "{name}: refused, and written down: {beyond:?}"
        );
        task.finish()?;
    }
    Ok(())
}

fn learn_execs_and_terminals() -> Outcome {
    casemate_only()?;
    let mut task = learning("tty", &["/bin/probe", "sleep"], "")?;
    task.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let task = start(task)?;
    for n in 0..5 {
        let terminal = Exec::sh(&task, &format!("t{n}"), "stty size; tty; echo $((6 * 7))")?;
        let (code, out) = terminal.with_terminal(33, 77)?.run()?;
        ensure_eq!(code, 0, "exit code, with {out}");
        for part in ["33 77", "/dev/pts/", "42"] {
            ensure!(out.contains(part), "{part:?} is not in {out:?}");
        }
        let (code, _) = Exec::new(&task, &format!("e{n}"), &["/bin/true"])?.run()?;
        ensure_eq!(code, 0, "exit code");
    }
    let (code, out) = Exec::new(&task, "none", &["/bin/nothing"])?
        .run()
        .unwrap_or_else(|error| (127, error.to_string()));
    ensure!(code == 127 && out.contains("/bin/nothing"), "{code}: {out}");
    let seen = of(&task)?;
    ensure!(
        seen.directories().contains("/dev"),
        "{:?}",
        seen.directories()
    );
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}

fn learn_with_a_filter_of_the_specification() -> Outcome {
    casemate_only()?;
    let mut task = learning("ownfilter", &["/bin/probe", "sleep"], "")?;
    // Without a tracer, the second is answered ENOSYS: no question may go before that.
    task.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["listen"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
            {"names": ["sync"], "action": "SCMP_ACT_TRACE", "errnoRet": 1},
        ],
    });
    let task = start(task)?;
    let number = |name: &str| table::number(name).unwrap_or(0).to_string();
    let args = [number("listen"), number("sync"), number("getppid")];
    let mut words = vec!["/bin/probe", "refused-numbers"];
    words.extend(args.iter().map(String::as_str));
    let said = say(&task, "n", &words)?;
    let [listen, sync, getppid] = &args;
    ensure_eq!(
        said,
        format!("{listen} 13\n{sync} 38\n{getppid} 0\n"),
        "answers"
    );
    let all = kinds(&of(&task)?);
    ensure!(!all.contains("listen") && !all.contains("sync"), "{all:?}");
    ensure!(all.contains("getppid"), "{all:?}");
    Ok(task.finish()?)
}

fn learn_without_no_new_privs() -> Outcome {
    casemate_only()?;
    let mut task = learning(
        "learnprivs",
        &["/bin/probe", "sleep"],
        "profile = \"compat\"\n",
    )?;
    task.spec["process"]["noNewPrivileges"] = false.into();
    let task = start(task)?;
    let text = say(&task, "s", &["/bin/cat", "/proc/self/status"])?;
    ensure!(text.contains("NoNewPrivs:\t0"), "no_new_privs is set");
    ensure!(
        kinds(&of(&task)?).contains("execve"),
        "nothing is written down"
    );
    Ok(task.finish()?)
}

fn learn_is_told_and_as_promised() -> Outcome {
    casemate_only()?;
    let task = sleeper("told", "")?;
    let (_, _out) = exec(&task, "more", &["/bin/probe", "sleep"])?;
    let why = casemate(&["why", &task.id])?.ok()?.out();
    ensure!(why.contains("is learning"), "{why}");
    let found = deviations(&task, Depth::Whole)?;
    ensure!(found.is_empty(), "not as promised: {found:?}");
    let promise = ask(task.rpc()?, "Promise", &json!({}), SHORT)?;
    ensure_eq!(promise["learners"][0]["pid"], learner(&task)?, "learner");
    let hashes = &promise["containers"][0]["filters"];
    ensure_eq!(
        hashes.as_array().map(Vec::len),
        Some(3),
        "filters: {hashes}"
    );
    // With what the forker calls by its mark.
    let learn = seccomp_profiles::shipped_program("learn").and_then(Program::from_bytes);
    let learn = learn.and_then(|program| marked::open(&program).ok().flatten());
    let learn = learn.map(|program| program.to_bytes()).unwrap_or_default();
    ensure_eq!(
        hashes[1],
        seccomp_profiles::Hash::of(&learn).to_string().as_str(),
        "the filter that asks"
    );
    // Nobody in the container has a pid for it.
    let pids = say(&task, "ps", &["/bin/ps"])?;
    ensure!(!pids.contains("learner"), "{pids}");
    Ok(task.finish()?)
}

pub fn file(task: &Task) -> PathBuf {
    directory(task).join(format!("{NAMESPACE}_{}.json", task.id))
}

fn learn_outlives_the_pod() -> Outcome {
    casemate_only()?;
    let task = sleeper("outlives", "")?;
    say(&task, "e", &["/bin/probe", "deeds", "7007"])?;
    let rpc = task.rpc()?;
    let living = kinds(&of(&task)?);
    // Its last word, and then at once its end.
    let mut last = task.spec["process"].clone();
    last["args"] = json!([
        "/bin/probe",
        "refused-numbers",
        table::number("sync").unwrap_or(0).to_string()
    ]);
    let (id, path) = (task.id.clone(), file(&task));
    rpc.exec((&id, "last"), &last, "", "")?;
    rpc.start_exec((&id, "last"))?;
    rpc.wait_exec((&id, "last"))?;
    rpc.kill(&id, 9, true)?;
    rpc.wait(&id, SHORT)?;
    rpc.delete(&id)?;
    rpc.shutdown(&id)?;
    task.wait_gone(Duration::from_secs(5))?;
    let kept = Recording::read(&path).map_err(|e| Stop::Fail(e.to_string()))?;
    let own = kept
        .container(&id)
        .ok_or_else(|| Stop::Fail(format!("{kept:?}")))?;
    ensure!(kinds(own).is_superset(&living), "{:?}", kinds(own));
    ensure!(kinds(own).contains("sync"), "{:?}", kinds(own));
    ensure_eq!(*own.ports_bound(), set(&[7007]), "bound");
    let mode = |path: &PathBuf| -> Result<u32, Stop> {
        Ok(fs::metadata(path)?.permissions().mode() & 0o777)
    };
    ensure_eq!(mode(&path)?, 0o600, "mode of the recording");
    ensure_eq!(mode(&directory(&task))?, 0o700, "mode of the directory");
    let all: Vec<_> = fs::read_dir(directory(&task))?
        .flatten()
        .map(|e| e.file_name())
        .collect();
    ensure_eq!(all.len(), 1, "files: {all:?}");
    let value: Value =
        serde_json::from_slice(&fs::read(&path)?).map_err(|e| Stop::Fail(e.to_string()))?;
    ensure_eq!(value["version"], 2, "version");
    Ok(task.expect_clean(Duration::from_secs(5))?)
}

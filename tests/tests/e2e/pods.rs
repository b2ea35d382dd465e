//! 114–118: what containers of a pod share, and what they don't.

use std::fs;
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::pod::{Pids, Pod, exec, init, inner_pid, insiders, namespace, population, say};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, procs};
use rustix::process::Signal;
use serde_json::json;
use ttrpc::Code;

use crate::common::{casemate_only, expect_code, expect_text};
use crate::hostile_node::configure;
use crate::locks::{ALL, on_host};

crate::trials![
    c114_pod_shares_net_ipc_uts,
    c115_shared_pid_namespace,
    c116_target_container,
    c116_pid_namespaces_of_others_are_refused,
    c117_network_namespace_by_path,
    c118_host_namespaces,
    pod_siblings_signal_but_do_not_trace,
    pod_pause_is_out_of_reach,
    pod_shares_pids_the_older_way,
];

const SLEEP: [&str; 2] = ["/bin/probe", "sleep"];

fn c114_pod_shares_net_ipc_uts() -> Outcome {
    let pod = Pod::start("c114")?;
    let a = pod.run("c114a", &SLEEP, Pids::Own)?;
    let b = pod.run("c114b", &SLEEP, Pids::Own)?;
    let (first, second) = (init(&a)?, init(&b)?);
    for kind in ["net", "ipc", "uts"] {
        let pods = namespace(pod.pid, kind)?;
        ensure_eq!(namespace(first, kind)?, pods, "{kind} of the first");
        ensure_eq!(namespace(second, kind)?, pods, "{kind} of the second");
        ensure!(
            pods != namespace(std::process::id(), kind)?,
            "{kind} is the host's"
        );
    }
    for kind in ["mnt", "pid"] {
        let all = [pod.pid, first, second].map(|pid| namespace(pid, kind).unwrap_or(0));
        ensure!(
            all[0] != all[1] && all[1] != all[2] && all[0] != all[2] && !all.contains(&0),
            "{kind} namespaces: {all:?}"
        );
    }
    let agent = insiders(&a)?.0;
    ensure!(agent != pod.pid, "the agent's pid was given away");
    pod.remove(a)?;
    pod.remove(b)?;
    Ok(pod.finish()?)
}

/// `pid name parent` of each process that the container sees.
fn seen(task: &Task, exec_id: &str) -> Result<Vec<(u32, String, u32)>, Stop> {
    let script = "for d in /proc/[0-9]*; do echo ${d#/proc/} \
                  $(sed -n -e 's/^Name:.//p' -e 's/^PPid:.//p' $d/status); done";
    let text = say(task, exec_id, &["/bin/sh", "-c", script])?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let pid = words.next()?.parse().ok()?;
            Some((pid, words.next()?.to_owned(), words.next()?.parse().ok()?))
        })
        .collect())
}

fn c115_shared_pid_namespace() -> Outcome {
    let pod = Pod::start("c115")?;
    shares_pids(&pod)?;
    Ok(pod.finish()?)
}

/// Everything that shareProcessNamespace promises, in a pod with nothing in it.
fn shares_pids(pod: &Pod) -> Outcome {
    let a = pod.run("share-a", &SLEEP, Pids::Pod)?;
    let b = pod.run("share-b", &SLEEP, Pids::Pod)?;
    let alone = pod.run("share-c", &SLEEP, Pids::Own)?;
    let (first, second) = (init(&a)?, init(&b)?);
    let shared = namespace(pod.pid, "pid")?;
    ensure_eq!(
        namespace(first, "pid")?,
        shared,
        "pid namespace of the first"
    );
    ensure_eq!(
        namespace(second, "pid")?,
        shared,
        "pid namespace of the second"
    );
    ensure!(
        namespace(init(&alone)?, "pid")? != shared,
        "a container that asked for its own shares"
    );
    // The pause and they, and nobody else: no agent, no forker.
    let mut inside = population(shared);
    inside.sort_unstable();
    let mut wanted = vec![pod.pid, first, second];
    wanted.sort_unstable();
    ensure_eq!(inside, wanted, "processes in the shared pid namespace");
    let inner = |pid: u32| inner_pid(pid).unwrap_or(0);
    ensure_eq!(inner(pod.pid), 1, "the pause, inside");

    // Each sees the other, by the same number, in its own /proc.
    let list = seen(&a, "list")?;
    for (what, pid) in [("itself", first), ("its sibling", second)] {
        ensure!(
            list.iter()
                .any(|(n, name, _)| *n == inner(pid) && name == "probe"),
            "the first does not see {what} as {}: {list:?}",
            inner(pid)
        );
    }
    ensure!(
        list.iter().any(|(n, _, parent)| (*n, *parent) == (1, 0)),
        "no pid 1: {list:?}"
    );
    ensure!(
        !list.iter().any(|(_, name, _)| name.contains("agent")),
        "the agent or a forker is seen: {list:?}"
    );

    // An orphan goes to the pause, and when it ends nothing is left of it.
    let number = say(
        &a,
        "orphan",
        &["/bin/sh", "-c", "sleep 1000 > /dev/null & echo $!"],
    )?;
    let number: u32 = number.trim().parse().unwrap_or(0);
    let list = seen(&b, "list")?;
    ensure!(
        list.iter()
            .any(|(n, name, parent)| (*n, name.as_str(), *parent) == (number, "sleep", 1)),
        "{number} is no orphan of the pause's: {list:?}"
    );
    say(&b, "kill", &["/bin/kill", &number.to_string()])?;
    // A zombie whose parent never looks, orphaned.
    let script = "(exit 7) & exec sleep 0.3";
    say(&a, "zombie", &["/bin/sh", "-c", script])?;
    until("orphans to be reaped", Duration::from_secs(5), || {
        population(shared).len() == 3
    })?;
    let zombies = procs::all()
        .into_iter()
        .filter(|pid| procs::status_field(*pid, "PPid") == Some(pod.pid.to_string()))
        .count();
    ensure_eq!(zombies, 0, "children that the pause has not reaped");

    // The end of one is nothing to the other.
    pod.remove(a)?;
    ensure!(procs::identity(second).is_some(), "the sibling died too");
    ensure_eq!(say(&b, "still", &["/bin/echo", "here"])?, "here\n", "exec");
    pod.remove(b)?;
    pod.remove(alone)?;
    ensure!(procs::identity(pod.pid).is_some(), "the pause died too");
    Ok(())
}

fn pod_shares_pids_the_older_way() -> Outcome {
    casemate_only()?;
    let mut configured = Ok(());
    let pod = Pod::with("older", |pause| {
        configured = configure(pause, "[kernel]\nolder_ways = true\n").map(drop);
    })?;
    configured?;
    shares_pids(&pod)?;
    // What joins another container's has its proc by the same way.
    let target = pod.run("older-t", &SLEEP, Pids::Own)?;
    let joined = pod.run("older-j", &SLEEP, Pids::Of(&target))?;
    let list = seen(&joined, "list")?;
    ensure!(
        list.iter().any(|(n, name, _)| *n == 1 && name == "probe"),
        "the target is not pid 1: {list:?}"
    );
    pod.remove(joined)?;
    pod.remove(target)?;
    Ok(pod.finish()?)
}

fn c116_target_container() -> Outcome {
    let pod = Pod::start("c116")?;
    let target = pod.run("c116t", &SLEEP, Pids::Own)?;
    let debug = pod.run("c116d", &SLEEP, Pids::Of(&target))?;
    let (first, second) = (init(&target)?, init(&debug)?);
    ensure_eq!(
        namespace(second, "pid")?,
        namespace(first, "pid")?,
        "pid namespace of the debugger"
    );
    let list = seen(&debug, "list")?;
    ensure!(
        list.iter().any(|(n, name, _)| *n == 1 && name == "probe"),
        "the target is not pid 1: {list:?}"
    );
    // Each is listed with its own processes only.
    for (task, own) in [(&target, first), (&debug, second)] {
        let pids: Vec<u32> = task
            .rpc()?
            .pids(&task.id)?
            .processes
            .iter()
            .map(|p| p.pid)
            .collect();
        ensure_eq!(pids, [own], "Pids of {}", task.id);
    }
    // One that joins the debugger joins the target's.
    let more = pod.run("c116m", &SLEEP, Pids::Of(&debug))?;
    ensure_eq!(
        namespace(init(&more)?, "pid")?,
        namespace(first, "pid")?,
        "pid namespace of the second debugger"
    );
    // A debugger that goes leaves the target alone.
    pod.remove(more)?;
    ensure!(procs::identity(first).is_some(), "the target died too");

    // The end of the target's init is the end of all in its pid namespace.
    let (late, _out) = exec(&debug, "late", &SLEEP)?;
    target.rpc()?.kill(&target.id, 9, false)?;
    for task in [&target, &debug] {
        let ended = task.rpc()?.wait(&task.id, Duration::from_secs(5))?;
        ensure_eq!(ended.exit_status, 137, "exit status of {}", task.id);
    }
    ensure!(procs::identity(late).is_none(), "an exec lives on");
    // With "list" and the second debugger before these three.
    let exits = pod.wait_for_exits(5)?;
    let place = |id: &str| exits.iter().position(|(_, process, _)| process == id);
    ensure!(
        place("late").is_some() && place("late") < place(&debug.id),
        "order of exits: {exits:?}"
    );
    // Nobody can join what has ended.
    let gone = pod.member("c116g", &SLEEP, Pids::Of(&target));
    pod.remove(debug)?;
    pod.remove(target)?;
    let mut gone = gone?;
    gone.boot()?;
    expect_text("Create", gone.create(), "where there is none (any more)")?;
    gone.forget();
    Ok(pod.finish()?)
}

fn c116_pid_namespaces_of_others_are_refused() -> Outcome {
    casemate_only()?;
    let other = Task::sleeping("c116o")?;
    let pod = Pod::start("c116r")?;
    let own = pod.run("c116s", &SLEEP, Pids::Own)?;
    let agent = insiders(&own)?.0;
    let stranger = init(&other)?;
    for (who, path) in [
        ("the host's", format!("/proc/{}/ns/pid", std::process::id())),
        ("another pod's", format!("/proc/{stranger}/ns/pid")),
        ("the agent's", format!("/proc/{agent}/ns/pid")),
        ("no pid namespace", format!("/proc/{}/ns/net", pod.pid)),
    ] {
        let mut task = pod.member("c116x", &SLEEP, Pids::Own)?;
        if let Some(list) = task.spec["linux"]["namespaces"].as_array_mut() {
            list.retain(|ns| ns["type"] != "pid");
            list.push(json!({"type": "pid", "path": path}));
        }
        task.boot()?;
        let created = task.create();
        expect_text(who, created, &format!("{path}, which is neither the pod's"))?;
        expect_code("State", task.rpc()?.state(&task.id), Code::NOT_FOUND)?;
        task.forget();
    }
    pod.remove(own)?;
    pod.finish()?;
    Ok(other.finish()?)
}

fn c117_network_namespace_by_path() -> Outcome {
    // A network namespace like the CNI's, made by the host, alive while this
    // thread is.
    let (send, receive) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let made = casemate_sys::namespace::unshare(casemate_sys::namespace::kind::NET);
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let _ = send.send(made.map(|()| tid));
        let _ = ended.recv();
    });
    let outcome = (|| -> Outcome {
        let tid = receive.recv()??;
        let path = format!("/proc/{}/task/{tid}/ns/net", std::process::id());
        let cni = namespace(u32::try_from(tid)?, "net")?;
        let pod = Pod::with("c117", |pause| {
            if let Some(list) = pause.spec["linux"]["namespaces"].as_array_mut() {
                list.retain(|ns| ns["type"] != "network");
                list.push(json!({"type": "network", "path": path}));
            }
        })?;
        ensure_eq!(namespace(pod.pid, "net")?, cni, "network of the pause");
        let a = pod.run("c117a", &SLEEP, Pids::Pod)?;
        ensure_eq!(namespace(init(&a)?, "net")?, cni, "network of a container");
        ensure!(
            cni != namespace(std::process::id(), "net")?,
            "control: the host's"
        );
        pod.remove(a)?;
        Ok(pod.finish()?)
    })();
    drop(end);
    let _ = thread.join();
    outcome
}

fn c118_host_namespaces() -> Outcome {
    casemate_only()?;
    let without = |task: &mut Task, kinds: &[&str]| {
        if let Some(list) = task.spec["linux"]["namespaces"].as_array_mut() {
            list.retain(|ns| !kinds.iter().any(|kind| ns["type"] == *kind));
        }
    };
    let allow = "[sandbox]\nallow_host_network = true\n";
    // hostNetwork, as CRI writes it: neither network nor uts for the pause,
    // the pause's for the others.
    let mut configured = Ok(());
    let pod = Pod::with("c118", |pause| {
        configured = configure(pause, allow).map(drop);
        without(pause, &["network", "uts"]);
        pause.spec["hostname"] = json!("the-node");
    })?;
    configured?;
    let host = std::process::id();
    let a = pod.run("c118a", &SLEEP, Pids::Own)?;
    let pid = init(&a)?;
    for (who, pid) in [("the pause", pod.pid), ("a container", pid)] {
        ensure_eq!(
            namespace(pid, "net")?,
            namespace(host, "net")?,
            "network of {who}"
        );
        for kind in ["pid", "ipc", "uts", "user", "mnt"] {
            ensure!(
                namespace(pid, kind)? != namespace(host, kind)?,
                "{kind} of {who} is the host's"
            );
        }
    }
    // The name is given rather than the host's uts namespace.
    ensure_eq!(say(&a, "name", &["/bin/hostname"])?, "the-node\n", "name");
    pod.remove(a)?;
    pod.finish()?;

    // hostPID and hostIPC are refused, and no key changes that.
    for (kind, setting) in [("pid", "hostPID"), ("ipc", "hostIPC")] {
        let mut task = Task::new("c118h", &SLEEP)?;
        without(&mut task, &[kind]);
        task.boot()?;
        expect_text(setting, task.create(), setting)?;
        task.rpc()?.shutdown(&task.id)?;
        let key = format!("allow_host_{kind}");
        let mut task = Task::new("c118k", &SLEEP)?;
        configure(&mut task, &format!("[sandbox]\n{key} = true\n"))?;
        without(&mut task, &[kind]);
        task.boot()?;
        expect_text(&key, task.create(), &format!("sandbox.{key}"))?;
        task.rpc()?.shutdown(&task.id)?;
    }
    Ok(())
}

fn pod_siblings_signal_but_do_not_trace() -> Outcome {
    casemate_only()?;
    let pod = Pod::start("siblings")?;
    let script = "trap 'echo got' USR1; echo ready; while :; do sleep 0.05; done";
    let a = pod.run("sib-a", &["/bin/sh", "-c", script], Pids::Pod)?;
    let b = pod.run("sib-b", &SLEEP, Pids::Pod)?;
    let said = |what: &'static str| {
        let out = a.stdout.clone();
        until(what, SHORT, move || {
            String::from_utf8_lossy(&out.so_far()).contains(what)
        })
    };
    said("ready")?;
    let number = inner_pid(init(&a)?).unwrap_or(0).to_string();
    say(&b, "usr1", &["/bin/kill", "-USR1", &number])?;
    said("got")?;
    // By the rules of any system: an ordinary user can't signal root.
    let mut process = b.spec["process"].clone();
    process["user"] = json!({"uid": 1000, "gid": 1000});
    process["args"] = json!(["/bin/kill", "-USR1", number]);
    let exec = (b.id.as_str(), "user");
    b.rpc()?.exec(exec, &process, "", "")?;
    b.rpc()?.start_exec(exec)?;
    let refused = b.rpc()?.wait_exec(exec)?.exit_status;
    ensure!(refused != 0, "a user's signal reached root's process");
    // Landlock keeps each container's domain apart.
    let text = say(&b, "trace", &["/bin/probe", "processes", &number])?;
    let answers: Vec<&str> = text.lines().collect();
    ensure!(
        answers.contains(&format!("signal {number} ok").as_str()),
        "{text}"
    );
    for what in ["mem", "environ", "maps", "root", "exe", "cwd", "ns/mnt"] {
        let refused = ["EACCES", "EPERM"]
            .iter()
            .any(|e| answers.contains(&format!("{what} {number} {e}").as_str()));
        ensure!(refused, "{what} of a sibling: {text}");
    }
    // Control: its own.
    let own = inner_pid(init(&b)?).unwrap_or(0).to_string();
    let text = say(&b, "own", &["/bin/probe", "processes", &own])?;
    ensure!(text.contains(&format!("root {own} ok")), "control: {text}");
    pod.remove(a)?;
    pod.remove(b)?;
    Ok(pod.finish()?)
}

fn pod_pause_is_out_of_reach() -> Outcome {
    casemate_only()?;
    let mut pod = Pod::start("reach")?;
    let mut a = pod.run("reach-a", &SLEEP, Pids::Pod)?;
    let pid = init(&a)?;
    let get = |name: &str| procs::status_field(pod.pid, name).unwrap_or_default();
    for (name, wanted) in [
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Threads", "1"),
    ] {
        ensure_eq!(get(name), wanted, "{name} of the pause");
    }
    ensure_eq!(
        namespace(pod.pid, "user")?,
        namespace(pid, "user")?,
        "user namespace of pause and container"
    );
    // It keeps no descriptor, and no mount that says anything.
    let open: Vec<_> = fs::read_dir(format!("/proc/{}/fd", pod.pid))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    ensure!(open.is_empty(), "descriptors of the pause: {open:?}");
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", pod.pid))?;
    ensure_eq!(mounts.lines().count(), 1, "mounts of the pause: {mounts}");
    ensure!(mounts.contains(" / / ro,"), "its root: {mounts}");

    // Root of the container with all capabilities, without filter or Landlock:
    // nothing of it can be seen or changed, and no signal ends it.
    let target = pid.to_string();
    let text = on_host(&["enter", ALL, &target, "processes", "1"])?;
    for what in [
        "mem", "environ", "maps", "root", "exe", "cwd", "ns/mnt", "fd",
    ] {
        let refused = ["EACCES", "EPERM"]
            .iter()
            .any(|e| text.lines().any(|line| line == format!("{what} 1 {e}")));
        ensure!(refused, "{what} of the pause: {text}");
    }
    let before = procs::identity(pod.pid);
    for signal in ["KILL", "STOP", "TERM", "SEGV", "USR1"] {
        say(&a, signal, &["/bin/kill", &format!("-{signal}"), "1"])?;
    }
    ensure_eq!(procs::identity(pod.pid), before, "the pause after signals");
    let state = get("State");
    ensure!(state.starts_with('S'), "the pause is {state}");
    // Agent and forker have no number in there.
    let (agent, forker) = insiders(&a)?;
    for insider in [agent, forker] {
        let depth = procs::status_field(insider, "NSpid").unwrap_or_default();
        ensure_eq!(
            depth.split_whitespace().count(),
            2,
            "pid namespaces of {insider}"
        );
    }
    let text = on_host(&["enter", ALL, &target, "reach", "4096"])?;
    let reached: Vec<&str> = text
        .lines()
        .find_map(|l| l.strip_prefix("reached "))
        .unwrap_or_default()
        .split(' ')
        .collect();
    ensure_eq!(reached.len(), 3, "who answers inside: {text}");
    // Killed from outside it takes those who share with it along, and then ends
    // itself, as far as containerd sees.
    let mut own = pod.run("reach-b", &SLEEP, Pids::Own)?;
    // The end of the pod, which nothing is then promised of.
    (pod.pause.posture, a.posture, own.posture) = (false, false, false);
    procs::signal(pod.pid, Signal::KILL);
    for task in [&a, &pod.pause] {
        let ended = task.rpc()?.wait(&task.id, Duration::from_secs(5))?;
        ensure_eq!(ended.exit_status, 137, "exit status of {}", task.id);
    }
    // Those of the execs before, and these two.
    let exits = pod.wait_for_exits(5 + 2)?;
    let ids: Vec<&str> = exits
        .iter()
        .filter(|(container, process, _)| container == process)
        .map(|(container, ..)| container.as_str())
        .collect();
    ensure_eq!(ids, [&*a.id, &*pod.pause.id], "order of exits");
    ensure!(
        procs::identity(init(&own)?).is_some(),
        "a container with pids of its own died too"
    );
    let mut late = pod.member("reach-c", &SLEEP, Pids::Own)?;
    late.spec["linux"]["namespaces"] = a.spec["linux"]["namespaces"].clone();
    late.boot()?;
    expect_text("Create", late.create(), "namespace")?;
    late.forget();
    pod.remove(own)?;
    pod.remove(a)?;
    Ok(pod.finish()?)
}

//! The locks of a whole pod: apart from other pods, the same for every process
//! in it, and gone with its agent.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::pod::{init, insiders};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::stdio::{Reader, make_fifo};
use casemate_tests::{ensure, ensure_eq, procs};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::casemate_only;
use crate::exec_joins::facts;
use crate::locks::{ALL, all_refused, on_host, sleeper};

crate::trials![
    locks_pods_are_apart,
    locks_own_device_nodes,
    locks_exec_is_held_as_init,
    locks_shim_and_agent_are_locked_down,
    locks_session_keyring_is_its_own,
    locks_death_of_the_agent_takes_all,
];

fn locks_pods_are_apart() -> Outcome {
    casemate_only()?;
    let one = sleeper("lockone")?;
    let two = sleeper("locktwo")?;
    let (first, second) = (init(&one)?, init(&two)?);
    let host = |pid: u32| {
        procs::status_field(pid, "Uid")
            .and_then(|t| t.split_whitespace().next().map(str::to_owned))
            .and_then(|t| t.parse::<u64>().ok())
            .unwrap_or(0)
    };
    ensure!(
        host(first).abs_diff(host(second)) >= 65537,
        "{} and {} share ids",
        host(first),
        host(second)
    );
    ensure!(
        host(first) > 65536 && host(second) > 65536,
        "ids of the host's own"
    );
    // Root of one pod, all its capabilities, in the host's pid namespace.
    let target = second.to_string();
    let text = on_host(&["enter", "user", &first.to_string(), "processes", &target])?;
    all_refused("a process of the other pod", &text, 9, &["EPERM", "EACCES"])?;
    let (agent, forker) = insiders(&two)?;
    for target in [agent, forker] {
        let text = on_host(&[
            "enter",
            "user",
            &first.to_string(),
            "processes",
            &target.to_string(),
        ])?;
        all_refused(
            "agent and forker of the other pod",
            &text,
            9,
            &["EPERM", "EACCES"],
        )?;
    }
    for kind in ["mnt", "pid", "net", "ipc", "uts", "user", "cgroup"] {
        let link = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        ensure!(
            link(first)? != link(second)?,
            "both pods are in one {kind} namespace"
        );
        ensure!(
            link(first)? != link(std::process::id())?,
            "the pod is in the host's {kind} namespace"
        );
    }
    one.finish()?;
    Ok(two.finish()?)
}

fn locks_own_device_nodes() -> Outcome {
    casemate_only()?;
    let before: Vec<_> = ["null", "zero", "full", "random", "urandom", "tty"]
        .iter()
        .map(|name| {
            fs::metadata(format!("/dev/{name}"))
                .map(|m| (*name, m.permissions().mode(), m.uid(), m.gid()))
        })
        .collect::<Result<_, _>>()?;
    let task = sleeper("locknodes")?;
    let pid = init(&task)?.to_string();
    for (name, ..) in &before {
        let path = format!("/dev/{name}");
        on_host(&["enter", ALL, &pid, "chmod", "000", &path])?;
    }
    let mode = fs::metadata(format!("/proc/{pid}/root/dev/null"))?
        .permissions()
        .mode();
    ensure_eq!(mode & 0o777, 0, "control: mode of the container's own node");
    for (name, mode, uid, gid) in before {
        let now = fs::metadata(format!("/dev/{name}"))?;
        ensure_eq!(
            (now.permissions().mode(), now.uid(), now.gid()),
            (mode, uid, gid),
            "the host's /dev/{name}"
        );
    }
    Ok(task.finish()?)
}

/// Runs `args` in the container as containerd does; the host pid.
fn exec(task: &Task, exec_id: &str, args: &[&str]) -> Result<(u32, Reader), Stop> {
    let out = task.side.join(format!("{exec_id}.out"));
    make_fifo(&out)?;
    let reader = Reader::start(&out);
    let mut process: Value = task.spec["process"].clone();
    process["args"] = json!(args);
    // More than init has: must not be given. (More capabilities are refused.)
    process["noNewPrivileges"] = json!(false);
    let exec = (task.id.as_str(), exec_id);
    task.rpc()?
        .exec(exec, &process, &out.display().to_string(), "")?;
    let started = task.rpc()?.start_exec(exec)?;
    Ok((started.pid, reader))
}

fn locks_exec_is_held_as_init() -> Outcome {
    casemate_only()?;
    let task = sleeper("lockexec")?;
    let init = init(&task)?;
    let (exec, _out) = exec(&task, "more", &["/bin/probe", "sleep"])?;
    ensure!(procs::identity(exec).is_some(), "no exec'ed process {exec}");
    // What a program does with its signals when it begins is not how it is held.
    for pid in [init, exec] {
        until("the program to have begun", SHORT, || {
            procs::status_field(pid, "SigCgt").is_some_and(|set| set.contains(|c| c != '0'))
        })?;
    }
    let (theirs, inits) = (facts(exec)?, facts(init)?);
    for (what, value) in &inits {
        ensure_eq!(
            theirs.get(what),
            Some(value),
            "{what} of the exec'ed process"
        );
    }
    // execve(2) closes the others one by one.
    let descriptors = || fs::read_dir(format!("/proc/{exec}/fd")).map_or(0, |all| all.count());
    let _late = until("three descriptors", SHORT, || descriptors() == 3);
    ensure_eq!(descriptors(), 3, "descriptors of the exec'ed process");
    Ok(task.finish()?)
}

fn locks_shim_and_agent_are_locked_down() -> Outcome {
    casemate_only()?;
    let task = sleeper("lockself")?;
    let (agent, forker) = insiders(&task)?;
    let shim = task.shim_pid()?;
    let get = |pid: u32, name: &str| procs::status_field(pid, name).unwrap_or_default();
    let bits = |pid: u32, name: &str| u64::from_str_radix(&get(pid, name), 16).unwrap_or(u64::MAX);
    // SYS_MODULE 16, SYS_RAWIO 17, SYS_BOOT 22, SYS_TIME 25, NET_ADMIN 12,
    // NET_RAW 13, SYSLOG 34, PERFMON 38, BPF 39, CHECKPOINT_RESTORE 40.
    let never = [12, 13, 16, 17, 22, 25, 34, 38, 39, 40]
        .iter()
        .fold(0u64, |m, c| m | 1 << c);
    // Kernels before 6.6 want NET_ADMIN for device programs, so with cgroup v2.
    let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let old = casemate_tests::procs::kernel() < (6, 6);
    let granted = if v2 && old { 1u64 << 12 } else { 0 };
    for set in ["CapBnd", "CapEff", "CapPrm"] {
        ensure_eq!(bits(shim, set) & never & !granted, 0, "{set} of the shim");
        ensure_eq!(
            bits(agent, set) & (never | 1 << 19),
            0,
            "{set} of the agent"
        );
    }
    ensure!(
        (bits(shim, "CapBnd") & !granted).count_ones() <= 15,
        "CapBnd of the shim: {}",
        get(shim, "CapBnd")
    );
    ensure!(
        bits(agent, "CapBnd").count_ones() <= 11,
        "CapBnd of the agent: {}",
        get(agent, "CapBnd")
    );
    for (who, pid) in [("shim", shim), ("agent", agent), ("forker", forker)] {
        ensure_eq!(get(pid, "Seccomp"), "2", "Seccomp of the {who}");
        ensure_eq!(
            get(pid, "CapInh") == "0000000000000000" || who == "forker",
            true,
            "CapInh of the {who}"
        );
        ensure_eq!(
            get(pid, "CapAmb"),
            "0000000000000000",
            "CapAmb of the {who}"
        );
        // Files in /proc of what can't be dumped belong to root of the user
        // namespace it was executed in.
        ensure_eq!(get(pid, "Threads"), "1", "threads of the {who}");
    }
    ensure_eq!(get(shim, "NoNewPrivs"), "1", "NoNewPrivs of the shim");
    ensure_eq!(get(forker, "NoNewPrivs"), "1", "NoNewPrivs of the forker");
    ensure_eq!(
        bits(forker, "CapEff") & (never | 1 << 21 | 1 << 19),
        0,
        "CapEff of the forker"
    );
    // Nothing of the host is open in the agent but its socket, its lock, null.
    for entry in fs::read_dir(format!("/proc/{agent}/fd"))?.flatten() {
        let target = fs::read_link(entry.path())?.display().to_string();
        let known = [
            "socket:",
            "anon_inode:",
            "/dev/null",
            "/run/casemate/ids/",
            "/null",
            "/casemate/ids/",
        ];
        ensure!(
            known.iter().any(|k| target.contains(k)),
            "the agent has {target} open"
        );
    }
    // Its binary can't be written through /proc.
    let exe = fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/{agent}/exe"));
    ensure!(exe.is_err(), "the agent's binary can be opened for writing");
    Ok(task.finish()?)
}

fn locks_session_keyring_is_its_own() -> Outcome {
    casemate_only()?;
    let task = sleeper("lockkeys")?;
    let pid = init(&task)?.to_string();
    // Key rings that the container's root owns; only their owner is shown them.
    let keys = on_host(&["enter", "user", &pid, "read", "/proc/keys"])?;
    let own = keys
        .lines()
        .filter(|line| line.contains("keyring") && line.contains("_ses"))
        .filter(|line| line.split_whitespace().nth(5) == Some("0"))
        .count();
    ensure!(
        own >= 1,
        "no session key ring of the container's own: {keys:?}"
    );
    // Inside, the list is masked and the calls are refused (locks_filter_refuses).
    let masked = on_host(&["enter", ALL, &pid, "read", "/proc/keys"])?;
    ensure_eq!(masked, "", "/proc/keys inside");
    Ok(task.finish()?)
}

fn locks_death_of_the_agent_takes_all() -> Outcome {
    casemate_only()?;
    let task = sleeper("lockdeath")?;
    let (agent, forker) = insiders(&task)?;
    let (more, _out) = exec(&task, "more", &["/bin/probe", "sleep"])?;
    let all: Vec<_> = [agent, forker, init(&task)?, more]
        .into_iter()
        .filter_map(procs::identity)
        .collect();
    ensure_eq!(all.len(), 4, "processes of the pod");
    let begun = Instant::now();
    procs::signal(agent, Signal::KILL);
    until("the pod's processes to end", Duration::from_secs(1), || {
        !all.iter().any(|p| procs::alive(*p))
    })?;
    let ended = task.rpc()?.wait(&task.id, Duration::from_secs(2))?;
    ensure_eq!(ended.exit_status, 137, "exit status of init");
    ensure!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?} until the exit was told",
        begun.elapsed()
    );
    Ok(task.finish()?)
}

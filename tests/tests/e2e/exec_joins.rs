//! 67: what an exec is given and what it shares with its container, as the host
//! sees both.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::{probe, set_mode};
use casemate_tests::{ensure, ensure_eq, procs};
use serde_json::json;

use crate::calls::init;
use crate::common::{RUNNING, casemate_only, expect_text, status};
use crate::hostile_node::configure;

crate::trials![
    c067_process_document_of_an_exec,
    c067_exec_joins_everything,
    c067_exec_beside_an_unreadable_init,
    exec_cwd_through_hostile_links,
    exec_environment_of_all_sizes,
];

/// Everything about a process that must not depend on who asked for it. Caught signals
/// (`SigCgt`) aren't of it: execve(2) resets them, and what follows is the program's.
pub fn facts(pid: u32) -> Result<BTreeMap<String, String>, Stop> {
    let mut all = BTreeMap::new();
    for field in [
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "NSsid",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        "SigIgn",
        "SigBlk",
        "CoreDumping",
        "Speculation_Store_Bypass",
        "Cpus_allowed",
        "Mems_allowed",
    ] {
        // A session of its own it has.
        if field != "NSsid" {
            all.insert(
                field.to_owned(),
                procs::status_field(pid, field).unwrap_or_default(),
            );
        }
    }
    for kind in [
        "mnt",
        "pid",
        "pid_for_children",
        "net",
        "ipc",
        "uts",
        "user",
        "cgroup",
        "time",
    ] {
        let link = fs::read_link(format!("/proc/{pid}/ns/{kind}"))?;
        all.insert(format!("ns/{kind}"), link.display().to_string());
    }
    for file in [
        "cgroup",
        "limits",
        "oom_score_adj",
        "mountinfo",
        "personality",
        "coredump_filter",
        "uid_map",
        "gid_map",
        "loginuid",
        "timerslack_ns",
    ] {
        if let Ok(text) = fs::read_to_string(format!("/proc/{pid}/{file}")) {
            all.insert(file.to_owned(), text);
        }
    }
    let root = fs::metadata(format!("/proc/{pid}/root/"))?;
    all.insert("root".to_owned(), format!("{}:{}", root.dev(), root.ino()));
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    // priority, nice, rt_priority, policy (proc_pid_stat(5)).
    for n in [18, 19, 40, 41] {
        let value = fields.get(n - 3).copied().unwrap_or_default();
        all.insert(format!("stat field {n}"), value.to_owned());
    }
    Ok(all)
}

fn c067_exec_joins_everything() -> Outcome {
    casemate_only()?;
    // Whatever a container can be given: filter, limits, ids, mask, score.
    let mut task = Task::new("c067j", &["/bin/probe", "sleep"])?;
    task.spec["process"]["user"] =
        json!({"uid": 1000, "gid": 1000, "additionalGids": [1000, 2000], "umask": 23});
    task.spec["process"]["oomScoreAdj"] = json!(777);
    task.spec["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "hard": 512, "soft": 256},
        {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
        {"type": "RLIMIT_NPROC", "hard": 333, "soft": 222},
    ]);
    task.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mincore"], "action": "SCMP_ACT_ERRNO"}]
    });
    task.spec["linux"]["resources"]["pids"] = json!({"limit": 50});
    task.spec["linux"]["resources"]["cpu"] = json!({"cpus": "0"});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let exec = Exec::new(&task, "e", &["/bin/probe", "sleep"])?;
    let pid = exec.begin()?;
    let want = facts(init(&task)?)?;
    // The program sets up its own signals first.
    let _late = until("the exec'ed program", SHORT, || {
        facts(pid).is_ok_and(|is| is == want)
    });
    let is = facts(pid)?;
    ensure!(want.len() > 30, "only {} facts", want.len());
    ensure_eq!(
        want.get("Groups").map(|g| g.split_whitespace().count()),
        Some(2),
        "control: groups of init"
    );
    for (name, value) in &want {
        ensure_eq!(is.get(name), Some(value), "{name} of the exec'ed process");
    }
    // In init's shoes there is nothing of the shim's: three descriptors.
    // execve(2) closes the others one by one.
    let descriptors = || fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |all| all.count());
    let _late = until("three descriptors", SHORT, || descriptors() == 3);
    ensure_eq!(descriptors(), 3, "descriptors");
    Ok(task.finish()?)
}

fn c067_process_document_of_an_exec() -> Outcome {
    let task = Task::sleeping("c067")?;
    let root = procs::status_field(init(&task)?, "Uid").unwrap_or_default();
    let root: u64 = root
        .split_whitespace()
        .next()
        .and_then(|u| u.parse().ok())
        .unwrap_or(0);
    let script = "id -u; id -g; id -G; pwd; echo $MINE $HOME; umask; ulimit -n; \
                  grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; exec probe sleep";
    let mut exec = Exec::sh(&task, "e", script)?;
    exec.process = json!({
        "args": exec.process["args"].clone(),
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [2000, 7], "umask": 0o027},
        "env": ["PATH=/bin", "MINE=some value"],
        "cwd": "/tmp",
        "capabilities": {
            "bounding": ["CAP_KILL", "CAP_CHOWN"],
            "effective": ["CAP_KILL"],
            "permitted": ["CAP_KILL"],
            "inheritable": [],
            "ambient": []
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 99, "soft": 66}],
        "noNewPrivileges": true,
        "oomScoreAdj": 900,
    });
    let pid = exec.begin()?;
    exec.stdout.until("NoNewPrivs", SHORT)?;
    let text = String::from_utf8_lossy(&exec.stdout.so_far()).replace('\t', " ");
    let lines: Vec<&str> = text.lines().collect();
    ensure_eq!(
        lines[..7],
        [
            "1000",
            "1001",
            "1001 7 2000",
            "/tmp",
            "some value /tmp",
            "0027",
            "66"
        ],
        "what it sees of itself"
    );
    let value = |name: &str| {
        let line = lines.iter().find(|l| l.starts_with(name)).copied();
        line.and_then(|l| l.split_whitespace().nth(1))
            .unwrap_or_default()
            .to_owned()
    };
    ensure_eq!(value("CapBnd"), "0000000000000021", "CapBnd");
    ensure_eq!(value("NoNewPrivs"), "1", "NoNewPrivs");
    ensure_eq!(
        procs::status_field(pid, "Uid")
            .unwrap_or_default()
            .split_whitespace()
            .next(),
        Some((root + 1000).to_string().as_str()),
        "host uid"
    );
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?;
    ensure_eq!(score.trim(), "900", "oom_score_adj");
    let other = Exec::new(&task, "other", &["/bin/probe", "sleep"])?;
    let other = other.begin()?;
    ensure_eq!(
        fs::read_to_string(format!("/proc/{other}/oom_score_adj"))?,
        fs::read_to_string(format!("/proc/{}/oom_score_adj", init(&task)?))?,
        "oom_score_adj of the next exec"
    );
    task.finish()?;
    casemate_only()?;
    // no_new_privs is an exec's own, where its container does without.
    let mut task = Task::new("c067n", &["/bin/probe", "sleep"])?;
    configure(&mut task, "profile = \"compat\"\n")?;
    task.spec["process"]["noNewPrivileges"] = json!(false);
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    for (id, set) in [("with", true), ("without", false)] {
        let mut exec = Exec::new(&task, id, &["/bin/probe", "sleep"])?;
        exec.process["noNewPrivileges"] = json!(set);
        let pid = exec.begin()?;
        let value = procs::status_field(pid, "NoNewPrivs").unwrap_or_default();
        ensure_eq!(value, u8::from(set).to_string(), "NoNewPrivs of {id}");
    }
    Ok(task.finish()?)
}

fn c067_exec_beside_an_unreadable_init() -> Outcome {
    let mut task = Task::new("c067u", &["/odd/hidden", "sleep"])?;
    let odd = task.side.join("upper/odd");
    fs::create_dir_all(&odd)?;
    set_mode(&odd, 0o711)?;
    fs::copy(probe()?, odd.join("hidden"))?;
    // It may be executed, not read: its process is not dumpable.
    set_mode(&odd.join("hidden"), 0o711)?;
    task.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    for (id, uid) in [("root", 0), ("same", 1000), ("other", 65534)] {
        let mut exec = Exec::sh(
            &task,
            id,
            "cat /odd/hidden >/dev/null && echo read; echo $(id -u)",
        )?;
        exec.process["user"] = json!({"uid": uid, "gid": uid});
        let (code, text) = exec.run()?;
        ensure_eq!(code, 0, "exit of {id}");
        ensure!(text.ends_with(&format!("{uid}\n")), "{id}: {text:?}");
        if uid != 0 {
            ensure_eq!(text, format!("{uid}\n"), "{id}: control, the file");
        }
        let mut hidden = Exec::new(
            &task,
            &format!("{id}-hidden"),
            &["/odd/hidden", "exit", "5"],
        )?;
        hidden.process["user"] = json!({"uid": uid, "gid": uid});
        ensure_eq!(hidden.run()?.0, 5, "exit of the unreadable program as {id}");
    }
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}

fn exec_cwd_through_hostile_links() -> Outcome {
    let mut task = Task::new("cwdlinks", &["/bin/probe", "sleep"])?;
    let odd = task.side.join("upper/odd");
    fs::create_dir_all(&odd)?;
    let mut links = vec![
        "/proc/self/root/../../..".to_owned(),
        "/proc/1/cwd/../../..".to_owned(),
        "/proc/self/cwd".to_owned(),
        "../../../../../../..".to_owned(),
    ];
    links.extend((0..40).map(|n| format!("/proc/self/fd/{n}")));
    links.extend((0..40).map(|n| format!("/proc/self/fd/{n}/..")));
    for (n, target) in links.iter().enumerate() {
        std::os::unix::fs::symlink(target, odd.join(format!("l{n}")))?;
    }
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let (mut inside, mut refused) = (0, 0);
    for (n, target) in links.iter().enumerate() {
        let exec_id = format!("e{n}");
        let mut exec = Exec::sh(
            &task,
            &exec_id,
            "pwd -P; ls -d etc/passwd odd 2>&1; ls /proc/self/cwd/",
        )?;
        exec.process["cwd"] = json!(format!("/odd/l{n}"));
        exec.add()?;
        match exec.start() {
            Ok(_) => {
                exec.wait()?;
                exec.delete()?;
                let text = exec.stdout.text(SHORT)?;
                let first = text.lines().next().unwrap_or_default();
                ensure!(
                    first.starts_with('/') && !first.contains("unreachable"),
                    "cwd through {target}: {text:?}"
                );
                inside += 1;
            }
            Err(error) => {
                ensure!(error.to_string().contains("cwd"), "{target}: {error}");
                exec.delete()?;
                refused += 1;
            }
        }
    }
    // Controls: the links back into the root lead there, to descriptors nowhere.
    ensure!(inside >= 4, "only {inside} were inside");
    ensure!(refused >= 60, "only {refused} were refused");
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}

fn exec_environment_of_all_sizes() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("bigenv")?;
    // 1 MiB in many variables is what the kernel takes.
    let mut exec = Exec::sh(&task, "many", "env | grep -c ^V")?;
    let many: Vec<String> = (0..16_384)
        .map(|n| format!("V{n}={}", "x".repeat(50)))
        .collect();
    let mut env = vec!["PATH=/bin".to_owned()];
    env.extend(many);
    exec.process["env"] = json!(env);
    ensure_eq!(exec.run()?, (0, "16384\n".to_owned()), "many variables");
    for (n, (size, part)) in [
        // One string may have 128 KiB (execve(2)), a plan 8 MiB.
        (200 << 10, "Argument list too long"),
        (4 << 20, "Argument list too long"),
        (9 << 20, "process.env"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut exec = Exec::new(&task, &format!("big{n}"), &["/bin/true"])?;
        // One at the limit of a message, so the daemon can't send much more.
        exec.process["env"] = if size > 4 << 20 {
            // Escapes double their size on the wire only.
            json!(vec![format!("A={}", "y".repeat(size))])
        } else {
            json!([format!("A={}", "y".repeat(size))])
        };
        match exec.add() {
            // ttrpc has a limit of its own, of 4 MiB for one message.
            Err(error) => {
                ensure!(size >= 4 << 20, "{size} bytes: Exec: {error}");
                continue;
            }
            Ok(()) => expect_text(&format!("{size} bytes"), exec.start(), part)?,
        }
        exec.wait_within(Duration::from_secs(5))?;
        exec.delete()?;
    }
    let after = Exec::sh(&task, "after", "echo fine")?;
    ensure_eq!(after.run()?, (0, "fine\n".to_owned()), "the next exec");
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}

//! `linux.cgroupsPath` in systemd's form: scopes where systemd is process 1, the
//! same place through the file system where it isn't (139). And a pod's parent.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::{ensure, ensure_eq, procs};
use containerd_shim_protos::api::{Empty, StatsRequest, StatsResponse, UpdateTaskRequest};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::casemate_only;
use crate::limits::{cgroup, init};

crate::trials![
    c139_scope_in_the_slice,
    group_oom_is_told,
    pod_limits_cover_agent_and_containers,
    systemd_delete_after_the_shim_was_killed,
    systemd_reload_keeps_limits,
    systemd_scope_lives_and_goes,
];

fn booted() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn need_systemd() -> Outcome {
    casemate_only()?;
    if booted() {
        return Ok(());
    }
    skip("systemd is not process 1 here")
}

fn systemctl(args: &[&str]) -> Result<String, Stop> {
    let done = Command::new("systemctl").args(args).output()?;
    if !done.status.success() {
        return fail(format!(
            "systemctl {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&done.stderr)
        ));
    }
    Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
}

fn property(unit: &str, name: &str) -> Result<String, Stop> {
    systemctl(&["show", "--value", "-p", name, unit])
}

fn is_unit(unit: &str) -> Result<bool, Stop> {
    Ok(property(unit, "LoadState")? == "loaded")
}

/// A slice of a test's own, two levels deep.
fn slice(name: &str) -> String {
    format!("casemate_{name}-pod.slice")
}

/// What a kubelet does when the pod has gone.
fn stop_slice(name: &str) -> Outcome {
    systemctl(&["stop", &format!("casemate_{name}.slice")]).map(drop)
}

fn place(task: &mut Task, name: &str) {
    task.spec["linux"]["cgroupsPath"] = json!(format!("{}:test:{}", slice(name), task.id));
}

/// The scopes of a task: the container's and the agent's.
fn scopes(task: &Task) -> [String; 2] {
    [
        format!("test-{}.scope", task.id),
        format!("casemate-{}.scope", task.id),
    ]
}

fn parent(dir: &Path) -> PathBuf {
    dir.parent().unwrap_or(dir).to_owned()
}

fn c139_scope_in_the_slice() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("c139", &["/bin/probe", "sleep"])?;
    place(&mut task, "c139");
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let [scope, agent] = scopes(&task);
    for controller in ["memory", "pids"] {
        let dir = cgroup(init(&task)?, controller)?;
        let want = format!("casemate_c139.slice/{}/{scope}", slice("c139"));
        ensure!(
            dir.ends_with(&want),
            "{controller}: {}, want {want}",
            dir.display()
        );
        let beside = parent(&dir).join(&agent);
        let text = fs::read_to_string(beside.join("cgroup.procs"))?;
        ensure!(!text.trim().is_empty(), "{} is empty", beside.display());
        let inside = fs::read_to_string(dir.join("cgroup.procs"))?;
        // Init and its forker, and nobody who only kept the place.
        ensure_eq!(inside.lines().count(), 2, "processes in the scope");
    }
    if booted() {
        for unit in [&scope, &agent] {
            ensure_eq!(property(unit, "ActiveState")?, "active", "{unit}");
            ensure_eq!(property(unit, "Slice")?, slice("c139"), "{unit}");
            ensure_eq!(property(unit, "Delegate")?, "yes", "{unit}");
        }
    }
    task.finish()?;
    if booted() {
        stop_slice("c139")?;
    }
    Ok(())
}

/// The parent's limit, as a kubelet sets it on the pod's cgroup, is the one that
/// a container without any runs into, and the agent counts too.
fn pod_limits_cover_agent_and_containers() -> Outcome {
    casemate_only()?;
    let script = "i=0; while [ $i -lt 40 ]; do probe sleep & i=$((i+1)); done; wait";
    let mut task = Task::new("parent", &["/bin/sh", "-c", script])?;
    if booted() {
        place(&mut task, "parent");
    } else {
        let path = format!("/casemate-parent-{}/{}", task.id, task.id);
        task.spec["linux"]["cgroupsPath"] = json!(path);
    }
    task.boot()?;
    task.create()?;
    let own = cgroup(init(&task)?, "pids")?;
    let pod = parent(&own);
    if booted() {
        systemctl(&["set-property", "--runtime", &slice("parent"), "TasksMax=20"])?;
    } else {
        fs::write(pod.join("pids.max"), "20")?;
    }
    let number = |dir: &Path, file: &str| -> Result<u64, Stop> {
        let text = fs::read_to_string(dir.join(file))?;
        let last = text.split_whitespace().last().unwrap_or_default();
        last.parse()
            .map_err(|_| Stop::Fail(format!("{file}: {text:?}")))
    };
    ensure_eq!(number(&pod, "pids.max")?, 20, "the pod's limit");
    // Agent, forker, init.
    ensure_eq!(number(&pod, "pids.current")?, 3, "processes of the pod");
    task.rpc()?.start(&task.id)?;
    until("the pod to run into its limit", SHORT, || {
        // Version 1 and older kernels count it where the fork was refused.
        [&pod, &own]
            .into_iter()
            .any(|dir| number(dir, "pids.events").is_ok_and(|times| times > 0))
    })?;
    ensure!(number(&pod, "pids.current")? <= 20, "over the pod's limit");
    // The shell gives up where it can't fork.
    task.posture = false;
    task.finish()?;
    if booted() {
        stop_slice("parent")?;
    }
    Ok(())
}

fn systemd_scope_lives_and_goes() -> Outcome {
    need_systemd()?;
    let mut task = Task::new("sdlife", &["/bin/probe", "sleep"])?;
    place(&mut task, "life");
    task.boot()?;
    task.create()?;
    let units = scopes(&task);
    for unit in &units {
        ensure_eq!(property(unit, "ActiveState")?, "active", "{unit} created");
    }
    task.rpc()?.start(&task.id)?;
    let process = json!({
        "args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0},
        "env": ["PATH=/bin"], "noNewPrivileges": true
    });
    let exec = (task.id.as_str(), "e");
    task.rpc()?.exec(exec, &process, "", "")?;
    task.rpc()?.start_exec(exec)?;
    ensure_eq!(task.rpc()?.wait_exec(exec)?.exit_status, 0, "exec");
    task.rpc()?.delete_exec(exec)?;
    ensure_eq!(task.rpc()?.pids(&task.id)?.processes.len(), 1, "pids");
    let ask = StatsRequest {
        id: task.id.clone(),
        ..StatsRequest::default()
    };
    let stats: StatsResponse = task.rpc()?.call("Stats", &ask, SHORT)?;
    let stats = stats.stats.unwrap_or_default();
    ensure_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics", "type");
    let stats = Metrics::parse_from_bytes(&stats.value)?;
    ensure!(stats.memory.usage > 0, "no memory in use");
    ensure!(stats.cpu.usage_usec > 0, "no time used");
    ensure!(stats.pids.current >= 2, "pids {}", stats.pids.current);
    task.rpc()?.kill(&task.id, 9, false)?;
    task.rpc()?.wait(&task.id, SHORT)?;
    // The forker is still there, so the numbers are, too.
    ensure_eq!(property(&units[0], "ActiveState")?, "active", "stopped");
    task.rpc()?.delete(&task.id)?;
    ensure!(!is_unit(&units[0])?, "{} after delete", units[0]);
    // The name is free at once.
    task.finish()?;
    for unit in &units {
        ensure!(!is_unit(unit)?, "{unit} after the pod");
    }
    let failed = systemctl(&["list-units", "--failed", "--plain", "--no-legend"])?;
    ensure!(!failed.contains("casemate"), "failed units: {failed}");
    stop_slice("life")?;
    Ok(())
}

/// Everything that limits in a leaf of version 2, as text.
fn limits(dir: &Path) -> Result<BTreeMap<&'static str, String>, Stop> {
    let mut all = BTreeMap::new();
    for file in [
        "cpu.max",
        "cpu.weight",
        "cpuset.cpus",
        "io.weight",
        "memory.high",
        "memory.low",
        "memory.max",
        "memory.min",
        "memory.oom.group",
        "memory.swap.max",
        "pids.max",
    ] {
        // Some are there only with swap or a scheduler for disks.
        if let Ok(text) = fs::read_to_string(dir.join(file)) {
            all.insert(file, text.trim().to_owned());
        }
    }
    let programs = casemate_sys::bpf::device_programs(&fs::File::open(dir)?)?;
    all.insert("device programs", format!("{programs:?}"));
    Ok(all)
}

fn update(task: &Task, resources: &Value) -> Outcome {
    let update = UpdateTaskRequest {
        id: task.id.clone(),
        resources: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources.to_string().into_bytes(),
            ..Any::default()
        }),
        ..UpdateTaskRequest::default()
    };
    task.rpc()?.call::<Empty>("Update", &update, SHORT)?;
    Ok(())
}

fn systemd_reload_keeps_limits() -> Outcome {
    need_systemd()?;
    let mut task = Task::new("sdreload", &["/bin/probe", "sleep"])?;
    place(&mut task, "reload");
    let resources = &mut task.spec["linux"]["resources"];
    resources["memory"] = json!({"limit": 64 << 20, "swap": 64 << 20, "reservation": 16 << 20});
    resources["cpu"] = json!({"shares": 512, "quota": 55_000, "period": 50_000, "cpus": "0"});
    resources["pids"] = json!({"limit": 77});
    resources["unified"] = json!({"memory.high": "60000000", "memory.min": "4096"});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let dir = cgroup(init(&task)?, "memory")?;
    let before = limits(&dir)?;
    for (file, want) in [
        ("memory.max", "67108864"),
        ("memory.high", "59998208"),
        ("cpu.max", "55000 50000"),
        ("cpuset.cpus", "0"),
        ("pids.max", "77"),
    ] {
        let is = before.get(file).map(String::as_str);
        ensure_eq!(is, Some(want), "{file}");
    }
    let programs = before.get("device programs").map_or("", String::as_str);
    ensure!(programs.len() > 2, "no device program: {programs}");
    systemctl(&["daemon-reload"])?;
    ensure_eq!(limits(&dir)?, before, "limits after daemon-reload");

    // An update is known to systemd as well.
    let resources = json!({"memory": {"limit": 96 << 20, "swap": 96 << 20},
        "cpu": {"quota": 12_345, "period": 50_000}, "pids": {"limit": 55}});
    update(&task, &resources)?;
    let updated = limits(&dir)?;
    for (file, want) in [
        ("memory.max", "100663296"),
        // Whole percents of a CPU, since systemd keeps no others; never less.
        ("cpu.max", "12500 50000"),
        ("pids.max", "55"),
        ("memory.high", "59998208"),
    ] {
        let is = updated.get(file).map(String::as_str);
        ensure_eq!(is, Some(want), "{file} updated");
    }
    let [unit, agent] = scopes(&task);
    ensure_eq!(property(&unit, "MemoryMax")?, "100663296", "known limit");
    ensure_eq!(property(&unit, "TasksMax")?, "55", "known limit");
    ensure_eq!(property(&agent, "TasksMax")?, "infinity", "the agent's");
    systemctl(&["daemon-reload"])?;
    ensure_eq!(limits(&dir)?, updated, "limits after update and reload");

    // The period that was there goes on where none is named.
    update(&task, &json!({"cpu": {"quota": 20_111}}))?;
    let updated = limits(&dir)?;
    let is = updated.get("cpu.max").map(String::as_str);
    ensure_eq!(is, Some("20500 50000"), "cpu.max of a quota alone");
    systemctl(&["daemon-reload"])?;
    ensure_eq!(limits(&dir)?, updated, "a quota alone after a reload");
    update(&task, &json!({"cpu": {"period": 33_333}}))?;
    let updated = limits(&dir)?;
    let is = updated.get("cpu.max").map(String::as_str);
    ensure_eq!(is, Some("20666 33333"), "cpu.max of a period alone");
    systemctl(&["daemon-reload"])?;
    ensure_eq!(limits(&dir)?, updated, "a period alone after a reload");
    update(&task, &json!({"cpu": {"quota": -1, "period": 33_333}}))?;
    let updated = limits(&dir)?;
    let is = updated.get("cpu.max").map(String::as_str);
    ensure_eq!(is, Some("max 100000"), "cpu.max without a limit");
    systemctl(&["daemon-reload"])?;
    ensure_eq!(limits(&dir)?, updated, "no limit after a reload");
    task.finish()?;
    stop_slice("reload")?;
    Ok(())
}

/// With `memory.oom.group` the kernel kills the forker as well, so that nobody is
/// left to tell of exits, and systemd takes the empty scope away: that it was for
/// want of memory is told all the same.
fn group_oom_is_told() -> Outcome {
    casemate_only()?;
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return skip("cgroup v1 has no memory.oom.group");
    }
    let mut task = Task::new(
        "sdoom",
        &[
            "/bin/dd",
            "if=/dev/zero",
            "of=/dev/null",
            "bs=200M",
            "count=1",
        ],
    )?;
    place(&mut task, "oom");
    let resources = &mut task.spec["linux"]["resources"];
    resources["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    resources["unified"] = json!({"memory.oom.group": "1"});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    crate::limits::killed_for_memory(&task)?;
    let units = scopes(&task);
    task.finish()?;
    if booted() {
        for unit in &units {
            ensure!(!is_unit(unit)?, "{unit} after the pod");
        }
        stop_slice("oom")?;
    }
    Ok(())
}

fn systemd_delete_after_the_shim_was_killed() -> Outcome {
    need_systemd()?;
    let mut task = Task::new("sddead", &["/bin/probe", "sleep"])?;
    place(&mut task, "dead");
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let units = scopes(&task);
    procs::signal(task.shim_pid()?, Signal::KILL);
    task.wait_gone(Duration::from_secs(2))?;
    let began = Instant::now();
    let reply = task.shim.delete()?;
    let took = began.elapsed();
    // Emulated, this is ten to twenty times slower than it would be.
    ensure!(took < Duration::from_secs(5), "delete took {took:?}");
    ensure_eq!(reply.exit_status, 137, "reply");
    for unit in &units {
        ensure!(!is_unit(unit)?, "{unit} after delete");
    }
    task.expect_clean(Duration::from_secs(1))?;
    // Once more, with nothing left to do.
    task.shim.delete()?;
    stop_slice("dead")?;
    Ok(())
}

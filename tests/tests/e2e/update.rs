//! 79–83: limits that change, and the numbers of a cgroup.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, skip};
use casemate_tests::{ensure, ensure_eq, procs};
use containerd_shim_protos::api::{Empty, StatsRequest, StatsResponse, UpdateTaskRequest};
use containerd_shim_protos::cgroups::metrics::Metrics as MetricsV1;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as MetricsV2;
use protobuf::Message;
use rustix::process::Signal;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::calls::{PAUSED, cgroup, init, is_v2, pause, resume, stats, update};
use crate::common::{RUNNING, casemate_only, expect_code, expect_text, status};

crate::trials![
    c079_update,
    c079_update_that_cannot_be,
    c080_update_of_stopped,
    c081_stats_of_version_2,
    c082_stats_of_version_1,
    c083_stats_without_a_cgroup,
];

/// The forker is counted with the container (README).
fn one_process(count: u64) -> Outcome {
    ensure!((1..=2).contains(&count), "pids {count}");
    Ok(())
}

/// Spends processor time in the container.
fn works(task: &Task) -> Outcome {
    let script = "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done";
    Exec::sh(task, "e", script)?.run()?;
    Ok(())
}

/// Every limit of a cgroup, by file: what an update must leave alone.
fn limits(pid: u32) -> Result<BTreeMap<String, String>, Stop> {
    let files: &[(&str, &[&str])] = if is_v2() {
        &[(
            "",
            &[
                "memory.max",
                "memory.low",
                "memory.swap.max",
                "cpu.max",
                "cpu.weight",
                "pids.max",
                "cpuset.cpus",
            ],
        )]
    } else {
        &[
            (
                "memory",
                &[
                    "memory.limit_in_bytes",
                    "memory.soft_limit_in_bytes",
                    "memory.swappiness",
                ],
            ),
            (
                "cpu",
                &["cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us"],
            ),
            ("pids", &["pids.max"]),
            ("cpuset", &["cpuset.cpus", "cpuset.mems"]),
            ("devices", &["devices.list"]),
        ]
    };
    let mut all = BTreeMap::new();
    for (controller, names) in files {
        let dir = cgroup(pid, controller)?;
        for name in *names {
            if let Ok(text) = fs::read_to_string(dir.join(name)) {
                all.insert((*name).to_owned(), text.trim().to_owned());
            }
        }
    }
    Ok(all)
}

fn c079_update() -> Outcome {
    let mut task = Task::new("c079", &["/bin/probe", "sleep"])?;
    task.spec["linux"]["resources"] = json!({
        "devices": [{"allow": false, "access": "rwm"}],
        "memory": {"limit": 64 << 20, "reservation": 32 << 20},
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
        "pids": {"limit": 50},
    });
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let pid = init(&task)?;
    let text = |n: u64| n.to_string();
    let (memory, quota) = if is_v2() {
        ("memory.max", "cpu.max")
    } else {
        ("memory.limit_in_bytes", "cpu.cfs_quota_us")
    };
    let bandwidth = |quota: u64| {
        if is_v2() {
            format!("{quota} 100000")
        } else {
            text(quota)
        }
    };
    let shares = if is_v2() { "cpu.weight" } else { "cpu.shares" };
    let mut want = limits(pid)?;
    ensure!(want.len() >= 6, "only {want:?} could be read");
    let steps: Vec<(Value, &str, Option<String>)> = vec![
        (
            json!({"memory": {"limit": 128 << 20}}),
            memory,
            Some(text(128 << 20)),
        ),
        (
            json!({"memory": {"limit": 48 << 20}}),
            memory,
            Some(text(48 << 20)),
        ),
        (
            json!({"cpu": {"quota": 20_000}}),
            quota,
            Some(bandwidth(20_000)),
        ),
        (json!({"pids": {"limit": 99}}), "pids.max", Some(text(99))),
        (
            json!({"pids": {"limit": -1}}),
            "pids.max",
            Some("max".to_owned()),
        ),
        (json!({"cpu": {"shares": 2048}}), shares, None),
        (
            json!({"cpu": {"cpus": "0"}}),
            "cpuset.cpus",
            Some("0".to_owned()),
        ),
        // Nothing named, nothing changed; fields with a zero are not named.
        (json!({}), "", None),
        (
            json!({"memory": {}, "cpu": {"shares": 0, "quota": 0, "period": 0}}),
            "",
            None,
        ),
        // Rules about devices come along with every update of CRI.
        (
            json!({"devices": [{"allow": true, "access": "rwm"}], "pids": {"limit": 60}}),
            "pids.max",
            Some(text(60)),
        ),
    ];
    for (resources, file, value) in steps {
        update(&task, &resources).map_err(|e| Stop::Fail(format!("Update {resources}: {e}")))?;
        let now = limits(pid)?;
        match value {
            Some(value) => drop(want.insert(file.to_owned(), value)),
            None if file.is_empty() => {}
            None => {
                ensure!(now.get(file) != want.get(file), "{file} after {resources}");
                want.insert(file.to_owned(), now.get(file).cloned().unwrap_or_default());
            }
        }
        ensure_eq!(now, want, "limits after {resources}");
    }
    // Also before Start, and while paused.
    pause(&task)?;
    update(&task, &json!({"pids": {"limit": 70}}))?;
    want.insert("pids.max".to_owned(), text(70));
    ensure_eq!(limits(pid)?, want, "limits after an update while paused");
    ensure_eq!(status(&task)?, PAUSED, "state");
    resume(&task)?;
    let created = Task::created("c079c", &["/bin/probe", "sleep"])?;
    update(&created, &json!({"pids": {"limit": 71}}))?;
    ensure_eq!(
        limits(init(&created)?)?.get("pids.max").map(String::as_str),
        Some("71"),
        "before Start"
    );
    created.finish()?;
    Ok(task.finish()?)
}

fn c079_update_that_cannot_be() -> Outcome {
    casemate_only()?;
    // 40 MiB in memory, so that a limit below can be asked for.
    let script =
        "dd if=/dev/zero of=/dev/shm/full bs=1M count=40 2>/dev/null; echo up; exec probe sleep";
    let mut task = Task::new("c079n", &["/bin/sh", "-c", script])?;
    task.spec["linux"]["resources"]["memory"] = json!({"limit": 128 << 20});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    task.stdout.until("up", SHORT)?;
    let pid = init(&task)?;
    let before = limits(pid)?;
    let mut cases = vec![
        (json!({"cpu": {"shares": 1}}), "cpu.shares"),
        (json!({"cpu": {"quota": 1}}), "cpu.quota"),
        (json!({"cpu": {"cpus": "4000"}}), "cpu.cpus"),
        (json!({"cpu": {"cpus": "../0"}}), "cpu.cpus"),
        (
            json!({"memory": {"limit": 100 << 20, "swap": 50 << 20}}),
            "memory.swap",
        ),
        (
            json!({"memory": {"disableOOMKiller": true}}),
            "disableOOMKiller",
        ),
        (
            json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}),
            "hugepageLimits",
        ),
        (json!({"unified": {"cgroup.freeze": "1"}}), "unified"),
        (json!({"unified": {"../memory.max": "1"}}), "unified"),
        (json!({"memory": {"limit": "much"}}), "resources"),
        (json!([1, 2]), "resources"),
    ];
    if !is_v2() {
        // Version 2 makes room by killing, as its document says.
        cases.push((json!({"memory": {"limit": 8 << 20}}), "memory.limit"));
    }
    for (resources, part) in cases {
        let answer = update(&task, &resources);
        let text = answer
            .as_ref()
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        expect_text(&resources.to_string(), answer, part)?;
        ensure_eq!(text.trim().lines().count(), 1, "lines of {text:?}");
        ensure_eq!(limits(pid)?, before, "limits after {resources}");
    }
    let none = UpdateTaskRequest {
        id: task.id.clone(),
        ..Default::default()
    };
    expect_code(
        "no resources",
        task.rpc()?.call::<Empty>("Update", &none, SHORT),
        Code::INVALID_ARGUMENT,
    )?;
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}

fn c080_update_of_stopped() -> Outcome {
    let task = Task::running("c080", &["/bin/true"])?;
    task.rpc()?.wait(&task.id, SHORT)?;
    expect_code(
        "Update",
        update(&task, &json!({"pids": {"limit": 9}})),
        Code::FAILED_PRECONDITION,
    )?;
    Ok(task.finish()?)
}

/// Uses some processor time and 20 MiB of memory, then sleeps.
const WORK: &str = "dd if=/dev/zero of=/dev/shm/full bs=1M count=20 2>/dev/null; \
                    i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo up; exec probe sleep";

fn c081_stats_of_version_2() -> Outcome {
    if !is_v2() {
        return skip("this node has cgroup v1");
    }
    let task = Task::running("c081", &["/bin/sh", "-c", WORK])?;
    task.stdout.until("up", SHORT)?;
    let any = stats(&task)?;
    ensure_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics", "type");
    let first = MetricsV2::parse_from_bytes(&any.value)?;
    ensure!(first.cpu.usage_usec > 1000, "cpu {}", first.cpu.usage_usec);
    ensure!(
        first.memory.usage > 20 << 20,
        "memory {}",
        first.memory.usage
    );
    ensure_eq!(first.memory.usage_limit, u64::MAX, "no limit");
    one_process(first.pids.current)?;
    works(&task)?;
    let second = MetricsV2::parse_from_bytes(&stats(&task)?.value)?;
    ensure!(
        second.cpu.usage_usec > first.cpu.usage_usec,
        "cpu went from {} to {}",
        first.cpu.usage_usec,
        second.cpu.usage_usec
    );
    update(&task, &json!({"memory": {"limit": 128 << 20}}))?;
    let third = MetricsV2::parse_from_bytes(&stats(&task)?.value)?;
    ensure_eq!(third.memory.usage_limit, 128 << 20, "limit");
    Ok(task.finish()?)
}

fn c082_stats_of_version_1() -> Outcome {
    if is_v2() {
        return skip("this node has cgroup v2");
    }
    let mut task = Task::new("c082", &["/bin/sh", "-c", WORK])?;
    task.spec["linux"]["resources"]["memory"] = json!({"limit": 128 << 20});
    task.spec["linux"]["resources"]["pids"] = json!({"limit": 55});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    task.stdout.until("up", SHORT)?;
    let any = stats(&task)?;
    ensure_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics", "type");
    let first = MetricsV1::parse_from_bytes(&any.value)?;
    let total = first.cpu.usage.total;
    // Nanoseconds: the work takes tens of milliseconds.
    let read = fs::read_to_string(cgroup(init(&task)?, "cpuacct")?.join("cpuacct.usage"))?;
    let kernel: u64 = read.trim().parse().unwrap_or(0);
    ensure!(
        total > 1_000_000 && total <= kernel,
        "cpu {total}, kernel says {kernel}"
    );
    let memory = &first.memory;
    ensure!(
        memory.usage.usage > 20 << 20,
        "memory {}",
        memory.usage.usage
    );
    ensure_eq!(memory.usage.limit, 128 << 20, "limit");
    ensure!(memory.total_pg_fault > 0, "no page fault");
    ensure_eq!(first.pids.limit, 55, "pids limit");
    one_process(first.pids.current)?;
    works(&task)?;
    let second = MetricsV1::parse_from_bytes(&stats(&task)?.value)?;
    ensure!(
        second.cpu.usage.total > total,
        "cpu went from {total} to {}",
        second.cpu.usage.total
    );
    Ok(task.finish()?)
}

fn c083_stats_without_a_cgroup() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c083")?;
    let forker = procs::status_field(init(&task)?, "PPid").unwrap_or_default();
    let forker: u32 = forker.parse().unwrap_or(0);
    ensure!(forker > 1, "no forker");
    // The last looks at a cgroup that is dying: an answer or NotFound.
    let (client, id) = (task.rpc()?.clone(), task.id.clone());
    let looking = std::thread::spawn(move || {
        let mut odd = Vec::new();
        for _ in 0..200 {
            let ask = StatsRequest {
                id: id.clone(),
                ..Default::default()
            };
            match client.call::<StatsResponse>("Stats", &ask, SHORT) {
                Ok(reply) => {
                    let url = reply.stats.unwrap_or_default().type_url;
                    if !url.starts_with("io.containerd.cgroups.v") {
                        odd.push(url);
                    }
                }
                Err(error) if error.code() == Some(Code::NOT_FOUND) => {}
                Err(error) => odd.push(error.to_string()),
            }
        }
        odd
    });
    task.rpc()?.kill(&task.id, 9, false)?;
    task.rpc()?.wait(&task.id, SHORT)?;
    procs::signal(forker, Signal::KILL);
    until("the forker to go", SHORT, || {
        procs::identity(forker).is_none()
    })?;
    let dirs = casemate_tests::leaks::cgroups_with(&task.id);
    let own = |dir: &Path| dir.file_name().is_some_and(|name| *name == *task.id);
    let dirs: Vec<_> = dirs.into_iter().filter(|dir| own(Path::new(dir))).collect();
    ensure!(!dirs.is_empty(), "no cgroup");
    for dir in dirs {
        let _ = fs::remove_dir(dir);
    }
    let odd = looking
        .join()
        .unwrap_or_else(|_| vec!["panicked".to_owned()]);
    ensure!(odd.is_empty(), "odd answers: {odd:?}");
    expect_code("Stats", stats(&task), Code::NOT_FOUND)?;
    let pids = task.rpc()?.pids(&task.id);
    match pids {
        Ok(pids) => ensure!(pids.processes.is_empty(), "processes {pids:?}"),
        Err(error) => ensure_eq!(error.code(), Some(Code::NOT_FOUND), "Pids: {error}"),
    }
    ensure_eq!(task.rpc()?.delete(&task.id)?.exit_status, 137, "Delete");
    expect_code("Stats, deleted", stats(&task), Code::NOT_FOUND)?;
    Ok(task.finish()?)
}

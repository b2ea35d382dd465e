//! Version 1.

use std::sync::atomic::AtomicU8;

use super::*;
use crate::Stats;

#[test]
fn limits_arrive_in_the_kernel() {
    let cgroup = Made::new(&version_1(), "limits");
    let warnings = cgroup
        .apply(&resources(
            r#"{
        "memory": {"limit": 67108864, "swap": 67108864, "reservation": 33554432, "swappiness": 7},
        "cpu": {"shares": 512, "quota": 50000, "period": 100000, "burst": 10000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 77}
    }"#,
        ))
        .unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    let file = |controller: &str, file: &str| read(cgroup.v1(controller).unwrap(), file);
    assert_eq!(file("memory", "memory.limit_in_bytes"), "67108864");
    assert_eq!(file("memory", "memory.memsw.limit_in_bytes"), "67108864");
    assert_eq!(file("memory", "memory.soft_limit_in_bytes"), "33554432");
    assert_eq!(file("memory", "memory.swappiness"), "7");
    assert_eq!(file("cpu", "cpu.shares"), "512");
    assert_eq!(file("cpu", "cpu.cfs_quota_us"), "50000");
    assert_eq!(file("cpu", "cpu.cfs_period_us"), "100000");
    assert_eq!(file("cpu", "cpu.cfs_burst_us"), "10000");
    assert_eq!(file("cpuset", "cpuset.cpus"), "0");
    assert_eq!(file("pids", "pids.max"), "77");

    // Updates go up, down, and leave alone what they don't name.
    cgroup
        .apply(&resources(
            r#"{"memory": {"limit": 134217728, "swap": 134217728}, "cpu": {"quota": 5000, "burst": 0}}"#,
        ))
        .unwrap();
    assert_eq!(file("memory", "memory.limit_in_bytes"), "134217728");
    assert_eq!(file("cpu", "cpu.cfs_quota_us"), "5000");
    assert_eq!(file("cpu", "cpu.shares"), "512");
    cgroup
        .apply(&resources(
            r#"{"memory": {"limit": 33554432, "swap": 50331648}}"#,
        ))
        .unwrap();
    assert_eq!(file("memory", "memory.limit_in_bytes"), "33554432");
    assert_eq!(file("memory", "memory.memsw.limit_in_bytes"), "50331648");
    cgroup
        .apply(&resources(
            r#"{"memory": {"limit": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}}"#,
        ))
        .unwrap();
    assert_eq!(file("memory", "memory.memsw.limit_in_bytes").len(), 19);
    assert_eq!(file("cpu", "cpu.cfs_quota_us"), "-1");
    assert_eq!(file("pids", "pids.max"), "max");

    cgroup
        .apply(&resources(r#"{"cpu": {"idle": 1, "shares": 300}}"#))
        .unwrap();
    assert_eq!(file("cpu", "cpu.idle"), "1");
    cgroup
        .apply(&resources(r#"{"cpu": {"idle": 0, "shares": 300}}"#))
        .unwrap();
    assert_eq!(file("cpu", "cpu.shares"), "300");
}

#[test]
fn what_cannot_be_had_is_named() {
    let cgroup = Made::new(&version_1(), "refused");
    for (json, want) in [
        (
            r#"{"unified": {"memory.high": "1"}}"#,
            "linux.resources.unified.memory.high = \"1\": this host runs cgroup v1",
        ),
        (
            r#"{"cpu": {"cpus": "0-4095"}}"#,
            "linux.resources.cpu.cpus = \"0-4095\": write ",
        ),
        (
            r#"{"cpu": {"shares": 1}}"#,
            "linux.resources.cpu.shares = 1: out of the kernel's range",
        ),
        (
            r#"{"cpu": {"quota": 5, "period": 100000}}"#,
            "linux.resources.cpu.quota = 5: write ",
        ),
        (
            r#"{"memory": {"limit": 100000, "swap": 5}}"#,
            "linux.resources.memory.swap = 5: ",
        ),
        (
            r#"{"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}"#,
            "linux.resources.hugepageLimits.pageSize = \"../x\": not a size",
        ),
        (
            r#"{"network": {"classID": 7}}"#,
            "linux.resources.network.classID = 7: the net_cls controller of cgroup v1 is not mounted",
        ),
        (
            r#"{"blockIO": {"leafWeight": 7}}"#,
            "linux.resources.blockIO.leafWeight = 7: ",
        ),
        (
            r#"{"pids": {"limit": 9223372036854775807}}"#,
            "linux.resources.pids.limit = 9223372036854775807: write ",
        ),
    ] {
        let error = cgroup.apply(&resources(json)).unwrap_err().to_string();
        assert!(error.starts_with(want), "{json}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let warnings = cgroup
        .apply(&resources(r#"{"memory": {"kernel": 5}}"#))
        .unwrap();
    assert!(warnings[0].starts_with("linux.resources.memory.kernel = 5: "));
}

#[test]
fn a_cgroup_nobody_limits_can_be_entered_and_is_counted() {
    let cgroup = Made::new(&version_1(), "stats");
    cgroup
        .apply(&resources(r#"{"pids": {"limit": 9}}"#))
        .unwrap();
    let child = run(&cgroup, true, sleeper);
    until("it used the processor", || match cgroup.stats().unwrap() {
        Stats::V1(s) => s.cpu.total > 0 && s.pids.current == 1,
        Stats::V2(_) => false,
    });
    let Stats::V1(stats) = cgroup.stats().unwrap() else {
        panic!("not version 1's numbers");
    };
    assert_eq!(stats.pids.limit, 9);
    assert!(!stats.cpu.per_cpu.is_empty());
    assert!(stats.memory_usage.usage <= stats.memory_usage.max);
    assert!(stats.memory_usage.limit > 1 << 60);
    assert!(stats.memory.hierarchical_memory_limit > 0);
    // In every hierarchy, the unified one included.
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", child.pid)).unwrap();
    let leaf = cgroup.dirs()[0].file_name().unwrap().to_str().unwrap();
    for line in text.lines() {
        assert!(line.ends_with(leaf), "{line}");
    }
    assert_eq!(text.lines().count(), cgroup.dirs().len());
}

#[test]
fn devices() {
    devices_follow_the_rules(&version_1());
}

#[test]
fn freezing() {
    freezing_stops_and_thawing_continues(&version_1());
    a_frozen_cgroup_can_be_killed(&version_1());
}

#[test]
fn killing() {
    killing_spares_the_exceptions(&version_1());
}

#[test]
fn sharing() {
    a_leaf_of_somebody_else_is_left_alone(&version_1());
}

#[test]
fn a_fork_bomb_is_killed() {
    // With and without the unified hierarchy's cgroup.kill.
    for unified_too in [false, true] {
        let cgroup = Made::new(&version_1(), "bomb");
        cgroup
            .apply(&resources(
                r#"{"pids": {"limit": 300}, "memory": {"limit": 268435456}}"#,
            ))
            .unwrap();
        let child = run(&cgroup, unified_too, fork_bomb);
        until("the bomb is at its limit", || {
            cgroup.pids().unwrap().len() > 200
        });
        let started = Instant::now();
        cgroup.kill(libc::SIGKILL, &[]).unwrap();
        assert_eq!(child.status(), 128 + libc::SIGKILL as u32);
        cgroup.remove(SOON).unwrap();
        println!("bomb ({unified_too}): gone after {:?}", started.elapsed());
        assert!(exists(cgroup.dirs()).is_empty());
    }
}

/// Not a check of correctness but of the order of magnitude: a cgroup is on
/// the way of every container's start.
#[test]
fn making_and_removing_is_quick() {
    let h = version_1();
    let mut times = Vec::new();
    for _ in 0..30 {
        let path = name("time");
        let started = Instant::now();
        let cgroup = Cgroup::create(&h, &path).unwrap();
        let made = started.elapsed();
        cgroup.attach().unwrap();
        let attach = started.elapsed() - made;
        let started = Instant::now();
        cgroup.stats().unwrap();
        let stats = started.elapsed();
        let started = Instant::now();
        cgroup.remove(SOON).unwrap();
        times.push((made, attach, stats, started.elapsed()));
    }
    times.sort();
    let median = times[times.len() / 2];
    println!("create, attach, stats, remove: {median:?}");
    assert!(median.0 < Duration::from_millis(50));
}

/// Zeroed by the loader and without a page until something is written.
static HOARD: [AtomicU8; 64 << 20] = [const { AtomicU8::new(0) }; 64 << 20];

/// Touches memory until the kernel ends it.
fn hog() -> i32 {
    for byte in HOARD.iter().step_by(1024) {
        byte.store(1, Ordering::Relaxed);
    }
    0
}

#[test]
fn an_oom_kill_is_told_to_its_own_cgroup_only() {
    let h = version_1();
    let path = name("oom");
    let pod = Made(Cgroup::create(&h, &path).unwrap());
    let sibling = Made(Cgroup::create(&h, &format!("{path}/sibling")).unwrap());
    let victim = Made(Cgroup::create(&h, &format!("{path}/victim")).unwrap());
    pod.apply(&resources(
        r#"{"memory": {"limit": 16777216, "swap": 16777216}}"#,
    ))
    .unwrap();
    let (hears, deaf) = (victim.oom_watch().unwrap(), sibling.oom_watch().unwrap());
    let bystander = run(&sibling, false, sleeper);
    assert!(!hears.drain());
    let child = run(&victim, false, hog);
    assert_eq!(child.status(), 128 + libc::SIGKILL as u32);
    assert!(readable(&hears));
    assert!(hears.drain());
    assert!(!hears.drain(), "told once");
    // The shortage was the pod's: the sibling's watch is woken, and says no.
    assert!(readable(&deaf));
    assert!(!deaf.drain());
    assert!(!readable(&deaf));
    let Stats::V1(stats) = victim.stats().unwrap() else {
        panic!("not version 1's numbers");
    };
    assert_eq!(stats.memory_oom_control.oom_kill, 1);
    drop(bystander);
    // Removal wakes the watch too.
    sibling.remove(SOON).unwrap();
    until("the watch is woken", || readable(&deaf));
    assert!(!deaf.drain());
    victim.remove(SOON).unwrap();
}

fn readable(watch: &crate::OomWatch) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(watch, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).unwrap() == 1
}

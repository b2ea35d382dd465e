//! The unified hierarchy. This host's has few controllers: what needs others is
//! refused, and says so.

use super::*;
use crate::Stats;

#[test]
fn a_child_is_born_inside() {
    let cgroup = Made::new(&unified(), "born");
    assert!(cgroup.unified_dir().unwrap().is_none());
    let child = run(&cgroup, false, sleeper);
    assert_eq!(cgroup.pids().unwrap(), [child.pid]);
    let Stats::V2(stats) = cgroup.stats().unwrap() else {
        panic!("not version 2's numbers");
    };
    // The core counts processor time without the controller.
    until("it used the processor", || match cgroup.stats().unwrap() {
        Stats::V2(s) => s.cpu.usage_usec > 0,
        Stats::V1(_) => false,
    });
    assert_eq!(stats.memory_usage_limit, u64::MAX);
    cgroup.kill(libc::SIGKILL, &[]).unwrap();
    assert_eq!(child.status(), 128 + libc::SIGKILL as u32);
}

#[test]
fn controllers_are_enabled_all_the_way_down_or_named() {
    let host = unified();
    let root = host.mounts()[0].point.clone();
    let cgroup = Made(Cgroup::create(&host, &format!("{}/x/y", name("enable"))).unwrap());
    let leaf = cgroup.dirs().last().unwrap().clone();
    let available = read(&root, "cgroup.controllers");
    let enabled = read(&leaf, "cgroup.controllers");
    for controller in ["cpu", "memory", "pids", "hugetlb", "io"] {
        let has = |list: &str| list.split(' ').any(|c| c == controller);
        assert_eq!(has(&available), has(&enabled), "{controller}");
        if has(&enabled) {
            continue;
        }
        let json = match controller {
            "cpu" => r#"{"cpu": {"shares": 2}}"#,
            "memory" => r#"{"memory": {"limit": 1048576}}"#,
            "pids" => r#"{"pids": {"limit": 5}}"#,
            _ => continue,
        };
        let error = cgroup.apply(&resources(json)).unwrap_err().to_string();
        let want = format!("the {controller} controller is not enabled in cgroup {leaf:?}");
        assert!(error.contains(&want), "{error}");
    }
    if enabled.split(' ').any(|c| c == "hugetlb") {
        let json = r#"{"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]}"#;
        cgroup.apply(&resources(json)).unwrap();
        assert_eq!(read(&leaf, "hugetlb.2MB.max"), "4194304");
        let json = r#"{"unified": {"hugetlb.2MB.max": "2097152"}}"#;
        cgroup.apply(&resources(json)).unwrap();
        assert_eq!(read(&leaf, "hugetlb.2MB.max"), "2097152");
        let Stats::V2(stats) = cgroup.stats().unwrap() else {
            panic!("not version 2's numbers");
        };
        let huge = stats.hugetlb.iter().find(|h| h.pagesize == "2MB").unwrap();
        assert_eq!((huge.usage, huge.max), (0, 2_097_152));
    }
}

#[test]
fn what_cannot_be_had_is_named() {
    let cgroup = Made::new(&unified(), "refused");
    for (json, want) in [
        (
            r#"{"unified": {"cgroup.procs": "0"}}"#,
            "linux.resources.unified.\"cgroup.procs\" = \"0\": a file of the cgroup core",
        ),
        (
            r#"{"unified": {"hugetlb.none": "0"}}"#,
            "linux.resources.unified.hugetlb.none = \"0\": ",
        ),
        (
            r#"{"cpu": {"realtimeRuntime": 5}}"#,
            "linux.resources.cpu.realtimeRuntime = 5: cgroup v2 has no realtime bandwidth",
        ),
        (
            r#"{"memory": {"disableOOMKiller": true}}"#,
            "linux.resources.memory.disableOOMKiller = true: ",
        ),
        (
            r#"{"memory": {"swap": 5}}"#,
            "linux.resources.memory.swap = 5: ",
        ),
        (
            r#"{"network": {"classID": 7}}"#,
            "linux.resources.network = classID 7: ",
        ),
    ] {
        let error = cgroup.apply(&resources(json)).unwrap_err().to_string();
        assert!(error.starts_with(want), "{json}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    if !cgroup.dirs()[0].join("memory.events").exists() {
        let error = cgroup.oom_watch().unwrap_err().to_string();
        assert!(
            error.contains("the memory controller is not enabled"),
            "{error}"
        );
    }
}

#[test]
fn devices() {
    devices_follow_the_rules(&unified());
}

#[test]
fn one_device_program_stays_after_updates() {
    let cgroup = Made::new(&unified(), "programs");
    for _ in 0..70 {
        cgroup.apply(&rules(DENY_ALL_BUT_NULL)).unwrap();
    }
    let Attach::V2(dir) = cgroup.attach().unwrap() else {
        panic!("not version 2");
    };
    assert_eq!(casemate_sys::bpf::device_programs(&dir).unwrap().len(), 1);
    // As many rules as are taken pass the kernel's verifier.
    let one = r#"{"allow": true, "type": "b", "major": 4294967295, "minor": 9, "access": "rw"}"#;
    let many = vec![one; 1024].join(",");
    cgroup.apply(&rules(&format!("[{many}]"))).unwrap();
    assert_eq!(run(&cgroup, false, open_devices).status(), 0);
}

#[test]
fn freezing() {
    freezing_stops_and_thawing_continues(&unified());
    a_frozen_cgroup_can_be_killed(&unified());
}

#[test]
fn killing() {
    killing_spares_the_exceptions(&unified());
}

#[test]
fn sharing() {
    a_leaf_of_somebody_else_is_left_alone(&unified());
}

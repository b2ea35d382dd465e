//! Limits, their changes, and what is measured.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, leaks};
use k8s_cri::v1::*;

use super::Cri;
use super::config::{container, resources};

crate::cri_tests![
    c084_c085_out_of_memory_is_reported,
    c079_update,
    c081_c082_stats,
    c134_oom_score,
];

/// The value of the first of these files in a container's cgroup.
fn limit(id: &str, names: &[&str]) -> Result<String, Stop> {
    for dir in leaks::cgroups_with(id) {
        for name in names {
            let path = PathBuf::from(&dir).join(name);
            if let Ok(text) = fs::read_to_string(&path) {
                return Ok(text.trim().to_owned());
            }
        }
    }
    fail(format!("none of {names:?} in a cgroup of {id}"))
}

fn c084_c085_out_of_memory_is_reported(cri: &Cri) -> Outcome {
    let pod = cri.pod("oom")?;
    let bystander = pod.sleeper("bystander")?;
    let mut config = container("hog", &["/bin/tail", "/dev/zero"]);
    resources(&mut config).memory_limit_in_bytes = 32 << 20;
    let id = pod.run(config)?;
    let status = pod.ended(&id)?;
    ensure_eq!(status.exit_code, 137, "exit code of {status:?}");
    ensure_eq!(status.reason, "OOMKilled", "reason of {status:?}");
    let other = pod.status(&bystander)?;
    ensure_eq!(other.reason, "", "reason of the container beside it");
    pod.remove()
}

fn c079_update(cri: &Cri) -> Outcome {
    let pod = cri.pod("update")?;
    let mut config = container("app", &["/bin/probe", "sleep"]);
    resources(&mut config).memory_limit_in_bytes = 64 << 20;
    resources(&mut config).cpu_period = 100_000;
    resources(&mut config).cpu_quota = 50_000;
    let id = pod.run(config)?;
    let memory = ["memory.limit_in_bytes", "memory.max"];
    ensure_eq!(
        limit(&id, &memory)?,
        (64 << 20).to_string(),
        "memory at first"
    );
    let wanted = LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        cpu_period: 100_000,
        cpu_quota: 20_000,
        ..Default::default()
    };
    let request = UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(wanted),
        ..Default::default()
    };
    cri.call("UpdateContainerResources", async |mut c| {
        c.update_container_resources(request).await
    })?;
    ensure_eq!(limit(&id, &memory)?, (96 << 20).to_string(), "memory");
    let quota = limit(&id, &["cpu.cfs_quota_us", "cpu.max"])?;
    ensure!(quota == "20000" || quota == "20000 100000", "quota {quota}");
    // A limit below what is used is refused or pushed down to; never a crash.
    ensure_eq!(pod.exec_sh(&id, "echo lives")?, "lives\n", "output");
    pod.remove()
}

fn c081_c082_stats(cri: &Cri) -> Outcome {
    let pod = cri.pod("stats")?;
    let script = "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done; exec /bin/probe sleep";
    let id = pod.run(container("app", &["/bin/sh", "-c", script]))?;
    let one = || -> casemate_tests::Result<(u64, u64)> {
        let request = ContainerStatsRequest {
            container_id: id.clone(),
        };
        let call = cri.call("ContainerStats", async |mut c| {
            c.container_stats(request).await
        });
        let stats = call?.stats.unwrap_or_default();
        let cpu = stats.cpu.unwrap_or_default().usage_core_nano_seconds;
        let memory = stats.memory.unwrap_or_default().working_set_bytes;
        Ok((
            cpu.unwrap_or_default().value,
            memory.unwrap_or_default().value,
        ))
    };
    until("used cpu and memory", Duration::from_secs(20), || {
        one().is_ok_and(|(cpu, memory)| cpu > 1_000_000 && memory > 10_000)
    })?;
    let first = one()?.0;
    ensure!(first < 60_000_000_000, "{first} ns of cpu");
    // One container that answered with something odd would fail the whole list.
    let request = ListContainerStatsRequest { filter: None };
    let all = cri.call("ListContainerStats", async |mut c| {
        c.list_container_stats(request).await
    })?;
    let ids: Vec<_> = all
        .stats
        .iter()
        .filter_map(|s| Some(s.attributes.as_ref()?.id.clone()))
        .collect();
    ensure!(ids.contains(&id), "{id} is not in {ids:?}");
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let stats = cri.call("PodSandboxStats", async |mut c| {
        c.pod_sandbox_stats(request).await
    })?;
    let linux = stats.stats.and_then(|s| s.linux).unwrap_or_default();
    let cpu = linux.cpu.and_then(|c| c.usage_core_nano_seconds);
    ensure!(cpu.unwrap_or_default().value > 0, "no cpu time of the pod");
    ensure!(linux.network.is_some(), "no network counters of the pod");
    pod.remove()
}

fn c134_oom_score(cri: &Cri) -> Outcome {
    let pod = cri.pod("score")?;
    let id = pod.sleeper("app")?;
    let score = pod.exec_sh(&id, "cat /proc/1/oom_score_adj /proc/self/oom_score_adj")?;
    ensure_eq!(score, "1000\n1000\n", "scores of init and an exec");
    pod.remove()
}

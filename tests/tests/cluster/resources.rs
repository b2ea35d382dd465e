//! Limits, their change in place, the class's overhead, and what the kubelet counts.

use std::fs;

use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq};
use serde_json::Value;

use crate::installer::installed;
use crate::kube::{Class, Cluster, SLOW, container_id, status, steady};

crate::cluster_trials![
    limits_change_in_place,
    overhead_is_of_the_pod,
    the_kubelet_counts
];

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  CLASS
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: IMAGE
    command: [sh, -c, 'httpd -p 8080; while :; do :; done']
    resources: {limits: {cpu: 100m, memory: 32Mi}}
    resizePolicy:
    - {resourceName: cpu, restartPolicy: NotRequired}
    - {resourceName: memory, restartPolicy: NotRequired}
";

const MIB: u64 = 1 << 20;

/// A number in a cgroup of the pod's; of its container's, if one is named.
fn number(cluster: &Cluster, pod: &Value, container: &str, file: &str) -> Option<u64> {
    let uid = pod["metadata"]["uid"].as_str()?;
    let leaf = container_id(pod, container);
    let path = format!("/kubepods/pod{uid}/{leaf}");
    cluster
        .node
        .cgroups(&path)
        .iter()
        .find_map(|dir| fs::read_to_string(dir.join(file)).ok())
        .and_then(|text| text.trim().parse().ok())
}

const MEMORY: &str = "memory.limit_in_bytes";
const QUOTA: &str = "cpu.cfs_quota_us";

fn limits_change_in_place() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    for class in Class::BOTH {
        let ns = class.namespace();
        cluster.apply(class, &POD.replace("NAME", "resized"))?;
        let first = cluster.ready(class, "resized")?;
        // Up, and down again.
        for (cpu, memory) in [(200, 64), (50, 40)] {
            let patch = format!(
                "{{\"spec\":{{\"containers\":[{{\"name\":\"c\",\"resources\":{{\
                 \"requests\":{{\"cpu\":\"{cpu}m\",\"memory\":\"{memory}Mi\"}},\
                 \"limits\":{{\"cpu\":\"{cpu}m\",\"memory\":\"{memory}Mi\"}}}}}}]}}}}"
            );
            let args = [
                "-n",
                ns,
                "patch",
                "pod",
                "resized",
                "--subresource=resize",
                "-p",
                &patch,
            ];
            cluster.must(&args, "")?;
            let pod = cluster.pod(class, "resized", "resized", |pod| {
                let now = &status(pod, "c")["resources"]["limits"];
                now["memory"] == format!("{memory}Mi") && now["cpu"] == format!("{cpu}m")
            })?;
            for (file, wanted) in [(MEMORY, memory * MIB), (QUOTA, cpu * 100)] {
                let found = number(&cluster, &pod, "c", file);
                ensure_eq!(found, Some(wanted), "{class:?}: {file}");
            }
            ensure_eq!(
                status(&pod, "c")["containerID"],
                status(&first, "c")["containerID"],
                "{class:?}: its container"
            );
            ensure_eq!(status(&pod, "c")["restartCount"], 0, "{class:?}: restarts");
        }
        if class == Class::Casemate {
            cluster.node.must(&["casemate", "posture", "resized"])?;
        }
        cluster.delete(class, "resized")?;
    }
    Ok(())
}

/// What RuntimeClass says that shim and agent need comes on top of the containers'.
fn overhead_is_of_the_pod() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    for (class, memory, cpu) in [(Class::Runc, 0, 0), (Class::Casemate, 3 * MIB, 100)] {
        cluster.apply(class, &POD.replace("NAME", "weighed"))?;
        let pod = cluster.ready(class, "weighed")?;
        for (container, file, wanted) in [
            ("c", MEMORY, 32 * MIB),
            ("", MEMORY, 32 * MIB + memory),
            ("c", QUOTA, 10_000),
            ("", QUOTA, 10_000 + cpu),
        ] {
            let found = number(&cluster, &pod, container, file);
            ensure_eq!(found, Some(wanted), "{class:?}: {file} of {container:?}");
        }
        cluster.delete(class, "weighed")?;
    }
    Ok(())
}

/// `kubectl top`, the autoscalers and the eviction of pods live by this.
fn the_kubelet_counts() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    for class in Class::BOTH {
        let ns = class.namespace();
        cluster.apply(class, &POD.replace("NAME", "counted"))?;
        let pod = cluster.ready(class, "counted")?;
        let ip = pod["status"]["podIP"].as_str().unwrap_or_default();
        let summary = || -> Result<Value, Stop> {
            // Something for its network to count.
            cluster.node.curl(&[&format!("http://{ip}:8080/")])?;
            let path = "/api/v1/nodes/node1/proxy/stats/summary";
            let said: Value = serde_json::from_str(&cluster.must(&["get", "--raw", path], "")?)?;
            let pods = said["pods"].as_array().cloned().unwrap_or_default();
            let own = pods
                .into_iter()
                .find(|pod| pod["podRef"]["name"] == "counted" && pod["podRef"]["namespace"] == ns);
            Ok(own.unwrap_or_default())
        };
        let mut seen = Value::Null;
        let counted = until("the kubelet to count", SLOW, || {
            seen = summary().unwrap_or_default();
            let container = &seen["containers"][0];
            [
                &seen["memory"]["workingSetBytes"],
                &seen["cpu"]["usageNanoCores"],
                &seen["network"]["rxBytes"],
                &seen["network"]["txBytes"],
                &seen["ephemeral-storage"]["usedBytes"],
                &seen["process_stats"]["process_count"],
                &container["memory"]["workingSetBytes"],
                &container["cpu"]["usageNanoCores"],
                &container["rootfs"]["usedBytes"],
            ]
            .iter()
            .all(|number| number.as_u64().is_some_and(|n| n > 0))
        });
        ensure!(counted.is_ok(), "{class:?}: {seen}");
        // A pod that does nothing but count is at its limit of a tenth of a CPU.
        let cores = seen["cpu"]["usageNanoCores"].as_u64().unwrap_or_default();
        ensure!(cores < 400_000_000, "{class:?}: {cores} nanocores: {seen}");
        cluster.delete(class, "counted")?;
    }
    Ok(())
}

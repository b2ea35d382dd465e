//! A pod's life: its probes and hooks, init containers and sidecars, how it ends and
//! what is told of that; and that it outlives the services of its node.

use std::time::Duration;

use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, fail};
use casemate_tests::{ensure, ensure_eq};
use serde_json::Value;

use crate::installer::installed;
use crate::kube::{Class, SLOW, alone, status, steady};

crate::cluster_trials![
    probes_and_hooks,
    liveness_restarts,
    ends_are_told,
    restarts_back_off,
    jobs_complete,
    pods_outlive_kubelet_and_containerd,
];

const WHOLE: &str = "
apiVersion: v1
kind: Pod
metadata: {name: whole}
spec:
  CLASS
  terminationGracePeriodSeconds: 20
  initContainers:
  - {name: first, image: IMAGE, command: [sh, -c, 'echo init >/e/init'], volumeMounts: [{name: e, mountPath: /e}]}
  - name: side
    image: IMAGE
    restartPolicy: Always
    command: [sh, -c, \"trap 'echo side-ends >>/e/order; exit' TERM; echo side-begins >>/e/order; while :; do sleep 0.1; done\"]
    startupProbe: {exec: {command: [grep, side-begins, /e/order]}, periodSeconds: 1}
    volumeMounts: [{name: e, mountPath: /e}]
  containers:
  - name: c
    image: IMAGE
    command: [sh, -c, \"trap 'echo main-ends >>/e/order; exit 7' TERM; echo main-begins >>/e/order; httpd -p 8080 -h /e; while :; do sleep 0.1; done\"]
    startupProbe: {exec: {command: [cat, /e/init]}, periodSeconds: 1}
    readinessProbe: {httpGet: {path: /ready, port: 8080}, periodSeconds: 1}
    livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
    lifecycle:
      postStart: {exec: {command: [sh, -c, 'echo post >>/e/order']}}
      preStop: {exec: {command: [sh, -c, 'echo pre >>/e/order']}}
    volumeMounts: [{name: e, mountPath: /e}]
  - name: reader
    image: IMAGE
    command: [sh, -c, \"trap 'sleep 2; cat /e/order >/dev/termination-log; exit 0' TERM; while :; do sleep 0.1; done\"]
    volumeMounts: [{name: e, mountPath: /e}]
  volumes: [{name: e, emptyDir: {}}]
";

fn probes_and_hooks() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    for class in Class::BOTH {
        let ns = class.namespace();
        cluster.apply(class, WHOLE)?;
        // Up, and not ready before its page is there.
        let pod = cluster.pod(class, "whole", "up", |pod| {
            status(pod, "c")["started"] == true && status(pod, "reader")["started"] == true
        })?;
        ensure_eq!(
            status(&pod, "c")["ready"],
            false,
            "{class:?}: ready without its page"
        );
        cluster.exec_ok(class, "whole", "touch /e/ready")?;
        let pod = cluster.ready(class, "whole")?;
        ensure_eq!(
            status(&pod, "first")["state"]["terminated"]["reason"],
            "Completed",
            "{class:?}: init container"
        );
        ensure_eq!(status(&pod, "side")["ready"], true, "{class:?}: sidecar");
        cluster.exec_ok(class, "whole", "rm /e/ready")?;
        cluster.pod(class, "whole", "unready", |pod| {
            status(pod, "c")["ready"] == false
        })?;
        // The last state is read before it goes: a finalizer keeps the object.
        let keep = r#"{"metadata":{"finalizers":["casemate.test/keep"]}}"#;
        cluster.must(&["-n", ns, "patch", "pod", "whole", "-p", keep], "")?;
        cluster.must(&["-n", ns, "delete", "pod", "whole", "--wait=false"], "")?;
        let pod = cluster.pod(class, "whole", "ended", |pod| {
            ["c", "reader", "side"]
                .iter()
                .all(|name| status(pod, name)["state"]["terminated"].is_object())
        })?;
        let end = &status(&pod, "c")["state"]["terminated"];
        ensure_eq!(end["exitCode"], 7, "{class:?}: {end}");
        ensure_eq!(status(&pod, "c")["restartCount"], 0, "{class:?}: {pod}");
        let end = &status(&pod, "side")["state"]["terminated"];
        ensure_eq!(end["exitCode"], 0, "{class:?}: the sidecar: {end}");
        let told = &status(&pod, "reader")["state"]["terminated"]["message"];
        let order: Vec<&str> = told.as_str().unwrap_or_default().lines().collect();
        let place = |word: &str| order.iter().position(|line| *line == word);
        ensure!(
            order.first() == Some(&"side-begins")
                && place("post").is_some()
                && place("main-begins").is_some()
                && place("pre").is_some()
                && place("pre") < place("main-ends")
                && place("side-ends").is_none(),
            "{class:?}: {order:?}"
        );
        let free = r#"{"metadata":{"finalizers":null}}"#;
        cluster.must(&["-n", ns, "patch", "pod", "whole", "-p", free], "")?;
    }
    Ok(())
}

fn liveness_restarts() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: ill}
spec:
  CLASS
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: IMAGE
    command: [sh, -c, 'echo begun; touch /tmp/well; sleep infinity']
    livenessProbe: {exec: {command: [cat, /tmp/well]}, periodSeconds: 1, failureThreshold: 1, initialDelaySeconds: 1}
";
    for class in Class::BOTH {
        cluster.apply(class, pod)?;
        cluster.ready(class, "ill")?;
        cluster.exec_ok(class, "ill", "rm /tmp/well")?;
        let pod = cluster.pod(class, "ill", "restarted", |pod| {
            status(pod, "c")["restartCount"].as_u64() == Some(1)
                && status(pod, "c")["state"]["running"].is_object()
        })?;
        let before = &status(&pod, "c")["lastState"]["terminated"];
        ensure_eq!(before["exitCode"], 137, "{class:?}: {before}");
        let args = ["-n", class.namespace(), "logs", "ill", "--previous"];
        ensure_eq!(
            cluster.must(&args, "")?.trim(),
            "begun",
            "{class:?}: what it said before"
        );
        cluster.delete(class, "ill")?;
    }
    Ok(())
}

const ENDS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: words}
spec:
  CLASS
  restartPolicy: Never
  containers:
  - {name: file, image: IMAGE, command: [sh, -c, 'echo last words >/dev/termination-log; exit 4']}
  - {name: log, image: IMAGE, terminationMessagePolicy: FallbackToLogsOnError, command: [sh, -c, 'echo in the log; exit 5']}
---
apiVersion: v1
kind: Pod
metadata: {name: greedy}
spec:
  CLASS
  restartPolicy: Never
  containers:
  - {name: c, image: IMAGE, command: [tail, /dev/zero], resources: {limits: {memory: 24Mi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: greedy-together}
spec:
  CLASS
  restartPolicy: Never
  resources: {limits: {memory: 40Mi}}
  containers:
  - {name: c, image: IMAGE, command: [tail, /dev/zero]}
---
apiVersion: v1
kind: Pod
metadata: {name: late}
spec:
  CLASS
  restartPolicy: Never
  activeDeadlineSeconds: 2
  terminationGracePeriodSeconds: 1
  containers:
  - {name: c, image: IMAGE, command: [sleep, infinity]}
---
apiVersion: v1
kind: Pod
metadata: {name: nothing}
spec:
  CLASS
  restartPolicy: Never
  containers:
  - {name: c, image: IMAGE, command: [/no/such/program]}
---
apiVersion: v1
kind: Pod
metadata: {name: begins-badly}
spec:
  CLASS
  restartPolicy: Never
  initContainers:
  - {name: i, image: IMAGE, command: [sh, -c, 'exit 3']}
  containers:
  - {name: c, image: IMAGE, command: ['true']}
";

fn ends_are_told() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    for class in Class::BOTH {
        cluster.apply(class, ENDS)?;
        let end = |pod: &str, name: &str| -> Result<Value, casemate_tests::skip::Stop> {
            let pod = cluster.ended(class, pod)?;
            Ok(status(&pod, name)["state"]["terminated"].clone())
        };
        for (pod, name, reason, code, message) in [
            ("words", "file", "Error", 4, "last words\n"),
            ("words", "log", "Error", 5, "in the log\n"),
            ("greedy", "c", "OOMKilled", 137, ""),
            ("greedy-together", "c", "OOMKilled", 137, ""),
            ("late", "c", "Error", 137, ""),
            ("nothing", "c", "StartError", 128, "/no/such/program"),
            ("begins-badly", "i", "Error", 3, ""),
        ] {
            let told = end(pod, name)?;
            let said = told["message"].as_str().unwrap_or_default();
            ensure!(
                told["reason"] == reason && told["exitCode"] == code && said.contains(message),
                "{class:?}: {pod} {name}: {told}"
            );
        }
        let late = cluster.ended(class, "late")?;
        ensure_eq!(late["status"]["reason"], "DeadlineExceeded", "{class:?}");
        for pod in [
            "words",
            "greedy",
            "greedy-together",
            "late",
            "nothing",
            "begins-badly",
        ] {
            cluster.delete(class, pod)?;
        }
    }
    Ok(())
}

fn restarts_back_off() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: loop}
spec:
  CLASS
  containers:
  - {name: c, image: IMAGE, command: [sh, -c, 'exit 1']}
";
    for class in Class::BOTH {
        cluster.apply(class, pod)?;
        cluster.pod(class, "loop", "restarted three times", |pod| {
            status(pod, "c")["restartCount"]
                .as_u64()
                .is_some_and(|n| n >= 3)
        })?;
        cluster.pod(class, "loop", "in CrashLoopBackOff", |pod| {
            status(pod, "c")["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        })?;
        cluster.delete(class, "loop")?;
    }
    Ok(())
}

fn jobs_complete() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    let job = "
apiVersion: batch/v1
kind: Job
metadata: {name: job}
spec:
  completions: 3
  parallelism: 3
  backoffLimit: 4
  completionMode: Indexed
  template:
    spec:
      CLASS
      restartPolicy: Never
      containers:
      - {name: c, image: IMAGE, command: [sh, -c, 'echo I am $JOB_COMPLETION_INDEX']}
";
    for class in Class::BOTH {
        let ns = class.namespace();
        cluster.apply(class, job)?;
        until("the job to complete", SLOW, || {
            let job = cluster.object(ns, "job", "job").unwrap_or_default();
            job["status"]["succeeded"] == 3
        })?;
        let args = ["-n", ns, "logs", "-l", "job-name=job"];
        let said = cluster.must(&args, "")?;
        for index in 0..3 {
            ensure!(said.contains(&format!("I am {index}")), "{class:?}: {said}");
        }
        cluster.must(&["-n", ns, "delete", "job", "job", "--wait"], "")?;
    }
    Ok(())
}

/// Restarted under living pods: they go on, and everything that is asked of them works.
fn pods_outlive_kubelet_and_containerd() -> Outcome {
    let cluster = installed()?;
    let _alone = alone();
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: lasting}
spec:
  CLASS
  terminationGracePeriodSeconds: 5
  containers:
  - name: c
    image: IMAGE
    command: [sh, -c, \"trap 'exit 9' TERM; n=0; while :; do echo $n; n=$((n+1)); sleep 0.2; done\"]
    readinessProbe: {exec: {command: ['true']}, periodSeconds: 1}
";
    for class in Class::BOTH {
        cluster.apply(class, pod)?;
    }
    let mut ids = Vec::new();
    for class in Class::BOTH {
        let pod = cluster.ready(class, "lasting")?;
        ids.push(status(&pod, "c")["containerID"].clone());
    }
    let count = |class: Class| -> Result<u64, casemate_tests::skip::Stop> {
        let args = ["-n", class.namespace(), "logs", "lasting", "--tail=1"];
        let said = cluster.must(&args, "")?;
        Ok(said.trim().parse().unwrap_or_default())
    };
    for service in ["kubelet", "containerd"] {
        let mut before = Vec::new();
        for class in Class::BOTH {
            before.push(count(class)?);
        }
        cluster.node.systemctl("restart", service)?;
        for (class, before) in Class::BOTH.into_iter().zip(before) {
            let mut now = 0;
            until("the log to go on", SLOW, || {
                now = count(class).unwrap_or_default();
                std::thread::sleep(Duration::from_millis(100));
                now > before + 5
            })?;
            until("exec to work", SLOW, || {
                cluster
                    .exec(class, "lasting", "exit 5")
                    .is_ok_and(|said| said.err().contains("exit code 5"))
            })?;
        }
    }
    for (class, id) in Class::BOTH.into_iter().zip(ids) {
        let pod = cluster.ready(class, "lasting")?;
        let now = status(&pod, "c");
        ensure_eq!(now["restartCount"], 0, "{class:?}: {now}");
        ensure_eq!(now["containerID"], id, "{class:?}: its container");
        if class == Class::Casemate {
            cluster.node.must(&["casemate", "posture", "lasting"])?;
        }
        // How it ends is still seen.
        let keep = r#"{"metadata":{"finalizers":["casemate.test/keep"]}}"#;
        let ns = class.namespace();
        cluster.must(&["-n", ns, "patch", "pod", "lasting", "-p", keep], "")?;
        cluster.must(&["-n", ns, "delete", "pod", "lasting", "--wait=false"], "")?;
        let pod = cluster.pod(class, "lasting", "ended", |pod| {
            status(pod, "c")["state"]["terminated"].is_object()
        })?;
        let code = &status(&pod, "c")["state"]["terminated"]["exitCode"];
        if code != 9 {
            return fail(format!("{class:?}: ended with {code}"));
        }
        let free = r#"{"metadata":{"finalizers":null}}"#;
        cluster.must(&["-n", ns, "patch", "pod", "lasting", "-p", free], "")?;
    }
    Ok(())
}

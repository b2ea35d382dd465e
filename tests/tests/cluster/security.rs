//! securityContext in its variants, user namespaces, and what an author is told of a
//! pod that is refused.

use std::fs;

use casemate_tests::skip::{Outcome, Stop, skip};
use casemate_tests::{ensure, ensure_eq};

use crate::installer::installed;
use crate::kube::{Class, steady};

crate::cluster_trials![
    security_contexts,
    user_namespaces,
    refusals_reach_the_author,
];

const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: secure}
spec:
  CLASS
  terminationGracePeriodSeconds: 0
  securityContext:
    runAsUser: 1000
    runAsGroup: 3000
    fsGroup: 2000
    supplementalGroups: [4000]
    seccompProfile: {type: RuntimeDefault}
    sysctls: [{name: net.ipv4.ip_unprivileged_port_start, value: '77'}]
  containers:
  - name: c
    image: IMAGE
    command: [sleep, infinity]
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: e, mountPath: /e}]
  volumes: [{name: e, emptyDir: {}}]
---
apiVersion: v1
kind: Pod
metadata: {name: capable}
spec:
  CLASS
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: IMAGE
    command: [sleep, infinity]
    securityContext: {capabilities: {drop: [ALL], add: [NET_BIND_SERVICE, CHOWN]}, seccompProfile: {type: Unconfined}}
---
apiVersion: v1
kind: Pod
metadata: {name: local}
spec:
  CLASS
  terminationGracePeriodSeconds: 0
  securityContext: {runAsUser: 1000, supplementalGroupsPolicy: Strict, supplementalGroups: [5000]}
  containers:
  - name: c
    image: IMAGE
    command: [sleep, infinity]
    securityContext: {seccompProfile: {type: Localhost, localhostProfile: nomkdir.json}}
";

fn security_contexts() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    let profiles = cluster.node.path("/var/lib/kubelet/seccomp");
    fs::create_dir_all(&profiles)?;
    let profile = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    });
    fs::write(profiles.join("nomkdir.json"), profile.to_string())?;
    // containerd before 2.0 knows no policy for groups, and merges those of the image.
    let (pods, groups) = match cluster.generation.version() < "2.0" {
        true => {
            let pods = PODS.replace("supplementalGroupsPolicy: Strict, ", "");
            (pods, "1000 2000 5000")
        }
        false => (PODS.to_owned(), "1000 5000"),
    };
    let status = |field: &str| format!("grep '^{field}:' /proc/self/status | cut -f2");
    for class in Class::BOTH {
        cluster.apply(class, &pods)?;
        for pod in ["secure", "capable", "local"] {
            cluster.ready(class, pod)?;
        }
        for (pod, script, wanted) in [
            (
                "secure",
                "id -u; id -g; id -G".to_owned(),
                "1000\n3000\n3000 2000 4000",
            ),
            (
                "secure",
                "touch /e/x; stat -c '%u %g' /e/x; stat -c '%g %A' /e".to_owned(),
                "1000 2000\n2000 drwxrwsrwx",
            ),
            (
                "secure",
                "touch /x 2>&1 | grep -o 'Read-only file system'".to_owned(),
                "Read-only file system",
            ),
            ("secure", status("CapBnd"), "0000000000000000"),
            ("secure", status("NoNewPrivs"), "1"),
            ("secure", status("Seccomp"), "2"),
            (
                "secure",
                "cat /proc/sys/net/ipv4/ip_unprivileged_port_start".to_owned(),
                "77",
            ),
            ("capable", status("CapBnd"), "0000000000000401"),
            ("capable", status("CapEff"), "0000000000000401"),
            (
                "local",
                "mkdir /tmp/x 2>&1 | grep -o 'Operation not permitted'".to_owned(),
                "Operation not permitted",
            ),
            ("local", "id -G".to_owned(), groups),
        ] {
            let said = cluster.exec(class, pod, &script)?;
            let (out, err) = (said.out(), said.err());
            // The order of supplementary groups is nobody's promise.
            let sorted = |text: &str| -> Vec<Vec<String>> {
                let line = |line: &str| {
                    let mut words: Vec<_> = line.split(' ').map(str::to_owned).collect();
                    words.sort();
                    words
                };
                text.trim().lines().map(line).collect()
            };
            ensure_eq!(
                sorted(&out),
                sorted(wanted),
                "{class:?}: {pod}: {script}: {err}"
            );
        }
        if class == Class::Casemate {
            // Unconfined is so as far as the pod goes: the sandbox's own filter is there.
            let said = cluster.exec_ok(class, "capable", &status("Seccomp"))?;
            ensure_eq!(said.trim(), "2", "seccomp of an unconfined container");
        }
        for pod in ["secure", "capable", "local"] {
            cluster.delete(class, pod)?;
        }
    }
    Ok(())
}

/// Without runc: Debian's is too old for it.
fn user_namespaces() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    if cluster.generation.version() < "2.0" {
        return skip("containerd before 2.0 doesn't tell the kubelet that a runtime has them");
    }
    let class = Class::Casemate;
    cluster.apply(
        class,
        "
apiVersion: v1
kind: ConfigMap
metadata: {name: userns}
data: {k: v}
---
apiVersion: v1
kind: Pod
metadata: {name: userns}
spec:
  CLASS
  hostUsers: false
  terminationGracePeriodSeconds: 0
  securityContext: {fsGroup: 2000}
  containers:
  - name: c
    image: IMAGE
    command: [sleep, infinity]
    securityContext: {procMount: Unmasked}
    volumeMounts: [{name: e, mountPath: /e}, {name: m, mountPath: /m}]
  volumes: [{name: e, emptyDir: {}}, {name: m, configMap: {name: userns}}]
",
    )?;
    let pod = cluster.ready(class, "userns")?;
    let said = cluster.exec_ok(
        class,
        "userns",
        "id -u; touch /e/x; stat -c '%u %g' /e/x; cat /m/k",
    )?;
    ensure_eq!(said.trim(), "0\n0 2000\nv", "as its root");
    // On the node the file is its root's of the kubelet's choice.
    let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
    let path = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/e/x");
    let owner = cluster.node.must(&["stat", "-c", "%u", &path])?;
    let inside = cluster.node.must(&["casemate", "posture", "userns"]);
    ensure!(inside.is_ok(), "posture: {inside:?}");
    ensure_eq!(owner.trim(), "0", "whose a file on an id-mapped volume is");
    cluster.delete(class, "userns")
}

/// At admission by the policies; past those, by the node, as events of the pod.
fn refusals_reach_the_author() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    // A class that the policies don't know, with the same handler.
    let class = "
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: past-the-policies}
handler: casemate
";
    cluster.must(&["apply", "-f", "-"], class)?;
    let pod = |name: &str, more: &str, container: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  \
             runtimeClassName: past-the-policies\n  restartPolicy: Never\n{more}  containers:\n  \
             - name: tool\n    image: IMAGE\n    command: [sleep, infinity]\n{container}"
        )
    };
    let privileged = "    securityContext: {privileged: true}\n";
    let admin = "    securityContext: {capabilities: {add: [SYS_ADMIN]}}\n";
    let mount = "    volumeMounts: [{name: h, mountPath: /h}]\n";
    let volume = "  volumes: [{name: h, hostPath: {path: /etc}}]\n";
    for (name, more, container, words) in [
        (
            "privileged",
            "",
            privileged,
            "casemate: privileged containers are refused",
        ),
        ("host-pid", "  hostPID: true\n", "", "casemate: "),
        (
            "capability",
            "",
            admin,
            "these capabilities are refused in this sandbox: CAP_SYS_ADMIN",
        ),
        (
            "host-path",
            volume,
            mount,
            "this path of the node is refused as a volume: /etc",
        ),
    ] {
        cluster.apply(Class::Casemate, &pod(name, more, container))?;
        let args = ["-n", "casemate", "describe", "pod", name];
        let mut said = String::new();
        casemate_tests::run::until("the refusal", crate::kube::SLOW, || {
            said = cluster.must(&args, "").unwrap_or_default();
            said.contains(words)
        })
        .map_err(|e| Stop::Fail(format!("{name}: {e}: {said}")))?;
        cluster.delete(Class::Casemate, name)?;
    }
    cluster.must(&["delete", "runtimeclass", "past-the-policies"], "")?;
    Ok(())
}

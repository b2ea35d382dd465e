//! Volumes: what a pod gets to see, and what becomes of it when the object changes.

use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, skip};
use casemate_tests::{ensure, ensure_eq};

use crate::installer::installed;
use crate::kube::{BUSYBOX, Class, SLOW, steady};

crate::cluster_trials![
    volumes_of_every_kind,
    volumes_follow_their_objects,
    image_as_volume
];

const OBJECTS: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: NAME}
data: {k: first, f.conf: hello}
---
apiVersion: v1
kind: Secret
metadata: {name: NAME}
stringData: {pw: geheim}
---
apiVersion: v1
kind: Pod
metadata: {name: NAME, labels: {colour: red}}
spec:
  CLASS
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: IMAGE
    command: [sleep, infinity]
    env:
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: LIMIT, valueFrom: {resourceFieldRef: {resource: limits.memory}}}
    - {name: PW, valueFrom: {secretKeyRef: {name: NAME, key: pw}}}
    resources: {limits: {memory: 64Mi}}
    volumeMounts:
    - {name: empty, mountPath: /empty}
    - {name: empty, mountPath: /part, subPath: a/b}
    - {name: empty, mountPath: /part-of, subPathExpr: $(NODE)}
    - {name: empty, mountPath: /read, readOnly: true, recursiveReadOnly: IfPossible}
    - {name: memory, mountPath: /memory}
    - {name: map, mountPath: /map}
    - {name: map, mountPath: /etc/f.conf, subPath: f.conf}
    - {name: secret, mountPath: /secret}
    - {name: all, mountPath: /all}
    - {name: down, mountPath: /down}
  volumes:
  - {name: empty, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
  - {name: map, configMap: {name: NAME}}
  - {name: secret, secret: {secretName: NAME, defaultMode: 0400}}
  - name: all
    projected:
      sources:
      - configMap: {name: NAME}
      - secret: {name: NAME}
      - serviceAccountToken: {path: token, audience: somebody, expirationSeconds: 600}
  - {name: down, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}
";

fn volumes_of_every_kind() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    for class in Class::BOTH {
        cluster.apply(class, &OBJECTS.replace("NAME", "volumes"))?;
        cluster.ready(class, "volumes")?;
        for (script, wanted) in [
            ("echo $NODE $LIMIT $PW", "node1 67108864 geheim"),
            ("cat /map/k /etc/f.conf /secret/pw", "firsthellogeheim"),
            (
                "cat /all/k /all/pw; wc -c </all/token | grep -c '[0-9]\\{3\\}'",
                "firstgeheim1",
            ),
            ("cat /down/labels", "colour=\"red\""),
            ("echo x >/empty/x; cat /read/x", "x"),
            (
                "touch /part/y /part-of/z; ls /empty /empty/a/b /empty/node1",
                "/empty:\na\nnode1\nx\n\n/empty/a/b:\ny\n\n/empty/node1:\nz",
            ),
            (
                "touch /read/no 2>&1 | grep -o 'Read-only file system'",
                "Read-only file system",
            ),
            (
                "touch /map/no 2>&1 | grep -o 'Read-only file system'",
                "Read-only file system",
            ),
            ("df /memory | awk 'END { print $1, $2 }'", "tmpfs 8192"),
            (
                "dd if=/dev/zero of=/memory/x bs=1M count=9 2>&1 | grep -o 'No space left.*'",
                "No space left on device",
            ),
            ("stat -L -c %a /secret/pw", "400"),
            (
                "cut -c1-3 /var/run/secrets/kubernetes.io/serviceaccount/token",
                "eyJ",
            ),
            (
                "cat /var/run/secrets/kubernetes.io/serviceaccount/namespace",
                class.namespace(),
            ),
        ] {
            let said = cluster.exec(class, "volumes", script)?;
            let out = said.out();
            ensure_eq!(out.trim(), wanted, "{class:?}: {script}: {}", said.err());
        }
        cluster.delete(class, "volumes")?;
    }
    Ok(())
}

fn volumes_follow_their_objects() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    for class in Class::BOTH {
        let ns = class.namespace();
        cluster.apply(class, &OBJECTS.replace("NAME", "live"))?;
        cluster.ready(class, "live")?;
        // Also those that a long-lived process of it has open as a directory.
        let before = cluster.exec_ok(class, "live", "cat /map/k /all/pw /down/labels")?;
        ensure_eq!(before.trim(), "firstgeheimcolour=\"red\"", "{class:?}");
        let changes: [&[&str]; 3] = [
            &[
                "patch",
                "configmap",
                "live",
                "-p",
                r#"{"data":{"k":"second"}}"#,
            ],
            &[
                "patch",
                "secret",
                "live",
                "-p",
                r#"{"stringData":{"pw":"neu"}}"#,
            ],
            &["label", "--overwrite", "pod", "live", "colour=blue"],
        ];
        for change in changes {
            cluster.must(&[&["-n", ns], change].concat(), "")?;
        }
        let wanted = "secondsecondneuneucolour=\"blue\"";
        let mut said = String::new();
        let script = "cat /map/k /all/k /all/pw /secret/pw /down/labels";
        until("volumes to follow", SLOW, || {
            said = cluster.exec_ok(class, "live", script).unwrap_or_default();
            said.trim() == wanted
        })
        .map_err(|e| casemate_tests::skip::Stop::Fail(format!("{class:?}: {e}: {said}")))?;
        cluster.delete(class, "live")?;
    }
    Ok(())
}

/// An image as a volume, which containerd mounts in its own directory.
fn image_as_volume() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    if cluster.generation.version() < "2.1" {
        return skip("containerd before 2.1 has no images as volumes");
    }
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: image}
spec:
  CLASS
  terminationGracePeriodSeconds: 0
  containers:
  - {name: c, image: IMAGE, command: [sleep, infinity], volumeMounts: [{name: v, mountPath: /v}]}
  volumes: [{name: v, image: {reference: VOLUME}}]
";
    for class in Class::BOTH {
        cluster.apply(class, &pod.replace("VOLUME", BUSYBOX))?;
        cluster.ready(class, "image")?;
        let said = cluster.exec_ok(class, "image", "cmp /bin/probe /v/bin/probe && echo same")?;
        ensure_eq!(said.trim(), "same", "{class:?}");
        let said = cluster.exec(class, "image", "touch /v/x")?;
        ensure!(
            said.err().contains("Read-only file system"),
            "{class:?}: {}",
            said.err()
        );
        cluster.delete(class, "image")?;
    }
    Ok(())
}

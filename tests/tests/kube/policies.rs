//! What each policy lets in and what it refuses, and that it says why.

use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq};
use serde_json::{Value, json};
use std::time::Duration;

use crate::server::{Api, Who, api, changing, steady};

crate::kube_trials![
    pods_are_refused_for_what_nodes_refuse,
    pods_are_admitted_with_what_nodes_allow,
    pods_of_other_classes_are_left_alone,
    pods_without_settings_are_refused,
    settings_let_more_in,
    debug_containers_get_no_more_than_the_pod,
    namespaces_can_require_a_class,
    namespaces_can_give_a_class,
    tenants_pull_always,
    exec_is_refused_by_the_namespace,
];

/// Lays `patch` over `base`, as JSON merge patches (RFC 7396) do, but for null.
fn merge(base: &mut Value, patch: &Value) {
    match (base, patch) {
        (Value::Object(base), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(base.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (base, patch) => *base = patch.clone(),
    }
}

/// A pod of the class casemate with one container, changed.
fn pod(namespace: &str, patch: &Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "namespace": namespace},
        "spec": {
            "runtimeClassName": "casemate",
            "containers": [{"name": "c", "image": "i", "imagePullPolicy": "Always"}],
        },
    });
    merge(&mut pod, patch);
    pod
}

/// The one container's security context.
fn security(context: &Value) -> Value {
    json!({"spec": {"containers": [
        {"name": "c", "image": "i", "imagePullPolicy": "Always", "securityContext": context},
    ]}})
}

fn annotation(key: &str, value: &str) -> Value {
    json!({"metadata": {"annotations": {format!("casemate.io/{key}"): value}}})
}

fn host_path(path: &str) -> Value {
    json!({"spec": {"volumes": [{"name": "v", "hostPath": {"path": path}}]}})
}

fn sysctl(name: &str) -> Value {
    json!({"spec": {"securityContext": {"sysctls": [{"name": name, "value": "1"}]}}})
}

fn admitted(api: &Api, namespace: &str, patch: &Value) -> Result<Value, Stop> {
    match api.would_make(Who::Admin, &pod(namespace, patch))? {
        Ok(made) => Ok(made),
        Err(why) => fail(format!("{patch} is refused: {why}")),
    }
}

fn refused(api: &Api, namespace: &str, patch: &Value, why: &str) -> Outcome {
    match api.would_make(Who::Admin, &pod(namespace, patch))? {
        Ok(_) => fail(format!("{patch} is admitted")),
        Err(said) => {
            ensure!(said.contains(why), "{patch}: no {why:?} in {said}");
            Ok(())
        }
    }
}

fn pods_are_refused_for_what_nodes_refuse() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let _steady = steady();
    let device = json!({"spec": {
        "containers": [{"name": "c", "image": "i", "volumeDevices": [
            {"name": "v", "devicePath": "/dev/v"},
        ]}],
        "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "v"}}],
    }});
    let init = json!({"spec": {"initContainers": [
        {"name": "i", "image": "i", "securityContext": {"privileged": true}},
    ]}});
    for (patch, why) in [
        (
            security(&json!({"privileged": true})),
            "(c: securityContext.privileged)",
        ),
        (init, "(i: securityContext.privileged)"),
        (json!({"spec": {"hostPID": true}}), "spec.hostPID"),
        (json!({"spec": {"hostIPC": true}}), "spec.hostIPC"),
        (json!({"spec": {"hostNetwork": true}}), "spec.hostNetwork"),
        (host_path("/data"), "the hostPath /data is in no list"),
        (host_path("/"), "the hostPath / is in no list"),
        (
            security(&json!({"capabilities": {"add": ["SYS_ADMIN", "CHOWN"]}})),
            "(SYS_ADMIN)",
        ),
        (
            security(&json!({"capabilities": {"add": ["ALL"]}})),
            "(ALL)",
        ),
        (
            sysctl("net.core.somaxconn"),
            "unsafe sysctls (net.core.somaxconn)",
        ),
        (device, "volumeDevices"),
        (
            annotation("exce", "deny"),
            "there is no annotation casemate.io/exce",
        ),
        (annotation("exec", "no"), "casemate.io/exec is not"),
        (
            annotation("profile", "Strict!"),
            "casemate.io/profile is not",
        ),
        (
            annotation("service-account-token", "allow"),
            "is not withhold",
        ),
        (annotation("egress", " "), "is empty"),
        (
            annotation("ingress", &"1.2.3.4:5/tcp, ".repeat(600)),
            "longer than 8192",
        ),
    ] {
        refused(&api, "default", &patch, why)?;
    }
    // The strict class is never loosened; the others may be, if the node says so.
    let strict = |value: &str| {
        let mut patch = annotation("profile", value);
        merge(
            &mut patch,
            &json!({"spec": {"runtimeClassName": "casemate-strict"}}),
        );
        patch
    };
    refused(&api, "default", &strict("compat"), "would loosen")?;
    refused(&api, "default", &strict("default"), "would loosen")?;
    admitted(&api, "default", &strict("strict")).map(drop)
}

fn pods_are_admitted_with_what_nodes_allow() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let _steady = steady();
    for patch in [
        json!({}),
        security(&json!({"capabilities": {"add": ["NET_BIND_SERVICE", "CAP_CHOWN"]}})),
        security(&json!({"capabilities": {"drop": ["ALL"]}})),
        security(&json!({"privileged": false})),
        sysctl("net.ipv4.ip_unprivileged_port_start"),
        json!({"spec": {"hostNetwork": false, "hostUsers": false, "shareProcessNamespace": true}}),
        json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}}),
        annotation("exec", "deny"),
        annotation("profile", "compat"),
        annotation("profile", "learned-nginx"),
        annotation("egress", "cluster-dns, 192.0.2.10:443/tcp"),
        annotation("capabilities", "none"),
        annotation("service-account-token", "withhold"),
        json!({"metadata": {"annotations": {"example.com/exce": "deny"}}}),
    ] {
        admitted(&api, "default", &patch)?;
    }
    Ok(())
}

fn pods_of_other_classes_are_left_alone() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let _steady = steady();
    let mut bare = pod("default", &security(&json!({"privileged": true})));
    merge(&mut bare, &host_path("/"));
    if let Some(spec) = bare["spec"].as_object_mut() {
        spec.remove("runtimeClassName");
    }
    match api.would_make(Who::Admin, &bare)? {
        Ok(_) => Ok(()),
        Err(why) => fail(format!("a pod of no class is refused: {why}")),
    }
}

/// Settings as they are, with some of them changed.
fn settings(api: &Api, data: &Value) -> Outcome {
    let object = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "casemate-policy", "namespace": "casemate-system"},
        "data": data,
    });
    let args = [
        "patch",
        "configmap",
        "-n",
        "casemate-system",
        "casemate-policy",
    ];
    let patch = object.to_string();
    let more = ["--type=merge", "-p", patch.as_str()];
    api.must(&[args.as_slice(), more.as_slice()].concat(), "")
        .map(drop)
}

/// As soon as the server has read the settings.
fn soon(what: &str, mut probe: impl FnMut() -> bool) -> Outcome {
    Ok(until(what, Duration::from_secs(20), &mut probe).map(drop)?)
}

fn settings_let_more_in() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let _changing = changing();
    let probe = host_path("/srv/allowed/x");
    settings(
        &api,
        &json!({
            "host-paths": "/srv/allowed\n/opt/data/\n", "host-network": "true",
            "sysctls": "net.core.somaxconn\nkernel.shm*\n", "block-devices": "true",
        }),
    )?;
    let done = (|| {
        soon("the settings to count", || {
            admitted(&api, "default", &probe).is_ok()
        })?;
        for path in ["/srv/allowed", "/opt/data/y"] {
            admitted(&api, "default", &host_path(path))?;
        }
        for path in ["/srv/allowed-not", "/srv", "/srv/allowed/../../etc"] {
            refused(&api, "default", &host_path(path), "the hostPath").or_else(
                |why| match why {
                    // The server itself refuses dots.
                    Stop::Fail(why) if why.contains("..") => Ok(()),
                    other => Err(other),
                },
            )?;
        }
        admitted(&api, "default", &json!({"spec": {"hostNetwork": true}}))?;
        admitted(&api, "default", &sysctl("net.core.somaxconn"))?;
        admitted(&api, "default", &sysctl("kernel.shmmax"))?;
        refused(&api, "default", &sysctl("kernel.msgmax"), "unsafe sysctls")
    })();
    settings(
        &api,
        &json!({
            "host-paths": "", "host-network": "false", "sysctls": "", "block-devices": "false",
        }),
    )?;
    soon("the settings to be back", || {
        admitted(&api, "default", &probe).is_err()
    })?;
    done
}

fn pods_without_settings_are_refused() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let _changing = changing();
    let name = ["configmap", "-n", "casemate-system", "casemate-policy"];
    api.must(&[["delete"].as_slice(), name.as_slice()].concat(), "")?;
    let fails = soon("pods to be refused", || {
        refused(&api, "default", &json!({}), "no params found").is_ok()
    });
    api.must(
        &["apply", "--server-side", "-k", "runtimeclass/policies"],
        "",
    )?;
    soon("pods to be admitted", || {
        admitted(&api, "default", &json!({})).is_ok()
    })?;
    fails
}

fn debug_containers_get_no_more_than_the_pod() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let _steady = steady();
    api.namespace("debug", &json!({}))?;
    let patch = json!({"spec": {"securityContext": {"runAsNonRoot": true, "runAsUser": 7}}});
    let made = pod("debug", &patch);
    api.must(&["apply", "--server-side", "-f", "-"], &made.to_string())?;
    let debug = |context: &Value| -> Result<Result<(), String>, Stop> {
        let patch = json!({"spec": {"ephemeralContainers": [{
            "name": "d", "image": "i", "imagePullPolicy": "Always",
            "securityContext": context,
        }]}})
        .to_string();
        let args = [
            "patch",
            "pod",
            "-n",
            "debug",
            "p",
            "--subresource=ephemeralcontainers",
            "--dry-run=server",
            "-p",
            patch.as_str(),
        ];
        let said = api.kubectl(&args)?;
        Ok(match said.code() {
            0 => Ok(()),
            _ => Err(said.err()),
        })
    };
    for (context, why) in [
        (
            json!({"privileged": true}),
            "privileged containers are refused",
        ),
        (
            json!({"capabilities": {"add": ["SYS_PTRACE", "SYS_ADMIN"]}}),
            "added capabilities",
        ),
        (
            json!({"capabilities": {"add": ["CHOWN"]}}),
            "that no container of the pod has",
        ),
        (json!({"runAsUser": 0}), "would be root"),
        (json!({"runAsNonRoot": false}), "would be root"),
    ] {
        match debug(&context)? {
            Ok(()) => return fail(format!("{context} is admitted")),
            Err(said) => ensure!(said.contains(why), "{context}: no {why:?} in {said}"),
        }
    }
    for context in [
        json!({}),
        json!({"runAsUser": 8, "capabilities": {"drop": ["ALL"]}}),
        // By the default profile of kubectl debug.
        json!({"capabilities": {"add": ["SYS_PTRACE"]}}),
    ] {
        if let Err(said) = debug(&context)? {
            return fail(format!("{context} is refused: {said}"));
        }
    }
    Ok(())
}

fn class(name: &str) -> Value {
    json!({"spec": {"runtimeClassName": name}})
}

fn other_class(api: &Api) -> Outcome {
    let other = json!({
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
        "metadata": {"name": "other"}, "handler": "runc",
    });
    let args = ["apply", "--server-side", "-f", "-"];
    api.must(&args, &other.to_string()).map(drop)
}

fn namespaces_can_require_a_class() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let _steady = steady();
    other_class(&api)?;
    let label = |value: &str| json!({"casemate.io/require": value});
    api.namespace("any-class", &label("casemate"))?;
    api.namespace("strict-class", &label("strict"))?;
    api.namespace("odd-class", &label("struct"))?;
    for name in ["casemate", "casemate-strict", "casemate-compat"] {
        admitted(&api, "any-class", &class(name))?;
    }
    refused(&api, "any-class", &class("other"), "(this one has other)")?;
    admitted(&api, "strict-class", &class("casemate-strict"))?;
    for name in ["casemate", "casemate-compat", "other"] {
        let why = "need runtimeClassName: casemate-strict";
        refused(&api, "strict-class", &class(name), why)?;
    }
    refused(
        &api,
        "odd-class",
        &class("casemate"),
        "is struct, and should be",
    )?;
    let mut none = pod("any-class", &json!({}));
    if let Some(spec) = none["spec"].as_object_mut() {
        spec.remove("runtimeClassName");
    }
    match api.would_make(Who::Admin, &none)? {
        Ok(_) => fail("a pod without a class is admitted"),
        Err(why) => {
            ensure!(why.contains("(this one has none)"), "{why}");
            Ok(())
        }
    }
}

fn namespaces_can_give_a_class() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let _steady = steady();
    other_class(&api)?;
    let bare = |namespace: &str| {
        let mut bare = pod(namespace, &json!({}));
        if let Some(spec) = bare["spec"].as_object_mut() {
            spec.remove("runtimeClassName");
        }
        bare
    };
    let labels = json!({"casemate.io/class": "casemate-strict", "casemate.io/require": "strict"});
    api.namespace("given-class", &labels)?;
    api.namespace("given-odd-class", &json!({"casemate.io/class": "runc"}))?;
    let mut made = Value::Null;
    soon("pods to get the class", || {
        let answer = api.would_make(Who::Admin, &bare("given-class"));
        made = answer.ok().and_then(Result::ok).unwrap_or_default();
        !made.is_null()
    })?;
    let spec = &made["spec"];
    ensure_eq!(spec["runtimeClassName"], "casemate-strict", "class");
    // As if its author had named it: what the class has comes with it.
    ensure!(
        spec["overhead"]["memory"].is_string(),
        "no overhead: {spec}"
    );
    ensure_eq!(spec["nodeSelector"]["casemate.io/ready"], "true", "nodes");
    // And it is judged by the policies of that class.
    let mut privileged = bare("given-class");
    merge(&mut privileged, &security(&json!({"privileged": true})));
    match api.would_make(Who::Admin, &privileged)? {
        Ok(_) => return fail("a privileged pod is admitted"),
        Err(why) => ensure!(why.contains("privileged containers are refused"), "{why}"),
    }
    // Who names a class keeps it.
    let named = pod("given-class", &json!({}));
    match api.would_make(Who::Admin, &named)? {
        Ok(_) => return fail("casemate is admitted where strict is required"),
        Err(why) => ensure!(why.contains("this one has casemate)"), "{why}"),
    }
    match api.would_make(Who::Admin, &bare("given-odd-class"))? {
        Ok(made) => ensure!(made["spec"]["runtimeClassName"].is_null(), "{made}"),
        Err(why) => return fail(why),
    }
    Ok(())
}

fn tenants_pull_always() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let _steady = steady();
    api.namespace("tenants", &json!({"casemate.io/tenancy": "multi"}))?;
    let policy = |value: &str| {
        json!({"spec": {"containers": [
            {"name": "c", "image": "i", "imagePullPolicy": "Always"},
            {"name": "d", "image": "i@sha256:00", "imagePullPolicy": value},
        ]}})
    };
    admitted(&api, "tenants", &policy("Always"))?;
    for value in ["IfNotPresent", "Never"] {
        refused(
            &api,
            "tenants",
            &policy(value),
            "need imagePullPolicy: Always (d)",
        )?;
    }
    admitted(&api, "default", &policy("IfNotPresent")).map(drop)
}

fn exec_is_refused_by_the_namespace() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let _steady = steady();
    for (name, rule) in [
        ("exec-deny", "deny"),
        ("exec-plain", "no-terminal"),
        ("exec-allow", "allow"),
        ("exec-odd", "dny"),
    ] {
        api.namespace(name, &json!({"casemate.io/exec": rule}))?;
        let made = pod(name, &json!({"spec": {"nodeName": "nowhere"}}));
        api.must(&["apply", "--server-side", "-f", "-"], &made.to_string())?;
    }
    // There is no kubelet: who is let in fails there, for another reason.
    let exec = |namespace: &str, terminal: bool| -> Result<String, Stop> {
        let flag = if terminal { "tty=true&" } else { "" };
        let path = format!(
            "/api/v1/namespaces/{namespace}/pods/p/exec?{flag}stdout=true&command=id&container=c"
        );
        Ok(api
            .kubectl(&["create", "--raw", &path, "-f", "/dev/null"])?
            .err())
    };
    let refusal = "casemate";
    for (namespace, terminal, why) in [
        ("exec-deny", false, "exec, attach and debug are refused"),
        ("exec-deny", true, "exec, attach and debug are refused"),
        ("exec-plain", true, "terminals are refused"),
        ("exec-odd", false, "should be allow, no-terminal or deny"),
    ] {
        let said = exec(namespace, terminal)?;
        ensure!(said.contains(why), "{namespace}, {terminal}: {said}");
    }
    for (namespace, terminal) in [("exec-plain", false), ("exec-allow", true)] {
        let said = exec(namespace, terminal)?;
        ensure!(!said.contains(refusal), "{namespace}, {terminal}: {said}");
        ensure!(
            said.contains("nowhere"),
            "not for want of a kubelet: {said}"
        );
    }
    let attach = "/api/v1/namespaces/exec-deny/pods/p/attach?stdout=true&container=c";
    let said = api
        .kubectl(&["create", "--raw", attach, "-f", "/dev/null"])?
        .err();
    ensure!(
        said.contains("are refused in this namespace"),
        "attach: {said}"
    );
    let patch = json!({"spec": {"ephemeralContainers": [
        {"name": "d", "image": "i", "imagePullPolicy": "Always", "tty": true},
    ]}})
    .to_string();
    for (namespace, why) in [
        ("exec-deny", "exec, attach and debug are refused"),
        ("exec-plain", "terminals are refused"),
    ] {
        let args = [
            "patch",
            "pod",
            "-n",
            namespace,
            "p",
            "--subresource=ephemeralcontainers",
            "--dry-run=server",
            "-p",
            patch.as_str(),
        ];
        let said = api.kubectl(&args)?.err();
        ensure!(said.contains(why), "debug in {namespace}: {said}");
    }
    Ok(())
}

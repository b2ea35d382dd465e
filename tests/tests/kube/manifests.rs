//! Every manifest on the API server, by kustomize and by helm.

use std::collections::BTreeMap;
use std::fs;

use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq};
use serde_json::{Value, json};

use crate::server::{Api, Who, api, helm, here};

crate::kube_trials![
    manifests_are_accepted,
    jobs_are_accepted_and_have_no_token,
    chart_is_what_kustomize_makes,
    chart_values_count,
    daemonset_gives_the_token_to_the_installer_alone,
    monitoring_is_accepted,
];

const NAMESPACE: &str = "casemate-system";

fn manifests_are_accepted() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    // Again, and nobody else owns a field of them.
    let said = api.must(&["apply", "--server-side", "-k", "runtimeclass"], "")?;
    let count = said.lines().count();
    ensure!(count > 20, "{count} objects: {said}");
    // Types of expressions are checked by a controller that isn't here, but each must
    // have been compiled: what isn't would refuse everything.
    let classes = api.must(&["get", "runtimeclass", "-o", "name"], "")?;
    ensure_eq!(classes.lines().count(), 3, "classes: {classes}");
    Ok(())
}

fn jobs_are_accepted_and_have_no_token() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    for name in ["install", "uninstall"] {
        let path = here().join(format!("runtimeclass/job/{name}.yaml"));
        let text = fs::read_to_string(path)?.replace("NODE", "n1");
        let args = ["apply", "--server-side", "-o", "json", "-f", "-"];
        let job: Value = serde_json::from_str(&api.must(&args, &text)?)?;
        let pod = &job["spec"]["template"]["spec"];
        ensure_eq!(pod["nodeName"], "n1", "{name}");
        ensure_eq!(pod["automountServiceAccountToken"], false, "{name}");
        let volumes = pod["volumes"].as_array().cloned().unwrap_or_default();
        ensure!(
            volumes
                .iter()
                .all(|volume| volume.get("projected").is_none()),
            "{name} has a token: {volumes:?}"
        );
        made(&api, &job["spec"]["template"], NAMESPACE)?;
    }
    Ok(())
}

/// The pod of a template, as a controller would make it.
fn made(api: &Api, template: &Value, namespace: &str) -> Result<Value, Stop> {
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod"});
    pod["metadata"] = template["metadata"].clone();
    pod["metadata"]["name"] = "of-template".into();
    pod["metadata"]["namespace"] = namespace.into();
    pod["spec"] = template["spec"].clone();
    match api.would_make(Who::Admin, &pod)? {
        Ok(pod) => Ok(pod),
        Err(why) => fail(why),
    }
}

fn daemonset_gives_the_token_to_the_installer_alone() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let args = [
        "get",
        "daemonset",
        "-n",
        NAMESPACE,
        "casemate-installer",
        "-o",
        "json",
    ];
    let set: Value = serde_json::from_str(&api.must(&args, "")?)?;
    let pod = made(&api, &set["spec"]["template"], NAMESPACE)?;
    let spec = &pod["spec"];
    ensure_eq!(spec["automountServiceAccountToken"], false, "of the pod");
    let mounts = |container: &Value| -> Vec<String> {
        let mounts = container["volumeMounts"].as_array().cloned();
        let names = mounts.unwrap_or_default();
        names
            .iter()
            .filter_map(|mount| mount["name"].as_str().map(str::to_owned))
            .collect()
    };
    ensure_eq!(
        mounts(&spec["initContainers"][0]),
        ["host", "token"],
        "install"
    );
    let metrics = &spec["containers"][0];
    ensure_eq!(mounts(metrics), ["pods", "sockets"], "metrics");
    ensure!(
        metrics["securityContext"]["privileged"].is_null(),
        "what serves metrics is privileged"
    );
    Ok(())
}

/// Objects by kind and name, with what they say.
fn sorted(objects: Vec<Value>) -> BTreeMap<String, Value> {
    let key = |object: &Value| format!("{}/{}", object["kind"], object["metadata"]["name"]);
    objects.into_iter().map(|o| (key(&o), o)).collect()
}

fn render(namespace: &str, more: &[&str]) -> Result<String, Stop> {
    let mut args = vec![
        "template",
        "casemate",
        "runtimeclass",
        "--kube-version",
        "1.36.0",
    ];
    args.extend(["--namespace", namespace]);
    args.extend(more);
    helm(&args)
}

fn chart_is_what_kustomize_makes() -> Outcome {
    let api = api()?;
    let chart = sorted(api.objects(&render(NAMESPACE, &[])?)?);
    let plain = sorted(api.objects(&api.must(&["kustomize", "runtimeclass"], "")?)?);
    let names = |all: &BTreeMap<String, Value>| all.keys().cloned().collect::<Vec<_>>();
    ensure_eq!(
        names(&chart),
        names(&plain),
        "objects of chart and kustomize"
    );
    for (name, object) in &plain {
        ensure!(
            chart.get(name) == Some(object),
            "{name}: kustomize {object}, chart {:?}",
            chart.get(name)
        );
    }
    Ok(())
}

fn chart_values_count() -> Outcome {
    let api = api()?;
    let more = [
        "--set",
        "installer.args={--compat}",
        "--set",
        "image.repository=r.test/c",
        "--set",
        "image.tag=9",
        "--set",
        "policies.enabled=false",
        "--set",
        "monitoring.enabled=true",
    ];
    let text = render("elsewhere", &more)?;
    ensure!(
        !text.contains("casemate-system") && !text.contains("casemate.invalid"),
        "a default is left: {text}"
    );
    let chart = sorted(api.objects(&text)?);
    let set = chart.get("\"DaemonSet\"/\"casemate-installer\"");
    let pod = set
        .map(|set| set["spec"]["template"]["spec"].clone())
        .unwrap_or_default();
    let install = &pod["initContainers"][0];
    ensure_eq!(install["image"], "r.test/c:9", "image");
    ensure_eq!(
        install["args"],
        json!([
            "install",
            "--compat",
            "--host-root",
            "/host",
            "--node",
            "$(NODE)"
        ]),
        "arguments"
    );
    ensure!(!text.contains("casemate-pods"), "policies are there");
    ensure!(
        chart.keys().any(|name| name.contains("casemate-dashboard")),
        "no dashboard: {:?}",
        chart.keys()
    );
    Ok(())
}

fn monitoring_is_accepted() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    let args = ["apply", "--server-side", "-k", "runtimeclass/monitoring"];
    let said = api.must(&args, "")?;
    ensure_eq!(said.lines().count(), 2, "config maps: {said}");
    Ok(())
}

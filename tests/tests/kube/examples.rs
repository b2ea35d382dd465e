//! Examples that people copy: each is admitted, or refused with the line that it shows.

use std::fs;

use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq};
use serde_json::{Value, json};

use crate::server::{Api, Who, api, here, steady};

crate::kube_trials![examples_do_as_they_say, examples_run_in_a_sandbox];

fn all() -> Result<Vec<(String, String)>, Stop> {
    let mut all = Vec::new();
    for entry in fs::read_dir(here().join("runtimeclass/examples"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().display().to_string();
        all.push((name, fs::read_to_string(&path)?));
    }
    all.sort();
    Ok(all)
}

/// The namespaces that examples name.
fn namespaces(api: &Api) -> Outcome {
    api.with_manifests()?;
    for (_, text) in all()? {
        for object in api.objects(&text)? {
            if object["kind"] == "Namespace" {
                let args = ["apply", "--server-side", "-f", "-"];
                api.must(&args, &object.to_string())?;
            }
        }
    }
    Ok(())
}

/// Pods of an object, as its controller would make them.
fn pods(object: &Value) -> Vec<Value> {
    if object["kind"] == "Pod" {
        return vec![object.clone()];
    }
    let template = &object["spec"]["template"];
    if template["spec"].is_null() {
        return Vec::new();
    }
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod"});
    pod["metadata"] = template["metadata"].clone();
    pod["metadata"]["name"] = object["metadata"]["name"].clone();
    pod["metadata"]["namespace"] = object["metadata"]["namespace"].clone();
    pod["spec"] = template["spec"].clone();
    vec![pod]
}

fn examples_do_as_they_say() -> Outcome {
    let api = api()?;
    namespaces(&api)?;
    let _steady = steady();
    let mut seen = 0;
    for (name, text) in all()? {
        let first = text.lines().next().unwrap_or_default();
        let expected = first.trim_start_matches("# ");
        for object in api.objects(&text)? {
            if object["kind"] != "Pod" && object["kind"] != "Namespace" {
                // What isn't a pod is only stored; its pods come later.
                if let Err(why) = api.would_make(Who::Admin, &object)? {
                    return fail(format!("{name}: {why}"));
                }
            }
            for pod in pods(&object) {
                seen += 1;
                match (api.would_make(Who::Admin, &pod)?, expected.split_once(": ")) {
                    (Ok(_), None) => ensure_eq!(expected, "admitted", "{name}"),
                    (Err(why), Some(("refused", message))) => {
                        ensure!(why.contains(message), "{name}: {why}");
                    }
                    (outcome, _) => return fail(format!("{name}: {expected}: {outcome:?}")),
                }
            }
        }
    }
    ensure!(seen >= 5, "only {seen} pods in the examples");
    Ok(())
}

/// Those that are admitted have a class, with its overhead and its nodes, whether they
/// name it or their namespace does.
fn examples_run_in_a_sandbox() -> Outcome {
    let api = api()?;
    namespaces(&api)?;
    let _steady = steady();
    for (name, text) in all()? {
        if !text.starts_with("# admitted") {
            continue;
        }
        for pod in api.objects(&text)?.iter().flat_map(pods) {
            let Ok(made) = api.would_make(Who::Admin, &pod)? else {
                return fail(format!("{name} is refused"));
            };
            let class = made["spec"]["runtimeClassName"]
                .as_str()
                .unwrap_or_default();
            ensure!(class.starts_with("casemate"), "{name} has class {class:?}");
            ensure!(
                made["spec"]["overhead"]["memory"].is_string(),
                "{name} has no overhead: {}",
                made["spec"]
            );
            ensure_eq!(
                made["spec"]["nodeSelector"]["casemate.io/ready"],
                "true",
                "nodes of {name}"
            );
        }
    }
    Ok(())
}

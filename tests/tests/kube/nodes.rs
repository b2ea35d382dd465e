//! Labels of nodes: who may set them.

use casemate_tests::ensure;
use casemate_tests::skip::{Outcome, Stop, fail};
use serde_json::{Value, json};

use crate::server::{Api, Who, api};

crate::kube_trials![
    labels_are_kept_from_kubelets,
    installer_changes_its_own_node_alone,
];

/// Makes the node, as its kubelet would.
fn node(api: &Api, name: &str) -> Outcome {
    let object = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/os": "linux"}},
    });
    let args = ["apply", "--server-side", "-f", "-"];
    api.must(&args, &object.to_string()).map(drop)
}

fn labels_are_kept_from_kubelets() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    node(&api, "n1")?;
    let args = [
        "create",
        "clusterrole",
        "editor",
        "--verb=get,patch,update",
        "--resource=nodes,nodes/status",
    ];
    api.must(&args, "")?;
    let args = [
        "create",
        "clusterrolebinding",
        "editor",
        "--clusterrole=editor",
        "--user=editor",
    ];
    api.must(&args, "")?;
    let patch = |who: Who, subresource: &str, patch: &Value| -> Result<String, Stop> {
        let patch = patch.to_string();
        let mut args = vec!["patch", "node", "n1", "--dry-run=server", "-p", &patch];
        args.extend(Some(subresource).filter(|s| !s.is_empty()));
        Ok(api.kubectl_as(who, &args, "")?.err())
    };
    let label = |key: &str| json!({"metadata": {"labels": {key: "true"}}});
    let annotation = json!({"metadata": {"annotations": {"casemate.io/version": "9"}}});
    let refusal = "are set by casemate install";
    let status = "--subresource=status";
    for (who, way, what) in [
        (Who::Kubelet, "", label("casemate.io/ready")),
        (Who::Kubelet, "", label("casemate.io/other")),
        (Who::Kubelet, "", annotation),
        (Who::Editor, "", label("casemate.io/ready")),
        (Who::Editor, status, label("casemate.io/ready")),
    ] {
        let said = patch(who, way, &what)?;
        ensure!(said.contains(refusal), "{who:?} {way} {what}: {said:?}");
    }
    // Its other labels are its own affair, and the administrator's are all.
    for (who, key) in [
        (Who::Kubelet, "example.com/x"),
        (Who::Editor, "example.com/x"),
        (Who::Admin, "casemate.io/ready"),
    ] {
        let said = patch(who, "", &label(key))?;
        ensure!(said.is_empty(), "{who:?} {key}: {said}");
    }
    // A kubelet that registers anew can't bring them along.
    let object = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "n1", "labels": {"casemate.io/ready": "true"}},
    });
    api.must(&["delete", "node", "n1"], "")?;
    match api.would_make(Who::Kubelet, &object)? {
        Ok(_) => fail("a node that is ready from its birth is admitted"),
        Err(why) => {
            ensure!(why.contains(refusal), "{why}");
            Ok(())
        }
    }
}

fn installer_changes_its_own_node_alone() -> Outcome {
    let api = api()?;
    api.with_manifests()?;
    node(&api, "own")?;
    node(&api, "other")?;
    let token = api.installer_token("own")?;
    let unbound = api.token(&[])?;
    let patch = |token: &str, node: &str, patch: &Value| -> Result<String, Stop> {
        let patch = patch.to_string();
        let args = [
            "patch",
            "node",
            node,
            "--dry-run=server",
            "--type=merge",
            "-p",
            &patch,
        ];
        let token = format!("--token={token}");
        let all = [[token.as_str()].as_slice(), args.as_slice()].concat();
        Ok(api.kubectl_as(Who::Nobody, &all, "")?.err())
    };
    let ready = json!({"metadata": {"labels": {"casemate.io/ready": "true"}}});
    let said = patch(&token, "own", &ready)?;
    ensure!(said.is_empty(), "its own node: {said}");
    for (token, node, what, why) in [
        (
            &token,
            "other",
            ready.clone(),
            "on own may not change the node other",
        ),
        (&unbound, "own", ready, "on no node may not change"),
        (
            &token,
            "own",
            json!({"metadata": {"labels": {"x": "y"}}}),
            "annotations casemate.io/",
        ),
        (
            &token,
            "own",
            json!({"metadata": {"labels": {"kubernetes.io/os": null}}}),
            "annotations casemate.io/",
        ),
        (
            &token,
            "own",
            json!({"spec": {"unschedulable": true}}),
            "only changes labels",
        ),
        (
            &token,
            "own",
            json!({"spec": {"taints": [{"key": "k", "effect": "NoExecute"}]}}),
            "only changes labels",
        ),
    ] {
        let said = patch(token, node, &what)?;
        ensure!(said.contains(why), "{node} {what}: no {why:?} in {said}");
    }
    // Beyond that it has no rights at all.
    for args in [
        ["get", "secrets", "-A"],
        ["delete", "node", "own"],
        ["get", "nodes", "-A"],
    ] {
        let token = format!("--token={token}");
        let all = [[token.as_str()].as_slice(), args.as_slice()].concat();
        let said = api.kubectl_as(Who::Nobody, &all, "")?.err();
        ensure!(
            said.contains("Forbidden") || said.contains("forbidden"),
            "{args:?}: {said}"
        );
    }
    Ok(())
}

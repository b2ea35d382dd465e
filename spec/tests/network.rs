//! Lists of connections at the door: refused with the pod, not later.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use std::collections::BTreeSet;

use common::{CTR_1_6, all_of, config, policy, refusal, with};
use serde_json::{Value, json};

fn annotated(key: &str, value: &str) -> Vec<u8> {
    with(CTR_1_6, &[("/annotations", json!({key: value}))])
}

#[test]
fn each_rule_refuses_and_names_the_annotation() {
    let mut seen = BTreeSet::new();
    for (key, value, why) in [
        ("casemate.io/egress", "10.0.0.0/8", "has no port"),
        (
            "casemate.io/ingress",
            "10.0.0.1/8:1",
            "is 10.0.0.0/8 meant?",
        ),
        (
            "casemate.io/ingress",
            "cluster-dns",
            "where connections go to",
        ),
    ] {
        let refusal = refusal(&annotated(key, value));
        assert_eq!(refusal.field, format!("annotations[{key}]"));
        assert!(refusal.to_string().contains(why), "{refusal}");
        seen.insert(refusal.rule);
    }
    // On the host's network, be it allowed.
    let mut root: Value = serde_json::from_slice(&annotated("casemate.io/egress", "none")).unwrap();
    let namespaces = root["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|n| n["type"] != "network");
    let allowed = config("[sandbox]\nallow_host_network = true\n");
    let refusal = policy(&serde_json::to_vec(&root).unwrap(), &allowed).unwrap_err();
    assert!(
        refusal.to_string().contains("Remove hostNetwork"),
        "{refusal}"
    );
    seen.insert(refusal.rule);
    all_of("network-list", &seen);
}

#[test]
fn the_nodes_own_lists_are_checked_when_they_are_read() {
    use casemate_spec::Config;
    let good = config(
        "[network]\nmetadata = \"allow\"\ndeny = [\"10.0.0.0/8\", \"192.0.2.7:6443/tcp\"]\n\
         nodes = [\"192.0.2.0/24\"]\ncluster_dns = [\"10.96.0.10\"]\n",
    );
    assert_eq!(good.network.deny.len(), 2);
    for (text, why) in [
        ("deny = [\"10.0.0.1/8\"]", "is 10.0.0.0/8 meant?"),
        ("deny = [\"127.0.0.0/8\"]", "loopback"),
        ("nodes = [\"node-1\"]", "no address"),
        ("cluster_dns = [\"kube-dns\"]", "IP address"),
        ("metadata = \"maybe\"", "maybe"),
        ("without_nftables = \"fine\"", "fine"),
    ] {
        let error = Config::parse("x.toml".as_ref(), &format!("[network]\n{text}\n"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(why) && error.contains("network."),
            "{text}: {error}"
        );
    }
}

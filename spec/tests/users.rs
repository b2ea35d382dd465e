//! User namespaces that the kubelet chose, and mappings of mounts.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use casemate_spec::{Config, IdMap, PodUsers, Refusal, Tightened};
use common::{CRI_CONTAINER, CRI_PAUSE, config, policy};
use serde_json::{Value, json};

fn lines(first: u32) -> Value {
    json!([{"containerID": 0, "hostID": first, "size": 65536}])
}

/// `base` in a user namespace, with these mappings of users and groups.
fn of(base: &[u8], path: &str, uids: Value, gids: Value) -> Value {
    let mut root: Value = serde_json::from_slice(base).unwrap();
    let mut namespace = json!({"type": "user"});
    if !path.is_empty() {
        namespace["path"] = path.into();
    }
    let list = root["linux"]["namespaces"].as_array_mut().unwrap();
    list.push(namespace);
    root["linux"]["uidMappings"] = uids;
    root["linux"]["gidMappings"] = gids;
    root
}

fn decide(root: &Value, text: &str) -> Result<Tightened, Refusal> {
    policy(&serde_json::to_vec(root).unwrap(), &config(text))
}

fn refused(root: &Value, rule: &str, parts: &[&str]) {
    let refusal = decide(root, "").unwrap_err();
    let text = refusal.to_string();
    assert_eq!(refusal.rule, rule, "{text}");
    for part in parts {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn one_line_of_65536_ids_is_taken_with_and_without_a_path() {
    let pinned = of(
        CRI_PAUSE,
        "/run/pins/x/user",
        lines(131_072),
        lines(131_072),
    );
    assert_eq!(
        decide(&pinned, "").unwrap().users,
        Some(PodUsers {
            first: 131_072,
            path: Some("/run/pins/x/user".into())
        })
    );
    let made = of(CRI_CONTAINER, "", lines(65536), lines(65536));
    assert_eq!(
        decide(&made, "").unwrap().users,
        Some(PodUsers {
            first: 65536,
            path: None
        })
    );
    let none: Value = serde_json::from_slice(CRI_PAUSE).unwrap();
    assert_eq!(decide(&none, "").unwrap().users, None);
}

#[test]
fn other_mappings_are_refused_by_name() {
    let two = json!([{"containerID": 0, "hostID": 65536, "size": 1},
        {"containerID": 1, "hostID": 70000, "size": 65535}]);
    let line = |container: u32, size: u32| json!([{"containerID": container, "hostID": 65536, "size": size}]);
    for (uids, gids, part) in [
        (json!([]), lines(65536), "uidMappings"),
        (lines(65536), json!([]), "gidMappings"),
        (two, lines(65536), "2 lines"),
        (line(1, 65536), lines(65536), "from 1"),
        (lines(65536), line(0, 1000), "1000 ids"),
        (line(0, 131_072), lines(65536), "131072 ids"),
        (lines(65536), lines(131_072), "group ids from 131072"),
    ] {
        let root = of(CRI_PAUSE, "/u", uids, gids);
        refused(&root, "user-namespace", &[part, "hostUsers: false"]);
    }
    let mut alone: Value = serde_json::from_slice(CRI_PAUSE).unwrap();
    alone["linux"]["uidMappings"] = lines(65536);
    refused(&alone, "user-namespace", &["without a user namespace"]);
    let mut twice = of(CRI_PAUSE, "/u", lines(65536), lines(65536));
    let list = twice["linux"]["namespaces"].as_array_mut().unwrap();
    list.push(json!({"type": "user"}));
    refused(&twice, "namespace-list", &["twice"]);
    let relative = of(CRI_PAUSE, "u", lines(65536), lines(65536));
    refused(&relative, "namespace-list", &["not absolute"]);
}

#[test]
fn ids_that_somebody_else_has_are_refused() {
    for (first, part) in [
        (0, "the host itself"),
        (65535, "the host itself"),
        (u32::MAX - 65535, "beyond 32 bits"),
        (0x7000_0000 - 65535, "casemate hands out"),
        (0x7000_0000, "casemate hands out"),
        (0x7fff_ffff, "casemate hands out"),
    ] {
        let root = of(CRI_PAUSE, "/u", lines(first), lines(first));
        refused(&root, "user-namespace-ids", &[part, "ids.base", "subuid"]);
    }
    // Just beside them is fine; and where they are is the configuration's.
    for first in [65536, 0x7000_0000 - 65536, 0x8000_0000] {
        let root = of(CRI_PAUSE, "/u", lines(first), lines(first));
        assert_eq!(decide(&root, "").unwrap().users.unwrap().first, first);
    }
    let moved = of(CRI_PAUSE, "/u", lines(0x7000_0000), lines(0x7000_0000));
    decide(&moved, "[ids]\nbase = 65536\ncount = 10\n").unwrap();
    let hit = of(CRI_PAUSE, "/u", lines(131_072), lines(131_072));
    let refusal = decide(&hit, "[ids]\nbase = 65536\ncount = 10\n").unwrap_err();
    assert_eq!(refusal.rule, "user-namespace-ids");
}

#[test]
fn a_mount_is_mapped_as_its_pod_or_not_at_all() {
    let with = |mount: Value| {
        let mut root = of(CRI_CONTAINER, "/u", lines(65536), lines(65536));
        root["mounts"].as_array_mut().unwrap().push(mount);
        root
    };
    let bind = |options: &[&str]| json!({"destination": "/a", "type": "bind", "source": "/a", "options": options});
    let idmap = |root: &Value| decide(root, "").unwrap().mounts.pop().unwrap().flags.idmap;
    let mut own = bind(&["rbind"]);
    own["uidMappings"] = lines(65536);
    own["gidMappings"] = lines(65536);
    assert_eq!(idmap(&with(own.clone())), Some(IdMap::Mount));
    own["options"] = json!(["rbind", "ridmap"]);
    assert_eq!(idmap(&with(own.clone())), Some(IdMap::Recursive));
    assert_eq!(idmap(&with(bind(&["rbind", "idmap"]))), Some(IdMap::Mount));
    assert_eq!(idmap(&with(bind(&["rbind"]))), None);

    let mut others = own.clone();
    others["gidMappings"] = lines(131_072);
    refused(
        &with(others),
        "mount-idmap",
        &["/a", "131072", "gidMappings"],
    );
    let mut half = own.clone();
    half.as_object_mut().unwrap().remove("gidMappings");
    refused(&with(half), "mount-idmap", &["gidMappings", "missing"]);
    let mut tmpfs = own.clone();
    tmpfs["type"] = "tmpfs".into();
    tmpfs["options"] = json!([]);
    refused(&with(tmpfs), "mount-idmap", &["no bind"]);
    // A pod with casemate's own ids has no mapping that could be meant.
    let mut root: Value = serde_json::from_slice(CRI_CONTAINER).unwrap();
    root["mounts"].as_array_mut().unwrap().push(own);
    let refusal = policy(&serde_json::to_vec(&root).unwrap(), &Config::default()).unwrap_err();
    assert_eq!(refusal.rule, "mount-idmap", "{refusal}");
}

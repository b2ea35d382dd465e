//! Images, by the name that CRI says.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use std::collections::BTreeSet;

use casemate_spec::Config;
use common::{CRI_CONTAINER, CRI_PAUSE, CTR_1_6, config, policy, with};
use serde_json::json;

const KEY: &str = "/annotations/io.kubernetes.cri.image-name";
const DIGEST: &str = "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// The rule that refuses a container of this image.
fn rule(image: Option<&str>, node: &Config) -> Option<&'static str> {
    let name = image.map_or(json!(""), |name| json!(name));
    policy(&with(CRI_CONTAINER, &[(KEY, name)]), node)
        .err()
        .map(|refusal| {
            assert!(refusal.field.contains("image-name"), "{refusal}");
            refusal.rule
        })
}

#[test]
fn no_rule_no_question() {
    for image in [None, Some("nginx"), Some("sha256:abc")] {
        assert_eq!(rule(image, &Config::default()), None);
    }
    assert!(policy(CTR_1_6, &Config::default()).is_ok());
}

#[test]
fn a_digest_is_a_whole_one() {
    let node = config("[images]\nrequire_digest = true");
    for image in ["nginx", "a.io/b/c", "a.io/b/c:1"] {
        assert_eq!(rule(Some(image), &node), Some("image-digest"), "{image}");
        assert_eq!(
            rule(Some(&format!("{image}{DIGEST}")), &node),
            None,
            "{image}"
        );
        for wrong in ["@sha256:", "@sha256:abc", "@md5:0", "@"] {
            let image = format!("{image}{wrong}");
            assert_eq!(rule(Some(&image), &node), Some("image-digest"), "{image}");
        }
    }
    let upper = DIGEST.to_uppercase().replace("SHA256", "sha256");
    assert_eq!(
        rule(Some(&format!("nginx{upper}")), &node),
        Some("image-digest")
    );
}

#[test]
fn a_registry_is_compared_part_by_part() {
    let node = config(
        "[images]\nregistries = [\"registry.example.com:5000\", \"docker.io/library\", \"ghcr.io/team/\"]",
    );
    for image in [
        "nginx",
        "nginx:1",
        "library/nginx",
        "docker.io/library/nginx:1",
        "index.docker.io/library/nginx",
        "index.docker.io/nginx",
        "registry.example.com:5000/a",
        "registry.example.com:5000/a/b:1",
        "ghcr.io/team/app",
    ] {
        assert_eq!(rule(Some(image), &node), None, "{image}");
    }
    for image in [
        "other/nginx",
        "docker.io/libraryx/nginx",
        "registry.example.com/a",
        "registry.example.com:5000.evil.com/a",
        "ghcr.io/teams/app",
        "ghcr.io/app",
        "localhost/library/nginx",
        "evil.com/docker.io/library/nginx",
        "evil.com/a@docker.io/library/nginx",
    ] {
        assert_eq!(rule(Some(image), &node), Some("image-registry"), "{image}");
    }
}

#[test]
fn what_has_no_name_is_refused_where_there_is_a_rule() {
    let mut seen: BTreeSet<&str> = ["image-digest", "image-registry"].into();
    for node in ["require_digest = true", "registries = [\"docker.io\"]"] {
        let node = config(&format!("[images]\n{node}"));
        for image in [None, Some("sha256:0123456789abcdef")] {
            seen.extend(rule(image, &node));
            assert_eq!(rule(image, &node), Some("image-unknown"), "{image:?}");
        }
        assert_eq!(policy(CTR_1_6, &node).unwrap_err().rule, "image-unknown");
        // Nothing runs there.
        assert!(policy(CRI_PAUSE, &node).is_ok());
    }
    common::all_of("image-", &seen);
}

//! Classes of pods: the runtime handler that a pod names decides about its profile,
//! whatever its annotations say.

use casemate_tests::ensure;
use casemate_tests::skip::{Outcome, Stop};

use super::Cri;
use super::client::Pod;
use super::config;

crate::cri_tests![
    classes_give_their_profile,
    classes_are_not_loosened_by_annotations,
    classes_misspelt_are_no_default,
];

/// What a process can do that one of the profiles refuses, and what it must bear.
const LOOK: &str = "chroot / /bin/true 2>/dev/null && echo chroot; \
                    grep -q 'NoNewPrivs:.*1' /proc/self/status && echo no_new_privs; true";

fn look(pod: &Pod<'_>) -> Result<String, Stop> {
    let seen = pod.sh("look", LOOK, |config| {
        config::security(config).no_new_privs = false;
    })?;
    Ok(seen.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn classes_give_their_profile(cri: &Cri) -> Outcome {
    for (handler, expected) in [
        ("casemate", "chroot no_new_privs"),
        ("casemate-strict", "no_new_privs"),
        ("casemate-compat", "chroot"),
    ] {
        let pod = cri.pod_of(handler, config::pod(cri, handler))?;
        let seen = look(&pod)?;
        ensure!(seen == expected, "{handler}: {seen:?}, not {expected:?}");
        pod.remove()?;
    }
    Ok(())
}

fn classes_are_not_loosened_by_annotations(cri: &Cri) -> Outcome {
    let annotated = |name: &str, profile: &str| {
        let mut config = config::pod(cri, name);
        let key = "casemate.io/profile".to_owned();
        config.annotations.insert(key, profile.to_owned());
        config
    };
    for profile in ["default", "compat"] {
        let why = match cri.pod_of("casemate-strict", annotated("looser", profile)) {
            Ok(pod) => return pod.remove().and(casemate_tests::skip::fail("accepted")),
            Err(Stop::Fail(why)) => why,
            Err(other) => return Err(other),
        };
        ensure!(
            why.contains("annotations.allow") && why.contains("where the node's is strict"),
            "{profile} by casemate-strict: {why}"
        );
    }
    // It can be tightened.
    let pod = cri.pod_of("casemate-compat", annotated("tighter", "strict"))?;
    let seen = look(&pod)?;
    ensure!(seen == "no_new_privs", "strict by casemate-compat: {seen}");
    pod.remove()
}

fn classes_misspelt_are_no_default(cri: &Cri) -> Outcome {
    match cri.pod_of("casemate-strct", config::pod(cri, "misspelt")) {
        Ok(pod) => pod.remove().and(casemate_tests::skip::fail("accepted")),
        Err(Stop::Fail(why)) => {
            ensure!(why.contains("there is no class \"strct\""), "{why}");
            Ok(())
        }
        Err(other) => Err(other),
    }
}

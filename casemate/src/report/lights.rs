//! A pod's locks, as lights: each is on if nothing contradicts what was promised of
//! it, and off where the pod has none.

use casemate_posture::Deviation;
use serde_json::Value;

/// How a lock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// As promised.
    Good,
    /// Not as promised.
    Bad,
    /// The pod has none.
    Absent,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Light {
    /// Its name.
    pub name: &'static str,
    /// How it is.
    pub state: State,
}

/// Names, and what a deviation of the lock speaks of.
const LOCKS: [(&str, &[&str]); 9] = [
    ("own ids", &[": Uid", ": Gid"]),
    (
        "capabilities",
        &[": CapBnd", ": CapPrm", ": CapEff", ": CapInh", ": CapAmb"],
    ),
    ("no new privileges", &[": NoNewPrivs"]),
    (
        "system-call filter",
        &[": Seccomp", ": filters", ": hash of filter"],
    ),
    ("namespaces", &[" namespace"]),
    ("mounts", &[": mount ", ": descriptor "]),
    ("hidden paths", &[": /"]),
    ("limits", &[": limit ", ": cgroup"]),
    ("untraced", &[": TracerPid"]),
];
/// Where all others are: processes that are missing, or that shouldn't be.
const PROCESSES: &str = "processes";

fn lock_of(deviation: &Deviation) -> &'static str {
    let of = |parts: &[&str]| parts.iter().any(|part| deviation.what.contains(part));
    let found = LOCKS.iter().find(|(_, parts)| of(parts));
    found.map_or(PROCESSES, |(name, _)| name)
}

/// The row of a pod.
pub fn row(deviations: &[Deviation], inspected: &Value) -> Vec<Light> {
    let is_bad = |name: &str| deviations.iter().any(|d| lock_of(d) == name);
    let checked = |name| Light {
        name,
        state: match is_bad(name) {
            true => State::Bad,
            false => State::Good,
        },
    };
    let there = |name, is: bool| Light {
        name,
        state: if is { State::Good } else { State::Absent },
    };
    let mut lights: Vec<Light> = LOCKS.iter().map(|(name, _)| checked(name)).collect();
    lights.push(checked(PROCESSES));
    lights.push(there("Landlock", inspected["sandbox"]["landlock"] == true));
    lights.push(there(
        "network guard",
        inspected["network"]["guard"] == true,
    ));
    lights
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_deviation_turns_its_own_light_off() {
        for (what, name) in [
            ("container c: init 5: Uid", "own ids"),
            ("shim (4): CapBnd", "capabilities"),
            ("container c: process 9: NoNewPrivs", "no new privileges"),
            (
                "container c: init 5: hash of filter 1",
                "system-call filter",
            ),
            ("container c: init 5: filters", "system-call filter"),
            ("container c: init 5: net namespace", "namespaces"),
            ("container c: mount /secret", "mounts"),
            ("container c: /proc/kcore", "hidden paths"),
            (
                "container c: limit pids.max (/sys/fs/cgroup/x/pids.max)",
                "limits",
            ),
            ("container c: init 5: cgroup", "limits"),
            ("agent (6): TracerPid", "untraced"),
            ("process 77 (nsenter)", "processes"),
            ("agent (6)", "processes"),
        ] {
            let deviation = Deviation {
                what: what.into(),
                promised: "a".into(),
                found: "b".into(),
            };
            let row = row(&[deviation], &json!({ "sandbox": { "landlock": true } }));
            let bad: Vec<_> = row.iter().filter(|l| l.state == State::Bad).collect();
            assert_eq!(bad.len(), 1, "{what}: {row:?}");
            assert_eq!(bad[0].name, name, "{what}");
        }
        let quiet = row(&[], &json!({}));
        assert!(quiet.iter().all(|light| light.state != State::Bad));
        let off = quiet.iter().filter(|l| l.state == State::Absent).count();
        assert_eq!(off, 2, "{quiet:?}");
    }
}

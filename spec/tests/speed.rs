//! How long a decision takes: on the way of every start.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

mod common;

use std::time::{Duration, Instant};

use casemate_spec::host_paths::{Lists, Mounts, Source, judge};
use casemate_spec::{Config, load, tighten};
use common::{CONTEXT, CRI_CONTAINER, with};
use serde_json::json;

/// At the median, of a container of a pod with 30 mounts and some annotations.
const AT_MOST: Duration = Duration::from_micros(200);

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
fn a_decision_over_thirty_mounts_is_quick() {
    let volumes: Vec<_> = (0..21)
        .map(|n| {
            json!({"destination": format!("/srv/volume/{n}"), "type": "bind",
                "source": format!("/var/lib/kubelet/pods/6d5b/volumes/v{n}"),
                "options": ["rbind", "rprivate", "ro"]})
        })
        .collect();
    let mut changes: Vec<(&str, serde_json::Value)> =
        volumes.into_iter().map(|v| ("/mounts/-", v)).collect();
    changes.push(("/annotations/casemate.io~1exec", "record".into()));
    let mut bytes = with(CRI_CONTAINER, &changes);
    bytes = String::from_utf8(bytes)
        .unwrap()
        .replace("casemate.io~1exec", "casemate.io/exec")
        .into();
    let config = Config::default();
    let table: String = (0..60)
        .map(|n| format!("{n} 1 8:1 /a{n} /mnt/place{n} rw - ext4 /dev/sda1 rw\n"))
        .collect();
    let (mut reading, mut deciding, mut judging) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..301 {
        let begun = Instant::now();
        let loaded = load(&bytes).unwrap();
        reading.push(begun.elapsed());
        let begun = Instant::now();
        let spec = tighten(loaded, &config, &CONTEXT).unwrap();
        deciding.push(begun.elapsed());
        assert_eq!(spec.mounts.len(), 30);
        // Were they all paths of the node, which none is in an ordinary pod.
        let sources: Vec<Source> = (0..30)
            .map(|mount| Source {
                mount,
                path: format!("/srv/data/{mount}"),
                socket: false,
            })
            .collect();
        let begun = Instant::now();
        let mounts = Mounts::parse(&table);
        let lists = Lists::look_up(&config.host_paths, &[], str::to_owned);
        judge(
            &sources,
            &spec.mounts,
            (&config.host_paths, &lists),
            &mounts,
        )
        .unwrap();
        judging.push(begun.elapsed());
    }
    let (reading, deciding, judging) = (median(reading), median(deciding), median(judging));
    println!("read {reading:?}, decide {deciding:?}, judge 30 paths of the node {judging:?}");
    assert!(deciding <= AT_MOST, "deciding takes {deciding:?}");
    // With a node full of hostPaths, where a debugging build doesn't have the last word.
    if !cfg!(debug_assertions) {
        assert!(
            deciding + judging <= AT_MOST * 2,
            "{deciding:?} and {judging:?}"
        );
    }
}

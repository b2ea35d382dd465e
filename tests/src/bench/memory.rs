//! Memory and processor time of all processes that exist because of one pod.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use casemate_tests::procs;

/// Pids that belong to a pod: the shim, its descendants (it is a subreaper),
/// and whatever names the id on its command line or sits in its cgroup.
pub fn pids(shim: u32, id: &str) -> BTreeSet<u32> {
    let mut pids: BTreeSet<u32> = procs::family(shim).iter().map(|who| who.pid).collect();
    pids.extend(procs::with_command(id));
    pids.extend(procs::all().into_iter().filter(|pid| {
        fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(id))
    }));
    pids.remove(&std::process::id());
    pids
}

/// PSS in kB by process name (proc_pid_smaps(5), `smaps_rollup`).
pub fn pss(pids: &BTreeSet<u32>) -> BTreeMap<String, u64> {
    let mut by_name = BTreeMap::new();
    for pid in pids {
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else {
            continue;
        };
        let kb = procs::field(&text, "Pss")
            .and_then(|v| v.split(' ').next()?.parse::<u64>().ok())
            .unwrap_or(0);
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        *by_name.entry(name.trim().to_owned()).or_insert(0) += kb;
    }
    by_name
}

/// Nanoseconds on a processor (proc(5), `schedstat`), all their threads' as far as
/// they have one.
pub fn busy(pids: &BTreeSet<u32>) -> u64 {
    let of = |pid: &u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    };
    pids.iter().filter_map(of).sum()
}

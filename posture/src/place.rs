//! Where in the hierarchies of cgroups a process is (cgroups(7)).

use std::fs;
use std::path::Path;

use crate::Report;

/// Every hierarchy that has a directory among `dirs` shows the process there, or
/// below. The unified hierarchy beside version 1's is left out: nothing counts or is
/// limited there.
pub fn check(report: &mut Report, who: &str, pid: u32, dirs: &[String]) {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else {
        return;
    };
    let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    for (dir, found) in elsewhere(&text, dirs, v2) {
        report.add(format!("{who}: cgroup"), dir, found);
    }
}

/// Directories that it isn't in, and where it is instead.
fn elsewhere(places: &str, dirs: &[String], v2: bool) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for dir in dirs {
        let below = dir.trim_start_matches("/sys/fs/cgroup/");
        // /sys/fs/cgroup/NAMES/PATH on version 1, /sys/fs/cgroup/PATH on 2.
        let (names, path) = match v2 {
            true => ("", below),
            false => below.split_once('/').unwrap_or((below, "")),
        };
        if !v2 && names == "unified" {
            continue;
        }
        let found = places.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (own, at) = (fields.next()?, fields.next()?);
            let own = own.trim_start_matches("name=");
            let meant = match v2 {
                true => own.is_empty(),
                false => {
                    !own.is_empty() && own.split(',').any(|n| names.split(',').any(|m| m == n))
                }
            };
            meant.then(|| at.trim_start_matches('/'))
        });
        let is_there = found.is_some_and(|at| Path::new(at).starts_with(path));
        if !is_there || path.is_empty() {
            let found = found.map_or_else(|| "in none".to_owned(), |at| format!("/{at}"));
            all.push((dir.clone(), found));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::elsewhere;

    #[test]
    fn each_hierarchy_counts() {
        let dirs = [
            "memory/d/x",
            "cpu,cpuacct/d/x",
            "systemd/d/x",
            "unified/d/x",
        ]
        .map(|d| format!("/sys/fs/cgroup/{d}"));
        let whole =
            "4:memory:/d/x\n3:cpu,cpuacct:/d/x/own\n2:net_cls:/\n1:name=systemd:/d/x\n0::/\n";
        assert_eq!(elsewhere(whole, &dirs, false), []);
        for (is, would_be) in [
            ("memory:/d/x", "memory:/"),
            ("memory:/d/x", "memory:/d/xx"),
            ("4:memory:/d/x\n", ""),
            ("cpuacct:/d/x/own", "cpuacct:/d"),
            ("systemd:/d/x", "systemd:/d/y"),
        ] {
            let text = whole.replace(is, would_be);
            assert_ne!(text, whole);
            assert_eq!(elsewhere(&text, &dirs, false).len(), 1, "{text}");
        }
        let dirs = ["/sys/fs/cgroup/d/x".to_owned()];
        assert_eq!(elsewhere("0::/d/x\n", &dirs, true), []);
        assert_eq!(elsewhere("0::/d/y\n", &dirs, true).len(), 1);
        assert_eq!(elsewhere("", &dirs, true).len(), 1);
    }
}

//! Limits of cgroups: what was written, and what the kernel shows of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::Report;
use crate::promise::Container;

/// Stands for version 2's device program, which has no file.
const DEVICE_PROGRAM: &str = "device program";
/// From here on a limit of version 1's is none: the largest number, in pages.
const NO_LIMIT: u64 = (i64::MAX as u64) & !0xffff;

pub fn check(report: &mut Report, container: &Container) {
    for (file, wanted) in &container.limits.0 {
        let path = Path::new(file);
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or(file);
        let found = match name {
            DEVICE_PROGRAM => programs(path),
            _ => fs::read_to_string(path).ok(),
        };
        let Some(found) = found else {
            // With its last process a scope of systemd's goes, too.
            if path.parent().is_some_and(Path::exists) {
                let what = format!("container {}: limit {name} ({file})", container.id);
                report.add(what, wanted, "nothing");
            }
            continue;
        };
        if !is(name, wanted, &found) {
            let line = |text: &str| text.trim().replace('\n', "; ");
            let what = format!("container {}: limit {name} ({file})", container.id);
            report.add(what, line(wanted), line(&found));
        }
    }
}

/// Ids of the device programs of a cgroup.
fn programs(path: &Path) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(CWD, path.parent()?, flags, Mode::empty()).ok()?;
    let ids = casemate_sys::bpf::device_programs(&dir).ok()?;
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    Some(ids.join(" "))
}

/// Whether `found` is how the kernel shows `wanted`.
fn is(name: &str, wanted: &str, found: &str) -> bool {
    let (wanted, found) = (wanted.trim(), found.trim());
    if wanted == found {
        return true;
    }
    match name {
        "devices.list" => {
            let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
            lines(wanted) == lines(found)
        }
        // `oom_kill_disable 1`, and what moves.
        "memory.oom_control" => found
            .lines()
            .next()
            .and_then(|line| line.split_once(' '))
            .is_some_and(|(_, value)| value == wanted),
        // The second number may not have been given.
        "cpu.max" => wanted
            .split_whitespace()
            .zip(found.split_whitespace())
            .all(|(wanted, found)| wanted == found),
        _ if name.starts_with("cpuset.") => list(wanted) == list(found),
        _ if name.starts_with("memory.") || name.starts_with("hugetlb.") => {
            amount(name, wanted, found)
        }
        _ => false,
    }
}

/// Bytes: rounded down to pages, and `-1` or `max` is shown as either or as the
/// largest there is.
fn amount(name: &str, wanted: &str, found: &str) -> bool {
    let none = |text: &str| {
        text == "max" || text == "-1" || text.parse::<u64>().is_ok_and(|n| n >= NO_LIMIT)
    };
    if none(wanted) || none(found) {
        return none(wanted) && none(found);
    }
    let (Ok(wanted), Ok(found)) = (wanted.parse::<u64>(), found.parse::<u64>()) else {
        return false;
    };
    let page = match name
        .strip_prefix("hugetlb.")
        .and_then(|n| n.split_once('.'))
    {
        Some((size, _)) => page_size(size),
        None => rustix::param::page_size() as u64,
    };
    wanted - wanted % page.max(1) == found
}

/// Of `2MB` and its like.
fn page_size(text: &str) -> u64 {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_uppercase());
    let unit = match text.get(digits.len()..) {
        Some("KB") => 1 << 10,
        Some("MB") => 1 << 20,
        Some("GB") => 1 << 30,
        _ => 1,
    };
    digits.parse::<u64>().unwrap_or(1).saturating_mul(unit)
}

/// Numbers of a list such as `0-3,8`.
fn list(text: &str) -> BTreeSet<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::is;

    #[test]
    fn what_the_kernel_shows_is_what_was_written() {
        for (name, wanted, found) in [
            ("pids.max", "77", "77\n"),
            ("memory.limit_in_bytes", "67109000", "67108864\n"),
            ("memory.limit_in_bytes", "-1", "9223372036854771712\n"),
            ("memory.max", "max", "max\n"),
            (
                "memory.oom_control",
                "1",
                "oom_kill_disable 1\nunder_oom 0\n",
            ),
            ("cpuset.cpus", "0,1,2", "0-2\n"),
            ("cpu.max", "50000", "50000 100000\n"),
            ("hugetlb.2MB.max", "3000000", "2097152\n"),
            (
                "devices.list",
                "c 1:3 rwm\nc 1:5 rwm",
                "c 1:5 rwm\nc 1:3 rwm\n",
            ),
        ] {
            assert!(is(name, wanted, found), "{name}: {wanted} {found}");
        }
        for (name, wanted, found) in [
            ("pids.max", "77", "78\n"),
            ("pids.max", "77", "max\n"),
            ("memory.limit_in_bytes", "67108864", "9223372036854771712\n"),
            ("memory.limit_in_bytes", "67108864", "67104768\n"),
            ("memory.max", "4096", "max\n"),
            ("memory.oom_control", "1", "oom_kill_disable 0\n"),
            ("cpuset.cpus", "0", "0-1\n"),
            ("cpu.max", "50000 100000", "50000 200000\n"),
            ("devices.list", "c 1:3 rwm", "a *:* rwm\n"),
            ("devices.list", "c 1:3 rwm", "c 1:3 rwm\nb 8:0 rwm\n"),
        ] {
            assert!(!is(name, wanted, found), "{name}: {wanted} {found}");
        }
    }
}

//! casemate's own configuration and places.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use casemate_spec::Config;
use casemate_spec::config::{Ids, Level, POD_IDS, WithoutIdmap, WithoutNftables};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, open, openat};

use super::check::{Verdict, bad};
use super::node::{Node, nearest};
use Verdict::{Good, Skipped};

/// What living pods need.
const RUN: &str = "/run/casemate";
/// Locks of ids.
const LOCKS: &str = "/run/casemate/ids";

pub fn config(node: &Node) -> Verdict {
    let Some(problem) = node.diagnosis.problems.first() else {
        return Good(match node.diagnosis.files.len() {
            0 => format!("{} doesn't exist: the defaults", node.path.display()),
            n => format!("{}, {n} file(s)", node.path.display()),
        });
    };
    let more = match node.diagnosis.problems.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    let line = problem.line.map(|n| format!(":{n}")).unwrap_or_default();
    bad(
        format!(
            "{}{line}: {} {}{more}",
            problem.file.display(),
            problem.key,
            problem.reason
        ),
        format!("casemate doctor --config {}", node.path.display()),
    )
}

/// Whether ids from `first` on, `count` of them, are among those of pods.
fn overlaps(ids: &Ids, first: u64, count: u64) -> bool {
    let begin = u64::from(ids.base);
    let end = begin + u64::from(ids.size) * u64::from(ids.count);
    first < end && first.saturating_add(count) > begin
}

/// Entries of subuid(5) that overlap.
fn subordinate<'a>(ids: &'a Ids, text: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter(|line| {
        let mut fields = line.split(':').skip(1).map(|field| field.trim().parse());
        match (fields.next(), fields.next()) {
            (Some(Ok(first)), Some(Ok(count))) => overlaps(ids, first, count),
            _ => false,
        }
    })
}

/// Names in passwd(5) or group(5) whose ids overlap.
fn named<'a>(ids: &'a Ids, text: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let id = fields.nth(1)?.parse().ok()?;
        overlaps(ids, id, 1).then_some(name)
    })
}

pub fn ids(node: &Node) -> Verdict {
    let ids = &node.config.ids;
    let range = format!(
        "{}…{}",
        ids.base,
        u64::from(ids.base) + u64::from(ids.size) * u64::from(ids.count) - 1
    );
    let mend = "choose another ids.base in config.toml, or give the others away elsewhere";
    for path in ["/etc/subuid", "/etc/subgid"] {
        let text = fs::read_to_string(path).unwrap_or_default();
        if let Some(line) = subordinate(ids, &text).next() {
            return bad(format!("{range} overlaps {line} of {path}"), mend);
        }
    }
    for path in ["/etc/passwd", "/etc/group"] {
        let text = fs::read_to_string(path).unwrap_or_default();
        if let Some(name) = named(ids, &text).next() {
            return bad(format!("{range} overlaps {name} of {path}"), mend);
        }
    }
    Good(range)
}

/// Whether somebody holds the lock; one that can't be opened isn't held.
fn is_held(path: &Path) -> bool {
    let Ok(file) = open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    ) else {
        return false;
    };
    // Let go of at once; a shim that comes in this moment tries the next range.
    flock(&file, FlockOperation::NonBlockingLockShared).is_err()
}

pub fn ids_free(node: &Node) -> Verdict {
    let Ids { base, count, size } = node.config.ids;
    let entries = fs::read_dir(LOCKS).into_iter().flatten().flatten();
    let last = u64::from(base) + u64::from(count) * u64::from(size);
    let ours = |name: &str| {
        let id = name.split('.').next().and_then(|id| id.parse::<u64>().ok());
        id.filter(|id| (u64::from(base)..last).contains(id))
    };
    let held: std::collections::BTreeSet<u64> = entries
        .filter_map(|e| Some((e.path(), ours(e.file_name().to_str()?)?)))
        .filter(|(path, _)| is_held(path))
        .map(|(_, id)| id)
        .collect();
    let taken = u32::try_from(held.len()).unwrap_or(u32::MAX);
    let found = format!(
        "{} of {count} ranges of {POD_IDS} ids",
        count.saturating_sub(taken)
    );
    match taken < count {
        true => Good(found),
        false => bad(found, "raise ids.count in config.toml"),
    }
}

pub fn run_directory(_: &Node) -> Verdict {
    let run = Path::new(RUN);
    let there = nearest(run);
    if there == run {
        for path in [RUN, LOCKS, "/run/casemate/pods", "/run/casemate/refused"] {
            let Ok(found) = fs::symlink_metadata(path) else {
                continue;
            };
            if !found.is_dir() || found.uid() != 0 || found.mode() & 0o022 != 0 {
                return bad(
                    format!("{path} has mode {:o}, owner {}", found.mode(), found.uid()),
                    format!(
                        "ls -la {RUN}; find out who did that; then chown -R root {RUN} && chmod -R go-w {RUN}"
                    ),
                );
            }
        }
    }
    // A file without a name: it leaves nothing.
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    match openat(CWD, there, flags, Mode::from_raw_mode(0o600)) {
        Ok(_) => Good(there.display().to_string()),
        Err(error) => bad(
            format!("{}: {error}", there.display()),
            format!(
                "mount -o remount,rw {}; df {}",
                there.display(),
                there.display()
            ),
        ),
    }
}

/// Keys that take a lock away, as they are.
fn loose(config: &Config) -> Vec<String> {
    let default = Config::default();
    let more = config.capabilities.allow & !default.capabilities.allow;
    let mut all = Vec::new();
    let mut note = |is: bool, text: String| {
        if is {
            all.push(text);
        }
    };
    note(
        config.profile > default.profile,
        format!("profile = \"{}\"", config.profile.name()),
    );
    note(
        more != 0,
        format!(
            "capabilities.allow has {}",
            casemate_spec::caps::names(more).join(", ")
        ),
    );
    note(
        config.sandbox.allow_host_network,
        "sandbox.allow_host_network".to_owned(),
    );
    note(
        config.fallback.without_landlock,
        "fallback.without_landlock".to_owned(),
    );
    note(
        config.network.without_nftables == WithoutNftables::Allow,
        "network.without_nftables = \"allow\"".to_owned(),
    );
    note(
        config.network.metadata != default.network.metadata,
        "network.metadata = \"allow\"".to_owned(),
    );
    note(
        config.volumes.without_idmap == WithoutIdmap::PassThrough,
        "volumes.without_idmap = \"pass-through\"".to_owned(),
    );
    note(!config.broker.enabled, "broker.enabled = false".to_owned());
    note(!config.hooks.allow.is_empty(), "hooks.allow".to_owned());
    note(!config.devices.allow.is_empty(), "devices.allow".to_owned());
    note(
        !config.annotations.allow.is_empty(),
        "annotations.allow".to_owned(),
    );
    all
}

pub fn loosened(node: &Node) -> Verdict {
    if !node.diagnosis.problems.is_empty() {
        return Skipped("the configuration is none".to_owned());
    }
    let loose = loose(&node.config);
    match loose.is_empty() {
        true => Good("nothing".to_owned()),
        false => bad(
            loose.join("; "),
            "remove from config.toml what no pod here needs; docs/config.md has the reasons",
        ),
    }
}

pub fn debugging(node: &Node) -> Verdict {
    let config = &node.config;
    let mut all = Vec::new();
    if matches!(config.log.level, Level::Debug | Level::Trace) {
        all.push("log.level");
    }
    if config.exec.record_argv {
        all.push("exec.record_argv");
    }
    if config.kernel.older_ways {
        all.push("kernel.older_ways");
    }
    match all.is_empty() {
        true => Good("none".to_owned()),
        false => bad(
            all.join(", "),
            format!("remove it from {} when done", node.path.display()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_seen_to_the_last_id() {
        let ids = Ids {
            base: 1_000_000,
            count: 2,
            size: 100_000,
        };
        for (line, is) in [
            ("a:900000:100000", false),
            ("a:900000:100001", true),
            ("a:1199999:1", true),
            ("a:1200000:5", false),
            ("a:0:18446744073709551615", true),
            ("a:x:5", false),
            ("", false),
        ] {
            assert_eq!(subordinate(&ids, line).count() == 1, is, "{line}");
        }
        let passwd = "root:x:0:0::/:/bin/sh\neve:x:1000001:5::/:/bin/sh\n";
        assert_eq!(named(&ids, passwd).collect::<Vec<_>>(), ["eve"]);
    }

    #[test]
    fn defaults_are_not_loose_and_what_is_loosened_is_named() {
        assert!(loose(&Config::default()).is_empty());
        let text = "profile = \"compat\"\n[broker]\nenabled = false\n\
                    [capabilities]\nallow = [\"CAP_NET_RAW\"]\n";
        let config = Config::parse(Path::new("x"), text).unwrap();
        assert_eq!(
            loose(&config),
            [
                "profile = \"compat\"",
                "capabilities.allow has CAP_NET_RAW",
                "broker.enabled = false"
            ]
        );
    }
}

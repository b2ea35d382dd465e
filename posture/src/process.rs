//! Processes: ids, capabilities, filters, namespaces, cgroups, descriptors.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;

use casemate_sys::seccomp;

use crate::promise::{Container, Process, Promise, hash};
use crate::{Depth, Report};

/// Ids of a container.
const IDS: u32 = 65_536;
/// Kinds of namespaces that make a process one of the pod's.
const OWN: [&str; 3] = ["user", "mnt", "pid"];
/// What all of a container's processes share; a shared pid namespace is joined
/// by children alone.
const SHARED: [&str; 5] = ["user", "mnt", "net", "ipc", "uts"];

/// Host pids of all processes, and inodes of the namespaces of [`OWN`].
pub type All = BTreeMap<u32, [u64; 3]>;

fn namespace(pid: u32, kind: &str) -> Option<u64> {
    Some(fs::metadata(format!("/proc/{pid}/ns/{kind}")).ok()?.ino())
}

/// Everybody on the host; zombies have no namespaces left and hold nothing.
pub fn all() -> All {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter_map(|pid| {
            let [a, b, c] = OWN.map(|kind| namespace(pid, kind));
            Some((pid, [a?, b?, c?]))
        })
        .collect()
}

/// `/proc/PID/status`.
struct Status(BTreeMap<String, String>);

impl Status {
    fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let lines = text.lines().filter_map(|l| l.split_once(':'));
        let all = lines.map(|(key, value)| (key.to_owned(), value.trim().to_owned()));
        Some(Self(all.collect()))
    }

    fn get(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }

    fn bits(&self, key: &str) -> u64 {
        u64::from_str_radix(self.get(key), 16).unwrap_or(u64::MAX)
    }

    fn ended(&self) -> bool {
        self.get("State").starts_with(['Z', 'X'])
    }
}

fn hex(set: u64) -> String {
    format!("{set:#x}")
}

/// Capabilities beyond those allowed, and what else is the same for everybody.
fn locks(
    report: &mut Report,
    who: &str,
    status: &Status,
    (allowed, no_new_privs, filters): (u64, bool, usize),
) {
    for set in ["CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"] {
        let found = status.bits(set);
        if found & !allowed != 0 {
            let promised = format!("at most {}", hex(allowed));
            report.add(format!("{who}: {set}"), promised, hex(found));
        }
    }
    if no_new_privs {
        report.equal(
            format!("{who}: NoNewPrivs"),
            &"1",
            &status.get("NoNewPrivs"),
        );
    }
    report.equal(format!("{who}: Seccomp"), &"2", &status.get("Seccomp"));
    let count = status.get("Seccomp_filters").parse().unwrap_or(0);
    if count < filters {
        report.add(
            format!("{who}: filters"),
            format!("{filters} at least"),
            count,
        );
    }
}

/// The first filters are those that were promised.
fn filters(report: &mut Report, who: &str, pid: u32, promised: &[String], depth: Depth) {
    if depth == Depth::Glance || promised.is_empty() {
        return;
    }
    match seccomp::filters_of(pid) {
        Ok(found) => {
            for (n, wanted) in promised.iter().enumerate() {
                let found = found.get(n).map_or_else(|| "none".to_owned(), |f| hash(f));
                report.equal(format!("{who}: hash of filter {n}"), wanted, &found);
            }
        }
        // Gone meanwhile; or traced by somebody, which nobody should.
        Err(e) if e.raw_os_error() == Some(3) => {}
        Err(e) => report.add(format!("{who}: filters"), "to be read", e),
    }
}

/// A process of the runtime's own.
pub fn runtime(report: &mut Report, name: &str, promised: &Process, depth: Depth) {
    let pid = promised.pid;
    let who = format!("{name} ({pid})");
    let Some(status) = Status::of(pid) else {
        report.add(who, "alive", "no such process");
        return;
    };
    if status.ended() {
        report.add(who, "alive", "ended");
        return;
    }
    let all = (
        promised.capabilities,
        promised.no_new_privs,
        promised.filters.len(),
    );
    locks(report, &who, &status, all);
    let uid = promised.uid;
    report.equal(
        format!("{who}: Uid"),
        &format!("{uid}\t{uid}\t{uid}\t{uid}").as_str(),
        &status.get("Uid"),
    );
    report.equal(format!("{who}: TracerPid"), &"0", &status.get("TracerPid"));
    filters(report, &who, pid, &promised.filters, depth);
}

/// All processes of a container: those in its cgroups, and those that are in its
/// mount or user namespace, whoever put them there.
pub fn container(
    report: &mut Report,
    promised: &Container,
    all: &All,
    known: &mut BTreeSet<u32>,
    depth: Depth,
) {
    let Some([user, mnt, _]) = all.get(&promised.init) else {
        let who = format!("container {}: init ({})", promised.id, promised.init);
        report.add(who, "alive", "no such process");
        return;
    };
    let mut members: BTreeSet<u32> = promised
        .cgroups
        .iter()
        .filter_map(|dir| fs::read_to_string(format!("{dir}/cgroup.procs")).ok())
        .flat_map(|text| {
            text.lines()
                .filter_map(|l| l.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect();
    let inside = |(_, ns): &(&u32, &[u64; 3])| ns[1] == *mnt;
    members.extend(all.iter().filter(inside).map(|(pid, _)| *pid));
    for pid in members {
        known.insert(pid);
        member(report, promised, pid, *user, depth);
    }
}

fn member(report: &mut Report, promised: &Container, pid: u32, user: u64, depth: Depth) {
    let forker = pid == promised.forker;
    let role = match pid {
        _ if forker => "forker",
        _ if pid == promised.init => "init",
        _ => "process",
    };
    let who = format!("container {}: {role} {pid}", promised.id);
    let Some(status) = Status::of(pid).filter(|s| !s.ended()) else {
        return;
    };
    let more = if forker {
        promised.forker_capabilities
    } else {
        0
    };
    let allowed = promised.capabilities | more;
    locks(
        report,
        &who,
        &status,
        (allowed, promised.no_new_privs, promised.filters.len()),
    );
    for key in ["Uid", "Gid"] {
        let foreign = status
            .get(key)
            .split_whitespace()
            .filter_map(|id| id.parse::<u32>().ok())
            .any(|id| !(promised.root..promised.root + IDS).contains(&id));
        if foreign {
            let range = format!("{}…{}", promised.root, promised.root + IDS - 1);
            report.add(
                format!("{who}: {key}"),
                range,
                status.get(key).replace('\t', " "),
            );
        }
    }
    for kind in SHARED {
        let (wanted, found) = match kind {
            "user" => (Some(user), namespace(pid, kind)),
            _ => (namespace(promised.init, kind), namespace(pid, kind)),
        };
        if let (Some(wanted), Some(found)) = (wanted, found)
            && wanted != found
        {
            report.add(format!("{who}: {kind} namespace"), wanted, found);
        }
    }
    if !forker {
        report.equal(format!("{who}: TracerPid"), &"0", &status.get("TracerPid"));
    }
    place(report, promised, pid, &who);
    filters(report, &who, pid, &promised.filters, depth);
    if !forker {
        descriptors(report, pid, &who);
    }
}

/// The process is in each of the container's cgroups, or below.
fn place(report: &mut Report, promised: &Container, pid: u32, who: &str) {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else {
        return;
    };
    for dir in &promised.cgroups {
        // /sys/fs/cgroup/CONTROLLERS/PATH on v1, /sys/fs/cgroup/PATH on v2.
        let below = dir.trim_start_matches("/sys/fs/cgroup/");
        let is_there = text.lines().any(|line| {
            let path = line.splitn(3, ':').nth(2).unwrap_or_default();
            let path = path.trim_start_matches('/');
            !path.is_empty()
                && (below == path || below.ends_with(&format!("/{path}")) || {
                    // In a cgroup of its own below.
                    let own = below.split_once('/').map_or(below, |(_, rest)| rest);
                    path.starts_with(&format!("{own}/"))
                })
        });
        if !is_there {
            report.add(
                format!("{who}: cgroup"),
                dir,
                text.trim().replace('\n', " "),
            );
            return;
        }
    }
}

/// An open file or directory is on a mount that the process itself can see.
fn descriptors(report: &mut Report, pid: u32, who: &str) {
    let Ok(table) = fs::read_to_string(format!("/proc/{pid}/mountinfo")) else {
        return;
    };
    let mounts: BTreeSet<&str> = table.lines().filter_map(|l| l.split(' ').next()).collect();
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    for entry in entries.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let target = target.display().to_string();
        // Pipes, sockets and their kin have no path; a stream may be null.
        if !target.starts_with('/') || target.starts_with("/memfd:") || target.ends_with("/null") {
            continue;
        }
        let number = entry.file_name().display().to_string();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"));
        let info = info.unwrap_or_default();
        let id = info.lines().find_map(|l| l.strip_prefix("mnt_id:"));
        if id.is_some_and(|id| !mounts.contains(id.trim())) {
            let what = format!("{who}: descriptor {number}");
            report.add(what, "of a mount of its own", target);
        }
    }
}

/// Processes in namespaces of the pod that are no container's and not the
/// runtime's.
pub fn strangers(report: &mut Report, promise: &Promise, all: &All, known: &BTreeSet<u32>) {
    let mut own: BTreeSet<(usize, u64)> = BTreeSet::new();
    let pids = promise
        .containers
        .iter()
        .flat_map(|c| [c.init, c.forker])
        .chain([promise.agent.pid]);
    for pid in pids {
        let spaces = all.get(&pid).into_iter().flatten();
        own.extend(spaces.enumerate().map(|(n, ino)| (n, *ino)));
    }
    for (pid, spaces) in all.iter().filter(|(pid, _)| !known.contains(pid)) {
        let joined: Vec<&str> = spaces
            .iter()
            .enumerate()
            .filter(|(n, ino)| own.contains(&(*n, **ino)))
            .map(|(n, _)| OWN[n])
            .collect();
        // Born or gone between two looks: of the pod it would be in a cgroup of it.
        let lives = Status::of(*pid).is_some_and(|s| !s.ended());
        if !joined.is_empty() && lives {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let found = format!("in its {} namespace", joined.join(", "));
            report.add(
                format!("process {pid} ({})", name.trim()),
                "not in the pod",
                found,
            );
        }
    }
}

//! Processes: ids, capabilities, filters, namespaces.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;

use casemate_sys::seccomp;
use rustix::io::Errno;

use crate::promise::{Container, Process, Promise, hash};
use crate::status::{self, Status, namespace};
use crate::{Depth, Report, descriptors, place};

/// Ids of a container.
const IDS: u32 = 65_536;
/// Kinds of namespaces that make a process one of the pod's.
const OWN: [&str; 3] = ["user", "mnt", "pid"];
/// What the pod has of its own, whatever its network is.
const PODS: [&str; 5] = ["user", "mnt", "pid", "ipc", "uts"];
/// What all of a container's processes share; a shared pid namespace is joined
/// by children alone.
const SHARED: [&str; 5] = ["user", "mnt", "net", "ipc", "uts"];

/// Host pids of all processes, and inodes of the namespaces of [`OWN`].
pub type All = BTreeMap<u32, [u64; 3]>;

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

fn hex(set: u64) -> String {
    format!("{set:#x}")
}

/// What the kernel enforces on a process.
struct Locks {
    capabilities: u64,
    no_new_privs: bool,
    filters: usize,
    /// It has exactly these, and not what is below them.
    exactly: bool,
}

fn locks(report: &mut Report, who: &str, status: &Status, promised: &Locks) {
    let allowed = promised.capabilities;
    for set in ["CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"] {
        let found = status.bits(set);
        let what = format!("{who}: {set}");
        // The shim gives effective ones up for moments in which it is a user.
        if promised.exactly && set == "CapPrm" && found != allowed {
            report.add(what, hex(allowed), hex(found));
        } else if found & !allowed != 0 {
            report.add(what, format!("at most {}", hex(allowed)), hex(found));
        }
    }
    if promised.no_new_privs {
        report.equal(
            format!("{who}: NoNewPrivs"),
            &"1",
            &status.get("NoNewPrivs"),
        );
    }
    report.equal(format!("{who}: Seccomp"), &"2", &status.get("Seccomp"));
    // Before Linux 5.10 there is no number.
    let count = status.get("Seccomp_filters").parse().unwrap_or(0);
    if promised.exactly && count != promised.filters {
        report.add(format!("{who}: filters"), promised.filters, count);
    } else if count < promised.filters {
        let at_least = format!("{} at least", promised.filters);
        report.add(format!("{who}: filters"), at_least, count);
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
        Err(e) if e.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {}
        Err(e) if e.raw_os_error() == Some(Errno::TIMEDOUT.raw_os_error()) => {
            report.unseen(format!("{who}: filters: it doesn't stop; is it paused?"));
        }
        Err(e) => report.add(format!("{who}: filters"), "to be read", e),
    }
}

fn core(report: &mut Report, who: &str, pid: u32) {
    // 1 is the kernel's word for neither file nor handler.
    match status::core_limit(pid).as_deref() {
        None | Some("0" | "1") => {}
        Some(found) => report.add(format!("{who}: core file"), "none", found),
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
    let promises = Locks {
        capabilities: promised.capabilities,
        no_new_privs: promised.no_new_privs,
        filters: promised.filters.len(),
        exactly: true,
    };
    for (tid, status) in Status::threads(pid) {
        let who = match tid == pid {
            true => who.clone(),
            false => format!("{who}, thread {tid}"),
        };
        locks(report, &who, &status, &promises);
        let ids = vec![promised.uid.to_string(); 4].join(" ");
        for key in ["Uid", "Gid"] {
            let found = status.get(key).replace('\t', " ");
            report.equal(format!("{who}: {key}"), &ids, &found);
        }
    }
    report.equal(format!("{who}: TracerPid"), &"0", &status.get("TracerPid"));
    if promised.no_core {
        core(report, &who, pid);
    }
    place::check(report, &who, pid, &promised.cgroups);
    if let Some(files) = &promised.files {
        descriptors::runtime(report, &who, pid, files);
    }
    filters(report, &who, pid, &promised.filters, depth);
}

/// The pod's namespaces are none of the node's, and its ids its own.
pub fn pod(report: &mut Report, promise: &Promise) {
    let (shim, agent) = (promise.shim.pid, promise.agent.pid);
    for kind in PODS {
        let found = namespace(agent, kind);
        if found.is_some() && found == namespace(shim, kind) {
            report.add(
                format!("agent: {kind} namespace"),
                "the pod's",
                "the node's",
            );
        }
    }
    let Some(root) = promise.root else {
        return;
    };
    let wanted = format!("0 {} 1; 1 {root} {IDS}", promise.agent.uid);
    for file in ["uid_map", "gid_map"] {
        if let Some(found) = status::map(agent, file) {
            report.equal(format!("agent: {file}"), &wanted, &found);
        }
    }
}

/// All processes of a container: those in its cgroups, and those that are in its
/// mount or user namespace, whoever put them there.
pub fn container(
    report: &mut Report,
    (promise, promised): (&Promise, &Container),
    all: &All,
    known: &mut BTreeSet<u32>,
    depth: Depth,
) {
    let name = format!("container {}", promised.id);
    let Some([user, mnt, _]) = all.get(&promised.init) else {
        let who = format!("{name}: init ({})", promised.init);
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
    forker(report, promised, &name);
    namespaces(report, promise, promised, &name);
}

/// What is the forker's alone.
fn forker(report: &mut Report, promised: &Container, name: &str) {
    let pid = promised.forker;
    let who = format!("{name}: forker {pid}");
    if !status::lives(pid) {
        return;
    }
    // Its memory is the pod's root's, as long as it can't be dumped.
    if let Some(found) = status::shown_owner(pid)
        && found == promised.root
    {
        report.add(format!("{who}: dumpable"), "no", "yes");
    }
    descriptors::runtime(report, &who, pid, &[]);
}

/// Whose namespaces a container has, and who owns them.
fn namespaces(report: &mut Report, promise: &Promise, promised: &Container, name: &str) {
    let (shim, agent, init) = (promise.shim.pid, promise.agent.pid, promised.init);
    let mut same = |kind: &str, wanted: Option<u64>| {
        if let (Some(wanted), Some(found)) = (wanted, namespace(init, kind)) {
            report.equal(format!("{name}: {kind} namespace"), &wanted, &found);
        }
    };
    same("user", promise.users);
    same("net", promise.network.namespace);
    same("ipc", namespace(agent, "ipc"));
    same("uts", namespace(agent, "uts"));
    for kind in ["mnt", "pid", "cgroup"] {
        let found = namespace(init, kind);
        for (whose, pid) in [("the node's", shim), ("the agent's", agent)] {
            if found.is_some() && found == namespace(pid, kind) {
                report.add(format!("{name}: {kind} namespace"), "its own", whose);
            }
        }
    }
    // Owned by the user namespace above its own: nothing it is capable of counts.
    let pods = namespace(agent, "user");
    for kind in ["mnt", "pid", "ipc", "uts"] {
        if let (Some(wanted), Some(found)) = (pods, status::owner(init, kind)) {
            report.equal(
                format!("{name}: owner of the {kind} namespace"),
                &wanted,
                &found,
            );
        }
    }
    let wanted = format!("0 {} {IDS}", promised.root);
    for file in ["uid_map", "gid_map"] {
        if let Some(found) = status::map(init, file) {
            report.equal(format!("{name}: {file}"), &wanted, &found);
        }
    }
}

/// Whether it runs the forker's program: a process that hasn't executed another yet.
/// Nobody in a container gets at that program.
fn is_forkers(pid: u32, forker: u32) -> bool {
    let program = |pid: u32| {
        let file = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
        Some((file.dev(), file.ino()))
    };
    program(pid).is_some_and(|of| program(forker) == Some(of))
}

fn member(report: &mut Report, promised: &Container, pid: u32, user: u64, depth: Depth) {
    let forker = pid == promised.forker;
    // Before anything else is looked at: it may execute meanwhile, and not go back.
    let started = !forker && !is_forkers(pid, promised.forker);
    let role = match pid {
        _ if forker => "forker",
        _ if pid == promised.init => "init",
        _ => "process",
    };
    let who = format!("container {}: {role} {pid}", promised.id);
    let Some(status) = Status::of(pid).filter(|s| !s.ended()) else {
        return;
    };
    let more = if started {
        0
    } else {
        promised.forker_capabilities
    };
    let mut own = promised.filters.clone();
    own.extend(promised.last_filter.clone().filter(|_| started));
    let promises = Locks {
        capabilities: promised.capabilities | more,
        no_new_privs: promised.no_new_privs,
        filters: own.len(),
        exactly: false,
    };
    locks(report, &who, &status, &promises);
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
        let wanted = match kind {
            "user" => Some(user),
            _ => namespace(promised.init, kind),
        };
        if let (Some(wanted), Some(found)) = (wanted, namespace(pid, kind))
            && wanted != found
        {
            report.add(format!("{who}: {kind} namespace"), wanted, found);
        }
    }
    if promised.no_core {
        core(report, &who, pid);
    }
    place::check(report, &who, pid, &promised.cgroups);
    filters(report, &who, pid, &own, depth);
    if !forker {
        report.equal(format!("{who}: TracerPid"), &"0", &status.get("TracerPid"));
        descriptors::inside(report, &who, pid, promised.forker);
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
        if !joined.is_empty() && status::lives(*pid) {
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

//! What becomes of every field of the OCI runtime specification.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use crate::error::one_line;
use crate::rules::{
    APPARMOR, HOOKS, PLATFORM, RESOURCES, Rule, SCHEDULING, SECCOMP_LISTENER, SELINUX, UNSUPPORTED,
};

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum How {
    /// As written.
    Applied,
    /// Applied, and at least as strict as written.
    Stricter,
    /// The container doesn't start.
    Refused,
    /// Harmless; a warning says so.
    IgnoredWithWarning,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Applied => "applied",
            Self::Stricter => "stricter",
            Self::Refused => "refused",
            Self::IgnoredWithWarning => "ignored with a warning",
        })
    }
}

/// One field, or one field and all below it.
#[derive(Debug)]
pub struct Coverage {
    /// Path: `[]` for the entries of a list, `*` for the keys of a map.
    pub field: &'static str,
    /// What becomes of it.
    pub how: How,
    /// How exactly, or why.
    pub note: &'static str,
    /// The reason to refuse it; with [`How::Refused`] only.
    pub rule: Option<&'static Rule>,
    /// The row is about everything below, too.
    pub subtree: bool,
}

const fn row_of(field: &'static str, how: How, note: &'static str) -> Coverage {
    Coverage {
        field,
        how,
        note,
        rule: None,
        subtree: false,
    }
}
const fn applied(field: &'static str, note: &'static str) -> Coverage {
    row_of(field, How::Applied, note)
}
const fn stricter(field: &'static str, note: &'static str) -> Coverage {
    row_of(field, How::Stricter, note)
}
const fn ignored(field: &'static str, note: &'static str) -> Coverage {
    row_of(field, How::IgnoredWithWarning, note)
}
const fn refused(field: &'static str, rule: &'static Rule, note: &'static str) -> Coverage {
    Coverage {
        field,
        how: How::Refused,
        note,
        rule: Some(rule),
        subtree: true,
    }
}

const fn hook(field: &'static str, note: &'static str) -> Coverage {
    Coverage {
        field,
        how: How::Applied,
        note,
        rule: Some(&HOOKS),
        subtree: true,
    }
}

const ON_NODE: &str = "allowed by hooks.allow; in the host's namespaces";

static TABLE: &[Coverage] = &[
    applied("ociVersion", "1.x; another major version is refused"),
    applied("annotations.*", "can only tighten"),
    applied("hostname", "in the pod's uts namespace"),
    applied("domainname", "in the pod's uts namespace"),
    hook("hooks.prestart", ON_NODE),
    hook("hooks.createRuntime", ON_NODE),
    hook(
        "hooks.createContainer",
        "allowed by hooks.allow; a static program of the node, in the container's namespaces and behind its locks",
    ),
    hook(
        "hooks.startContainer",
        "a program of the container, as its user and behind its locks",
    ),
    hook("hooks.poststart", ON_NODE),
    hook("hooks.poststop", ON_NODE),
    refused("solaris", &PLATFORM, "another platform"),
    refused("windows", &PLATFORM, "another platform"),
    refused("freebsd", &PLATFORM, "another platform"),
    refused("vm", &PLATFORM, "there is no virtual machine"),
    refused("zos", &PLATFORM, "another platform"),
    applied(
        "root.path",
        "the tree itself comes from containerd's mounts",
    ),
    applied("root.readonly", ""),
    // Mounts.
    applied(
        "mounts[].destination",
        "absolute, without .., not under /proc but for lxcfs's files",
    ),
    applied(
        "mounts[].type",
        "proc, sysfs, tmpfs, devpts, mqueue, bind, cgroup; others are refused",
    ),
    applied(
        "mounts[].source",
        "of a bind: absolute, and none that host_paths refuses; some are read-only",
    ),
    stricter(
        "mounts[].options",
        "unknown ones and shared propagation are refused; nodev and nosuid are added",
    ),
    applied("mounts[].uidMappings[].containerID", "as the pod's"),
    applied("mounts[].uidMappings[].hostID", "as the pod's"),
    applied("mounts[].uidMappings[].size", "as the pod's"),
    applied("mounts[].gidMappings[].containerID", "as the pod's"),
    applied("mounts[].gidMappings[].hostID", "as the pod's"),
    applied("mounts[].gidMappings[].size", "as the pod's"),
    // Process.
    applied("process.terminal", ""),
    applied("process.consoleSize.height", ""),
    applied("process.consoleSize.width", ""),
    applied("process.user.uid", "below 65536"),
    applied("process.user.gid", "below 65536"),
    applied("process.user.umask", "at most 0777"),
    applied("process.user.additionalGids", "each below 65536"),
    ignored("process.user.username", "for Windows only"),
    applied("process.args", "not empty"),
    ignored("process.commandLine", "for Windows only"),
    applied("process.env", "each with = and without NUL"),
    applied("process.cwd", "absolute"),
    stricter(
        "process.capabilities.bounding",
        "cut to capabilities.allow; refused where more than engines grant by themselves is asked for",
    ),
    stricter(
        "process.capabilities.effective",
        "cut to capabilities.allow; refused where more than engines grant by themselves is asked for",
    ),
    stricter(
        "process.capabilities.inheritable",
        "cut to capabilities.allow; refused where more than engines grant by themselves is asked for",
    ),
    stricter(
        "process.capabilities.permitted",
        "cut to capabilities.allow; refused where more than engines grant by themselves is asked for",
    ),
    stricter(
        "process.capabilities.ambient",
        "cut to capabilities.allow; refused where more than engines grant by themselves is asked for",
    ),
    applied("process.rlimits[].type", "each once"),
    applied("process.rlimits[].soft", "at most hard"),
    applied("process.rlimits[].hard", ""),
    stricter(
        "process.noNewPrivileges",
        "always true but in the profile compat",
    ),
    Coverage {
        field: "process.apparmorProfile",
        how: How::Applied,
        note: "taken on with execve; refused where the node has no AppArmor or hasn't loaded it, but for unconfined",
        rule: Some(&APPARMOR),
        subtree: false,
    },
    applied("process.oomScoreAdj", "-1000 to 1000"),
    Coverage {
        field: "process.selinuxLabel",
        how: How::Applied,
        note: "taken on with execve; refused where the node has no SELinux or its policy no such label",
        rule: Some(&SELINUX),
        subtree: false,
    },
    applied(
        "process.ioPriority.class",
        "IOPRIO_CLASS_BE and IOPRIO_CLASS_IDLE; refused with the profile strict",
    ),
    applied("process.ioPriority.priority", "0 to 7"),
    applied(
        "process.scheduler.policy",
        "SCHED_OTHER, SCHED_BATCH, SCHED_IDLE; refused with the profile strict",
    ),
    applied("process.scheduler.nice", "0 to 19"),
    applied("process.scheduler.priority", "0; others are refused"),
    refused(
        "process.scheduler.flags",
        &SCHEDULING,
        "of the realtime policies",
    ),
    applied("process.scheduler.runtime", "0; others are refused"),
    applied("process.scheduler.deadline", "0; others are refused"),
    applied("process.scheduler.period", "0; others are refused"),
    stricter(
        "process.execCPUAffinity.initial",
        "checked only: no process is ever outside of its cgroup",
    ),
    applied(
        "process.execCPUAffinity.final",
        "of execs; the container's own for an exec that names none",
    ),
    // Linux.
    stricter(
        "linux.namespaces[].type",
        "the host's are refused unless allowed by name",
    ),
    applied(
        "linux.namespaces[].path",
        "network, pid, ipc and uts; user: only its mapping, which must be the one written",
    ),
    applied("linux.uidMappings[].containerID", "0, in one line"),
    applied(
        "linux.uidMappings[].hostID",
        "not the host's ids nor casemate's own; locked while the pod lives",
    ),
    applied("linux.uidMappings[].size", "65536"),
    applied("linux.gidMappings[].containerID", "0, in one line"),
    applied("linux.gidMappings[].hostID", "the same as of uidMappings"),
    applied("linux.gidMappings[].size", "65536"),
    refused(
        "linux.netDevices",
        &UNSUPPORTED,
        "a device of the node's network would leave it",
    ),
    applied(
        "linux.sysctl.*",
        "the safe ones, and of net.*, kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.* those that sysctls.allow names; others are refused",
    ),
    applied("linux.cgroupsPath", "/casemate/<id> when absent"),
    stricter(
        "linux.devices[].path",
        "the default devices, and below /dev those of devices.allow; others are refused",
    ),
    stricter("linux.devices[].type", "as the node's device has it"),
    stricter("linux.devices[].major", "as the node's device has it"),
    stricter("linux.devices[].minor", "as the node's device has it"),
    stricter(
        "linux.devices[].fileMode",
        "permission bits; the default devices have 0666",
    ),
    stricter(
        "linux.devices[].uid",
        "below 65536; the default devices belong to root",
    ),
    stricter(
        "linux.devices[].gid",
        "below 65536; the default devices belong to root",
    ),
    Coverage {
        field: "linux.seccomp",
        how: How::Stricter,
        note: "intersected with the sandbox's own profile; read by the profile compiler",
        rule: None,
        subtree: true,
    },
    refused(
        "linux.seccomp.listenerPath",
        &SECCOMP_LISTENER,
        "a process of the host would decide",
    ),
    refused(
        "linux.seccomp.listenerMetadata",
        &SECCOMP_LISTENER,
        "a process of the host would decide",
    ),
    stricter(
        "linux.rootfsPropagation",
        "private and slave, of which both are private: nothing is mounted below the root from outside; others are refused",
    ),
    stricter(
        "linux.maskedPaths",
        "with the usual ones added, even to an empty list (procMount: Unmasked)",
    ),
    stricter(
        "linux.readonlyPaths",
        "with the usual ones added, even to an empty list (procMount: Unmasked)",
    ),
    Coverage {
        field: "linux.mountLabel",
        how: How::Applied,
        note: "of the overlay, tmpfs and devpts of a container; else as process.selinuxLabel",
        rule: Some(&SELINUX),
        subtree: false,
    },
    refused(
        "linux.intelRdt",
        &UNSUPPORTED,
        "classes of cache and bandwidth are the node's",
    ),
    refused(
        "linux.memoryPolicy",
        &UNSUPPORTED,
        "memory nodes are chosen with linux.resources.cpu.mems",
    ),
    applied("linux.personality.domain", "LINUX; others are refused"),
    applied("linux.personality.flags", "none; others are refused"),
    applied("linux.timeOffsets.*", "monotonic and boottime"),
    // Resources.
    stricter(
        "linux.resources.devices[].allow",
        "rules beyond linux.devices and the default ones are dropped",
    ),
    stricter(
        "linux.resources.devices[].type",
        "rules beyond linux.devices and the default ones are dropped",
    ),
    stricter(
        "linux.resources.devices[].major",
        "rules beyond linux.devices and the default ones are dropped",
    ),
    stricter(
        "linux.resources.devices[].minor",
        "rules beyond linux.devices and the default ones are dropped",
    ),
    stricter(
        "linux.resources.devices[].access",
        "rules beyond linux.devices and the default ones are dropped",
    ),
    applied("linux.resources.memory.limit", ""),
    applied("linux.resources.memory.reservation", ""),
    applied("linux.resources.memory.swap", ""),
    ignored(
        "linux.resources.memory.kernel",
        "kernels no longer have this limit; memory.limit counts that memory",
    ),
    ignored(
        "linux.resources.memory.kernelTCP",
        "gone with cgroup v2; memory.limit counts that memory",
    ),
    applied("linux.resources.memory.swappiness", "cgroup v1 only"),
    applied(
        "linux.resources.memory.disableOOMKiller",
        "false; true is refused",
    ),
    ignored("linux.resources.memory.useHierarchy", "always so"),
    applied("linux.resources.memory.checkBeforeUpdate", ""),
    applied("linux.resources.cpu.shares", ""),
    applied(
        "linux.resources.cpu.quota",
        "in a scope of systemd's rounded up to whole percents of a CPU, as it keeps no others",
    ),
    applied("linux.resources.cpu.burst", ""),
    applied("linux.resources.cpu.period", ""),
    applied("linux.resources.cpu.idle", ""),
    applied("linux.resources.cpu.cpus", ""),
    applied("linux.resources.cpu.mems", ""),
    refused(
        "linux.resources.cpu.realtimeRuntime",
        &RESOURCES,
        "a workload gets no realtime (0 is none)",
    ),
    refused(
        "linux.resources.cpu.realtimePeriod",
        &RESOURCES,
        "a workload gets no realtime (0 is none)",
    ),
    applied("linux.resources.pids.limit", ""),
    applied("linux.resources.blockIO.weight", ""),
    applied("linux.resources.blockIO.leafWeight", "cgroup v1 only"),
    applied("linux.resources.blockIO.weightDevice[].major", ""),
    applied("linux.resources.blockIO.weightDevice[].minor", ""),
    applied("linux.resources.blockIO.weightDevice[].weight", ""),
    applied(
        "linux.resources.blockIO.weightDevice[].leafWeight",
        "cgroup v1 only",
    ),
    applied("linux.resources.blockIO.throttleReadBpsDevice[].major", ""),
    applied("linux.resources.blockIO.throttleReadBpsDevice[].minor", ""),
    applied("linux.resources.blockIO.throttleReadBpsDevice[].rate", ""),
    applied("linux.resources.blockIO.throttleWriteBpsDevice[].major", ""),
    applied("linux.resources.blockIO.throttleWriteBpsDevice[].minor", ""),
    applied("linux.resources.blockIO.throttleWriteBpsDevice[].rate", ""),
    applied("linux.resources.blockIO.throttleReadIOPSDevice[].major", ""),
    applied("linux.resources.blockIO.throttleReadIOPSDevice[].minor", ""),
    applied("linux.resources.blockIO.throttleReadIOPSDevice[].rate", ""),
    applied(
        "linux.resources.blockIO.throttleWriteIOPSDevice[].major",
        "",
    ),
    applied(
        "linux.resources.blockIO.throttleWriteIOPSDevice[].minor",
        "",
    ),
    applied("linux.resources.blockIO.throttleWriteIOPSDevice[].rate", ""),
    applied("linux.resources.hugepageLimits[].pageSize", ""),
    applied("linux.resources.hugepageLimits[].limit", ""),
    refused(
        "linux.resources.network",
        &UNSUPPORTED,
        "net_cls and net_prio are gone with cgroup v2",
    ),
    refused(
        "linux.resources.rdma",
        &UNSUPPORTED,
        "a sandbox has no RDMA devices",
    ),
    applied(
        "linux.resources.unified.*",
        "cgroup v2 only, refused on v1; each a plain file name",
    ),
];

/// One row for every field of the specification (config.md, config-linux.md).
#[must_use]
pub fn coverage() -> &'static [Coverage] {
    TABLE
}

/// The table by path. A configuration is walked once per container, so each
/// step is one look-up.
struct Index {
    rows: HashMap<&'static str, &'static Coverage>,
    /// What rows begin with: `linux` and `linux.devices[]` for
    /// `linux.devices[].path`.
    beginnings: HashSet<&'static str>,
}

static INDEX: LazyLock<Index> = LazyLock::new(|| Index {
    rows: TABLE.iter().map(|r| (r.field, r)).collect(),
    beginnings: TABLE.iter().flat_map(|r| beginnings(r.field)).collect(),
});

fn beginnings(field: &str) -> impl Iterator<Item = &str> {
    field
        .char_indices()
        .filter(|(_, c)| matches!(c, '.' | '['))
        .filter_map(|(i, _)| field.get(..i))
}

/// The row about `path`, which is written as rows write it.
#[must_use]
pub fn row(path: &str) -> Option<&'static Coverage> {
    let within = |begin: &str| INDEX.rows.get(begin).copied().filter(|r| r.subtree);
    INDEX
        .rows
        .get(path)
        .copied()
        .or_else(|| beginnings(path).find_map(within))
}

/// Paths of all fields that `root` sets to something, each once. Nothing is
/// `null`, an empty text, list or map, and a map of empty lists.
#[must_use]
pub fn present(root: &Value) -> Vec<String> {
    let mut paths = BTreeSet::new();
    if let Value::Object(map) = root {
        walk_map(map, "", &mut paths);
    }
    paths.into_iter().collect()
}

/// What a document sets.
#[derive(Debug, Clone, Default)]
pub struct Fields {
    /// Rows of the fields, each once.
    pub known: Vec<&'static Coverage>,
    /// Paths without a row, the first few.
    pub unknown: Vec<String>,
}

impl Fields {
    /// Looks at the document itself: a typed reading loses what it doesn't
    /// know.
    #[must_use]
    pub fn of(root: &Value) -> Self {
        let mut fields = Self::default();
        let mut more = 0;
        for path in present(root) {
            match row(&path) {
                Some(row) if fields.known.iter().any(|k| k.field == row.field) => {}
                Some(row) => fields.known.push(row),
                // A document of ten megabytes can hold a million of them.
                None if fields.unknown.len() < 32 => fields.unknown.push(one_line(&path)),
                None => more += 1,
            }
        }
        if more > 0 {
            fields.unknown.push(format!("{more} more fields"));
        }
        fields
    }
}

/// Takes out what is refused whatever its value, so that a value which a
/// typed reading has no name for is still answered with the refusal.
pub(crate) fn strip_refused(root: &mut Value) {
    for row in TABLE.iter().filter(|r| r.how == How::Refused) {
        let (parents, last) = row.field.rsplit_once('.').unwrap_or(("", row.field));
        let parent = parents
            .split('.')
            .filter(|p| !p.is_empty())
            .try_fold(&mut *root, |value, key| value.get_mut(key));
        if let Some(map) = parent.and_then(Value::as_object_mut) {
            map.remove(last);
        }
    }
}

fn walk_map(map: &Map<String, Value>, path: &str, paths: &mut BTreeSet<String>) {
    let any = join(path, "*");
    let open = INDEX.rows.contains_key(any.as_str());
    for (key, value) in map {
        let path = if open { any.clone() } else { join(path, key) };
        walk(value, path, paths);
    }
}

/// Numbers of which 0 says no more than nothing: nerdctl writes them always.
const ZERO_IS_NONE: [&str; 2] = [
    "linux.resources.cpu.realtimeRuntime",
    "linux.resources.cpu.realtimePeriod",
];

fn walk(value: &Value, path: String, paths: &mut BTreeSet<String>) {
    let nothing = match value {
        Value::Number(number) => {
            number.as_u64() == Some(0) && ZERO_IS_NONE.contains(&path.as_str())
        }
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        // A map of empty maps is something: `netDevices: {"eth0": {}}`.
        Value::Object(map) => map
            .values()
            .all(|v| v.is_null() || v.as_array().is_some_and(Vec::is_empty)),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    if nothing {
        return;
    }
    // Where no row is about anything further down, there is nothing to look
    // for: the field itself has a row, or none.
    match value {
        Value::Object(map) if INDEX.beginnings.contains(path.as_str()) => {
            walk_map(map, &path, paths);
        }
        Value::Array(list) if INDEX.beginnings.contains(path.as_str()) => {
            list.iter()
                .for_each(|v| walk(v, format!("{path}[]"), paths));
        }
        _ => {
            paths.insert(path);
        }
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

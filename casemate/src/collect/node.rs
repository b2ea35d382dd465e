//! The node's part of a report: what decides whether pods run, by name. No whole
//! file of somebody else's: configurations and command lines hold credentials.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::install::bounded;

/// For a program that prints what it knows.
const SOON: Duration = Duration::from_secs(10);
/// The most of a log or a kernel's configuration that is read.
const LONGEST: u64 = 8 * 1024 * 1024;
/// The most lines of a log.
const LINES: usize = 2000;

/// Parameters of the kernel's command line that matter.
const PARAMETERS: [&str; 13] = [
    "apparmor",
    "cgroup_disable",
    "cgroup_no_v1",
    "cgroup_enable",
    "enforcing",
    "lsm",
    "mitigations",
    "noxattr",
    "security",
    "selinux",
    "swapaccount",
    "systemd.unified_cgroup_hierarchy",
    "user_namespace.enable",
];

/// Options of its configuration that do.
const OPTIONS: [&str; 22] = [
    "CONFIG_USER_NS",
    "CONFIG_PID_NS",
    "CONFIG_NET_NS",
    "CONFIG_IPC_NS",
    "CONFIG_UTS_NS",
    "CONFIG_CGROUPS",
    "CONFIG_CGROUP_BPF",
    "CONFIG_CGROUP_DEVICE",
    "CONFIG_CGROUP_FREEZER",
    "CONFIG_CGROUP_PIDS",
    "CONFIG_CPUSETS",
    "CONFIG_MEMCG",
    "CONFIG_SECCOMP",
    "CONFIG_SECCOMP_FILTER",
    "CONFIG_SECURITY_LANDLOCK",
    "CONFIG_SECURITY_APPARMOR",
    "CONFIG_SECURITY_SELINUX",
    "CONFIG_SECURITY_YAMA",
    "CONFIG_OVERLAY_FS",
    "CONFIG_NF_TABLES",
    "CONFIG_NFT_CT",
    "CONFIG_LSM",
];

/// Settings that do.
const SETTINGS: [&str; 15] = [
    "kernel/core_pattern",
    "kernel/pid_max",
    "kernel/unprivileged_userns_clone",
    "kernel/apparmor_restrict_unprivileged_userns",
    "kernel/yama/ptrace_scope",
    "kernel/seccomp/actions_avail",
    "kernel/unprivileged_bpf_disabled",
    "kernel/keys/root_maxkeys",
    "user/max_user_namespaces",
    "user/max_mnt_namespaces",
    "user/max_net_namespaces",
    "user/max_pid_namespaces",
    "fs/file-max",
    "fs/mount-max",
    "vm/overcommit_memory",
];

fn text(path: &str) -> Option<String> {
    let mut text = String::new();
    let file = fs::File::open(path).ok()?;
    file.take(LONGEST).read_to_string(&mut text).ok()?;
    Some(text.trim().to_owned())
}

/// What kernel it is, and how it is set.
pub fn kernel() -> Value {
    let name = rustix::system::uname();
    let shown = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
    let line = text("/proc/cmdline").unwrap_or_default();
    let parameters: Vec<&str> = line
        .split_whitespace()
        .filter(|word| PARAMETERS.contains(&word.split('=').next().unwrap_or_default()))
        .collect();
    let settings: Vec<(String, Option<String>)> = SETTINGS
        .iter()
        .map(|name| (name.replace('/', "."), text(&format!("/proc/sys/{name}"))))
        .collect();
    json!({
        "release": shown(name.release()),
        "version": shown(name.version()),
        "machine": shown(name.machine()),
        "parameters": parameters,
        "settings": settings.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        "options": options(&shown(name.release())),
        "lsm": text("/sys/kernel/security/lsm"),
        "cgroup_controllers": text("/sys/fs/cgroup/cgroup.controllers"),
        "file_systems": text("/proc/filesystems").map(|t| {
            t.lines().filter_map(|l| l.split_whitespace().last()).collect::<Vec<_>>().join(" ")
        }),
    })
}

fn options(release: &str) -> Value {
    let packed = fs::File::open("/proc/config.gz").ok().and_then(|file| {
        let mut text = String::new();
        let mut read = flate2::read::GzDecoder::new(file).take(LONGEST);
        read.read_to_string(&mut text).ok().map(|_| text)
    });
    let Some(all) = packed.or_else(|| text(&format!("/boot/config-{release}"))) else {
        return "neither /proc/config.gz nor /boot/config-*".into();
    };
    let set: Vec<&str> = all
        .lines()
        .filter(|line| {
            let name = line.split('=').next().unwrap_or_default();
            OPTIONS.contains(&name)
        })
        .collect();
    set.into()
}

/// The distribution, by its own words.
pub fn system() -> Value {
    let text = text("/etc/os-release").unwrap_or_default();
    let of = |key: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        let found = lines.find(|(name, _)| *name == key);
        found.map(|(_, value)| value.trim_matches('"').to_owned())
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let at = |path: &str| file_system(&mounts, path);
    json!({
        "id": of("ID"), "version": of("VERSION_ID"), "name": of("PRETTY_NAME"),
        "systemd": Path::new("/run/systemd/system").exists(),
        "file_systems": {
            "/": at("/"), "/run": at("/run"), "/var/lib/containerd": at("/var/lib/containerd"),
            "/var/lib/kubelet": at("/var/lib/kubelet"),
        },
    })
}

/// Type of the file system that a path is on: that of the longest mount point
/// in front of it (proc_pid_mountinfo(5)).
fn file_system(mounts: &str, path: &str) -> Option<String> {
    let under =
        |point: &str| point == "/" || path == point || path.starts_with(&format!("{point}/"));
    mounts
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            Some((left.split(' ').nth(4)?, right.split(' ').next()?))
        })
        .filter(|(point, _)| under(point))
        .max_by_key(|(point, _)| point.len())
        .map(|(_, kind)| kind.to_owned())
}

/// Lines of containerd's log that are about casemate or one of these pods; from
/// a file, or systemd's journal.
pub fn log(file: Option<&Path>, unit: &str, pods: &[String]) -> Result<String, String> {
    let text = match file {
        Some(path) => tail(path).map_err(|e| format!("{}: {e}", path.display()))?,
        None => {
            let mut command = Command::new("journalctl");
            command.args(["-u", unit, "-n", "20000", "--no-pager", "-q"]);
            let said = bounded(&mut command, SOON)
                .map_err(|e| format!("journalctl: {e}; name containerd's log with --log"))?;
            said.out
        }
    };
    let mut kept: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("casemate") || pods.iter().any(|pod| line.contains(pod)))
        .collect();
    let begin = kept.len().saturating_sub(LINES);
    kept.drain(..begin);
    Ok(kept.join("\n"))
}

fn tail(path: &Path) -> std::io::Result<String> {
    use std::io::{Seek, SeekFrom};
    let mut file = fs::File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LONGEST)))?;
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_mount_point_counts() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/a rw\n\
                      2 1 0:5 / /run rw shared:1 - tmpfs none rw\n\
                      3 1 0:6 / /var/lib/kubelet rw - xfs /dev/b rw\n";
        let of = |path| file_system(mounts, path);
        assert_eq!(of("/run").as_deref(), Some("tmpfs"));
        assert_eq!(of("/runner").as_deref(), Some("ext4"));
        assert_eq!(of("/var/lib/kubelet/pods").as_deref(), Some("xfs"));
    }
}

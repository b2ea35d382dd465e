//! What the kernel has, and how it is set.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use casemate_cgroup::Hierarchy;
use casemate_spec::config::WithoutNftables;
use casemate_sys::landlock;
use casemate_sys::mount::{self, Change, NewFs};
use rustix::fs::CWD;

use super::check::{Verdict, bad};
use super::node::{Node, nearest};
use crate::elsewhere::{WAY_OUT, is_elsewhere};
use Verdict::{Good, Skipped};

/// The oldest that is tested, and the one with the shortest ways.
const OLDEST: (u32, u32) = (6, 1);
const SHORTEST: (u32, u32) = (6, 17);
/// Of Linux 6.12.
const ABI: u32 = 6;
/// The kubelet's default for the most pods, and the most namespaces of a kind
/// that one of them has.
const ROOM: u64 = 110 * 4;
/// Controllers that limits need.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];
const UPGRADE: &str = "boot a newer kernel";

fn read(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

fn parse(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn release() -> (String, Option<(u32, u32)>) {
    let name = rustix::system::uname();
    let text = name.release().to_string_lossy().into_owned();
    let number = parse(&text);
    (text, number)
}

pub fn version(_: &Node) -> Verdict {
    let (text, number) = release();
    let machine = rustix::system::uname();
    let machine = machine.machine().to_string_lossy();
    let found = format!("Linux {text} on {machine}");
    if machine != "x86_64" {
        return bad(found, "use an x86-64 node");
    }
    match number {
        Some(number) if number >= OLDEST => Good(found),
        _ => bad(found, UPGRADE),
    }
}

pub fn recent(_: &Node) -> Verdict {
    let (text, number) = release();
    match number {
        Some(number) if number >= SHORTEST => Good(format!("Linux {text}")),
        _ => bad(format!("Linux {text}"), UPGRADE),
    }
}

pub fn namespaces(node: &Node) -> Verdict {
    let text = match &node.sandbox {
        Ok(sandbox) => match &sandbox.inside {
            Ok(()) => return Good("made, and gone again".to_owned()),
            Err(text) => text,
        },
        Err(text) => text,
    };
    let is_off = |path: &str| read(path).as_deref() == Some("0");
    let mend = if is_off("/proc/sys/user/max_user_namespaces") {
        "sysctl -w user.max_user_namespaces=15000".to_owned()
    } else if is_off("/proc/sys/kernel/unprivileged_userns_clone") {
        "sysctl -w kernel.unprivileged_userns_clone=1".to_owned()
    } else if read(APPARMOR).as_deref() == Some("1") {
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0".to_owned()
    } else if text.contains("Operation not permitted") && is_elsewhere() {
        format!(
            "if this is a chroot, as of kubectl debug node/…, none can be made: {WAY_OUT} casemate doctor"
        )
    } else {
        "sysctl -a --pattern 'user.max_.*_namespaces' shows limits; the kernel needs CONFIG_USER_NS \
         and its like"
            .to_owned()
    };
    bad(text.clone(), mend)
}

pub fn seccomp(_: &Node) -> Verdict {
    let path = "/proc/sys/kernel/seccomp/actions_avail";
    let Some(text) = read(path) else {
        return bad(
            format!("no {path}"),
            "boot a kernel with CONFIG_SECCOMP_FILTER",
        );
    };
    let has: BTreeSet<&str> = text.split_whitespace().collect();
    let wanted = [
        "allow",
        "errno",
        "kill_process",
        "log",
        "trap",
        "user_notif",
    ];
    let missing: Vec<&str> = wanted.into_iter().filter(|w| !has.contains(w)).collect();
    match missing.is_empty() {
        true => Good(text),
        false => bad(format!("no {}", missing.join(", ")), UPGRADE),
    }
}

pub fn landlock(node: &Node) -> Verdict {
    let abi = landlock::abi();
    let without = node.config.fallback.without_landlock;
    match (abi, without) {
        (1.., _) => Good(format!("ABI {abi}")),
        (0, true) => Good("none, and fallback.without_landlock allows that".to_owned()),
        (0, false) => bad(
            "none",
            "boot with landlock among lsm=… (CONFIG_SECURITY_LANDLOCK), or set \
             fallback.without_landlock = true in config.toml",
        ),
    }
}

pub fn landlock_abi(_: &Node) -> Verdict {
    match landlock::abi() {
        0 => Skipped("no Landlock".to_owned()),
        abi @ ABI.. => Good(format!("ABI {abi}")),
        abi => bad(format!("ABI {abi}"), UPGRADE),
    }
}

pub fn filesystems(_: &Node) -> Verdict {
    let wanted = ["overlay", "tmpfs", "proc", "sysfs", "devpts", "mqueue"];
    // Opening one has the kernel load its module.
    let missing: Vec<&str> = wanted
        .into_iter()
        .filter(|name| NewFs::open(name).is_err())
        .collect();
    match missing.is_empty() {
        true => Good(wanted.join(", ")),
        false => bad(
            format!("no {}", missing.join(", ")),
            format!("modprobe {}", missing.join(" ")),
        ),
    }
}

/// Whether a mount of what lies there can have mapped ids.
fn idmapped(node: &Node, path: &Path) -> Result<(), String> {
    let userns = node.userns().ok_or("no user namespace")?;
    let tree = mount::clone_tree(CWD, path, false, true).map_err(|e| e.to_string())?;
    let change = Change {
        userns: Some(std::os::fd::AsFd::as_fd(userns)),
        ..Change::default()
    };
    mount::set_attributes(tree, change).map_err(|e| e.to_string())
}

fn idmapped_at(node: &Node, path: &Path, mend: &str) -> Verdict {
    if node.userns().is_none() {
        return Skipped("needs a user namespace to try with".to_owned());
    }
    let there = nearest(path);
    match idmapped(node, there) {
        Ok(()) => Good(there.display().to_string()),
        Err(error) => bad(format!("{}: {error}", there.display()), mend),
    }
}

pub fn idmapped_images(node: &Node) -> Verdict {
    let path = node
        .containerd_root()
        .join("io.containerd.snapshotter.v1.overlayfs");
    idmapped_at(
        node,
        &path,
        "have containerd's root on ext4, xfs or btrfs (root in its config.toml)",
    )
}

pub fn idmapped_volumes(node: &Node) -> Verdict {
    let path = Path::new("/var/lib/kubelet/pods");
    if !path.exists() {
        return Skipped("no kubelet here".to_owned());
    }
    idmapped_at(node, path, "have /var/lib/kubelet on ext4, xfs or btrfs")
}

pub fn nftables(node: &Node) -> Verdict {
    match &node.guard {
        Ok(()) => Good("a guard was set up in a network namespace of its own".to_owned()),
        Err(_) if node.config.network.without_nftables == WithoutNftables::Allow => {
            Good("none, and network.without_nftables allows that".to_owned())
        }
        Err(error) => bad(
            error.clone(),
            "modprobe nf_tables nft_ct nft_reject, or set network.without_nftables = \"allow\" in \
             config.toml",
        ),
    }
}

/// Controllers that there are, of either version.
fn controllers(hierarchy: &Hierarchy) -> BTreeSet<String> {
    if hierarchy.is_v2() {
        let text = read("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
        return text.split_whitespace().map(str::to_owned).collect();
    }
    // Name, hierarchy, cgroups, enabled (cgroups(7)); hierarchy 0 is no v1 one.
    let text = read("/proc/cgroups").unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (name, number) = (fields.next()?, fields.next()?);
            (number != "0" && fields.next_back()? == "1").then(|| name.to_owned())
        })
        .collect()
}

pub fn cgroups(_: &Node) -> Verdict {
    let hierarchy = match Hierarchy::detect() {
        Ok(hierarchy) => hierarchy,
        Err(error) => return bad(error.to_string(), "mount -t cgroup2 none /sys/fs/cgroup"),
    };
    let version = if hierarchy.is_v2() { "v2" } else { "v1" };
    let there = controllers(&hierarchy);
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|name| !there.contains(*name))
        .collect();
    if !missing.is_empty() {
        return bad(
            format!("{version} without {}", missing.join(", ")),
            "boot without cgroup_disable=…; on v2 no v1 hierarchy may hold them; in a container, \
             delegate them",
        );
    }
    let read_only: Vec<String> = hierarchy
        .points()
        .filter(|point| {
            rustix::fs::statvfs(*point)
                .is_ok_and(|s| s.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
        })
        .map(|point| point.display().to_string())
        .collect();
    match read_only.first() {
        Some(point) => bad(
            format!("{version}, {point} is read-only"),
            format!("mount -o remount,rw {point}"),
        ),
        None => Good(format!("{version} with {}", CONTROLLERS.join(", "))),
    }
}

pub fn cgroup_v2(_: &Node) -> Verdict {
    match Hierarchy::detect() {
        Ok(hierarchy) if hierarchy.is_v2() => Good("v2".to_owned()),
        Ok(_) => bad("v1", "boot with systemd.unified_cgroup_hierarchy=1"),
        Err(error) => Skipped(error.to_string()),
    }
}

pub fn namespace_limits(_: &Node) -> Verdict {
    let kinds = ["user", "mnt", "net", "ipc", "uts", "cgroup", "pid"];
    let low: Vec<(&str, u64)> = kinds
        .into_iter()
        .filter_map(|kind| {
            let text = read(&format!("/proc/sys/user/max_{kind}_namespaces"))?;
            Some((kind, text.parse().ok()?))
        })
        .filter(|(_, most)| *most < ROOM)
        .collect();
    match low.first() {
        None => Good(format!("each {ROOM} or more")),
        Some((kind, most)) => bad(
            format!("user.max_{kind}_namespaces = {most}"),
            low.iter()
                .map(|(kind, _)| format!("sysctl -w user.max_{kind}_namespaces=15000"))
                .collect::<Vec<_>>()
                .join(" && "),
        ),
    }
}

pub fn ptrace(_: &Node) -> Verdict {
    match read("/proc/sys/kernel/yama/ptrace_scope").as_deref() {
        None => Good("no Yama".to_owned()),
        Some("3") => bad(
            "3: nobody may trace",
            "boot with kernel.yama.ptrace_scope = 2 or less: it can't be lowered",
        ),
        Some(value) => Good(value.to_owned()),
    }
}

pub fn core_pattern(_: &Node) -> Verdict {
    let Some(pattern) = read("/proc/sys/kernel/core_pattern") else {
        return Skipped("no kernel.core_pattern".to_owned());
    };
    match pattern.starts_with('|') || pattern.starts_with('@') {
        false => Good(pattern),
        true => bad(
            pattern,
            "sysctl -w kernel.core_pattern=core, or trust that program with hostile input",
        ),
    }
}

pub fn swap(_: &Node) -> Verdict {
    let text = read("/proc/swaps").unwrap_or_default();
    let devices = text.lines().skip(1).count();
    let (release, number) = release();
    match (devices, number) {
        (0, _) => Good("no swap".to_owned()),
        (_, Some(number)) if number >= (6, 4) => {
            Good("volumes in memory stay out of it".to_owned())
        }
        _ => bad(
            format!("swap, on Linux {release}"),
            "swapoff -a, or boot Linux 6.4 or later",
        ),
    }
}

pub fn processor(_: &Node) -> Verdict {
    let Ok(entries) = fs::read_dir("/sys/devices/system/cpu/vulnerabilities") else {
        return Skipped("the kernel doesn't tell".to_owned());
    };
    let mut open: Vec<String> = entries
        .flatten()
        .filter(|entry| {
            fs::read_to_string(entry.path()).is_ok_and(|text| text.starts_with("Vulnerable"))
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    open.sort();
    match open.is_empty() {
        true => Good("none that is known".to_owned()),
        false => bad(
            open.join(", "),
            "grep . /sys/devices/system/cpu/vulnerabilities/*; update microcode and kernel, boot \
             without mitigations=off",
        ),
    }
}

const APPARMOR: &str = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns";

pub fn apparmor(_: &Node) -> Verdict {
    match read(APPARMOR).as_deref() {
        None => Good("no such restriction".to_owned()),
        Some("0") => Good("0".to_owned()),
        Some(value) => bad(
            format!("kernel.apparmor_restrict_unprivileged_userns = {value}"),
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or a profile with userns for \
             casemate-agent",
        ),
    }
}

pub fn selinux(_: &Node) -> Verdict {
    if read("/sys/fs/selinux/enforce").as_deref() != Some("1") {
        return Good("not enforcing".to_owned());
    }
    let knows_containers = Path::new("/sys/fs/selinux/context").exists()
        && fs::write(
            "/sys/fs/selinux/context",
            "system_u:system_r:container_t:s0",
        )
        .is_ok();
    match knows_containers {
        true => Good("enforcing, with container_t".to_owned()),
        false => bad(
            "enforcing, without container_t",
            "install container-selinux (dnf install container-selinux)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_read_as_distributions_write_it() {
        for (text, number) in [
            ("6.1.0-37-cloud-amd64", Some((6, 1))),
            ("6.18.44-fc-v669", Some((6, 18))),
            ("7.2-rc1", Some((7, 2))),
            ("6", None),
            ("unknown", None),
        ] {
            assert_eq!(parse(text), number, "{text}");
        }
    }
}

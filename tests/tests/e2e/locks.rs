//! The locks, tried from where no workload ever stands: processes of the host
//! that enter the sandbox with every capability of its user namespace, without
//! filter, without Landlock. What they can't do is closed by the kernel's own
//! rules. Each attempt has a control that shows that it can succeed elsewhere.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use casemate_tests::bundle::Task;
use casemate_tests::pod::{init, insiders};
use casemate_tests::run;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::{probe, set_mode};
use casemate_tests::{ensure, ensure_eq, procs, spec};
use seccomp_profiles::{Form, shipped_program_as};
use serde_json::json;

use crate::common::casemate_only;
use crate::hostile_node::configure;

crate::trials![
    locks_hold_against_all_capabilities,
    locks_no_namespaces_below_the_container,
    locks_hold_against_a_hostile_agent,
    locks_agent_is_out_of_reach,
    locks_landlock_is_in_force,
    locks_links_and_renames_between_directories,
    locks_filter_refuses,
    locks_filters_are_the_promised_programs,
    locks_hold_with_every_privilege_granted,
];

/// Runs `probe` on the host.
pub fn on_host(args: &[&str]) -> Result<String, Stop> {
    let mut command = Command::new(probe()?);
    command.args(args);
    Ok(run::run(&mut command, &[], SHORT)?.ok()?.out())
}

/// Lines `name… answer` as a map.
fn answers(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(name, answer)| (name.to_owned(), answer.to_owned()))
        .collect()
}

/// Fails unless there are `least` answers and each is one of `wanted`.
pub fn all_refused(what: &str, text: &str, least: usize, wanted: &[&str]) -> Outcome {
    let all = answers(text);
    ensure!(
        all.len() >= least,
        "{what}: only {} answers: {text}",
        all.len()
    );
    let wrong: Vec<_> = all
        .iter()
        .filter(|(_, answer)| !wanted.contains(&answer.as_str()))
        .map(|(name, answer)| format!("{name}: {answer}"))
        .collect();
    ensure!(
        wrong.is_empty(),
        "{what}: want {wanted:?}, got {}",
        wrong.join("; ")
    );
    Ok(())
}

/// A directory of the host as a read-only volume at /vol.
fn with_volume(task: &mut Task) -> Result<(), Stop> {
    let volume = task.side.join("volume");
    fs::create_dir_all(&volume)?;
    fs::write(volume.join("file"), "content")?;
    set_mode(&volume, 0o777)?;
    if let Some(mounts) = task.spec["mounts"].as_array_mut() {
        mounts.push(json!({
            "destination": "/vol", "type": "bind", "source": volume,
            "options": ["rbind", "ro", "nosuid", "nodev"]
        }));
    }
    Ok(())
}

pub fn sleeper(name: &str) -> Result<Task, Stop> {
    let mut task = Task::new(name, &["/bin/probe", "sleep"])?;
    with_volume(&mut task)?;
    task.spec["root"]["readonly"] = json!(true);
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    Ok(task)
}

/// Everything a container's root can be joined to.
pub const ALL: &str = "mnt,pid,net,ipc,uts,user";

fn locks_hold_against_all_capabilities() -> Outcome {
    casemate_only()?;
    let task = sleeper("lockcaps")?;
    let pid = init(&task)?.to_string();
    let enter = |rest: &[&str]| on_host(&[&["enter", ALL, &pid], rest].concat());
    // The premise: all capabilities there are, no filter, no new privileges allowed.
    let status = enter(&["read", "/proc/self/status"])?;
    let get = |name: &str| procs::field(&status, name).unwrap_or_default();
    let effective = u64::from_str_radix(&get("CapEff"), 16).unwrap_or(0);
    ensure!(
        effective.count_ones() >= 40,
        "not all capabilities: {effective:x}"
    );
    ensure_eq!(get("Seccomp"), "0", "filter of the attacker");
    ensure_eq!(get("Uid"), "0\t0\t0\t0", "attacker's ids inside");

    let paths = [
        "/vol",
        "/",
        "/sys",
        "/proc",
        "/proc/sys",
        "/proc/bus",
        "/sys/firmware",
        "/dev",
    ];
    all_refused(
        "clear flags",
        &enter(&[&["flags"], &paths[..]].concat())?,
        paths.len() * 3,
        &["EPERM"],
    )?;
    let paths = [
        "/vol",
        "/sys",
        "/proc",
        "/proc/sys",
        "/proc/keys",
        "/sys/firmware",
        "/dev",
        "/",
    ];
    // A lazy unmount of a locked mount is EINVAL, of any mount here EPERM.
    all_refused(
        "unmount",
        &enter(&[&["unmount"], &paths[..]].concat())?,
        paths.len() * 3,
        &["EPERM", "EINVAL"],
    )?;
    let shown = enter(&["show", "/vol", "/sys", "/proc/sys", "/"])?;
    for line in shown.lines() {
        ensure!(line.contains("RDONLY"), "no longer read-only: {line}");
    }
    all_refused(
        "make mounts and devices, write kernel settings",
        &enter(&["make"])?,
        15,
        &["EPERM", "EROFS", "EACCES", "ENOENT"],
    )?;
    // Control: the very same on the host, in a mount namespace that it owns.
    let control = Command::new("unshare");
    let mut control = control;
    control
        .args(["--mount", "--propagation", "private"])
        .arg(probe()?)
        .args(["flags", "/proc"]);
    let text = run::run(&mut control, &[], SHORT)?.ok()?.out();
    all_refused("control", &text, 3, &["ok"])?;
    Ok(task.finish()?)
}

fn locks_no_namespaces_below_the_container() -> Outcome {
    casemate_only()?;
    let task = sleeper("lockns")?;
    let pid = init(&task)?.to_string();
    let text = on_host(&["enter", ALL, &pid, "namespaces"])?;
    all_refused("unshare", &text, 8, &["ENOSPC"])?;
    // Control: the agent's own user namespace may have them.
    let (agent, _) = insiders(&task)?;
    let text = on_host(&["enter", ALL, &agent.to_string(), "namespaces"])?;
    all_refused("control", &text, 8, &["ok"])?;
    Ok(task.finish()?)
}

fn locks_hold_against_a_hostile_agent() -> Outcome {
    casemate_only()?;
    let task = sleeper("lockagent")?;
    let (agent, _) = insiders(&task)?;
    let agent = agent.to_string();
    let enter = |rest: &[&str]| on_host(&[&["enter", "mnt,user", &agent], rest].concat());
    let mounts = fs::read_to_string(format!("/proc/{agent}/mountinfo"))?;
    let staged: Vec<(&str, &str)> = mounts
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            Some((*fields.get(4)?, *fields.get(5)?))
        })
        .filter(|(point, _)| point.starts_with("/staging/"))
        .collect();
    ensure!(
        staged.iter().any(|(point, _)| point.ends_with("/rootfs")),
        "no staged rootfs: {mounts}"
    );
    let volume = staged
        .iter()
        .find(|(_, flags)| flags.split(',').any(|f| f == "ro") && flags.contains("nodev"))
        .map(|(point, _)| *point);
    ensure!(volume.is_some(), "no staged read-only volume: {mounts}");
    for (point, flags) in &staged {
        for (flag, name) in [("ro", "rdonly"), ("nosuid", "nosuid"), ("nodev", "nodev")] {
            if !flags.split(',').any(|f| f == flag) {
                continue;
            }
            let all = answers(&enter(&["flags", point])?);
            let key = format!("clear-{name} {point}");
            ensure_eq!(
                all.get(&key).map(String::as_str),
                Some("EPERM"),
                "with all capabilities of the agent: {key}"
            );
            let all = answers(&enter(&["clone-flags", point])?);
            let key = format!("clone-clear-{name} {point}");
            ensure_eq!(
                all.get(&key).map(String::as_str),
                Some("EPERM"),
                "with all capabilities of the agent: {key}"
            );
        }
    }
    // Control: what the agent mounted itself obeys it.
    let text = enter(&["flags", "/proc"])?;
    all_refused("control", &text, 3, &["ok"])?;
    Ok(task.finish()?)
}

fn locks_agent_is_out_of_reach() -> Outcome {
    casemate_only()?;
    let task = sleeper("lockreach")?;
    let pid = init(&task)?;
    let (agent, forker) = insiders(&task)?;
    // Every pid that a root of the container with all capabilities can signal
    // is init, or itself.
    let text = on_host(&["enter", ALL, &pid.to_string(), "reach", "4096"])?;
    let reached = text
        .lines()
        .find_map(|l| l.strip_prefix("reached "))
        .unwrap_or_default();
    let own = text
        .lines()
        .find_map(|l| l.strip_prefix("self "))
        .unwrap_or_default();
    ensure_eq!(reached, format!("1 {own}"), "pids that answer inside");
    // Even in the host's pid namespace, where it has pids to aim at.
    let targets = [agent, task.shim_pid()?];
    for target in targets {
        let target = target.to_string();
        let text = on_host(&["enter", "user", &pid.to_string(), "processes", &target])?;
        all_refused("processes of the runtime", &text, 9, &["EPERM", "EACCES"])?;
    }
    // Control: its own init, from the same place.
    let own = pid.to_string();
    let all = answers(&on_host(&["enter", "user", &own, "processes", &own])?);
    ensure_eq!(
        all.get(&format!("signal {own}")).map(String::as_str),
        Some("ok"),
        "control: {all:?}"
    );
    // No descriptor of ours is in the workload, none of the workload's binary.
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let number = entry.file_name().to_string_lossy().into_owned();
        ensure!(
            ["0", "1", "2"].contains(&number.as_str()),
            "descriptor {number} {:?} in the workload",
            fs::read_link(entry.path())
        );
    }
    // Neither the agent nor the forker has a pid in the container's namespace.
    let depth = |pid: u32| {
        procs::status_field(pid, "NSpid")
            .unwrap_or_default()
            .split_whitespace()
            .count()
    };
    ensure_eq!(depth(pid), 3, "pid namespaces of init");
    ensure_eq!(
        (depth(agent), depth(forker)),
        (2, 2),
        "pid namespaces of agent and forker"
    );
    Ok(task.finish()?)
}

/// Programs count on both, within a file system; Landlock forbids them unless each
/// domain of a process says otherwise.
fn locks_links_and_renames_between_directories() -> Outcome {
    casemate_only()?;
    let script = "mkdir a b && echo x >a/f && ln a/f b/g && mv a/f b/h && ls -i b/g b/h | \
                  while read inode name; do echo $inode; done | uniq | wc -l; mv a b/a; ls -d b/a";
    for config in [
        "profile = \"default\"\n",
        "profile = \"strict\"\n",
        "profile = \"compat\"\n",
        "[sandbox]\nallow_host_network = true\n",
    ] {
        let mut task = Task::new("links", &["/bin/sh", "-c", script])?;
        configure(&mut task, config)?;
        if config.contains("network") {
            on_the_nodes_network(&mut task);
        }
        let out = crate::oci::says(task)?;
        ensure_eq!(out, "1\nb/a\n", "{config}");
    }
    Ok(())
}

fn on_the_nodes_network(task: &mut Task) {
    if let Some(list) = task.spec["linux"]["namespaces"].as_array_mut() {
        list.retain(|ns| ns["type"] != "network" && ns["type"] != "uts");
    }
    task.spec["hostname"] = serde_json::json!("the-node");
}

fn locks_landlock_is_in_force() -> Outcome {
    casemate_only()?;
    landlock(false)?;
    landlock(true)
}

fn landlock(nodes_network: bool) -> Outcome {
    // Scope: an abstract unix socket of the same network namespace, made by a
    // process outside of the Landlock domain. It is kept to the container where the
    // network isn't the pod's own.
    let name = format!("casemate-{}", std::process::id());
    let mut task = Task::new(
        "landlock",
        &[
            "/bin/sh",
            "-c",
            &format!("probe drive /proc/keys; probe drive /dev/null; probe connect {name}"),
        ],
    )?;
    if nodes_network {
        configure(&mut task, "[sandbox]\nallow_host_network = true\n")?;
        on_the_nodes_network(&mut task);
    }
    task.boot()?;
    task.create()?;
    let pid = init(&task)?.to_string();
    let mut listener = Command::new(probe()?)
        .args(["enter", "net", &pid, "listen", &name])
        .stdout(std::process::Stdio::null())
        .spawn()?;
    let seen = (|| -> Result<(String, String), Stop> {
        let entered = on_host(&["enter", ALL, &pid, "connect", &name])?;
        let driven = on_host(&["enter", ALL, &pid, "drive", "/proc/keys"])?;
        Ok((entered, driven))
    })();
    let waited = task.start_and_wait();
    let _ = listener.kill();
    let _ = listener.wait();
    let (entered, driven) = seen?;
    waited?;
    ensure_eq!(
        entered.trim(),
        "connect ok",
        "control: outside of the domain"
    );
    ensure_eq!(
        driven.trim(),
        "tcgets /proc/keys ENOTTY",
        "control: outside of the domain"
    );
    task.rpc()?.delete(&task.id)?;
    let all = answers(&task.stdout.text(SHORT)?);
    let get = |name: &str| all.get(name).map(String::as_str);
    // Scopes came with ABI 6 (Linux 6.12). Before, the network namespace alone
    // stands between pods.
    let scoped = nodes_network && casemate_sys::landlock::abi() >= 6;
    ensure_eq!(
        get("connect"),
        Some(if scoped { "EPERM" } else { "ok" }),
        "to a socket outside of the domain"
    );
    // The mask on /proc/keys is the null device, outside of /dev.
    // The right came with ABI 5 (Linux 6.10).
    let ioctls = casemate_sys::landlock::abi() >= 5;
    ensure_eq!(
        get("tcgets /proc/keys"),
        Some(if ioctls { "EACCES" } else { "ENOTTY" }),
        "ioctl of a device outside /dev"
    );
    ensure_eq!(
        get("tcgets /dev/null"),
        Some("ENOTTY"),
        "control: ioctl of a device in /dev"
    );
    Ok(task.finish()?)
}

fn locks_filter_refuses() -> Outcome {
    casemate_only()?;
    for profile in ["default", "strict", "compat"] {
        filter_refuses(profile)?;
    }
    Ok(())
}

/// The kernel has the programs that are in the shim's binary, byte for byte.
fn locks_filters_are_the_promised_programs() -> Outcome {
    casemate_only()?;
    for (profile, broker) in [
        ("default", true),
        ("strict", true),
        ("compat", true),
        ("default", false),
    ] {
        let mut task = Task::new("promised", &["/bin/sleep", "100"])?;
        let text = format!("profile = \"{profile}\"\n[broker]\nenabled = {broker}\n");
        configure(&mut task, &text)?;
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        let installed = casemate_sys::seccomp::filters_of(init(&task)?)?;
        let form = if broker { Form::Notify } else { Form::Enforce };
        let promised = [
            shipped_program_as("agent", Form::Enforce),
            shipped_program_as(profile, form),
        ];
        let names = |programs: &mut dyn Iterator<Item = &[u8]>| -> Vec<String> {
            programs
                .map(|program| seccomp_profiles::Hash::of(program).to_string())
                .collect()
        };
        ensure_eq!(
            names(&mut installed.iter().map(Vec::as_slice)),
            names(&mut promised.into_iter().flatten()),
            "filters under {profile}, oldest first"
        );
        task.finish()?;
    }
    Ok(())
}

fn filter_refuses(profile: &str) -> Outcome {
    let mut task = Task::new("filter", &["/bin/probe", "calls"])?;
    // Every capability: none of these is refused for want of one.
    let all = [
        "CAP_SYS_ADMIN",
        "CAP_SYS_PTRACE",
        "CAP_NET_ADMIN",
        "CAP_BPF",
        "CAP_MKNOD",
    ];
    for set in ["bounding", "effective", "permitted"] {
        task.spec["process"]["capabilities"][set] = json!(all);
    }
    configure(
        &mut task,
        &format!("profile = \"{profile}\"\n[capabilities]\nallow = {all:?}\n"),
    )?;
    let (deleted, out) = task.run_to_end()?;
    ensure_eq!(deleted.exit_status, 0, "exit: {out}");
    let inside = answers(&out);
    let outside = answers(&on_host(&["calls"])?);
    ensure!(inside.len() >= 42, "only {} answers: {out}", inside.len());
    let mut unproven = Vec::new();
    for (name, answer) in &inside {
        let wanted: &[&str] = match name.as_str() {
            "ioctl-sti" | "ioctl-sti-high" => &["EPERM"],
            "i386-getpid" => &["SIGSYS"],
            "x32-getpid" => &["SIGSYS", "ENOSYS"],
            "socket-netfilter" => &["EPROTONOSUPPORT"],
            other if other.starts_with("socket-") => &["EAFNOSUPPORT"],
            _ => &["ENOSYS", "EPERM"],
        };
        ensure!(
            wanted.contains(&answer.as_str()),
            "{profile}: {name}: {answer}, want {wanted:?}"
        );
        if outside.get(name) == Some(answer) {
            unproven.push(name.as_str());
        }
    }
    // What this kernel lacks is refused on the host in the same words.
    let may_lack = [
        "init_module",
        "kexec_load",
        "socket-alg",
        "socket-alg-high",
        "x32-getpid",
    ];
    unproven.retain(|name| !may_lack.contains(name));
    ensure!(
        unproven.is_empty(),
        "control: refused on the host in the same words: {unproven:?}"
    );
    Ok(task.finish()?)
}

/// The most that an operator can grant: every capability, no no_new_privs, the
/// widest profile. The workload itself tries.
fn locks_hold_with_every_privilege_granted() -> Outcome {
    casemate_only()?;
    let script = "probe flags /vol /sys /proc/sys /; probe unmount /vol /sys /proc/sys /proc/keys /; \
                  probe make; probe namespaces; probe reach 200";
    let mut task = Task::new("granted", &["/bin/sh", "-c", script])?;
    with_volume(&mut task)?;
    task.spec["root"]["readonly"] = json!(true);
    task.spec["process"]["noNewPrivileges"] = json!(false);
    let all: Vec<&str> = spec::DEFAULT_CAPABILITIES
        .into_iter()
        .chain([
            "CAP_SYS_ADMIN",
            "CAP_SYS_PTRACE",
            "CAP_NET_ADMIN",
            "CAP_SYS_RESOURCE",
            "CAP_BPF",
        ])
        .collect();
    for set in [
        "bounding",
        "effective",
        "permitted",
        "inheritable",
        "ambient",
    ] {
        task.spec["process"]["capabilities"][set] = json!(all);
    }
    configure(
        &mut task,
        &format!("profile = \"compat\"\n[capabilities]\nallow = {all:?}\n"),
    )?;
    let (_, out) = task.run_to_end()?;
    let (attempts, reach) = out
        .split_once("reached ")
        .ok_or_else(|| Stop::Fail(format!("not all attempts made: {out}")))?;
    all_refused(
        "with every privilege granted",
        attempts,
        4 * 3 + 5 * 3 + 15 + 8,
        &[
            "EPERM", "ENOSYS", "EROFS", "EACCES", "ENOENT", "EINVAL", "ENOSPC",
        ],
    )?;
    // The shell ends by becoming the last probe.
    ensure_eq!(reach.lines().next(), Some("1"), "pids that answer");
    Ok(task.finish()?)
}

//! What holds the workload, seen from inside and from the host.

use std::fs;
use std::os::unix::fs::MetadataExt;

use casemate_tests::bundle::Task;
use casemate_tests::procs::field;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, procs, spec};
use serde_json::json;

use crate::common::{casemate_only, expect_text, null_mode, run, sh};
use crate::hostile_node::configure;

crate::trials![
    sandbox_user_namespace,
    sandbox_capabilities_and_filters,
    sandbox_only_three_descriptors,
    sandbox_signals_are_reset,
    sandbox_stdout_can_be_opened_again,
    sandbox_files_on_disk_belong_to_root,
    sandbox_remounts_are_refused,
    sandbox_device_nodes_are_safe,
    sandbox_processes_of_others_are_hidden,
    sandbox_masked_and_read_only_paths,
    sandbox_read_only_rootfs,
    sandbox_bad_cwd,
    sandbox_bad_user,
    sandbox_ids_environment_and_limits,
    sandbox_loopback_is_up,
    sandbox_ranges_are_exclusive,
];

fn sandbox_user_namespace() -> Outcome {
    casemate_only()?;
    let map = sh("uidmap", "cat /proc/self/uid_map")?;
    let fields: Vec<&str> = map.split_whitespace().collect();
    ensure!(fields.len() >= 3, "uid_map {map:?}");
    ensure_eq!(fields[0], "0", "first id inside");
    ensure!(fields[1] != "0", "root inside is root outside: {map:?}");
    let task = Task::sleeping("userns")?;
    let pid = task.rpc()?.state(&task.id)?.pid;
    let uid = procs::status_field(pid, "Uid").unwrap_or_default();
    ensure!(
        !uid.starts_with("0\t"),
        "the workload is uid 0 on the host: {uid:?}"
    );
    Ok(task.finish()?)
}

fn sandbox_capabilities_and_filters() -> Outcome {
    let status = sh("caps", "cat /proc/self/status")?;
    let get = |name: &str| field(&status, name).unwrap_or_default();
    let bits = |name: &str| u64::from_str_radix(&get(name), 16).unwrap_or(u64::MAX);
    // Bits of the 14 capabilities of the default spec (capability.h).
    let default = 0xa804_25fbu64;
    for set in ["CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb"] {
        ensure_eq!(
            bits(set) & !default,
            0,
            "{set} goes beyond the spec: {}",
            get(set)
        );
    }
    ensure_eq!(get("NoNewPrivs"), "1", "NoNewPrivs");
    ensure_eq!(get("SigBlk"), "0000000000000000", "blocked signals");
    casemate_only()?;
    ensure_eq!(get("Seccomp"), "2", "Seccomp");
    Ok(())
}

fn sandbox_signals_are_reset() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("signals", &["/bin/cat", "/proc/self/status"])?;
    let wrapper = task.side.join("shim");
    let program = task.shim.program.display().to_string();
    let script = format!("#!/bin/sh\ntrap '' HUP QUIT PIPE USR1\nexec {program} \"$@\"\n");
    fs::write(&wrapper, script)?;
    casemate_tests::world::set_mode(&wrapper, 0o755)?;
    task.shim.program = wrapper;
    let (_, status) = task.run_to_end()?;
    let ignored = field(&status, "SigIgn").unwrap_or_default();
    let bits = u64::from_str_radix(&ignored, 16).unwrap_or(u64::MAX);
    // 32 and 33 are the C library's own: posix_spawn(3) leaves them ignored.
    ensure_eq!(bits & !0x1_8000_0000, 0, "ignored signals {ignored}");
    ensure_eq!(
        field(&status, "SigBlk").unwrap_or_default(),
        "0000000000000000",
        "blocked signals"
    );
    Ok(task.finish()?)
}

fn sandbox_stdout_can_be_opened_again() -> Outcome {
    let script = "echo out > /dev/stdout && echo more > /proc/self/fd/1 && echo err > /dev/stderr";
    let mut task = Task::new("reopen", &["/bin/sh", "-c", script])?;
    task.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let (deleted, out) = task.run_to_end()?;
    let errors = task.stderr.text(SHORT)?;
    ensure_eq!(
        (deleted.exit_status, out.as_str()),
        (0, "out\nmore\n"),
        "{errors}"
    );
    ensure_eq!(errors, "err\n", "standard error");
    Ok(task.finish()?)
}

fn sandbox_only_three_descriptors() -> Outcome {
    let (code, out) = run("fds", &["/bin/probe", "fds"])?;
    ensure_eq!(code, 0, "exit");
    let numbers: Vec<&str> = out.lines().filter_map(|l| l.split(' ').next()).collect();
    ensure_eq!(numbers, ["0", "1", "2"], "descriptors: {out}");
    Ok(())
}

fn sandbox_files_on_disk_belong_to_root() -> Outcome {
    let script = "echo x > /by-root && mkdir /dir && chown 1000:2000 /dir && ln -s x /link && \
                  cp /etc/passwd /tmp/copy && chown 1000 /etc/passwd";
    let mut task = Task::new("ids", &["/bin/sh", "-c", script])?;
    let (deleted, _) = task.run_to_end()?;
    let errors = String::from_utf8_lossy(&task.stderr.so_far()).into_owned();
    ensure_eq!(deleted.exit_status, 0, "script: {errors}");
    let upper = task.side.join("upper");
    for (path, want) in [
        ("by-root", (0, 0)),
        ("dir", (1000, 2000)),
        ("link", (0, 0)),
        ("etc/passwd", (1000, 0)),
    ] {
        let meta = fs::symlink_metadata(upper.join(path))?;
        ensure_eq!((meta.uid(), meta.gid()), want, "owner of {path} on disk");
    }
    Ok(task.finish()?)
}

/// A task with every capability that the kernel knows in its spec.
fn powerful(name: &str, script: &str) -> Result<Task, Stop> {
    let mut task = Task::new(name, &["/bin/sh", "-c", script])?;
    let mut all: Vec<&str> = spec::DEFAULT_CAPABILITIES.to_vec();
    all.extend([
        "CAP_SYS_ADMIN",
        "CAP_SYS_PTRACE",
        "CAP_NET_ADMIN",
        "CAP_DAC_READ_SEARCH",
    ]);
    for set in ["bounding", "effective", "permitted"] {
        task.spec["process"]["capabilities"][set] = json!(all);
    }
    configure(&mut task, &format!("[capabilities]\nallow = {all:?}\n"))?;
    Ok(task)
}

fn sandbox_remounts_are_refused() -> Outcome {
    casemate_only()?;
    let script = "for m in /sys /proc/sys /proc/bus /; do \
                    mount -o remount,rw,bind $m 2>/dev/null && echo rw $m; \
                  done; \
                  for m in /sys/firmware /proc/kcore /proc/sys /dev/null; do \
                    umount $m 2>/dev/null && echo umount $m; \
                    umount -l $m 2>/dev/null && echo umount -l $m; \
                  done; \
                  mount -o remount,dev,suid,exec,bind /proc 2>/dev/null && echo flags; echo end";
    for full in [false, true] {
        let mut task = if full {
            powerful("remount", script)?
        } else {
            Task::new("remount", &["/bin/sh", "-c", script])?
        };
        task.spec["root"]["readonly"] = json!(true);
        let (_, out) = task.run_to_end()?;
        ensure_eq!(
            out.trim(),
            "end",
            "what worked, with every capability: {full}"
        );
        task.finish()?;
    }
    Ok(())
}

fn sandbox_device_nodes_are_safe() -> Outcome {
    let before = null_mode();
    ensure_eq!(
        before,
        0o666,
        "mode of the host's /dev/null before the test"
    );
    let script = "echo x > /dev/null && head -c 8 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; \
                  probe chmod 000 /dev/null; chown 1000 /dev/null; rm -f /dev/null; exit 0";
    let (_, out) = run("nodes", &["/bin/sh", "-c", script])?;
    ensure_eq!(
        out.split_whitespace().collect::<Vec<_>>(),
        ["8", "4"],
        "bytes read"
    );
    ensure_eq!(
        null_mode(),
        before,
        "mode of the host's /dev/null after the test"
    );
    ensure_eq!(
        fs::metadata("/dev/null")?.uid(),
        0,
        "owner of the host's /dev/null"
    );
    let made = sh(
        "mknod",
        "mknod /tmp/sda b 8 0 2>/dev/null && cat /tmp/sda; echo $?",
    )?;
    ensure!(made.trim() != "0", "a block device could be made and read");
    Ok(())
}

fn sandbox_processes_of_others_are_hidden() -> Outcome {
    let out = sh(
        "procs",
        "ls -d /proc/[0-9]*; cat /proc/1/cmdline | tr '\\0' ' '",
    )?;
    ensure!(!out.contains("casemate-agent"), "the agent shows: {out}");
    ensure!(!out.contains("containerd"), "the shim shows: {out}");
    let count = out
        .lines()
        .filter(|line| line.starts_with("/proc/"))
        .count();
    ensure!(count <= 3, "{count} processes: {out}");
    let mounts = sh("mounts", "cat /proc/self/mountinfo")?;
    ensure!(!mounts.contains(" /home "), "host mounts show: {mounts}");
    let root = mounts
        .lines()
        .filter(|l| l.split(' ').nth(4) == Some("/"))
        .count();
    ensure_eq!(root, 1, "mounts on /: {mounts}");
    Ok(())
}

fn sandbox_masked_and_read_only_paths() -> Outcome {
    let script = "for p in /proc/kcore /proc/keys /proc/timer_list; do \
                    [ -e $p ] && [ -n \"$(head -c 1 $p 2>/dev/null)\" ] && echo open $p; done; \
                  for p in /proc/acpi /proc/scsi /sys/firmware; do \
                    [ -d $p ] && [ -n \"$(ls $p)\" ] && echo shows $p; done; \
                  for p in /proc/sys/kernel/domainname /proc/sysrq-trigger /proc/irq/x; do \
                    (echo x > $p) 2>/dev/null && echo wrote $p; done; echo end";
    ensure_eq!(
        sh("masked", script)?.trim(),
        "end",
        "paths that are not closed"
    );
    Ok(())
}

fn sandbox_read_only_rootfs() -> Outcome {
    let script = "(echo x > /file) 2>/dev/null && echo wrote; mkdir /d 2>/dev/null && echo made; \
                  echo x > /dev/shm/ok && echo shm";
    let mut task = Task::new("readonly", &["/bin/sh", "-c", script])?;
    task.spec["root"]["readonly"] = json!(true);
    let (_, out) = task.run_to_end()?;
    ensure_eq!(out.trim(), "shm", "what could be written");
    Ok(task.finish()?)
}

/// Create or Start fails with a text that has `part`; nothing is left.
fn refused(mut task: Task, part: &str) -> Outcome {
    task.boot()?;
    let result = match task.create() {
        Ok(_) => task.rpc()?.start(&task.id).map(|_| ()),
        Err(error) => Err(error),
    };
    expect_text("Create or Start", result, part)?;
    Ok(task.finish()?)
}

fn sandbox_bad_cwd() -> Outcome {
    let mut task = Task::new("cwd", &["/bin/true"])?;
    task.spec["process"]["cwd"] = json!("/etc/passwd/nowhere");
    refused(task, "/etc/passwd/nowhere")
}

fn sandbox_bad_user() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("user", &["/bin/true"])?;
    // Beyond any range a pod gets, and not a valid id either.
    task.spec["process"]["user"] = json!({"uid": 4_000_000_000u32, "gid": 0});
    refused(task, "4000000000")
}

fn sandbox_ids_environment_and_limits() -> Outcome {
    let script = "id -u; id -g; id -G; umask; pwd; echo $FOO; ulimit -n; hostname; \
                  cat /proc/self/oom_score_adj";
    let mut task = Task::new("process", &["/bin/sh", "-c", script])?;
    let process = &mut task.spec["process"];
    process["user"] = json!({"uid": 1000, "gid": 1000, "umask": 23, "additionalGids": [2000]});
    process["cwd"] = json!("/tmp");
    process["env"] = json!(["PATH=/bin", "FOO=a b"]);
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 512, "soft": 256}]);
    process["oomScoreAdj"] = json!(321);
    let (_, out) = task.run_to_end()?;
    let want = [
        "1000",
        "1000",
        "1000 2000",
        "0027",
        "/tmp",
        "a b",
        "256",
        "casemate-test",
        "321",
    ];
    ensure_eq!(
        out.lines().collect::<Vec<_>>(),
        want,
        "what the process got"
    );
    Ok(task.finish()?)
}

fn sandbox_loopback_is_up() -> Outcome {
    casemate_only()?;
    let out = sh("lo", "ip addr show lo; ls /sys/class/net")?;
    ensure!(out.contains("UP") && out.contains("127.0.0.1"), "lo: {out}");
    ensure!(!out.contains("eth"), "the host's interfaces show: {out}");
    Ok(())
}

fn sandbox_ranges_are_exclusive() -> Outcome {
    casemate_only()?;
    let tasks = (0..5)
        .map(|_| Task::sleeping("range"))
        .collect::<Result<Vec<_>, _>>()?;
    let mut ranges = Vec::new();
    for task in &tasks {
        let pid = task.rpc()?.state(&task.id)?.pid;
        let text = fs::read_to_string(format!("/proc/{pid}/uid_map"))?;
        let numbers: Vec<u64> = text
            .split_whitespace()
            .filter_map(|w| w.parse().ok())
            .collect();
        ensure!(numbers.len() >= 3, "uid_map of {pid}: {text:?}");
        ranges.push((numbers[1], numbers[1] + numbers[2]));
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        ensure!(pair[0].1 <= pair[1].0, "ranges overlap: {ranges:?}");
    }
    for task in tasks {
        task.stdout.so_far();
        task.rpc()?.kill(&task.id, 9, true)?;
        task.rpc()?.wait(&task.id, SHORT)?;
        task.finish()?;
    }
    Ok(())
}

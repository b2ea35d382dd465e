//! Items 125 to 142 of the conformance list that are about what a container is
//! given and what it is refused.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_tests::bundle::Task;
use casemate_tests::image::oci::sha256;
use casemate_tests::pod::insiders;
use casemate_tests::run;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::world::{binaries, probe, set_mode};
use casemate_tests::{World, ensure, ensure_eq, procs};
use containerd_shim_protos::api::Mount;
use serde_json::{Value, json};

use crate::common::{casemate_only, expect_text, run as run_plain};
use crate::hostile::expect;
use crate::hostile_node::configure;
use crate::oci::says;

crate::trials![
    c125_masked_and_read_only_paths,
    c127_default_seccomp_profile_of_containerd,
    c128_set_uid_gains_where_it_may,
    c129_no_new_privileges,
    c132_capabilities_known_and_unknown,
    c133_device_rules,
    c134_oom_score_of_the_container_alone,
    c135_sysctls_of_the_pod_alone,
    c136_only_three_descriptors,
    c137_own_binary_is_out_of_reach,
    c142_raw_mounts_are_refused,
];

fn shell(name: &str, script: &str) -> casemate_tests::Result<Task> {
    Task::new(name, &["/bin/sh", "-c", script])
}

fn c125_masked_and_read_only_paths() -> Outcome {
    let script = "cat /etc/passwd; ls -A /root; (echo x > /etc/group) 2>/dev/null && echo wrote; \
                  (echo x > /etc/new) 2>/dev/null && echo made; echo x > /var/ok && echo var";
    let mut task = shell("c125", script)?;
    fs::create_dir_all(task.side.join("upper/root"))?;
    fs::write(task.side.join("upper/root/secret"), "x")?;
    for (key, more) in [
        ("maskedPaths", ["/etc/passwd", "/root"]),
        ("readonlyPaths", ["/etc", "/nonexistent"]),
    ] {
        if let Some(paths) = task.spec["linux"][key].as_array_mut() {
            paths.extend(more.map(Value::from));
        }
    }
    ensure_eq!(says(task)?, "var\n", "what was seen and written");
    casemate_only()?;
    // procMount: Unmasked. Stricter than asked for, and it says so.
    let script = "head -c 1 /proc/kcore; ls -A /sys/firmware; \
                  (echo x > /proc/sys/kernel/domainname) 2>/dev/null && echo wrote; echo end";
    let mut task = shell("c125", script)?;
    for key in ["maskedPaths", "readonlyPaths"] {
        task.spec["linux"][key] = json!([]);
    }
    let (_, out) = task.run_to_end()?;
    ensure_eq!(out, "end\n", "what an unmasked container sees");
    task.log.until("linux.maskedPaths: empty", SHORT)?;
    Ok(task.finish()?)
}

fn c127_default_seccomp_profile_of_containerd() -> Outcome {
    casemate_only()?;
    let (_, output) = crate::daemon::run("c127", &["--seccomp"], &["/bin/probe", "calls"])?;
    let out = output.ok()?.out();
    let answer = |name: &str| {
        out.lines()
            .find_map(|l| l.strip_prefix(&format!("{name} ")))
            .unwrap_or("nothing")
            .to_owned()
    };
    for (name, wanted) in [
        ("clone3", &["ENOSYS"][..]),
        ("mount", &["EPERM"]),
        ("unshare", &["EPERM"]),
        ("ptrace", &["EPERM"]),
        ("x32-getpid", &["SIGSYS", "ENOSYS", "EPERM"]),
        // Stricter than containerd's: foreign ABIs are closed.
        ("i386-getpid", &["SIGSYS"]),
    ] {
        let is = answer(name);
        ensure!(
            wanted.contains(&is.as_str()),
            "{name}: {is}, want {wanted:?}: {out}"
        );
    }
    Ok(())
}

/// The user ids of a set-uid program that user 1000 runs.
fn ids_of_set_uid(profile: &str, no_new_privileges: bool, seccomp: bool) -> Result<String, Stop> {
    let mut task = Task::new("c128", &["/suid", "read", "/proc/self/status"])?;
    configure(&mut task, &format!("profile = \"{profile}\"\n"))?;
    let program = task.side.join("upper/suid");
    fs::copy(probe()?, &program)?;
    set_mode(&program, 0o4755)?;
    let process = &mut task.spec["process"];
    process["user"] = json!({"uid": 1000, "gid": 1000});
    process["noNewPrivileges"] = json!(no_new_privileges);
    if seccomp {
        task.spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["swapon"], "action": "SCMP_ACT_ERRNO"}]
        });
    }
    let out = says(task)?;
    let filters = procs::field(&out, "Seccomp_filters").unwrap_or_default();
    if seccomp && !filters.is_empty() {
        ensure_eq!(
            filters,
            "3",
            "filters in a row: the pod's own must be there"
        );
    }
    // Nothing that the specification doesn't have, with whatever ids.
    let caps = procs::field(&out, "CapBnd").unwrap_or_default();
    let caps = u64::from_str_radix(&caps, 16).unwrap_or(u64::MAX);
    ensure_eq!(caps & !0xa804_25fb, 0, "CapBnd");
    for set in ["CapPrm", "CapEff"] {
        let caps = procs::field(&out, set).unwrap_or_default();
        let caps = u64::from_str_radix(&caps, 16).unwrap_or(u64::MAX);
        ensure_eq!(caps & !0xa804_25fb, 0, "{set}");
    }
    procs::field(&out, "Uid").ok_or_else(|| Stop::Fail(out.clone()))
}

fn c128_set_uid_gains_where_it_may() -> Outcome {
    casemate_only()?;
    for seccomp in [false, true] {
        let gained = "1000\t0\t0\t0";
        let kept = "1000\t1000\t1000\t1000";
        for (profile, no_new_privileges, want) in [
            ("compat", false, gained),
            ("compat", true, kept),
            ("default", false, kept),
        ] {
            ensure_eq!(
                ids_of_set_uid(profile, no_new_privileges, seccomp)?,
                want,
                "{profile}, noNewPrivileges {no_new_privileges}, seccomp {seccomp}"
            );
        }
    }
    Ok(())
}

fn c129_no_new_privileges() -> Outcome {
    for config in ["profile = \"default\"\n", "profile = \"compat\"\n"] {
        let mut task = Task::new("c129", &["/bin/cat", "/proc/self/status"])?;
        configure(&mut task, config)?;
        task.spec["process"]["noNewPrivileges"] = json!(true);
        let out = says(task)?;
        ensure_eq!(
            procs::field(&out, "NoNewPrivs").as_deref(),
            Some("1"),
            "{config}"
        );
    }
    Ok(())
}

fn c132_capabilities_known_and_unknown() -> Outcome {
    let mut task = Task::new("c132", &["/bin/cat", "/proc/self/status"])?;
    task.spec["process"]["capabilities"] = json!({
        "bounding": ["CAP_CHOWN", "CAP_SETUID", "CAP_NET_BIND_SERVICE", "CAP_FUTURE"],
        "effective": ["CAP_CHOWN", "CAP_FUTURE"],
        "permitted": ["CAP_CHOWN", "CAP_NET_BIND_SERVICE"],
        "inheritable": ["CAP_CHOWN"],
        "ambient": ["CAP_CHOWN"]
    });
    task.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let (deleted, out) = task.run_to_end()?;
    ensure_eq!(deleted.exit_status, 0, "exit: {out}");
    // CHOWN 0, SETUID 7, NET_BIND_SERVICE 10; exec of another user's program
    // leaves what is ambient.
    for (set, want) in [
        ("CapBnd", 1u64 | 1 << 7 | 1 << 10),
        ("CapPrm", 1),
        ("CapEff", 1),
        ("CapInh", 1),
        ("CapAmb", 1),
    ] {
        let is = procs::field(&out, set).unwrap_or_default();
        ensure_eq!(u64::from_str_radix(&is, 16), Ok(want), "{set}: {is}");
    }
    task.log.until("CAP_FUTURE", SHORT)?;
    Ok(task.finish()?)
}

/// The file that moves its writer into the container's device rules.
fn door(pid: u32) -> Result<PathBuf, Stop> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let base = Path::new("/sys/fs/cgroup");
    let of = |mark: &str| {
        text.lines()
            .find_map(|l| l.split_once(mark))
            .map(|(_, path)| path.trim_start_matches('/').to_owned())
    };
    if base.join("cgroup.controllers").exists() {
        let path = of("0::").unwrap_or_default();
        return Ok(base.join(path).join("cgroup.procs"));
    }
    match of(":devices:") {
        Some(path) => Ok(base.join("devices").join(path).join("tasks")),
        None => fail(format!("no devices controller: {text}")),
    }
}

/// Rules are of the cgroup: a process of the host that joins it, with every
/// capability and without filter, shows them alone.
fn c133_device_rules() -> Outcome {
    let mut task = Task::new("c133", &["/bin/probe", "sleep"])?;
    task.spec["linux"]["resources"]["devices"] = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
    ]);
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let door = door(task.rpc()?.state(&task.id)?.pid)?;
    let ask = |join: bool| -> Result<String, Stop> {
        let dir = tempfile::tempdir_in("/tmp")?;
        let join = match join {
            true => format!("echo $$ > {} || exit 9; ", door.display()),
            false => String::new(),
        };
        // Both nodes exist before; one more is made after.
        let script = format!(
            "cd {0}; mknod disk b 8 0 && mknod fuse c 10 229 || exit 8; {join}\
             (: < /dev/null) && echo null; (: > /dev/null) && echo null; \
             (: < disk) 2>&1; (: < fuse) 2>&1; mknod more b 8 0 2>&1 && echo made; true",
            dir.path().display()
        );
        let mut command = Command::new("/bin/busybox");
        command.args(["sh", "-c", &script]);
        let output = run::run(&mut command, &[], SHORT)?;
        if output.code() == 8 {
            return skip("nodes of devices can't be made here at all");
        }
        Ok(output.ok()?.out())
    };
    let refused = "Operation not permitted";
    let outside = ask(false)?;
    ensure!(
        !outside.contains(refused) && outside.contains("made"),
        "the control is refused: {outside}"
    );
    let inside = ask(true)?;
    ensure!(inside.starts_with("null\nnull\n"), "/dev/null: {inside}");
    ensure_eq!(inside.matches(refused).count(), 3, "refusals: {inside}");
    ensure!(!inside.contains("made"), "a node of 8:0 was made: {inside}");
    task.finish()?;
    // And the container itself has neither the right to make one nor a mount on
    // which it would open.
    let (code, out) = run_plain("c133", &["/bin/sh", "-c", "mknod /tmp/sda b 8 0 2>&1"])?;
    ensure!(
        code != 0 && out.contains(refused),
        "mknod inside: {code} {out}"
    );
    Ok(())
}

fn c134_oom_score_of_the_container_alone() -> Outcome {
    casemate_only()?;
    let score = |pid: u32| -> Result<String, Stop> {
        let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?;
        Ok(text.trim().to_owned())
    };
    let mut task = shell("c134", "sleep 1000 & exec sleep 1000")?;
    task.spec["process"]["oomScoreAdj"] = json!(999);
    task.boot()?;
    let shim = task.shim_pid()?;
    let agent: u32 = procs::family(shim)
        .iter()
        .map(|who| who.pid)
        .find(|pid| *pid != shim)
        .ok_or_else(|| Stop::Fail("no agent".into()))?;
    let before = (score(shim)?, score(agent)?);
    ensure!(before.0 != "999" && before.1 != "999", "{before:?}");
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let mut pids = Vec::new();
    run::until("the child of init", SHORT, || {
        pids = task.rpc().map_or_else(
            |_| Vec::new(),
            |rpc| {
                let pids = rpc.pids(&task.id).unwrap_or_default();
                pids.processes.iter().map(|p| p.pid).collect()
            },
        );
        pids.len() >= 2
    })?;
    let mut process = task.spec["process"].clone();
    process["args"] = json!(["/bin/probe", "sleep"]);
    let exec = (task.id.as_str(), "more");
    task.rpc()?.exec(exec, &process, "", "")?;
    pids.push(task.rpc()?.start_exec(exec)?.pid);
    for pid in pids {
        ensure_eq!(score(pid)?, "999", "score of {}", procs::command_line(pid));
    }
    ensure_eq!(insiders(&task)?.0, agent, "agent");
    ensure_eq!((score(shim)?, score(agent)?), before, "shim and agent");
    Ok(task.finish()?)
}

fn c135_sysctls_of_the_pod_alone() -> Outcome {
    let set = [
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv4.tcp_keepalive_time", "777"),
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.msgmax", "4097"),
        ("kernel.sem", "100\t2000\t30\t40"),
        ("fs.mqueue.msg_max", "9"),
    ];
    let path = |name: &str| format!("/proc/sys/{}", name.replace('.', "/"));
    let here = || -> Vec<String> {
        set.iter()
            .map(|(name, _)| fs::read_to_string(path(name)).unwrap_or_default())
            .collect()
    };
    let before = here();
    let files: Vec<String> = set.iter().map(|(name, _)| path(name)).collect();
    let mut task = shell("c135", &format!("cat {}", files.join(" ")))?;
    let leave = r#"["net.ipv4.ip_forward", "kernel.msg*", "kernel.sem", "fs.mqueue.*"]"#;
    configure(&mut task, &format!("[sysctls]\nallow = {leave}\n"))?;
    for (name, value) in set {
        task.spec["linux"]["sysctl"][name] = json!(value);
    }
    let out = says(task)?;
    let want: Vec<&str> = set.iter().map(|(_, value)| *value).collect();
    ensure_eq!(out.lines().collect::<Vec<_>>(), want, "inside");
    ensure_eq!(here(), before, "the host's");
    casemate_only()?;
    let mut task = Task::new("c135", &["/bin/true"])?;
    task.spec["linux"]["sysctl"] = json!({"kernel.core_pattern": "|/bin/sh"});
    expect(task, &["linux.sysctl", "kernel.core_pattern"])
}

fn c136_only_three_descriptors() -> Outcome {
    let numbers = |out: &str| -> Vec<String> {
        out.lines()
            .filter_map(|l| l.split(' ').next())
            .map(str::to_owned)
            .collect()
    };
    let (_, out) = run_plain("c136", &["/bin/probe", "fds"])?;
    ensure_eq!(numbers(&out), ["0", "1", "2"], "descriptors of init: {out}");
    let task = Task::sleeping("c136")?;
    let mut process = task.spec["process"].clone();
    process["args"] = json!(["/bin/probe", "fds"]);
    let (_, out) = crate::oci::exec(&task, "fds", &process)?;
    ensure_eq!(
        numbers(&out),
        ["0", "1", "2"],
        "descriptors of an exec: {out}"
    );
    Ok(task.finish()?)
}

fn c137_own_binary_is_out_of_reach() -> Outcome {
    casemate_only()?;
    let ours: Vec<PathBuf> = ["casemate-agent", "containerd-shim-casemate-v2"]
        .iter()
        .map(|name| binaries().join(name))
        .collect();
    let sums = || -> Result<Vec<(String, u32, i64)>, Stop> {
        let each = ours.iter().map(|path| {
            let meta = fs::metadata(path)?;
            Ok((sha256(&fs::read(path)?), meta.mode(), meta.mtime()))
        });
        each.collect()
    };
    let before = sums()?;
    // A container, and an exec, whose program is its starter's: not to be had.
    let task = Task::new("c137", &["/proc/self/exe"])?;
    expect(task, &["/proc/self/exe", "Permission denied"])?;
    let script = "for n in 1 2 3 4 5 6 7 8 9; do for p in /proc/[0-9]*/exe; do \
                    case $(readlink $p) in */busybox|/bin/*) continue;; esac; \
                    (echo x > $p) 2>/dev/null && echo wrote $p; \
                    cp /bin/probe $p 2>/dev/null && echo replaced $p; \
                    (echo x >> $p) 2>/dev/null && echo added to $p; \
                    chmod 777 $p 2>/dev/null && echo chmod $p; done; done; echo end";
    let mut task = shell("c137", &format!("sleep 1; {script}"))?;
    fs::write(task.side.join("upper/interpreted"), "#!/proc/self/exe\n")?;
    set_mode(&task.side.join("upper/interpreted"), 0o755)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    // Over and over, while the container's init writes to whatever runs.
    for (n, program) in ["/proc/self/exe", "/interpreted"]
        .iter()
        .cycle()
        .take(20)
        .enumerate()
    {
        let mut process = task.spec["process"].clone();
        process["args"] = json!([program]);
        let id = format!("self{n}");
        let exec = (task.id.as_str(), id.as_str());
        task.rpc()?.exec(exec, &process, "", "")?;
        expect_text("Start", task.rpc()?.start_exec(exec), program)?;
    }
    task.rpc()?.wait(&task.id, SHORT)?;
    ensure_eq!(task.stdout.text(SHORT)?, "end\n", "what was written");
    ensure_eq!(sums()?, before, "binaries of the host");
    Ok(task.finish()?)
}

fn c142_raw_mounts_are_refused() -> Outcome {
    casemate_only()?;
    let world = World::get()?;
    let overlay = Task::new("c142", &["/bin/true"])?.rootfs.remove(0);
    let raw = |typ: &str, options: &[&str]| Mount {
        type_: typ.to_owned(),
        source: world.dir().display().to_string(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
        ..Default::default()
    };
    let mut hinted = overlay.clone();
    hinted
        .options
        .push("X-containerd.mkdir.path=/x:0755".into());
    for (mounts, part) in [
        (
            vec![raw("format/overlay", &["lowerdir={{ mount 0 }}"])],
            "format/overlay",
        ),
        (
            vec![raw("mkfs/ext4", &["X-containerd.mkfs.size=1m"])],
            "X-containerd.mkfs.size",
        ),
        (vec![raw("mkfs/ext4", &[])], "mkfs/ext4"),
        (vec![hinted], "X-containerd.mkdir.path"),
        (vec![raw("erofs", &["loop"])], "erofs"),
        (vec![raw("bind", &["ro"]), overlay.clone()], "2 mounts"),
    ] {
        let mut task = Task::new("c142", &["/bin/true"])?;
        task.rootfs = mounts;
        task.boot()?;
        let made = task.create();
        ensure_eq!(
            made.as_ref()
                .err()
                .and_then(casemate_tests::error::Failure::code),
            Some(ttrpc::Code::INVALID_ARGUMENT),
            "code for {part}"
        );
        expect_text("Create", made, part)?;
        task.finish()?;
    }
    Ok(())
}

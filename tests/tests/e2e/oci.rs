//! Fields of the OCI specification, seen from inside of a real container: applied
//! as written, or refused by name.

use std::fs;

use casemate_tests::bundle::Task;
use casemate_tests::procs;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, skip};
use casemate_tests::stdio::{Reader, make_fifo};
use casemate_tests::world::set_mode;
use casemate_tests::{ensure, ensure_eq};
use serde_json::{Value, json};

use crate::common::{casemate_only, expect_text};
use crate::hostile::expect;
use crate::hostile_node::configure;

crate::trials![
    oci_scheduler_and_io_priority,
    oci_exec_has_its_own_schedule_and_processors,
    oci_personality_is_plain,
    oci_time_namespace_shifts_the_clocks,
    oci_root_is_private,
    oci_devices_of_the_node_by_leave,
    oci_refused_fields_are_named,
    oci_rlimits,
    oci_core_dumps_by_leave,
    oci_hugepages_and_unified,
];

/// What a script in the task says; its exit code must be 0.
pub fn says(mut task: Task) -> Result<String, Stop> {
    let (deleted, out) = task.run_to_end()?;
    let errors = String::from_utf8_lossy(&task.stderr.so_far()).into_owned();
    ensure_eq!(deleted.exit_status, 0, "exit status: {out} {errors}");
    task.finish()?;
    Ok(out)
}

/// Runs a process in a running container to its end; status and output.
pub fn exec(task: &Task, exec_id: &str, process: &Value) -> Result<(u32, String), Stop> {
    let out = task.side.join(format!("{exec_id}.out"));
    make_fifo(&out)?;
    let reader = Reader::start(&out);
    let exec = (task.id.as_str(), exec_id);
    let out = out.display().to_string();
    task.rpc()?.exec(exec, process, &out, "")?;
    task.rpc()?.start_exec(exec)?;
    let status = task.rpc()?.wait_exec(exec)?.exit_status;
    let said = reader.text(SHORT)?;
    task.rpc()?.delete_exec(exec)?;
    Ok((status, said))
}

/// Nice value and policy are the 19th and 41st field of proc_pid_stat(5), the
/// name before them being one word.
const SCHEDULE: &str = "set -- $(cat /proc/self/stat); echo nice ${19}; shift 40; echo policy $1; \
                        ionice -p $$; grep Cpus_allowed_list /proc/self/status";

fn oci_scheduler_and_io_priority() -> Outcome {
    casemate_only()?;
    for (scheduler, io, want) in [
        (
            json!({"policy": "SCHED_BATCH", "nice": 7}),
            json!({"class": "IOPRIO_CLASS_BE", "priority": 6}),
            ["nice 7", "policy 3", "best-effort: prio 6"],
        ),
        (
            json!({"policy": "SCHED_IDLE", "nice": 0, "priority": 0}),
            json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0}),
            ["nice 0", "policy 5", "idle"],
        ),
        (
            json!({"policy": "SCHED_OTHER", "nice": 19}),
            json!({"class": "IOPRIO_CLASS_BE", "priority": 0}),
            ["nice 19", "policy 0", "best-effort: prio 0"],
        ),
    ] {
        let mut task = Task::new("sched", &["/bin/sh", "-c", SCHEDULE])?;
        task.spec["process"]["scheduler"] = scheduler;
        task.spec["process"]["ioPriority"] = io;
        let out = says(task)?;
        for line in want {
            ensure!(out.lines().any(|l| l == line), "no {line:?} in {out:?}");
        }
    }
    for (key, value, part) in [
        (
            "scheduler",
            json!({"policy": "SCHED_FIFO", "priority": 1}),
            "SCHED_FIFO",
        ),
        (
            "scheduler",
            json!({"policy": "SCHED_OTHER", "nice": -5}),
            "process.scheduler.nice",
        ),
        (
            "ioPriority",
            json!({"class": "IOPRIO_CLASS_RT", "priority": 0}),
            "IOPRIO_CLASS_RT",
        ),
    ] {
        let mut task = Task::new("sched", &["/bin/true"])?;
        task.spec["process"][key] = value;
        expect(task, &[part, "process."])?;
    }
    let mut task = Task::new("sched", &["/bin/true"])?;
    task.spec["process"]["scheduler"] = json!({"policy": "SCHED_IDLE"});
    configure(&mut task, "profile = \"strict\"\n")?;
    expect(task, &["process.scheduler", "profile strict"])
}

fn oci_exec_has_its_own_schedule_and_processors() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("execsched", &["/bin/probe", "sleep"])?;
    task.spec["process"]["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": 3});
    task.spec["process"]["execCPUAffinity"] = json!({"initial": "0", "final": "0"});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    // It is not about init.
    let init = task.rpc()?.state(&task.id)?.pid;
    let all = procs::status_field(std::process::id(), "Cpus_allowed_list").unwrap_or_default();
    ensure_eq!(
        procs::status_field(init, "Cpus_allowed_list").unwrap_or_default(),
        all,
        "processors of init"
    );
    let mut process = task.spec["process"].clone();
    process["args"] = json!(["/bin/sh", "-c", SCHEDULE]);
    let (_, same) = exec(&task, "same", &process)?;
    ensure!(
        same.contains("nice 3\npolicy 0\n") && same.contains("Cpus_allowed_list:\t0\n"),
        "an exec with the container's own: {same}"
    );
    process["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 9});
    process["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE"});
    let last = all.rsplit([',', '-']).next().unwrap_or("0").to_owned();
    process["execCPUAffinity"] = json!({"final": last});
    let (_, other) = exec(&task, "other", &process)?;
    ensure!(
        other.contains("nice 9\npolicy 3\n")
            && other.contains("idle\n")
            && other.contains(&format!("Cpus_allowed_list:\t{last}\n")),
        "an exec with one of its own: {other}"
    );
    // More than the container has: not given.
    process["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": 0});
    let (_, more) = exec(&task, "more", &process)?;
    ensure!(more.contains("nice 3\npolicy 0\n"), "more: {more}");
    // No such processor.
    process["execCPUAffinity"] = json!({"final": "8000"});
    let exec = (task.id.as_str(), "none");
    task.rpc()?.exec(exec, &process, "", "")?;
    let started = task.rpc()?.start_exec(exec);
    expect_text("Start", started, "process.execCPUAffinity.final")?;
    Ok(task.finish()?)
}

fn oci_personality_is_plain() -> Outcome {
    casemate_only()?;
    // A shim whose daemon runs without randomised addresses passes none of it on.
    let mut task = Task::new("persona", &["/bin/cat", "/proc/self/personality"])?;
    let wrapper = task.side.join("shim");
    let program = task.shim.program.display().to_string();
    let script = format!("#!/bin/sh\nexec setarch -R {program} \"$@\"\n");
    fs::write(&wrapper, script)?;
    set_mode(&wrapper, 0o755)?;
    task.shim.program = wrapper;
    task.spec["linux"]["personality"] = json!({"domain": "LINUX"});
    task.boot()?;
    let shim = fs::read_to_string(format!("/proc/{}/personality", task.shim_pid()?))?;
    ensure_eq!(shim.trim(), "00040000", "the shim's own: the premise");
    task.create()?;
    task.start_and_wait()?;
    ensure_eq!(task.stdout.text(SHORT)?.trim(), "00000000", "personality");
    task.finish()?;
    let mut task = Task::new("persona", &["/bin/true"])?;
    task.spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    expect(task, &["linux.personality.domain", "LINUX32"])
}

/// Clock and seconds, as `probe clocks` says them.
fn clock(text: &str, name: &str) -> Result<i64, Stop> {
    let line = text.lines().find_map(|l| l.strip_prefix(name));
    line.and_then(|l| l.trim().parse().ok())
        .ok_or_else(|| Stop::Fail(format!("no {name} in {text:?}")))
}

fn oci_time_namespace_shifts_the_clocks() -> Outcome {
    casemate_only()?;
    let with = |offsets: Value| -> Result<Task, Stop> {
        let mut task = Task::new("time", &["/bin/probe", "clocks"])?;
        if let Some(namespaces) = task.spec["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({"type": "time"}));
        }
        task.spec["linux"]["timeOffsets"] = offsets;
        Ok(task)
    };
    let host = crate::locks::on_host(&["clocks"])?;
    let out = says(with(json!({
        "monotonic": {"secs": 100_000, "nanosecs": 5},
        "boottime": {"secs": 1_000_000},
    }))?)?;
    for (name, ahead) in [
        ("monotonic", 100_000),
        ("boottime", 1_000_000),
        ("realtime", 0),
    ] {
        let difference = clock(&out, name)? - clock(&host, name)? - ahead;
        ensure!(
            (0..60).contains(&difference),
            "{name}: {difference} s off: {out} on the host {host}"
        );
    }
    // Without offsets it is a namespace all the same, and execs are in it.
    let mut task = with(json!({}))?;
    task.spec["process"]["args"] = json!(["/bin/probe", "sleep"]);
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let pid = task.rpc()?.state(&task.id)?.pid;
    let own = fs::read_link(format!("/proc/{pid}/ns/time"))?;
    ensure!(
        own != fs::read_link("/proc/self/ns/time")?,
        "init is in the host's time namespace"
    );
    let mut process = task.spec["process"].clone();
    process["args"] = json!(["/bin/readlink", "/proc/self/ns/time"]);
    let (_, said) = exec(&task, "time", &process)?;
    ensure_eq!(
        said.trim(),
        own.display().to_string(),
        "namespace of an exec"
    );
    task.finish()?;
    // What the kernel can't do, or nobody meant.
    expect(
        with(json!({"monotonic": {"secs": -4_000_000_000_i64}}))?,
        &["linux.timeOffsets.monotonic", "below 0"],
    )?;
    expect(
        with(json!({"realtime": {"secs": 1}}))?,
        &["linux.timeOffsets", "realtime"],
    )?;
    let mut task = Task::new("time", &["/bin/true"])?;
    task.spec["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 1}});
    expect(task, &["linux.timeOffsets", "no time namespace"])?;
    let mut task = Task::new("time", &["/bin/true"])?;
    if let Some(namespaces) = task.spec["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "time", "path": "/proc/1/ns/time"}));
    }
    expect(task, &["linux.namespaces", "/proc/1/ns/time"])
}

fn oci_root_is_private() -> Outcome {
    casemate_only()?;
    for kind in ["private", "rprivate", "slave", "rslave"] {
        let mut task = Task::new("rootprop", &["/bin/cat", "/proc/self/mountinfo"])?;
        task.spec["linux"]["rootfsPropagation"] = json!(kind);
        let out = says(task)?;
        for line in out.lines() {
            ensure!(
                !line.contains(" shared:") && !line.contains(" master:"),
                "{kind}: {line}"
            );
        }
        ensure!(out.lines().count() > 5, "mounts: {out}");
    }
    for kind in ["shared", "rshared", "unbindable"] {
        let mut task = Task::new("rootprop", &["/bin/true"])?;
        task.spec["linux"]["rootfsPropagation"] = json!(kind);
        expect(task, &["linux.rootfsPropagation", kind])?;
    }
    Ok(())
}

fn oci_devices_of_the_node_by_leave() -> Outcome {
    casemate_only()?;
    use std::os::unix::fs::MetadataExt;
    // One that the node has, and on whose opening nothing happens.
    let found = ["/dev/fuse", "/dev/tty0"]
        .into_iter()
        .find_map(|path| Some((path, fs::metadata(path).ok()?)));
    let Some((host, meta)) = found else {
        return skip("neither /dev/fuse nor /dev/tty0 on this node");
    };
    let (major, minor) = (
        rustix::fs::major(meta.rdev()),
        rustix::fs::minor(meta.rdev()),
    );
    let allowed = format!("\"{host}\"");
    let script = "stat -c '%t:%T %a %u:%g %F' /dev/x/fuse; \
                  (: < /dev/x/fuse) 2>/dev/null && echo opened; \
                  stat -c %a /dev/null; ls /dev";
    let with = |allow: &str, minor: u32, rule: bool| -> Result<Task, Stop> {
        let mut task = Task::new("device", &["/bin/sh", "-c", script])?;
        configure(&mut task, &format!("[devices]\nallow = [{allow}]\n"))?;
        task.spec["linux"]["devices"] = json!([{"path": "/dev/x/fuse", "type": "c",
            "major": major, "minor": minor, "fileMode": 0o640, "uid": 1000, "gid": 2000}]);
        if rule && let Some(rules) = task.spec["linux"]["resources"]["devices"].as_array_mut() {
            rules.push(
                json!({"allow": true, "type": "c", "major": major, "minor": minor,
                    "access": "rw"}),
            );
        }
        Ok(task)
    };
    let out = says(with(&allowed, minor, true)?)?;
    let node = format!("{major:x}:{minor:x} 640 1000:2000 character special file\nopened\n666\n");
    ensure!(out.starts_with(&node), "want {node:?}, got {out:?}");
    ensure!(
        !out.lines()
            .any(|l| ["fuse", "net", "sda", "kvm"].contains(&l)),
        "other devices: {out}"
    );
    // As on runc, a node without a rule is there and doesn't open.
    let out = says(with(&allowed, minor, false)?)?;
    ensure!(!out.contains("opened"), "opened without a rule: {out}");
    // Another device under that name, and no leave at all.
    for (allow, minor) in [
        (allowed.as_str(), minor + 8),
        ("", minor),
        ("\"/dev/null\"", minor),
    ] {
        expect(
            with(allow, minor, true)?,
            &["linux.devices[0]", "/dev/x/fuse", "devices.allow"],
        )?;
    }
    Ok(())
}

fn oci_refused_fields_are_named() -> Outcome {
    casemate_only()?;
    for (section, key, value) in [
        ("linux", "intelRdt", json!({"closID": "a"})),
        ("linux", "netDevices", json!({"eth0": {}})),
        (
            "linux",
            "memoryPolicy",
            json!({"mode": "MPOL_BIND", "nodes": "0"}),
        ),
    ] {
        let mut task = Task::new("refused", &["/bin/true"])?;
        task.spec[section][key] = value;
        expect(task, &[&format!("{section}.{key}"), "doesn't apply it"])?;
    }
    let mut task = Task::new("refused", &["/bin/true"])?;
    task.spec["vm"] = json!({"kernel": {"path": "/boot/vmlinuz"}});
    expect(task, &["(vm)", "another platform"])
}

fn oci_rlimits() -> Outcome {
    let mut task = Task::new("rlimits", &["/bin/cat", "/proc/self/limits"])?;
    task.spec["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_CPU", "soft": 50, "hard": 60},
        {"type": "RLIMIT_STACK", "soft": 1_048_576, "hard": 2_097_152},
        {"type": "RLIMIT_MSGQUEUE", "soft": 4096, "hard": 8192},
        {"type": "RLIMIT_NICE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_RTTIME", "soft": 1000, "hard": 2000},
    ]);
    let out = says(task)?;
    let core = out.lines().find(|l| l.starts_with("Max core file size"));
    for (name, soft, hard) in [
        ("Max open files", "100", "200"),
        ("Max cpu time", "50", "60"),
        ("Max stack size", "1048576", "2097152"),
        ("Max msgqueue size", "4096", "8192"),
        ("Max nice priority", "0", "0"),
        ("Max realtime timeout", "1000", "2000"),
    ] {
        let line = out.lines().find_map(|l| l.strip_prefix(name));
        let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
        ensure_eq!(words.get(..2), Some(&[soft, hard][..]), "{name}: {out}");
    }
    casemate_only()?;
    // Not even a limit of 0 is the specification's: core(5) has the node's own
    // handler called for it, and for 1 it is not.
    let words: Vec<&str> = core.unwrap_or_default().split_whitespace().collect();
    ensure_eq!(words.get(4..6), Some(&["1", "1"][..]), "core: {out}");
    for (limit, part) in [
        (
            json!({"type": "RLIMIT_QUANTUM", "soft": 1, "hard": 1}),
            "RLIMIT_QUANTUM",
        ),
        (
            json!({"type": "RLIMIT_CPU", "soft": 2, "hard": 1}),
            "more than hard",
        ),
    ] {
        let mut task = Task::new("rlimits", &["/bin/true"])?;
        task.spec["process"]["rlimits"] = json!([limit]);
        expect(task, &["process.rlimits[0]", part])?;
    }
    Ok(())
}

/// The container's directory of cgroup v2, if that is what the node has.
fn pure_v2(pid: u32) -> Option<std::path::PathBuf> {
    let base = std::path::Path::new("/sys/fs/cgroup");
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text
        .lines()
        .find_map(|l| l.strip_prefix("0::/"))?
        .to_owned();
    base.join("cgroup.controllers")
        .exists()
        .then(|| base.join(path))
}

fn oci_hugepages_and_unified() -> Outcome {
    casemate_only()?;
    let unified = json!({"memory.high": "67108864", "pids.max": "55"});
    if pure_v2(std::process::id()).is_none() {
        let mut task = Task::new("unified", &["/bin/true"])?;
        task.spec["linux"]["resources"]["unified"] = unified;
        expect(task, &["linux.resources.unified", "cgroup v1"])?;
    } else {
        let mut task = Task::new("unified", &["/bin/probe", "sleep"])?;
        task.spec["linux"]["resources"]["unified"] = unified;
        task.boot()?;
        task.create()?;
        let dir = pure_v2(task.rpc()?.state(&task.id)?.pid).unwrap_or_default();
        for (name, want) in [("memory.high", "67108864"), ("pids.max", "55")] {
            let is = fs::read_to_string(dir.join(name))?;
            ensure_eq!(is.trim(), want, "{name} in {}", dir.display());
        }
        task.finish()?;
    }
    let mut task = Task::new("huge", &["/bin/probe", "sleep"])?;
    task.spec["linux"]["resources"]["hugepageLimits"] =
        json!([{"pageSize": "2MB", "limit": 4_194_304}]);
    let v1 = std::path::Path::new("/sys/fs/cgroup/hugetlb").is_dir();
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if v1 || controllers.contains("hugetlb") {
        task.boot()?;
        task.create()?;
        let pid = task.rpc()?.state(&task.id)?.pid;
        let (dir, name) = match pure_v2(pid) {
            Some(dir) => (dir, "hugetlb.2MB.max"),
            None => (
                std::path::PathBuf::from(format!(
                    "/sys/fs/cgroup/hugetlb/casemate-test/{}",
                    task.id
                )),
                "hugetlb.2MB.limit_in_bytes",
            ),
        };
        let is = fs::read_to_string(dir.join(name))?;
        ensure_eq!(is.trim(), "4194304", "{name}");
        task.finish()?;
    } else {
        expect(task, &["linux.resources.hugepageLimits", "hugetlb"])?;
    }
    for size in ["2MB/../x", "lots"] {
        let mut task = Task::new("huge", &["/bin/true"])?;
        task.spec["linux"]["resources"]["hugepageLimits"] = json!([{"pageSize": size, "limit": 1}]);
        expect(task, &["linux.resources.hugepageLimits", size])?;
    }
    Ok(())
}

/// A process that dies of a signal leaves its memory in a file where the node and the
/// specification say so, and nowhere else.
fn oci_core_dumps_by_leave() -> Outcome {
    casemate_only()?;
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern")?;
    let script = "cd /tmp; cat /proc/self/limits; sh -c 'kill -SEGV $$'; echo $?";
    for (allow, limit, dumps) in [
        (false, Some(1 << 30), false),
        (true, None, false),
        (true, Some(0), false),
        (true, Some(1 << 30), true),
    ] {
        if dumps && !may_raise_limits()? {
            return skip("no CAP_SYS_RESOURCE, which raises limits above a forker's");
        }
        let mut task = Task::new("cores", &["/bin/sh", "-c", script])?;
        if let Some(limit) = limit {
            task.spec["process"]["rlimits"] =
                json!([{"type": "RLIMIT_CORE", "soft": limit, "hard": limit}]);
        }
        configure(&mut task, &format!("[secrets]\ncore_dumps = {allow}\n"))?;
        let (ended, out) = task.run_to_end()?;
        let what = format!("core_dumps = {allow}, limit {limit:?}");
        ensure_eq!(ended.exit_status, 0, "{what}: {out}");
        ensure!(out.ends_with("139\n"), "{what}: {out}");
        let line = out.lines().find(|l| l.starts_with("Max core file size"));
        let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
        let want = match (allow, limit) {
            (true, Some(limit)) => limit.to_string(),
            _ => "1".to_owned(),
        };
        ensure_eq!(words.get(4), Some(&want.as_str()), "{what}: {out}");
        // Where the node has a handler, the file would be its.
        if !pattern.starts_with("core") {
            continue;
        }
        let mut found = Vec::new();
        let tmp = task.side.join("upper/tmp");
        // Without it nothing was written.
        if tmp.exists() {
            for entry in fs::read_dir(tmp)? {
                let entry = entry?;
                if entry.file_name().as_encoded_bytes().starts_with(b"core") {
                    found.push(fs::read(entry.path())?);
                }
            }
        }
        ensure_eq!(found.len(), usize::from(dumps), "{what}: core files");
        ensure!(
            found.iter().all(|file| file.starts_with(b"\x7fELF")),
            "{what}: no core file"
        );
    }
    Ok(())
}

/// CAP_SYS_RESOURCE, in the initial user namespace.
fn may_raise_limits() -> Result<bool, Stop> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let set = u64::from_str_radix(line.unwrap_or_default().trim(), 16);
    Ok(set.is_ok_and(|set| set >> 24 & 1 == 1))
}

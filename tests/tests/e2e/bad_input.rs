//! Input that is wrong or hostile: one clear line, and nothing left behind.

use std::fs;

use casemate_tests::bundle::Task;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::Outcome;
use casemate_tests::{ensure, ensure_eq, procs};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::json;

use crate::common::{casemate_only, expect_text};

crate::trials![
    bad_unknown_capability,
    bad_unknown_syscall_in_seccomp,
    bad_mount_source,
    bad_mount_target_through_a_link,
    bad_missing_agent,
    bad_full_disk_under_the_bundle,
    bad_values_in_the_spec,
];

/// Create or Start fails and says `part`; then nothing is left.
fn refused(task: &mut Task, part: &str) -> Outcome {
    task.boot()?;
    let result = match task.create() {
        Ok(_) => task.rpc()?.start(&task.id).map(|_| ()),
        Err(error) => Err(error),
    };
    expect_text("Create or Start", result, part)?;
    let _ = task.rpc()?.delete(&task.id);
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(SHORT)?;
    Ok(task.expect_clean(SHORT)?)
}

fn bad_unknown_capability() -> Outcome {
    let mut task = Task::new("badcap", &["/bin/grep", "CapBnd", "/proc/self/status"])?;
    for set in ["bounding", "effective", "permitted"] {
        task.spec["process"]["capabilities"][set] = json!(["CAP_KILL", "CAP_OF_THE_FUTURE"]);
    }
    let (deleted, out) = task.run_to_end()?;
    ensure_eq!(deleted.exit_status, 0, "exit with an unknown capability");
    ensure!(
        out.trim().ends_with("0000000000000020"),
        "known capability not applied: {out}"
    );
    Ok(task.finish()?)
}

fn bad_unknown_syscall_in_seccomp() -> Outcome {
    let mut task = Task::new("badseccomp", &["/bin/true"])?;
    task.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["call_of_the_future"], "action": "SCMP_ACT_ERRNO"}]
    });
    // A name that the kernel does not know can't be called either.
    let (deleted, _) = task.run_to_end()?;
    ensure_eq!(deleted.exit_status, 0, "exit with an unknown syscall name");
    task.finish()?;
    let mut task = Task::new("badseccomp", &["/bin/true"])?;
    task.spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_OF_THE_FUTURE"});
    task.write_spec()?;
    // Refused at the latest at Create, with the value in the text.
    let output = task.shim.run("start")?;
    if output.code() != 0 {
        let said = output.out() + &output.err();
        ensure!(
            said.contains("SCMP_ACT_OF_THE_FUTURE"),
            "{said:?} does not name the value"
        );
        return Ok(());
    }
    refused(&mut task, "SCMP_ACT_OF_THE_FUTURE")
}

fn bad_mount_source() -> Outcome {
    let mut task = Task::new("badsource", &["/bin/true"])?;
    if let Some(mounts) = task.spec["mounts"].as_array_mut() {
        mounts.push(json!({
            "destination": "/mnt", "type": "bind", "source": "/nonexistent/volume",
            "options": ["rbind", "ro"]
        }));
    }
    refused(&mut task, "/nonexistent/volume")
}

fn bad_mount_target_through_a_link() -> Outcome {
    let mut task = Task::new("badtarget", &["/bin/true"])?;
    let victim = task.side.join("victim");
    fs::create_dir_all(&victim)?;
    std::os::unix::fs::symlink(&victim, task.side.join("upper/volume"))?;
    if let Some(mounts) = task.spec["mounts"].as_array_mut() {
        mounts.push(json!({
            "destination": "/volume/new", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]
        }));
    }
    task.boot()?;
    // To refuse, or to make the path inside the rootfs, are both right.
    if task.create().is_ok() {
        task.start_and_wait()?;
    }
    let made = fs::read_dir(&victim)?.count();
    ensure_eq!(made, 0, "entries made in a directory of the host");
    Ok(task.finish()?)
}

fn bad_missing_agent() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("badagent", &["/bin/true"])?;
    // The shim alone in a directory, and no other directory in PATH.
    let lonely = task.side.join("lonely");
    fs::create_dir_all(&lonely)?;
    let copy = lonely.join("containerd-shim-casemate-v2");
    fs::copy(&task.shim.program, &copy)?;
    task.shim.program = copy;
    task.shim.path = "/usr/bin:/bin".to_owned();
    task.write_spec()?;
    let output = task.shim.run("start")?;
    if output.code() != 0 {
        let said = output.out() + &output.err();
        ensure!(
            said.contains("casemate-agent"),
            "{said:?} does not name the agent"
        );
        ensure_eq!(said.trim().lines().count(), 1, "lines of {said:?}");
        return Ok(());
    }
    refused(&mut task, "casemate-agent")
}

fn bad_full_disk_under_the_bundle() -> Outcome {
    casemate_only()?;
    let task = Task::new("baddisk", &["/bin/true"])?;
    let bundle = task.bundle().to_owned();
    mount(
        "tmpfs",
        &bundle,
        "tmpfs",
        MountFlags::empty(),
        Some(c"size=16k"),
    )?;
    let done = full_disk(&task);
    unmount(&bundle, UnmountFlags::DETACH)?;
    done
}

fn full_disk(task: &Task) -> Outcome {
    fs::create_dir_all(task.bundle().join("rootfs"))?;
    task.write_spec()?;
    let mut filler = fs::File::create(task.bundle().join("filler"))?;
    while std::io::Write::write(&mut filler, &[0; 4096]).is_ok() {}
    let output = task.shim.run("start")?;
    let said = output.out() + &output.err();
    ensure!(
        output.code() != 0,
        "start succeeded without room for its record: {said:?}"
    );
    ensure_eq!(said.trim().lines().count(), 1, "lines of {said:?}");
    ensure!(
        procs::with_command(&task.id).is_empty(),
        "a process is left"
    );
    Ok(())
}

fn bad_values_in_the_spec() -> Outcome {
    casemate_only()?;
    type Spoil = fn(&mut serde_json::Value);
    let cases: [(&str, Spoil, &str); 5] = [
        (
            "relative cwd",
            |s| s["process"]["cwd"] = json!("tmp"),
            "cwd",
        ),
        ("no args", |s| s["process"]["args"] = json!([]), "args"),
        (
            "rlimit",
            |s| s["process"]["rlimits"] = json!([{"type": "RLIMIT_X", "hard": 1, "soft": 1}]),
            "RLIMIT_X",
        ),
        (
            "namespace",
            |s| s["linux"]["namespaces"] = json!([{"type": "flavour"}]),
            "flavour",
        ),
        (
            "relative mount",
            |s| s["mounts"][0]["destination"] = json!("proc/../../x"),
            "proc/../../x",
        ),
    ];
    for (name, spoil, part) in cases {
        let mut task = Task::new("badvalue", &["/bin/true"])?;
        spoil(&mut task.spec);
        task.write_spec()?;
        let output = task.shim.run("start")?;
        if output.code() != 0 {
            let said = output.out() + &output.err();
            ensure!(said.contains(part), "{name}: {said:?} does not name {part}");
            ensure_eq!(said.trim().lines().count(), 1, "lines of {said:?}");
            continue;
        }
        if let Err(why) = refused(&mut task, part) {
            return match why {
                casemate_tests::skip::Stop::Fail(text) => {
                    casemate_tests::skip::fail(format!("{name}: {text}"))
                }
                other => Err(other),
            };
        }
    }
    Ok(())
}

//! AppArmor profiles and SELinux labels: in force for init and exec where the
//! kernel has them, refused with a reason where it can't.

use std::fs;
use std::path::Path;
use std::process::Command;

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::{World, ensure, ensure_eq};
use serde_json::json;

use crate::common::casemate_only;
use crate::hostile::expect;
use crate::hostile_node::configure;
use crate::oci::says;

crate::trials![
    c130_apparmor_is_applied_or_refused,
    c131_selinux_is_applied_or_refused,
];

fn has(module: &str) -> bool {
    fs::read_to_string("/sys/kernel/security/lsm")
        .is_ok_and(|list| list.trim().split(',').any(|name| name == module))
}

/// Files that the profile, or the policy, does and doesn't let be read.
fn with_files(task: &Task) -> Outcome {
    let upper = task.side.join("upper");
    fs::write(upper.join("secret"), "secret")?;
    fs::write(upper.join("plain"), "plain\n")?;
    Ok(())
}

/// Says its label and what it gets to see.
const LOOK: &str = "tr -d '\\0' </proc/self/attr/current; echo; cat /plain; cat /secret 2>&1; echo";

/// What init (sleeping from then on) and an exec in it say, each of which the
/// node must see with `label`.
fn look(task: &mut Task, label: &str) -> Result<[String; 2], Stop> {
    task.spec["process"]["args"] = json!(["/bin/sh", "-c", format!("{LOOK}; echo end; sleep 600")]);
    task.boot()?;
    let pid = task.create()?.pid;
    task.rpc()?.start(&task.id)?;
    task.stdout.until("\nend", SHORT)?;
    ensure_eq!(label_of(pid)?, label, "init, seen from the node");
    let exec = Exec::sh(task, "e", &format!("{LOOK}; echo end; exec sleep 600"))?;
    let pid = exec.begin()?;
    exec.stdout.until("\nend", SHORT)?;
    ensure_eq!(label_of(pid)?, label, "exec, seen from the node");
    exec.kill(9)?;
    ensure_eq!(exec.wait()?, 137, "exec that was killed");
    exec.delete()?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok([text(task.stdout.so_far()), text(exec.stdout.so_far())])
}

fn label_of(pid: u32) -> Result<String, Stop> {
    let text = fs::read_to_string(format!("/proc/{pid}/attr/current"))?;
    Ok(text.trim_end_matches(['\0', '\n']).to_owned())
}

fn c130_apparmor_is_applied_or_refused() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("c130", &["/bin/true"])?;
    task.spec["process"]["apparmorProfile"] = json!("unconfined");
    says(task)?;
    let mut task = Task::new("c130", &["/bin/true"])?;
    task.spec["process"]["apparmorProfile"] = json!("casemate-nobody-has-this");
    let reason = match has("apparmor") {
        true => "no profile casemate-nobody-has-this is loaded",
        false => "can't be applied on this node: casemate-nobody-has-this (",
    };
    expect(
        task,
        &[
            "process.apparmorProfile",
            reason,
            "unconfined",
            "load this one",
        ],
    )?;
    if !has("apparmor") {
        return Ok(());
    }
    if Command::new("apparmor_parser").arg("-V").output().is_err() {
        return skip("this kernel has AppArmor, but there is no apparmor_parser to load a profile");
    }
    apparmor_in_force()
}

/// A profile that exists while this does.
struct Loaded(std::path::PathBuf);

impl Loaded {
    fn new(name: &str, rules: &str) -> Result<Loaded, Stop> {
        let path = World::get()?.dir().join(name);
        let flags = "flags=(attach_disconnected,mediate_deleted)";
        fs::write(&path, format!("profile {name} {flags} {{\n{rules}\n}}\n"))?;
        parser("--replace", &path)?;
        Ok(Loaded(path))
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let _ = parser("--remove", &self.0);
    }
}

fn parser(what: &str, path: &Path) -> Outcome {
    let output = Command::new("apparmor_parser")
        .args([what, "--skip-cache", "--quiet"])
        .arg(path)
        .output()?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "apparmor_parser {what}: {errors}");
    Ok(())
}

fn apparmor_in_force() -> Outcome {
    let name = "casemate-test";
    let rules = "file,\nnetwork,\ncapability,\nsignal,\nunix,\nptrace,\ndeny /secret rwklmx,";
    let profile = Loaded::new(name, rules)?;
    for (config, no_new_privileges, uid) in [
        ("profile = \"default\"\n", true, 0),
        ("profile = \"strict\"\n", true, 1000),
        ("profile = \"compat\"\n", false, 0),
    ] {
        let mut task = Task::new("c130", &[])?;
        configure(&mut task, config)?;
        with_files(&task)?;
        let process = &mut task.spec["process"];
        process["apparmorProfile"] = json!(name);
        process["noNewPrivileges"] = json!(no_new_privileges);
        process["user"] = json!({"uid": uid, "gid": uid});
        let label = format!("{name} (enforce)");
        for said in look(&mut task, &label)? {
            ensure!(
                said.starts_with(&format!("{label}\n"))
                    && said.contains("\nplain\n")
                    && said.contains("Permission denied"),
                "{config}: {said}"
            );
        }
        // What an exec names is its container's, or refused.
        let mut exec = Exec::sh(&task, "own", "cat /proc/self/attr/current")?;
        exec.process["apparmorProfile"] = json!("unconfined");
        let (status, said) = exec.run()?;
        ensure_eq!(
            (status, said.trim()),
            (0, &*label),
            "{config}: unconfined exec"
        );
        let mut exec = Exec::sh(&task, "other", "true")?;
        exec.process["apparmorProfile"] = json!("another");
        let Err(error) = exec.add().and_then(|()| exec.start()) else {
            return fail("an exec had a profile of its own");
        };
        ensure!(
            error.to_string().contains("process.apparmorProfile"),
            "{error}"
        );
        task.finish()?;
    }
    // The same kernel without a profile: the file is readable.
    let task = Task::new("c130", &["/bin/cat", "/secret"])?;
    with_files(&task)?;
    ensure_eq!(says(task)?, "secret", "without a profile");
    // Removed between Create and Start: the kernel would go on without.
    let mut task = Task::new("c130", &["/bin/sleep", "600"])?;
    task.spec["process"]["apparmorProfile"] = json!(name);
    task.boot()?;
    task.create()?;
    drop(profile);
    let Err(error) = task.rpc()?.start(&task.id) else {
        return fail("a task was started without its profile");
    };
    for part in ["process.apparmorProfile", name, "not in force"] {
        ensure!(error.to_string().contains(part), "{error}");
    }
    let status = task.rpc()?.wait(&task.id, SHORT)?.exit_status;
    ensure!(
        status > 128,
        "a task without its profile ended with {status}"
    );
    Ok(task.finish()?)
}

fn c131_selinux_is_applied_or_refused() -> Outcome {
    casemate_only()?;
    if has("selinux") {
        return skip("this kernel has SELinux, for which nothing is written yet");
    }
    for (section, key) in [("process", "selinuxLabel"), ("linux", "mountLabel")] {
        let mut task = Task::new("c131", &["/bin/true"])?;
        task.spec[section][key] = json!("system_u:system_r:container_t:s0");
        expect(
            task,
            &[&format!("{section}.{key}"), "container_t", "SELinux"],
        )?;
    }
    Ok(())
}

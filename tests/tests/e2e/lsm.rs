//! AppArmor profiles and SELinux labels: in force for init and exec where the
//! kernel has them, refused with a reason where it can't.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::{World, ensure, ensure_eq};
use rustix::mount::{MountFlags, mount};
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
        if !selinux_is_ours() {
            return skip("this kernel has SELinux, and the test would load a policy of its own");
        }
        return selinux_in_force();
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

/// A policy of six types, where the kernel and all that isn't told otherwise is
/// `node_t` and may do anything. `held_t` reads every file but `secret_t`; `daemon_t`,
/// as which a containerd may run, reads and executes all but `shut_t`. Classes and
/// permissions that aren't named are allowed.
const POLICY: &str = "
(handleunknown allow)
(mls true)
(policycap nnp_nosuid_transition)
(class file (read execute entrypoint))
(class process (transition dyntransition))
(classorder (file process))
(sid kernel)
(sid security)
(sid unlabeled)
(sidorder (kernel security unlabeled))
(sensitivity s0)
(sensitivityorder (s0))
(category c0)
(categoryorder (c0))
(sensitivitycategory s0 (c0))
(level low (s0))
(levelrange lowrange (low low))
(user node_u)
(userlevel node_u low)
(userrange node_u lowrange)
(role node_r)
(userrole node_u node_r)
(userrole node_u object_r)
(role object_r)
(type node_t)
(type held_t)
(type secret_t)
(type shown_t)
(type daemon_t)
(type shut_t)
(roletype node_r node_t)
(roletype node_r held_t)
(roletype node_r daemon_t)
(roletype object_r node_t)
(roletype object_r held_t)
(roletype object_r secret_t)
(roletype object_r shown_t)
(roletype object_r daemon_t)
(roletype object_r shut_t)
(typepermissive node_t)
(sidcontext kernel (node_u node_r node_t lowrange))
(sidcontext security (node_u object_r node_t lowrange))
(sidcontext unlabeled (node_u object_r node_t lowrange))
(allow node_t held_t (process (transition)))
(allow held_t node_t (file (read execute entrypoint)))
(allow held_t shown_t (file (read execute entrypoint)))
(allow held_t held_t (file (read)))
(allow held_t secret_t (file (execute)))
(allow held_t held_t (process (transition)))
(allow node_t daemon_t (process (transition)))
(allow daemon_t node_t (file (read execute entrypoint)))
(allow daemon_t daemon_t (file (read execute)))
(allow daemon_t daemon_t (process (transition dyntransition)))
";

fn tool(program: &str, args: &[&str]) -> Outcome {
    let output = Command::new(program).args(args).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{program} {args:?}: {said}");
    Ok(())
}

/// Whether this is a node whose SELinux is for trials to set up.
pub fn selinux_is_ours() -> bool {
    has("selinux") && std::env::var_os("CASEMATE_TEST_SELINUX").is_some()
}

/// Has the kernel enforce the policy; once, as trials run side by side.
pub fn enforce() -> Outcome {
    static DONE: Mutex<bool> = Mutex::new(false);
    let Ok(mut done) = DONE.lock() else {
        return fail("the policy could not be loaded");
    };
    if !*done {
        load()?;
        *done = true;
    }
    Ok(())
}

fn load() -> Outcome {
    let dir = World::get()?.dir().join("selinux");
    fs::create_dir_all(&dir)?;
    let path = |name: &str| dir.join(name).display().to_string();
    fs::write(path("policy.cil"), POLICY)?;
    let (cil, binary, contexts) = (path("policy.cil"), path("policy"), path("contexts"));
    tool("secilc", &["-o", &binary, "-f", &contexts, &cil])?;
    let selinux = Path::new("/sys/fs/selinux");
    if !selinux.join("load").exists() {
        tool(
            "mount",
            &["-t", "selinuxfs", "selinuxfs", "/sys/fs/selinux"],
        )?;
    }
    fs::write(selinux.join("load"), fs::read(&binary)?)?;
    fs::write(selinux.join("enforce"), "1")?;
    Ok(())
}

fn selinux_in_force() -> Outcome {
    enforce()?;
    let dir = World::get()?.dir().join("selinux");
    let path = |name: &str| dir.join(name).display().to_string();
    // A volume whose files have a label.
    let secrets = path("secrets");
    fs::create_dir_all(&secrets)?;
    // Not by mount(8), which drops the option on a system without libselinux' file.
    mount(
        "tmpfs",
        secrets.as_str(),
        "tmpfs",
        MountFlags::empty(),
        Some(c"context=node_u:object_r:secret_t:s0"),
    )?;
    fs::write(Path::new(&secrets).join("secret"), "secret")?;

    let label = "node_u:node_r:held_t:s0";
    for config in ["profile = \"default\"\n", "profile = \"compat\"\n"] {
        let volume = json!({"destination": "/volume", "source": secrets, "type": "bind",
            "options": ["bind", "ro"]});
        let with = |task: &mut Task| -> Outcome {
            configure(task, config)?;
            let upper = task.side.join("upper");
            fs::write(upper.join("plain"), "plain\n")?;
            std::os::unix::fs::symlink("/volume/secret", upper.join("secret"))?;
            if let Some(mounts) = task.spec["mounts"].as_array_mut() {
                mounts.push(volume.clone());
            }
            Ok(())
        };
        let mut task = Task::new("c131", &[])?;
        with(&mut task)?;
        task.spec["process"]["selinuxLabel"] = json!(label);
        task.spec["linux"]["mountLabel"] = json!("node_u:object_r:shown_t:s0");
        for said in look(&mut task, label)? {
            ensure!(
                said.starts_with(&format!("{label}\n"))
                    && said.contains("\nplain\n")
                    && said.contains("Permission denied"),
                "{config}: {said}"
            );
        }
        let mounts = fs::read_to_string(format!(
            "/proc/{}/mountinfo",
            task.rpc()?.state(&task.id)?.pid
        ))?;
        ensure!(
            mounts
                .lines()
                .any(|l| l.contains(" - overlay ")
                    && l.contains("context=node_u:object_r:shown_t:s0")),
            "the rootfs has no label: {mounts}"
        );
        task.finish()?;
        // The same files without a label.
        let mut task = Task::new("c131", &["/bin/cat", "/secret"])?;
        with(&mut task)?;
        ensure_eq!(says(task)?, "secret", "without a label");
    }
    // Not of the policy.
    let mut task = Task::new("c131", &["/bin/true"])?;
    task.spec["process"]["selinuxLabel"] = json!("node_u:node_r:nobody_t:s0");
    let parts = ["process.selinuxLabel", "nobody_t", "doesn't take"];
    expect(task, &parts)?;
    tool("umount", &[&secrets])
}

//! Hostile nodes: wrong configuration, used-up limits, missing rights. The pod
//! fails with one clear line, or works all the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{self, Outcome, Stop};
use casemate_tests::world::set_mode;
use casemate_tests::{ensure, ensure_eq, leaks};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::json;

use crate::common::{casemate_only, output};
use crate::hostile::{add_mount, expect, named, told};

crate::trials![
    hostile_agent_binaries,
    hostile_configuration,
    hostile_full_disk_under_the_layer,
    hostile_layers_on_other_mounts,
    hostile_pids_limit_of_one,
    hostile_fork_bomb,
    hostile_no_id_range_left,
    hostile_masked_proc_on_the_node,
    hostile_shim_without_privilege,
    hostile_no_cgroups_on_the_node,
    hostile_few_descriptors,
];

/// Tests that change the whole node for a moment: run alone, after all others.
pub fn exclusive_trials() -> Vec<libtest_mimic::Trial> {
    vec![skip::trial(
        "hostile_no_user_namespaces_on_the_node",
        hostile_no_user_namespaces_on_the_node,
    )]
}

/// Gives the task's shim a configuration of its own, beside that of the run (which it
/// may repeat: a run of the older ways has them already).
pub fn configure(task: &mut Task, text: &str) -> Result<PathBuf, Stop> {
    let path = task.side.join("config.toml");
    let of_run = match std::env::var_os("CASEMATE_CONFIG") {
        Some(path) => fs::read_to_string(path)?,
        None => String::new(),
    };
    let text = if of_run.contains(text) { "" } else { text };
    fs::write(&path, format!("{text}\n{of_run}"))?;
    task.shim
        .env
        .push(("CASEMATE_CONFIG".to_owned(), path.display().to_string()));
    Ok(path)
}

fn hostile_agent_binaries() -> Outcome {
    casemate_only()?;
    let agent = |path: &Path| -> Result<Task, Stop> {
        let mut task = Task::new("agent", &["/bin/true"])?;
        configure(
            &mut task,
            &format!("[sandbox]\nagent_path = \"{}\"\n", path.display()),
        )?;
        Ok(task)
    };
    expect(
        agent(Path::new("/nonexistent/agent"))?,
        &["/nonexistent/agent", "sandbox.agent_path"],
    )?;
    // Not a program; a directory; a program that ends at once.
    let scratch = tempfile::tempdir_in("/tmp")?;
    let text = scratch.path().join("text");
    fs::write(&text, "not a program")?;
    set_mode(&text, 0o755)?;
    expect(agent(&text)?, &["agent"])?;
    expect(agent(scratch.path())?, &["agent"])?;
    expect(
        agent(&casemate_tests::image::catalog::busybox()?)?,
        &["agent"],
    )
}

fn hostile_configuration() -> Outcome {
    casemate_only()?;
    for (text, parts) in [
        ("profile = \"lax\"\n", &["profile", "lax"][..]),
        ("profil = \"strict\"\n", &["profil"]),
        ("[ids]\nbase = 4294900000\ncount = 10\n", &["ids"]),
        ("[ids]\ncount = 0\n", &["ids.count"]),
        (
            "[capabilities]\nallow = [\"CAP_EVERYTHING\"]\n",
            &["CAP_EVERYTHING"],
        ),
        ("profile = \n", &["config.toml"]),
    ] {
        let mut task = Task::new("config", &["/bin/true"])?;
        let path = configure(&mut task, text)?;
        let said = told(task).map_err(|stop| named(text.trim(), stop))?;
        for part in parts {
            ensure!(
                said.contains(part),
                "{text:?}: {said:?} does not name {part}"
            );
        }
        let _ = path;
    }
    Ok(())
}

fn hostile_full_disk_under_the_layer() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("layer", &["/bin/true"])?;
    let scratch = tempfile::tempdir_in("/tmp")?;
    set_mode(scratch.path(), 0o711)?;
    let disk = scratch.path().join("disk");
    fs::create_dir(&disk)?;
    mount(
        "tmpfs",
        &disk,
        "tmpfs",
        MountFlags::empty(),
        Some(c"size=64k,nr_inodes=16"),
    )?;
    let result = (|| {
        for name in ["upper", "work"] {
            fs::create_dir(disk.join(name))?;
        }
        for option in &mut task.rootfs[0].options {
            for name in ["upper", "work"] {
                if option.starts_with(&format!("{name}dir=")) {
                    *option = format!("{name}dir={}", disk.join(name).display());
                }
            }
        }
        // Overlayfs itself needs a few; the target needs one that isn't there.
        add_mount(
            &mut task,
            json!({"destination": "/a/b/c/d/e/f/g/h/i/j/k/l/m/n", "type": "tmpfs", "source": "tmpfs"}),
        );
        expect(task, &["/a/b", "No space left"])
    })();
    unmount(&disk, UnmountFlags::DETACH)?;
    result
}

fn hostile_layers_on_other_mounts() -> Outcome {
    // Snapshotters whose layers are mounts, below a common directory.
    let mut task = Task::new("layers", &["/bin/sh", "-c", "cat /from; echo up > /up"])?;
    let scratch = tempfile::tempdir_in("/tmp")?;
    set_mode(scratch.path(), 0o711)?;
    let (low, disk) = (scratch.path().join("low"), scratch.path().join("disk"));
    for dir in [&low, &disk] {
        fs::create_dir(dir)?;
        mount(
            "tmpfs",
            dir,
            "tmpfs",
            MountFlags::empty(),
            Some(c"mode=0755"),
        )?;
    }
    let result = (|| {
        fs::write(low.join("from"), "lower")?;
        let base = task.rootfs[0].options[0]
            .trim_start_matches("lowerdir=")
            .to_owned();
        for name in ["upper", "work"] {
            fs::create_dir(disk.join(name))?;
        }
        task.rootfs[0].options = vec![
            format!("lowerdir={}:{base}", low.display()),
            format!("upperdir={}", disk.join("upper").display()),
            format!("workdir={}", disk.join("work").display()),
        ];
        let (deleted, out) = task.run_to_end()?;
        ensure_eq!(
            (deleted.exit_status, out.as_str()),
            (0, "lower"),
            "what the lower layer has"
        );
        let written = fs::read_to_string(disk.join("upper/up"))?;
        ensure_eq!(written, "up\n", "what the upper layer got");
        Ok(task.finish()?)
    })();
    for dir in [&low, &disk] {
        unmount(dir, UnmountFlags::DETACH)?;
    }
    result
}

fn hostile_pids_limit_of_one() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("pidsone", &["/bin/true"])?;
    task.spec["linux"]["resources"]["pids"] = json!({"limit": 1});
    match told(task) {
        Ok(text) => {
            ensure!(
                text.contains("pids.limit"),
                "{text:?} does not name linux.resources.pids.limit"
            );
            Ok(())
        }
        // The sandbox's own helper may be outside of the limit: then one
        // process is what the workload asked for, and gets.
        Err(Stop::Fail(text)) if text == "Create and Start succeeded" => Ok(()),
        Err(other) => Err(other),
    }
}

fn hostile_fork_bomb() -> Outcome {
    let script = "(while :; do (sleep 100 &) 2>/dev/null || echo full; done) & sleep 100";
    let mut task = Task::new("bomb", &["/bin/sh", "-c", script])?;
    task.spec["linux"]["resources"]["pids"] = json!({"limit": 50});
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    std::thread::sleep(Duration::from_millis(1500));
    // The agent's own leaf is named after the pod too.
    let current = leaks::cgroups_with(&task.id)
        .iter()
        .filter(|dir| Path::new(dir).file_name().is_some_and(|n| *n == *task.id))
        .find_map(|dir| fs::read_to_string(Path::new(dir).join("pids.current")).ok())
        .and_then(|text| text.trim().parse::<u32>().ok());
    ensure!(
        current.is_some_and(|n| (10..=50).contains(&n)),
        "{current:?} processes with a limit of 50"
    );
    // The shim is not impressed.
    let begun = Instant::now();
    task.rpc()?.state(&task.id)?;
    ensure!(
        begun.elapsed() < Duration::from_secs(1),
        "State took {:?}",
        begun.elapsed()
    );
    let begun = Instant::now();
    task.rpc()?.kill(&task.id, 9, true)?;
    task.rpc()?.wait(&task.id, SHORT)?;
    ensure!(
        begun.elapsed() < Duration::from_secs(3),
        "Kill took {:?}",
        begun.elapsed()
    );
    Ok(task.finish()?)
}

fn hostile_no_id_range_left() -> Outcome {
    casemate_only()?;
    // A range that no other pod of this node asks for.
    let one_range = |name: &str| -> Result<Task, Stop> {
        let mut task = Task::new(name, &["/bin/probe", "sleep"])?;
        configure(
            &mut task,
            "[ids]\nbase = 0x6fff0000\ncount = 1\nsize = 65537\n",
        )?;
        Ok(task)
    };
    let mut first = one_range("range")?;
    first.boot()?;
    first.create()?;
    expect(one_range("norange")?, &["ids.count", "in use"])?;
    Ok(first.finish()?)
}

/// Starts the shim through a script that spoils its surroundings.
/// A task whose shim is run by a script that does `prepare` before.
pub fn wrapped(name: &str, args: &[&str], prepare: &str, exec: &str) -> Result<Task, Stop> {
    let mut task = Task::new(name, args)?;
    wrap(&mut task, prepare, exec)?;
    Ok(task)
}

/// Has the task's shim run by a script that does `prepare` before.
pub fn wrap(task: &mut Task, prepare: &str, exec: &str) -> Outcome {
    let wrapper = task.side.join("shim");
    let program = task.shim.program.display().to_string();
    fs::write(
        &wrapper,
        format!("#!/bin/sh\n{prepare}\nexec {exec} {program} \"$@\"\n"),
    )?;
    set_mode(&wrapper, 0o755)?;
    task.shim.program = wrapper;
    Ok(())
}

const TRUE: &[&str] = &["/bin/true"];

/// A private mount namespace for the rest of a shell script.
const OWN_MOUNTS: &str =
    "[ -n \"$OWN\" ] || OWN=1 exec unshare --mount --propagation private \"$0\" \"$@\"";

fn hostile_masked_proc_on_the_node() -> Outcome {
    casemate_only()?;
    // A mask over a file of the node's /proc would keep a user namespace from
    // mounting its own (user_namespaces(7)); the shim sees below it.
    let prepare = format!("{OWN_MOUNTS}\nmount --bind /dev/null /proc/meminfo || exit 9");
    let mut task = wrapped(
        "masked",
        &["/bin/grep", "-c", "MemTotal", "/proc/meminfo"],
        &prepare,
        "",
    )?;
    let (deleted, out) = task.run_to_end()?;
    ensure_eq!(
        (deleted.exit_status, out.trim()),
        (0, "1"),
        "a pod on such a node"
    );
    Ok(task.finish()?)
}

fn hostile_shim_without_privilege() -> Outcome {
    casemate_only()?;
    let text = told(wrapped(
        "weak",
        TRUE,
        "",
        "setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin",
    )?)?;
    ensure!(
        text.contains("CAP_SYS_ADMIN") || text.contains("Operation not permitted"),
        "{text:?} says nothing of a missing right"
    );
    Ok(())
}

fn hostile_no_cgroups_on_the_node() -> Outcome {
    casemate_only()?;
    let prepare = format!("{OWN_MOUNTS}\numount -R -l /sys/fs/cgroup || exit 9");
    expect(wrapped("nocgroup", TRUE, &prepare, "")?, &["cgroup"])
}

fn hostile_few_descriptors() -> Outcome {
    casemate_only()?;
    let text = told(wrapped("few", TRUE, "ulimit -n 16", "")?)?;
    ensure!(
        text.contains("open files") || text.contains("EMFILE"),
        "{text:?} does not say why"
    );
    Ok(())
}

/// Writes a file, and its old content back when dropped.
struct Restored(&'static str, String);

impl Restored {
    fn write(path: &'static str, text: &str) -> std::io::Result<Self> {
        let old = fs::read_to_string(path)?;
        fs::write(path, text)?;
        Ok(Self(path, old))
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let _ = fs::write(self.0, self.1.trim());
    }
}

fn hostile_no_user_namespaces_on_the_node() -> Outcome {
    casemate_only()?;
    const LIMIT: &str = "/proc/sys/user/max_user_namespaces";
    let before = fs::read_to_string(LIMIT)?;
    let mut task = Task::new("nouserns", &["/bin/true"])?;
    let restored = match Restored::write(LIMIT, "0") {
        Ok(restored) => restored,
        Err(e) => return skip::skip(format!("{LIMIT} can't be written here: {e}")),
    };
    // The pod is made while containerd connects: Create tells how it went.
    let created = task.boot().and_then(|_| task.create());
    drop(restored);
    ensure_eq!(fs::read_to_string(LIMIT)?, before, "{LIMIT} after the test");
    crate::common::expect_text("Create", created, "user.max_user_namespaces")?;
    let _ = task.rpc()?.shutdown(&task.id);
    let _ = task.shim.delete();
    task.expect_clean(SHORT)?;
    // And the node works again.
    let mut task = Task::new("userns", &["/bin/echo", "again"])?;
    task.run_to_end()?;
    ensure_eq!(output_of(&task)?, "again", "the next pod");
    Ok(task.finish()?)
}

fn output_of(task: &Task) -> Result<String, Stop> {
    Ok(output(task)?.trim().to_owned())
}

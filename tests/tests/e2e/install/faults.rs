//! What goes wrong: one line with the way out, and the node as it was.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use casemate_tests::generation::Generation;
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::set_mode;
use casemate_tests::{Failure, ensure, ensure_eq};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};

use super::node::{Node, same};
use super::stepper;
use crate::trials;

/// Neither restart nor what follows it.
const QUIET: [&str; 2] = ["--no-restart", "--no-proof"];

trials! {
    install_refuses_a_broken_configuration,
    install_refuses_a_containerd_without_cri,
    install_refuses_an_old_containerd,
    install_refuses_the_wrong_machine,
    install_goes_back_when_containerd_wont_start,
    install_tells_of_a_containerd_that_was_broken_before,
    install_on_a_full_disk,
    install_on_a_read_only_etc,
    install_with_imports_in_a_loop,
    install_killed_after_each_effect_in_place,
    install_killed_after_each_effect_drop_in,
    uninstall_killed_after_each_effect,
    install_two_at_once,
}

fn install_refuses_a_broken_configuration() -> Outcome {
    for generation in [Generation::V1_6, Generation::V2_1] {
        let node = Node::running(generation)?;
        let text = fs::read_to_string(node.config())? + "[plugins.\"broken\n";
        fs::write(node.config(), text)?;
        let before = node.tree();
        let config = node.config().display().to_string();
        node.refuses("install", &[], &[&config, "can't read it", "as it was"])?;
        node.refuses("install", &["--dry-run"], &[&config])?;
        same("after a refusal", &before, &node.tree())?;
        ensure_eq!(node.starts(), 1, "starts of containerd");
    }
    Ok(())
}

fn install_refuses_a_containerd_without_cri() -> Outcome {
    let node = Node::new(Generation::V1_7)?;
    let text = fs::read_to_string(node.config())?;
    let off = text.replace(
        "disabled_plugins = [",
        "disabled_plugins = [\"io.containerd.grpc.v1.cri\", ",
    );
    fs::write(node.config(), off)?;
    let before = node.tree();
    node.refuses("install", &QUIET, &["disabled_plugins", "--binaries-only"])?;
    same("after a refusal", &before, &node.tree())
}

fn install_refuses_an_old_containerd() -> Outcome {
    let node = Node::new(Generation::V1_6)?;
    let before = node.tree();
    let program = node.dir.join("old");
    let path = program.display().to_string();
    for (says, part) in [
        (
            "containerd github.com/containerd/containerd v1.5.18 abc",
            "too old",
        ),
        ("what?", "no release of containerd"),
    ] {
        fs::write(&program, format!("#!/bin/sh\necho '{says}'\n"))?;
        set_mode(&program, 0o755)?;
        let more = ["--no-restart", "--no-proof", "--containerd", &path];
        node.refuses("install", &more, &[&path, part])?;
    }
    let more = [
        "--no-restart",
        "--no-proof",
        "--containerd",
        "/no/containerd",
    ];
    node.refuses("install", &more, &["/no/containerd", "No such file"])?;
    same("after three refusals", &before, &node.tree())
}

fn install_refuses_the_wrong_machine() -> Outcome {
    let node = Node::new(Generation::V1_6)?;
    fs::write(node.dir.join("etc/machine-id"), "0123456789abcdef\n")?;
    let before = node.tree();
    let wrong = [
        "--no-restart",
        "--no-proof",
        "--machine-id",
        "fedcba9876543210",
    ];
    node.refuses("install", &wrong, &["fedcba9876543210", "0123456789abcdef"])?;
    node.refuses("uninstall", &["--machine-id", "x"], &["wrong node"])?;
    same("after two refusals", &before, &node.tree())?;
    let right = [
        "--no-restart",
        "--no-proof",
        "--machine-id",
        "0123456789abcdef",
    ];
    node.must("install", &right)?;
    Ok(())
}

fn install_goes_back_when_containerd_wont_start() -> Outcome {
    for generation in [Generation::V1_7, Generation::V2_1] {
        let node = Node::running(generation)?;
        let before = node.tree();
        fs::write(node.dir.join("refuse"), "")?;
        node.refuses(
            "install",
            &["--timeout", "1"],
            &[
                "doesn't answer",
                "the node is as it was, and containerd runs",
            ],
        )?;
        same("after the way back", &before, &node.tree())?;
        node.answers()?;
        ensure_eq!(node.starts(), 3, "starts of containerd");
        // And with the hindrance away it works.
        fs::remove_file(node.dir.join("refuse"))?;
        node.must("install", &[])?;
    }
    Ok(())
}

fn install_tells_of_a_containerd_that_was_broken_before() -> Outcome {
    let node = Node::new(Generation::V2_1)?;
    // Read without complaint, and no place for a socket.
    let text = fs::read_to_string(node.config())?.replace(
        &format!("root = \"{}/root\"", node.dir.display()),
        "root = \"/proc/no\"",
    );
    fs::write(node.config(), text)?;
    let before = node.tree();
    node.refuses(
        "install",
        &["--timeout", "1"],
        &["didn't answer before either", "configuration is as it was"],
    )?;
    same("after the way back", &before, &node.tree())
}

/// A small file system of its own, for as long as this lives.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn make(path: &'a Path, size: &str) -> Result<Self, Stop> {
        fs::create_dir_all(path)?;
        let options = std::ffi::CString::new(format!("size={size},mode=755"))?;
        mount(
            "tmpfs",
            path,
            "tmpfs",
            MountFlags::empty(),
            options.as_c_str(),
        )?;
        Ok(Self(path))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

fn install_on_a_full_disk() -> Outcome {
    // Room for some of the programs only.
    let node = Node::new(Generation::V1_7)?;
    let opt = node.dir.join("opt");
    let small = Small::make(&opt, "4m")?;
    let before = node.tree();
    node.refuses(
        "install",
        &QUIET,
        &["/opt/casemate/", "No space left", "as it was"],
    )?;
    same("after programs without room", &before, &node.tree())?;
    drop(small);

    // None for the configuration.
    let etc = node.dir.join("etc/containerd");
    let text = fs::read(node.config())?;
    let small = Small::make(&etc, "64k")?;
    fs::write(node.config(), &text)?;
    let mut filler = 0;
    while fs::write(etc.join(format!("filler{filler}")), [0; 4096]).is_ok() {
        filler += 1;
    }
    let before = node.tree();
    node.refuses(
        "install",
        &QUIET,
        &["config.toml", "No space left", "as it was"],
    )?;
    same("after a configuration without room", &before, &node.tree())?;
    drop(small);

    // None for the journal.
    let var = node.dir.join("var/lib");
    let small = Small::make(&var, "16k")?;
    let mut filler = 0;
    while fs::write(var.join(format!("filler{filler}")), [0; 4096]).is_ok() {
        filler += 1;
    }
    let before = node.tree();
    node.refuses("install", &QUIET, &["/var/lib/casemate", "No space left"])?;
    same("after a journal without room", &before, &node.tree())?;
    drop(small);
    Ok(())
}

fn install_on_a_read_only_etc() -> Outcome {
    for generation in [Generation::V1_7, Generation::V2_1] {
        let node = Node::new(generation)?;
        let before = node.tree();
        let etc = node.dir.join("etc");
        mount_bind(&etc, &etc)?;
        let _unmounted = Small(&etc);
        mount_remount(&etc, MountFlags::BIND | MountFlags::RDONLY, "")?;
        node.refuses(
            "install",
            &QUIET,
            &["etc/containerd", "Read-only file system", "as it was"],
        )?;
        same("after a refusal", &before, &node.tree())?;
        // A look needs no more than that.
        node.must("install", &["--dry-run"])?;
        same("after a dry run", &before, &node.tree())?;
    }
    Ok(())
}

fn install_with_imports_in_a_loop() -> Outcome {
    for generation in [Generation::V1_7, Generation::V2_1] {
        let node = Node::new(generation)?;
        let text = fs::read_to_string(node.config())?;
        let version = text.lines().nth(1).unwrap_or_default().to_owned();
        fs::write(node.config(), format!("imports = [\"other.toml\"]\n{text}"))?;
        let config = node.config();
        let other = config.with_file_name("other.toml");
        fs::write(
            &other,
            format!("imports = [{config:?}, {other:?}]\n{version}\n"),
        )?;
        let before = node.tree();
        node.must("install", &QUIET)?;
        ensure!(node.dump()?.contains("runtimes.casemate]"), "no handler");
        node.must("uninstall", &["--no-restart"])?;
        same("after uninstall", &before, &node.tree())?;
    }
    Ok(())
}

fn install_killed_after_each_effect_in_place() -> Outcome {
    killed(Generation::V1_7, 3)
}

fn install_killed_after_each_effect_drop_in() -> Outcome {
    killed(Generation::V2_1, 2)
}

/// At any moment containerd can read what is there; and the next run of either
/// command ends as if nothing had happened.
fn killed(generation: Generation, stride: usize) -> Outcome {
    let node = Node::new(generation)?;
    let before = node.tree();
    node.must("install", &QUIET)?;
    // Which directories a run made that was cut short is nobody's knowledge.
    let tree = || {
        let mut tree = node.tree();
        tree.retain(|path, _| !path.ends_with("record.json"));
        tree
    };
    let installed = tree();
    node.must("uninstall", &["--no-restart"])?;
    same("after uninstall", &before, &node.tree())?;
    let mut number = 1;
    loop {
        let Some(effect) = stepper::killed_after(&node.command("install", &QUIET), number)? else {
            break;
        };
        let what = format!("killed after effect {number} ({effect})");
        node.dump().map_err(|stop| told(&what, stop))?;
        if number % 4 < 2 {
            node.must("install", &QUIET)
                .map_err(|stop| told(&what, stop))?;
            same(&format!("{what}, then install"), &installed, &tree())?;
        }
        node.must("uninstall", &["--no-restart"])
            .map_err(|stop| told(&what, stop))?;
        same(&format!("{what}, then uninstall"), &before, &node.tree())?;
        number += stride;
    }
    ensure!(number > 20, "only {number} effects were seen");
    Ok(())
}

fn told(what: &str, stop: Stop) -> Stop {
    match stop {
        Stop::Fail(why) => Stop::Fail(format!("{what}: {why}")),
        skip => skip,
    }
}

fn uninstall_killed_after_each_effect() -> Outcome {
    let node = Node::new(Generation::V2_1)?;
    let before = node.tree();
    let mut number = 1;
    loop {
        node.must("install", &QUIET)?;
        let command = node.command("uninstall", &["--no-restart"]);
        let Some(effect) = stepper::killed_after(&command, number)? else {
            break;
        };
        let what = format!("killed after effect {number} ({effect})");
        node.dump().map_err(|stop| told(&what, stop))?;
        node.must("uninstall", &["--no-restart"])
            .map_err(|stop| told(&what, stop))?;
        same(&what, &before, &node.tree())?;
        number += 3;
    }
    ensure!(number > 15, "only {number} effects were seen");
    Ok(())
}

fn install_two_at_once() -> Outcome {
    let node = Node::running(Generation::V1_7)?;
    fs::write(node.dir.join("slow"), "")?;
    let mut first = node
        .command("install", &[])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let pid = first.id().to_string();
    let out = first
        .stdout
        .take()
        .ok_or_else(|| Failure::Unexpected("no pipe".to_owned()))?;
    let mut lines = BufReader::new(out).lines();
    // Its restart takes two seconds from here on.
    for line in lines.by_ref() {
        if line?.contains("config dump") {
            break;
        }
    }
    node.refuses("install", &[], &["another casemate", &pid])?;
    node.refuses("uninstall", &[], &["another casemate", &pid])?;
    until("the first one to end", Duration::from_secs(30), || {
        !matches!(first.try_wait(), Ok(None))
    })?;
    ensure!(first.wait()?.success(), "the first one failed");
    node.must("install", &[])?;
    Ok(())
}

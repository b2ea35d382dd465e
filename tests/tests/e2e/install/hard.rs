//! Nodes that aren't made for it: read-only parts, distributions that make containerd's
//! configuration, cgroups that can't be written, an installer that ends half-way.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use casemate_tests::generation::Generation;
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{Failure, ensure, ensure_eq, procs};
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

use super::node::{Node, same};
use crate::trials;

trials! {
    install_on_a_read_only_usr,
    install_links_must_be_in_the_path_of_an_old_containerd,
    install_on_a_read_only_opt,
    install_without_cgroups_to_write,
    install_killed_while_containerd_restarts,
    install_killed_in_its_proof,
}

/// Read-only for as long as this lives.
struct ReadOnly<'a>(&'a Path);

impl<'a> ReadOnly<'a> {
    fn make(path: &'a Path) -> Result<Self, Stop> {
        mount_bind(path, path)?;
        let made = Self(path);
        mount_remount(path, MountFlags::BIND | MountFlags::RDONLY, "")?;
        Ok(made)
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

/// As where `/usr` is part of an image: CRI finds the shim by its path, but that of 1.6,
/// which knows names alone.
fn install_on_a_read_only_usr() -> Outcome {
    let node = Node::running(Generation::V1_7)?;
    let before = node.tree();
    let usr = node.dir.join("usr");
    let read_only = ReadOnly::make(&usr)?;
    let said = node.must("install", &[])?;
    ensure!(
        said.contains("ctr finds no shim by name")
            && said.contains("proof: a container of class strict ran"),
        "install: {said}"
    );
    node.must("uninstall", &[])?;
    same("after uninstall", &before, &node.tree())?;
    drop(read_only);

    let node = Node::running(Generation::V1_6)?;
    let before = node.tree();
    let usr = node.dir.join("usr");
    let read_only = ReadOnly::make(&usr)?;
    node.refuses(
        "install",
        &[],
        &["Read-only file system", "--links", "the node is as it was"],
    )?;
    same("after a refusal", &before, &node.tree())?;
    ensure_eq!(node.starts(), 1, "starts of containerd");
    drop(read_only);
    Ok(())
}

/// A link somewhere else would be no link: the proof asks as CRI does.
fn install_links_must_be_in_the_path_of_an_old_containerd() -> Outcome {
    let node = Node::running(Generation::V1_6)?;
    let before = node.tree();
    let elsewhere = node.dir.join("opt/links").display().to_string();
    let links = ["--links", elsewhere.as_str()];
    node.refuses(
        "install",
        &links,
        &[
            "containerd-shim-casemate-v2",
            "PATH",
            "--links",
            "as it was",
        ],
    )?;
    same("after a refusal", &before, &node.tree())?;
    // Later ones are told the path.
    let node = Node::running(Generation::V2_1)?;
    let before = node.tree();
    let elsewhere = node.dir.join("opt/links").display().to_string();
    node.must("install", &["--links", &elsewhere])?;
    node.must("uninstall", &["--links", &elsewhere])?;
    same("after uninstall", &before, &node.tree())
}

fn install_on_a_read_only_opt() -> Outcome {
    let node = Node::running(Generation::V2_1)?;
    let opt = node.dir.join("opt");
    let before = node.tree();
    let read_only = ReadOnly::make(&opt)?;
    node.refuses(
        "install",
        &[],
        &[
            "opt/casemate",
            "Read-only file system",
            "--prefix",
            "as it was",
        ],
    )?;
    same("after a refusal", &before, &node.tree())?;
    // The way out that it names.
    let prefix = node.dir.join("var/lib/programs").display().to_string();
    node.must("install", &["--prefix", &prefix])?;
    node.must("uninstall", &["--prefix", &prefix])?;
    same("after uninstall", &before, &node.tree())?;
    drop(read_only);
    Ok(())
}

/// As where containerd runs in a container that has no cgroups delegated to it.
fn install_without_cgroups_to_write() -> Outcome {
    let node = Node::new(Generation::V1_7)?;
    let script = fs::read_to_string(node.dir.join("restart"))?;
    let read_only = script.replace(
        "setsid ",
        "setsid unshare --mount --propagation private sh -c '\n\
         while read -r a b c d at rest; do case $at in /sys/fs/cgroup*)\n\
         mount -o remount,bind,ro $at;; esac; done </proc/self/mountinfo; exec \"$@\"' sh ",
    );
    ensure!(read_only != script, "the script has no setsid");
    fs::write(node.dir.join("restart"), &read_only)?;
    node.up()?;
    let before = node.tree();
    // As often as a DaemonSet's pod tries: containerd isn't restarted for it.
    for _ in 0..2 {
        node.refuses(
            "install",
            &[],
            &["prove: ", "cgroup", "the node is as it was"],
        )?;
        same("after a refusal", &before, &node.tree())?;
        ensure_eq!(node.starts(), 1, "starts of containerd");
    }
    node.answers()
}

/// Runs an installation until it says this, and leaves it there.
fn begun(node: &Node, says: &str) -> Result<Child, Stop> {
    let mut child = node
        .command("install", &[])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = child
        .stdout
        .take()
        .ok_or_else(|| Failure::Unexpected("no pipe".to_owned()))?;
    for line in BufReader::new(out).lines() {
        if line?.contains(says) {
            return Ok(child);
        }
    }
    let _ = child.wait();
    casemate_tests::skip::fail(format!("the installation never said {says:?}"))
}

fn install_killed_while_containerd_restarts() -> Outcome {
    let node = Node::running(Generation::V1_7)?;
    let before = node.tree();
    // It takes two seconds.
    fs::write(node.dir.join("slow"), "")?;
    for verb in ["install", "uninstall"] {
        let starts = node.starts();
        let mut child = begun(&node, "config dump")?;
        until("the restart to begin", Duration::from_secs(30), || {
            node.starts() > starts
        })?;
        child.kill()?;
        child.wait()?;
        // The restart goes on without it.
        node.answers()?;
        let said = node.must(verb, &[])?;
        ensure!(said.contains("was cut short"), "{verb}: {said}");
        if verb == "install" {
            ensure!(
                said.contains("proof: a container of class strict ran"),
                "{verb}: {said}"
            );
            node.must("uninstall", &[])?;
        }
        ensure!(
            !node.dump()?.contains("casemate"),
            "a handler is left after {verb}"
        );
        same(&format!("killed, then {verb}"), &before, &node.tree())?;
    }
    Ok(())
}

fn install_killed_in_its_proof() -> Outcome {
    let node = Node::running(Generation::V1_7)?;
    let before = node.tree();
    for verb in ["install", "uninstall"] {
        let mut child = begun(&node, "restart: containerd is back")?;
        let id = format!("casemate-proof-{}", child.id());
        until("a sandbox of the proof", Duration::from_secs(30), || {
            !procs::with_command(&id).is_empty()
        })?;
        child.kill()?;
        child.wait()?;
        let mut said = node.must(verb, &[])?;
        ensure!(said.contains("was cut short"), "{verb}: {said}");
        until("the proof's shim to end", Duration::from_secs(20), || {
            procs::with_command(&id).is_empty()
        })?;
        if verb == "install" {
            said += &node.must("uninstall", &[])?;
        }
        same(
            &format!("killed, then {verb}: {said}"),
            &before,
            &node.tree(),
        )?;
    }
    Ok(())
}

//! Install, again, upgrade, remove.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use casemate_tests::generation::Generation;
use casemate_tests::image::catalog;
use casemate_tests::run::{run, until};
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{World, ensure, ensure_eq, world};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::node::{Node, same};
use crate::trials;

const LIMIT: Duration = Duration::from_secs(30);

trials! {
    install_upgrades_under_living_pods,
    install_upgrade_that_fails_meets_no_pod,
    install_keeps_what_an_operator_has_changed_since,
    install_programs_alone_are_enough_for_ctr,
    install_without_a_configuration_makes_one,
    install_adopts_a_handler_made_by_hand,
    install_in_the_nodes_root,
    install_offers_compat_only_when_asked,
}

/// On each containerd: nothing by a dry run, all by a run, nothing more by a
/// second one, and back to the byte.
pub fn and_back(generation: Generation) -> Outcome {
    let node = Node::running(generation)?;
    let before = node.tree();
    let said = node.must("install", &["--dry-run"])?;
    ensure!(said.contains("would write"), "dry run: {said}");
    same("after a dry run", &before, &node.tree())?;

    let said = node.must("install", &[])?;
    ensure!(
        said.contains("restart: containerd is back, and has loaded the handler")
            && said.contains("proof: a container ran in its sandbox")
            && said.contains("proof: a container of class strict ran in its sandbox"),
        "install: {said}"
    );
    ensure_eq!(node.starts(), 2, "starts of containerd");
    let dump = node.dump()?;
    // containerd forgets its default as soon as there is another, up to 1.7.
    ensure!(
        dump.contains("runtimes.runc]")
            && dump.contains("runtimes.casemate]")
            && dump.contains("runtimes.casemate-strict]")
            && !dump.contains("runtimes.casemate-compat]"),
        "runtimes after the installation: {dump}"
    );
    ensure!(dump.contains("casemate.io/*"), "annotations: {dump}");

    let installed = node.tree();
    let said = node.must("install", &[])?;
    ensure!(said.contains("restart: not needed"), "second run: {said}");
    ensure_eq!(node.starts(), 2, "starts of containerd after a second run");
    same("after a second run", &installed, &node.tree())?;

    // What doesn't hold the node up, holds after the daemon's own restart, too.
    node.up()?;
    node.must("install", &[])?;
    ensure_eq!(node.starts(), 3, "starts of containerd after a third run");

    node.must("uninstall", &["--dry-run"])?;
    same("after a dry run of uninstall", &installed, &node.tree())?;
    let said = node.must("uninstall", &[])?;
    ensure!(
        said.contains("restart: containerd is back, without the handler"),
        "uninstall: {said}"
    );
    same("after uninstall", &before, &node.tree())?;
    ensure_eq!(node.starts(), 4, "starts of containerd at the end");
    let said = node.must("uninstall", &[])?;
    ensure!(said.contains("isn't installed"), "second uninstall: {said}");
    same("after a second uninstall", &before, &node.tree())
}

/// Programs of another build: a byte more in one.
fn other_build(node: &Node) -> Result<String, Stop> {
    changed_build(node, "casemate-agent", |bytes| bytes.push(0))
}

/// Programs of which one is another.
fn changed_build(node: &Node, which: &str, change: impl Fn(&mut Vec<u8>)) -> Result<String, Stop> {
    let dir = node.dir.join("other");
    fs::create_dir_all(&dir)?;
    for program in ["casemate", "casemate-agent", "containerd-shim-casemate-v2"] {
        let mut bytes = fs::read(world::binaries().join(program))?;
        if program == which {
            change(&mut bytes);
        }
        fs::write(dir.join(program), bytes)?;
        world::set_mode(&dir.join(program), 0o755)?;
    }
    Ok(dir.display().to_string())
}

fn versions(node: &Node) -> usize {
    fs::read_dir(node.dir.join("opt/casemate"))
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| !entry.path().is_symlink())
        .count()
}

fn pod(node: &Node, id: &str) -> Outcome {
    let mut args = vec!["run", "-d", "--runtime", "io.containerd.casemate.v2"];
    args.extend([catalog::BASE, id, "sleep", "1000"]);
    node.ctr().run(&args, LIMIT)?.ok()?;
    Ok(())
}

fn exec(node: &Node, id: &str) -> Outcome {
    let args = ["task", "exec", "--exec-id", "e1", id, "echo", "here"];
    ensure_eq!(
        node.ctr().run(&args, LIMIT)?.ok()?.out(),
        "here\n",
        "exec in {id}"
    );
    Ok(())
}

fn end(node: &Node, id: &str) -> Outcome {
    casemate_tests::operator::expect_pod_as_promised(id)?;
    let ctr = node.ctr();
    ctr.run(&["task", "kill", "-s", "SIGKILL", id], LIMIT)?
        .ok()?;
    ctr.run(&["task", "delete", "-f", id], LIMIT)?;
    ctr.run(&["container", "delete", id], LIMIT)?;
    let bundle = Path::new("/proc");
    let gone = || {
        casemate_tests::procs::with_command(id)
            .iter()
            .all(|pid| !bundle.join(pid.to_string()).exists())
    };
    until("the shim to end", LIMIT, gone)?;
    Ok(())
}

fn install_upgrades_under_living_pods() -> Outcome {
    let node = Node::running(Generation::V1_7)?;
    let before = node.tree();
    let world = World::get()?;
    node.must("install", &[])?;
    let probe = world::probe()?;
    node.ctr()
        .import(&catalog::base(Some(&probe))?, world.dir())?;
    let (old, new) = (world.id("old"), world.id("new"));
    pod(&node, &old)?;

    let other = other_build(&node)?;
    let starts = node.starts();
    let said = node.must("install", &["--from", &other])?;
    ensure!(
        said.contains("stays, as sandboxes run on it"),
        "upgrade: {said}"
    );
    ensure_eq!(node.starts(), starts, "starts of containerd by an upgrade");
    ensure_eq!(versions(&node), 2, "versions while a pod has the old one");
    exec(&node, &old)?;
    pod(&node, &new)?;
    exec(&node, &new)?;
    end(&node, &old)?;
    let said = node.must("install", &["--from", &other])?;
    ensure!(said.contains(": removed"), "after the old pod: {said}");
    ensure_eq!(versions(&node), 1, "versions after the old pod");

    node.refuses(
        "uninstall",
        &[],
        &["1 sandboxes run", "--force", "as it was"],
    )?;
    exec(&node, &new)?;
    let said = node.must("uninstall", &["--force"])?;
    ensure!(said.contains("run this again"), "uninstall --force: {said}");
    ensure!(
        !node.dump()?.contains("runtimes.casemate"),
        "the handler is still there"
    );
    ensure_eq!(versions(&node), 1, "versions under a living pod");
    exec(&node, &new)?;
    end(&node, &new)?;
    node.must("uninstall", &[])?;
    same("after all", &before, &node.tree())
}

/// A shim that says its version, and can't do more.
const BROKEN: &[u8] = b"#!/bin/sh
[ \"$1\" != -v ] || { echo 'containerd-shim-casemate-v2 broken'; exit 0; }
echo 'no such luck' >&2
exit 3
";

/// The link to the newest version never leads to one that has proven nothing.
fn install_upgrade_that_fails_meets_no_pod() -> Outcome {
    let node = Node::running(Generation::V2_1)?;
    node.must("install", &[])?;
    let (before, current) = (node.tree(), node.dir.join("opt/casemate/current"));
    let good = fs::read_link(&current)?;
    let shim = "containerd-shim-casemate-v2";
    let other = changed_build(&node, shim, |bytes| *bytes = BROKEN.to_vec())?;
    let done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut seen = BTreeSet::new();
            while !done.load(Ordering::Relaxed) {
                seen.insert(fs::read_link(&current).ok());
                std::thread::sleep(Duration::from_millis(1));
            }
            seen
        });
        let version = good.display().to_string();
        let way_out = ["no such luck", "as it was", &version, "or stay with it"];
        let refused = node.refuses("install", &["--from", &other], &way_out);
        done.store(true, Ordering::Relaxed);
        refused.map(|()| watch.join().unwrap_or_default())
    })?;
    ensure_eq!(seen, [Some(good)].into(), "where the link led");
    same("after an upgrade that failed", &before, &node.tree())?;
    let world = World::get()?;
    let probe = world::probe()?;
    node.ctr()
        .import(&catalog::base(Some(&probe))?, world.dir())?;
    let id = world.id("after");
    pod(&node, &id)?;
    exec(&node, &id)?;
    end(&node, &id)?;

    let other = other_build(&node)?;
    let said = node.must("install", &["--from", &other])?;
    let held = said.find("holds, and takes its place now");
    ensure!(
        held.is_some() && held < said.find("proof: a container ran"),
        "a good upgrade: {said}"
    );
    node.must("uninstall", &[]).map(drop)
}

fn install_keeps_what_an_operator_has_changed_since() -> Outcome {
    for generation in [Generation::V1_6, Generation::V2_1] {
        let node = Node::new(generation)?;
        let before = node.tree();
        let more = ["--no-restart", "--no-proof"];
        node.must("install", &more)?;
        let mine = "\n[proxy_plugins.mine]\n  type = \"snapshot\"\n  address = \"/mine\" # mine\n";
        let text = fs::read_to_string(node.config())? + mine;
        fs::write(node.config(), text)?;
        // Nothing to do for a second run, whatever else is in the file.
        let said = node.must("install", &more)?;
        ensure!(
            said.contains("config: has casemate, casemate-strict: unchanged"),
            "{said}"
        );
        let said = node.must("uninstall", &["--no-restart"])?;
        ensure!(
            said.contains("only casemate's part is out"),
            "uninstall: {said}"
        );
        let after = fs::read_to_string(node.config())?;
        ensure!(after.contains(mine), "the operator's part is gone: {after}");
        ensure!(
            !after.contains("runtimes.casemate"),
            "casemate's part is left: {after}"
        );
        ensure!(!after.contains("conf.d"), "an import is left: {after}");
        node.dump()?;
        let mut rest = node.tree();
        rest.insert(
            node.config(),
            before.get(&node.config()).cloned().unwrap_or_default(),
        );
        same("apart from that file", &before, &rest)?;
    }
    Ok(())
}

fn install_programs_alone_are_enough_for_ctr() -> Outcome {
    let node = Node::running(Generation::V2_1)?;
    let world = World::get()?;
    let config = fs::read(node.config())?;
    let said = node.must("install", &["--binaries-only"])?;
    ensure!(said.contains("proof: a container ran"), "install: {said}");
    ensure_eq!(node.starts(), 1, "starts of containerd");
    ensure!(
        fs::read(node.config())? == config,
        "the configuration was changed"
    );
    node.ctr()
        .import(&catalog::base(Some(&world::probe()?))?, world.dir())?;
    let id = world.id("alone");
    let ran = node.ctr().run_task(
        "io.containerd.casemate.v2",
        &[],
        catalog::BASE,
        &id,
        &["echo", "in"],
        LIMIT,
    )?;
    ensure_eq!(ran.ok()?.out(), "in\n", "ctr run by the runtime's name");
    node.must("uninstall", &[])?;
    ensure_eq!(node.starts(), 1, "starts of containerd at the end");
    Ok(())
}

fn install_without_a_configuration_makes_one() -> Outcome {
    for generation in Generation::ALL {
        if generation.binaries().is_none() {
            continue;
        }
        let node = Node::new(generation)?;
        fs::remove_file(node.config())?;
        let before = node.tree();
        node.must("install", &["--no-restart", "--no-proof"])?;
        let dump = node.dump()?;
        ensure!(
            dump.contains("runtimes.runc]") && dump.contains("runtimes.casemate]"),
            "{}: {dump}",
            generation.version()
        );
        node.must("uninstall", &["--no-restart"])?;
        same("after uninstall", &before, &node.tree())?;
    }
    Ok(())
}

fn install_offers_compat_only_when_asked() -> Outcome {
    for generation in [Generation::V1_6, Generation::V2_1] {
        let node = Node::running(generation)?;
        let before = node.tree();
        node.must("install", &[])?;
        let without = node.tree();
        let said = node.must("install", &["--compat"])?;
        ensure!(
            said.contains("proof: a container of class compat"),
            "{said}"
        );
        ensure!(
            node.dump()?.contains("runtimes.casemate-compat]"),
            "no handler casemate-compat"
        );
        // Who doesn't ask again takes it back, on disk and in containerd.
        let starts = node.starts();
        node.must("install", &[])?;
        ensure_eq!(node.starts(), starts + 1, "starts of containerd");
        ensure!(
            !node.dump()?.contains("compat"),
            "the handler casemate-compat is left"
        );
        let record = node.dir.join("var/lib/casemate/install/record.json");
        let (mut rest, mut expected) = (node.tree(), without);
        // It has digests of what was there in between.
        rest.remove(&record);
        expected.remove(&record);
        same("after --compat was taken back", &expected, &rest)?;
        node.must("install", &["--compat"])?;
        node.must("uninstall", &[])?;
        same("after uninstall", &before, &node.tree())?;
    }
    Ok(())
}

fn install_adopts_a_handler_made_by_hand() -> Outcome {
    let node = Node::new(Generation::V1_7)?;
    let shim = node
        .dir
        .join("opt/casemate/current/bin/containerd-shim-casemate-v2");
    let cri = "plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes";
    let by_hand = format!(
        "[{cri}.casemate]\nruntime_type = \"io.containerd.casemate.v2\"\nruntime_path = {:?}\n\
         pod_annotations = [\"casemate.io/*\"]\n",
        shim.display().to_string()
    );
    let text = fs::read_to_string(node.config())? + &by_hand;
    fs::write(node.config(), &text)?;
    let said = node.must("install", &["--no-restart", "--no-proof"])?;
    ensure!(said.contains("uninstall will leave it"), "install: {said}");
    node.must("uninstall", &["--no-restart"])?;
    ensure_eq!(
        fs::read_to_string(node.config())?,
        text,
        "the configuration"
    );

    // Another one of that name is nobody's to replace.
    let other = text.replace("io.containerd.casemate.v2", "io.containerd.kata.v2");
    fs::write(node.config(), &other)?;
    let before = node.tree();
    node.refuses(
        "install",
        &["--no-restart", "--no-proof"],
        &["a runtime \"casemate\" already", "--handler"],
    )?;
    same("after two named alike", &before, &node.tree())?;
    node.must(
        "install",
        &["--no-restart", "--no-proof", "--handler", "casemate-2"],
    )?;
    ensure!(
        node.dump()?.contains("runtimes.casemate-2]"),
        "no handler casemate-2"
    );
    node.must("uninstall", &["--no-restart"])?;
    same("after uninstall of the other", &before, &node.tree())
}

/// As from a container that has the node's root file system mounted: paths are the
/// node's, and so are the programs that are run.
fn install_in_the_nodes_root() -> Outcome {
    let node = Node::new(Generation::V2_3)?;
    let root = node.dir.join("host");
    for name in [
        "dev",
        "etc/containerd",
        "proc",
        "tmp",
        "usr/bin",
        "usr/local/bin",
    ] {
        fs::create_dir_all(root.join(name))?;
    }
    let containerd = Generation::V2_3
        .binaries()
        .unwrap_or_default()
        .join("containerd");
    fs::copy(containerd, root.join("usr/bin/containerd"))?;
    fs::write(root.join("dev/null"), "")?;
    let config = root.join("etc/containerd/config.toml");
    fs::write(&config, "version = 3\nimports = [\"conf.d/*.toml\"]\n")?;
    let casemate = |verb: &str, more: &[&str]| {
        let mut command = Command::new(world::binaries().join("casemate"));
        command.arg(verb).arg("--host-root").arg(&root).args(more);
        run(&mut command, &[], LIMIT)
    };
    let bare = casemate("install", &["--no-restart", "--no-proof"])?;
    ensure!(
        bare.code() == 1 && bare.err().contains("mounted /proc"),
        "a root without /proc: {}",
        bare.err()
    );
    let proc = root.join("proc");
    mount("proc", &proc, "proc", MountFlags::empty(), None)?;
    let installed = casemate("install", &["--no-restart", "--no-proof"]);
    let drop_in = fs::read_to_string(root.join("etc/containerd/conf.d/casemate.toml"));
    let shim = root.join("opt/casemate/current/bin/containerd-shim-casemate-v2");
    let has_shim = fs::read(&shim).is_ok_and(|bytes| !bytes.is_empty());
    let gone = casemate("uninstall", &["--no-restart"]);
    unmount(&proc, UnmountFlags::DETACH)?;
    installed?.ok()?;
    gone?.ok()?;
    let text = drop_in?;
    ensure!(
        text.contains("\"/opt/casemate/current/bin/containerd-shim-casemate-v2\""),
        "a path that isn't the node's: {text}"
    );
    ensure!(has_shim, "no {}", shim.display());
    ensure!(
        !root.join("opt").exists() && !root.join("var").exists(),
        "something is left"
    );
    Ok(())
}

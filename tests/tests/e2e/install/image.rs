//! The installer's image: the same bytes from the same programs, and it installs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use casemate_tests::generation::Generation;
use casemate_tests::image::installer;
use casemate_tests::run::run;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{World, ensure, ensure_eq, world};

use super::node::{Node, same};
use crate::trials;

const LIMIT: Duration = Duration::from_secs(60);

trials! {
    install_image_is_the_same_twice,
    install_image_installs,
    install_one_program_alone,
    install_one_program_that_is_damaged,
}

/// `testbed image`, as `make image` runs it.
fn make(from: &Path, to: &Path, epoch: Option<&str>) -> Result<String, Stop> {
    let mut command = Command::new(world::binaries().join("testbed"));
    command
        .arg("image")
        .arg("--from")
        .arg(from)
        .arg("--output")
        .arg(to);
    command.env_remove("SOURCE_DATE_EPOCH");
    command.envs(epoch.map(|epoch| ("SOURCE_DATE_EPOCH", epoch)));
    let said = run(&mut command, &[], LIMIT)?.ok()?.out();
    let digest = said.split_whitespace().last().unwrap_or_default();
    ensure!(digest.starts_with("sha256:"), "testbed image: {said}");
    Ok(digest.to_owned())
}

fn files(dir: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>, Stop> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            if path.is_dir() {
                left.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap_or(&path).to_owned();
                found.insert(name, fs::read(&path)?);
            }
        }
    }
    Ok(found)
}

/// What is in a layer.
fn listed(layer: &[u8]) -> Result<Vec<String>, Stop> {
    let mut tar = Command::new("tar");
    let said = run(tar.args(["-tzf", "-"]), layer, LIMIT)?.ok()?.out();
    Ok(said.lines().map(str::to_owned).collect())
}

fn install_image_is_the_same_twice() -> Outcome {
    let world = World::get()?;
    let dir = world.dir().join(world.id("image"));
    fs::create_dir_all(&dir)?;
    let at = |name: &str| dir.join(name);
    let first = make(&world::binaries(), &at("first"), None)?;
    // Other times, owners and modes, and another place; the same programs.
    let copies = at("copies");
    fs::create_dir_all(&copies)?;
    for program in installer::PROGRAMS.into_iter().rev() {
        let copy = copies.join(program);
        fs::copy(world::binaries().join(program), &copy)?;
        world::set_mode(&copy, 0o700)?;
        std::os::unix::fs::chown(&copy, Some(1234), Some(1234))?;
        let past = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        fs::File::open(&copy)?.set_modified(past)?;
    }
    let second = make(&copies, &at("second"), None)?;
    ensure_eq!(second, first, "digests of two builds");
    let (one, two) = (files(&at("first"))?, files(&at("second"))?);
    let layer = one.values().max_by_key(|bytes| bytes.len());
    let listed = listed(layer.map_or(&[][..], Vec::as_slice))?;
    ensure_eq!(listed, ["bin", "bin/casemate"], "files of the image");
    ensure!(
        one == two,
        "the layouts differ: {:?} {:?}",
        one.keys(),
        two.keys()
    );
    // Blobs have the names of what is in them, so the digest says everything.
    ensure_eq!(one.len(), 5, "files: {:?}", one.keys());

    // Again over the old one; another time is another image, and so is another program.
    ensure_eq!(make(&copies, &at("first"), None)?, first, "over an old one");
    let dated = make(&copies, &at("second"), Some("1700000000"))?;
    ensure!(dated != first, "SOURCE_DATE_EPOCH changes nothing");
    let mut agent = fs::read(copies.join("casemate-agent"))?;
    agent.push(0);
    fs::write(copies.join("casemate-agent"), agent)?;
    let changed = make(&copies, &at("second"), None)?;
    ensure!(changed != first, "another program changes nothing");
    fs::remove_dir_all(&dir)?;
    Ok(())
}

/// In a real containerd, by runc, with what the DaemonSet's container has.
fn install_image_installs() -> Outcome {
    let node = Node::running(Generation::V2_1)?;
    let before = node.tree();
    let layout = node.dir.join("image");
    make(&world::binaries(), &layout, None)?;
    let packed = node.dir.join("image.tar");
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&layout).arg("-cf").arg(&packed).arg(".");
    run(&mut tar, &[], LIMIT)?.ok()?;
    let shown = packed.display().to_string();
    node.ctr().run(&["image", "import", &shown], LIMIT)?.ok()?;

    let image = installer::name();
    let containerd = node.containerd().display().to_string();
    let at = |name: &str| node.dir.join(name).display().to_string();
    let paths = [
        ("--containerd", containerd),
        ("--config", node.config().display().to_string()),
        ("--address", at("run/containerd/containerd.sock")),
        ("--prefix", at("opt/casemate")),
        ("--state", at("var/lib/casemate/install")),
        ("--links", at("usr/local/bin")),
    ];
    let casemate = |verb: &str, more: &[&str]| -> Result<String, Stop> {
        let id = World::get()?.id("installer");
        let mut args = vec!["/bin/casemate", verb, "--host-root", "/host"];
        args.extend(paths.iter().flat_map(|(name, path)| [*name, path.as_str()]));
        args.extend(more);
        // hostPID: this machine's, which may be a container's.
        let pids = format!("pid:/proc/{}/ns/pid", std::process::id());
        let flags = [
            "--privileged",
            "--with-ns",
            &pids,
            "--mount",
            "type=bind,src=/,dst=/host,options=rbind:rslave",
        ];
        let ran =
            node.ctr()
                .run_task("io.containerd.runc.v2", &flags, &image, &id, &args, LIMIT)?;
        Ok(ran.ok()?.out())
    };
    let said = casemate("install", &["--dry-run"])?;
    ensure!(
        said.contains("would write") && said.contains("would run a container of each class"),
        "dry run: {said}"
    );
    same("after a dry run", &before, &node.tree())?;
    // All but the restart, which is the node's own script's to do.
    casemate("install", &["--no-restart", "--no-proof"])?;
    node.up()?;
    let said = casemate("install", &["--no-restart"])?;
    ensure!(
        said.contains("proof: a container of class strict ran"),
        "proof from the image: {said}"
    );
    // What the image has put there is what it was made of.
    let said = node.must("install", &[])?;
    ensure!(
        said.contains(": unchanged") && said.contains("restart: not needed"),
        "install by hand after that: {said}"
    );
    casemate("uninstall", &["--no-restart"])?;
    same("after uninstall", &before, &node.tree())
}

/// The node's command, by a casemate that carries the others and has nothing beside it.
fn alone(node: &Node, program: &[u8], verb: &str, more: &[&str]) -> Result<Command, Stop> {
    let dir = node.dir.join("alone");
    fs::create_dir_all(&dir)?;
    let path = dir.join("casemate");
    let bytes = dir.join("bytes");
    fs::write(&bytes, program)?;
    // By another process: a program that is open for writing in one that another trial has
    // just forked can't be run (execve(2), ETXTBSY).
    let mut copy = Command::new("cp");
    run(copy.arg(&bytes).arg(&path), &[], LIMIT)?.ok()?;
    world::set_mode(&path, 0o755)?;
    let mut command = Command::new(path);
    command.args(node.command(verb, more).get_args());
    Ok(command)
}

/// One file is a release: from it comes what comes from the three.
fn install_one_program_alone() -> Outcome {
    let node = Node::running(Generation::V2_1)?;
    let before = node.tree();
    let whole = installer::whole(&world::binaries())?;
    let mut install = alone(&node, &whole, "install", &[])?;
    let said = run(&mut install, &[], LIMIT)?.ok()?.out();
    ensure!(
        said.contains("proof: a container of class strict ran in its sandbox"),
        "install: {said}"
    );
    let installed = node.tree();
    for program in installer::PROGRAMS {
        let there = fs::read(node.dir.join("opt/casemate/current/bin").join(program))?;
        let built = fs::read(world::binaries().join(program))?;
        ensure!(there == built, "{program} isn't what was built");
    }
    // From three files: nothing to do. From what it has put there: neither.
    let again = node.must("install", &[])?;
    ensure!(
        again.contains(": unchanged") && again.contains("restart: not needed"),
        "install of the three: {again}"
    );
    let mut own = Command::new(node.dir.join("usr/local/bin/casemate"));
    own.args(node.command("install", &[]).get_args());
    let again = run(&mut own, &[], LIMIT)?.ok()?.out();
    ensure!(again.contains("restart: not needed"), "by itself: {again}");
    same("after all", &installed, &node.tree())?;
    let mut uninstall = alone(&node, &whole, "uninstall", &[])?;
    run(&mut uninstall, &[], LIMIT)?.ok()?;
    same("after uninstall", &before, &node.tree())
}

/// As by a download that was cut short, or changed on its way.
fn install_one_program_that_is_damaged() -> Outcome {
    let node = Node::new(Generation::V2_1)?;
    let before = node.tree();
    let whole = installer::whole(&world::binaries())?;
    let own = fs::read(world::binaries().join("casemate"))?;
    let mut changed = whole.clone();
    // In the shim that it carries.
    let byte = own.len() + 100_000;
    changed[byte] ^= 1;
    let cut = whole[..byte].to_vec();
    for (program, parts) in [
        (&changed, ["damaged", "get the release's file again"]),
        (&cut, ["casemate that carries the others", "--from"]),
    ] {
        let mut install = alone(&node, program, "install", &["--no-restart", "--no-proof"])?;
        let ran = run(&mut install, &[], LIMIT)?;
        let said = ran.err();
        ensure_eq!(ran.code(), 1, "status: {said}");
        ensure_eq!(said.lines().count(), 1, "lines: {said}");
        for part in parts {
            ensure!(said.contains(part), "no {part:?} in {said}");
        }
        same("after a damaged program", &before, &node.tree())?;
    }
    Ok(())
}

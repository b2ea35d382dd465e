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

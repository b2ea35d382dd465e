//! What a user of containerd sees: `ctr run`, `ctr task start`, and system calls
//! inside of a container.

use std::time::Duration;

use casemate_tests::World;
use casemate_tests::error::{Failure, Result};
use casemate_tests::image::{Image, catalog, layer};
use casemate_tests::run::until;

use super::clock;
use super::peer::{Peer, microbench};
use super::samples::{Samples, Unit};

/// The image: busybox, `probe` and `microbench`.
pub const IMAGE: &str = "casemate.test/bench:latest";
const LIMIT: Duration = Duration::from_secs(60);
/// What `microbench` measures.
const CALLS: [&str; 6] = [
    "getpid",
    "open+close",
    "stat",
    "pread",
    "fork+exec",
    "refused call",
];

/// Loads the image into the containerd of this runtime.
pub fn import(peer: &Peer) -> Result<()> {
    let mut top = layer::Layer::default();
    let path = microbench()?;
    let program = std::fs::read(&path).map_err(casemate_tests::error::file("read", &path))?;
    top.file("bin/microbench", layer::mode(0o755), &program)?;
    let image = Image {
        name: IMAGE.to_owned(),
        layers: vec![catalog::base_layer(None)?, top.finish()?],
        entrypoint: Vec::new(),
        cmd: vec!["/bin/sh".to_owned()],
    };
    peer.ctr().import(&image, World::get()?.dir())
}

/// `ctr …`; milliseconds and what it wrote.
fn ctr(peer: &Peer, args: &[&str]) -> Result<(f64, Vec<u8>)> {
    clock::run(peer.ctr().command(args), LIMIT)
}

/// `ctr run --rm IMAGE true`.
pub fn run(peer: &Peer, samples: &mut Samples) -> Result<()> {
    let id = World::get()?.id(peer.name);
    let args = [
        "run",
        "--rm",
        "--runtime",
        peer.runtime,
        IMAGE,
        &id,
        "/bin/true",
    ];
    let (took, _) = ctr(peer, &args)?;
    samples.add("ctr run --rm IMAGE true", Unit::Ms, peer.name, took);
    Ok(())
}

/// `ctr task start -d` of a container that exists.
pub fn start(peer: &Peer, samples: &mut Samples) -> Result<()> {
    let id = World::get()?.id(peer.name);
    let create = ["container", "create", "--runtime", peer.runtime, IMAGE, &id];
    let args = [&create[..], &["/bin/sleep", "3600"]].concat();
    ctr(peer, &args)?;
    clock::gap();
    let started = ctr(peer, &["task", "start", "-d", &id]);
    clock::gap();
    // Also after a failure: there may be half a task. A killed task takes a
    // moment to be gone, and `delete -f` of one that is going fails with runsc.
    let ended = ctr(peer, &["task", "kill", "-s", "SIGKILL", &id]).and_then(|_| {
        until("the task to be deleted", LIMIT, || {
            clock::gap();
            ctr(peer, &["task", "delete", &id]).is_ok()
        })
    });
    let removed = ctr(peer, &["container", "delete", &id]);
    let (took, _) = started?;
    ended?;
    removed?;
    samples.add(
        "ctr task start -d (create + start)",
        Unit::Ms,
        peer.name,
        took,
    );
    Ok(())
}

/// System calls inside of a container, under the default filter.
pub fn inside(peer: &Peer, samples: &mut Samples) -> Result<()> {
    let id = World::get()?.id(peer.name);
    let mut args = vec!["run", "--rm", "--runtime", peer.runtime];
    args.extend(peer.filter_flags());
    args.extend([IMAGE, &id, "/bin/microbench"]);
    let (_, output) = ctr(peer, &args)?;
    let text = String::from_utf8_lossy(&output).into_owned();
    // Containerd's client may warn on the same pipe.
    let figures = text
        .lines()
        .find_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .and_then(|value| value.as_object().cloned())
        .ok_or_else(|| Failure::Unexpected(format!("microbench wrote no JSON: {text:?}")))?;
    for name in CALLS {
        let value = figures.get(name).and_then(serde_json::Value::as_f64);
        let missing = || Failure::Unexpected(format!("microbench wrote no {name}: {text:?}"));
        let row = format!("inside: {name}");
        samples.add(&row, Unit::Ns, peer.name, value.ok_or_else(missing)?);
    }
    Ok(())
}

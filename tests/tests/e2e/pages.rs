//! What the documentation tells people to type does what it says.

use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use casemate_tests::image::catalog;
use casemate_tests::pages;
use casemate_tests::run::run;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::world::{NAMESPACE, binaries};
use casemate_tests::{World, ensure};
use libtest_mimic::Trial;

use crate::common::casemate_only;

/// The image that the pages name.
const IMAGE: &str = "docker.io/library/alpine:3";
const LIMIT: Duration = Duration::from_secs(60);

/// One for each page that has something to run.
pub fn trials() -> Vec<Trial> {
    let pages = pages::all().unwrap_or_default();
    let has_any = pages
        .into_iter()
        .filter(|(_, text)| !pages::blocks(text).is_empty());
    has_any
        .map(|(path, text)| {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let name = format!("pages_{}", stem.to_lowercase().replace('-', "_"));
            casemate_tests::skip::trial(&name, move || page(&text))
        })
        .collect()
}

fn page(text: &str) -> Outcome {
    casemate_only()?;
    let world = World::get()?;
    let daemon = world.daemon()?;
    let ctr = daemon.ctr(NAMESPACE);
    let mut image = catalog::base(None)?;
    image.name = IMAGE.to_owned();
    ctr.import(&image, world.dir())?;
    let scratch = tempfile::tempdir_in(world.dir())?;
    let mut path = binaries().as_os_str().as_bytes().to_vec();
    path.extend(b":");
    path.extend(world.path().as_bytes());
    for block in pages::blocks(text) {
        let mut shell = std::process::Command::new("bash");
        shell
            .args(["-euc", &block.script])
            .current_dir(scratch.path())
            .env("PATH", String::from_utf8_lossy(&path).as_ref())
            .env("CONTAINERD_ADDRESS", daemon.address())
            .env("CONTAINERD_NAMESPACE", NAMESPACE);
        let output = run(&mut shell, b"", LIMIT)?;
        let said = format!("{}\n{}", output.out(), output.err());
        ensure!(
            output.code() == 0,
            "the block at line {} ended with {}: {said}",
            block.line,
            output.code()
        );
        if let Some(line) = pages::missing(&block.output, &said) {
            return fail::<()>(format!(
                "the block at line {} doesn't say {line:?} where it should: {said}",
                block.line
            ));
        }
    }
    Ok::<(), Stop>(())
}

//! The same image, seen through runc and through the runtime under test.

use casemate_tests::image::{Image, catalog};
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{World, ensure, world};

use crate::common::LONG;
use crate::daemon::{hold, import};

crate::trials![
    sandbox_tree_of_many_layers,
    sandbox_tree_with_whiteouts,
    sandbox_tree_with_privileges,
];

/// The runtime that casemate is held against.
const STOCK: &str = "io.containerd.runc.v2";

fn tree(ctr: &casemate_tests::ctr::Ctr, runtime: &str, image: &str) -> Result<String, Stop> {
    let id = World::get()?.id("tree");
    let output = ctr
        .run_task(runtime, &[], image, &id, &["/bin/probe", "tree", "/"], LONG)?
        .ok()?;
    Ok(output.out())
}

fn compare(name: &str, make: impl FnOnce() -> casemate_tests::Result<Image>) -> Outcome {
    let _hold = hold()?;
    let ctr = import(name, make)?;
    let want = tree(&ctr, STOCK, name)?;
    let got = tree(&ctr, World::get()?.runtime(), name)?;
    ensure!(
        want.lines().count() > 100,
        "runc shows only {} files",
        want.lines().count()
    );
    let (left, right): (Vec<_>, Vec<_>) = (want.lines().collect(), got.lines().collect());
    let missing: Vec<_> = left
        .iter()
        .filter(|l| !right.contains(l))
        .take(10)
        .collect();
    let added: Vec<_> = right
        .iter()
        .filter(|l| !left.contains(l))
        .take(10)
        .collect();
    ensure!(
        missing.is_empty() && added.is_empty(),
        "only with runc:\n{missing:#?}\nonly here:\n{added:#?}"
    );
    Ok(())
}

fn sandbox_tree_of_many_layers() -> Outcome {
    let probe = world::probe()?;
    compare(catalog::MANY, || catalog::many_layers(&probe))
}

fn sandbox_tree_with_whiteouts() -> Outcome {
    let probe = world::probe()?;
    compare(catalog::WHITEOUTS, || catalog::whiteouts(&probe))
}

fn sandbox_tree_with_privileges() -> Outcome {
    let probe = world::probe()?;
    compare(catalog::PRIVILEGES, || catalog::privileges(&probe))
}

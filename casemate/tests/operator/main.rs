//! What the operator's command says of real pods, and of nodes in real trouble: needs
//! root, and the programs of one build.

mod collect;
mod commands;
mod common;
mod doctor;
mod inspect;
mod metrics;
mod walk;

use std::process::ExitCode;

use casemate_tests::World;
use casemate_tests::skip::{skipped, tell_unsteady};
use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads = args.test_threads.or(Some(2));
    let trials: Vec<Trial> = [
        doctor::trials(),
        inspect::trials(),
        metrics::trials(),
        collect::trials(),
        commands::trials(),
        walk::trials(),
    ]
    .into_iter()
    .flatten()
    .collect();
    if args.list {
        return libtest_mimic::run(&args, trials).exit_code();
    }
    let conclusion = libtest_mimic::run(&args, trials);
    for (name, reason) in skipped() {
        println!("{name}: skipped: {reason}");
    }
    tell_unsteady();
    let left = World::get().map(World::close).unwrap_or_default();
    for thing in &left {
        println!("left on the host: {thing}");
    }
    // None of these may be skipped in CI: it has root, and all programs.
    let lacks = std::env::var_os("CI").is_some() && !skipped().is_empty();
    if lacks || !left.is_empty() {
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

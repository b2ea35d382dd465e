//! `runtimeclass/` on a real Kubernetes API server: every manifest is accepted, every
//! policy lets in and refuses what it says, every example does as its first line says,
//! and `casemate install --node` labels its node and no other.
//!
//! `scripts/apiserver.sh` builds the server; without it the trials are skipped. What can
//! be said of manifests without one is in `tests/src/manifests.rs`.

mod examples;
mod labels;
mod manifests;
mod monitoring;
#[path = "../e2e/install/node.rs"]
mod node;
mod nodes;
mod policies;
mod server;

use std::process::ExitCode;

use casemate_tests::{World, skip};
use libtest_mimic::Arguments;

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads = args.test_threads.or(Some(2));
    let trials = [
        manifests::trials(),
        monitoring::trials(),
        policies::trials(),
        examples::trials(),
        nodes::trials(),
        labels::trials(),
    ];
    let done = libtest_mimic::run(&args, trials.into_iter().flatten().collect());
    server::close();
    let left = World::get().map(World::close).unwrap_or_default();
    if !left.is_empty() {
        println!("left on the host: {left:?}");
    }
    skip::tell_unsteady();
    let skipped = skip::skipped();
    for (name, reason) in &skipped {
        println!("skipped: {name}: {reason}");
    }
    let list = server::here().join("tests/allowed-skips.txt");
    let refused = match std::env::var_os("CI") {
        Some(_) => skip::not_allowed(&list),
        None => Vec::new(),
    };
    for name in &refused {
        println!("{name}: skipped, and tests/allowed-skips.txt doesn't name it");
    }
    let failed = done.num_failed + refused.len() as u64 + u64::from(!left.is_empty());
    println!(
        "{} passed, {failed} failed, {} skipped",
        done.num_passed,
        skipped.len()
    );
    ExitCode::from(u8::from(failed > 0))
}

/// Names trials after their functions.
#[macro_export]
macro_rules! kube_trials {
    ($($name:ident),+ $(,)?) => {
        pub fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$(casemate_tests::skip::trial(concat!("kube_", stringify!($name)), $name)),+]
        }
    };
}

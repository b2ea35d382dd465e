//! Whole clusters, for the length of the run: etcd, API server, controllers,
//! scheduler, and a real kubelet with a real containerd, on which the DaemonSet of
//! `runtimeclass/` installs casemate. Then what authors of pods and operators do, each
//! thing under runc, as a control, and under casemate.
//!
//! `scripts/apiserver.sh` builds the programs; without them the trials are skipped.

mod examples;
mod files;
mod installer;
mod kube;
mod kubeadm;
mod life;
mod machine;
mod node;
mod nodes;
mod registry;
mod resources;
mod security;
mod services;
mod streams;
mod upgrade;

use std::process::ExitCode;

use casemate_tests::skip;
use libtest_mimic::Arguments;

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads = args.test_threads.or(Some(3));
    if machine::wanted() {
        args.test_threads = Some(1);
        let run = libtest_mimic::run(&args, machine::trials());
        machine::close();
        kube::close();
        return told(&[run]);
    }
    let trials = [
        installer::trials(),
        files::trials(),
        life::trials(),
        security::trials(),
        streams::trials(),
        resources::trials(),
        examples::trials(),
    ];
    // What changes nodes comes when all others have ended, one after the other.
    let last = [nodes::trials(), upgrade::trials(), installer::last_trials()];
    let all_together = libtest_mimic::run(&args, trials.into_iter().flatten().collect());
    args.test_threads = Some(1);
    let one_by_one = libtest_mimic::run(&args, last.into_iter().flatten().collect());
    kube::close();
    // A cluster of its own.
    let runs = [
        all_together,
        one_by_one,
        libtest_mimic::run(&args, kubeadm::trials()),
    ];
    told(&runs)
}

/// Says what came of them.
fn told(runs: &[libtest_mimic::Conclusion]) -> ExitCode {
    skip::tell_unsteady();
    let skipped = skip::skipped();
    for (name, reason) in &skipped {
        println!("skipped: {name}: {reason}");
    }
    let sum = |of: fn(&libtest_mimic::Conclusion) -> u64| runs.iter().map(of).sum::<u64>();
    let (passed, failed) = (sum(|run| run.num_passed), sum(|run| run.num_failed));
    println!(
        "{passed} passed, {failed} failed, {} skipped",
        skipped.len()
    );
    ExitCode::from(u8::from(failed > 0))
}

/// Names trials after their functions.
#[macro_export]
macro_rules! cluster_trials {
    ($($name:ident),+ $(,)?) => {
        pub fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$(casemate_tests::skip::trial(concat!("cluster_", stringify!($name)), $name)),+]
        }
    };
}

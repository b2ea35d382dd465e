//! End-to-end tests on real containerd and on shims started by hand.
//!
//! Each test is named after its item of the conformance list (`c041_…`), those
//! of the sandbox itself `sandbox_…`. Run one: `make e2e T=c041`. The runtime is
//! `CASEMATE_TEST_RUNTIME`, casemate's own by default.

mod bad_input;
mod bootstrap;
mod bootstrap_shim;
mod broker;
mod calls;
mod common;
mod cri;
mod daemon;
mod death;
mod descriptors;
mod errors;
mod events;
mod exec;
mod exec_io;
mod exec_joins;
mod faults;
mod faults_crowd;
mod faults_daemon;
mod faults_wedge;
mod guard;
mod hooks;
mod hostile;
mod hostile_agent;
mod hostile_node;
mod hostile_races;
mod hostile_shape;
mod install;
mod items;
mod learn;
mod learn_bounds;
mod learn_hostile;
mod lifecycle;
mod limits;
mod locks;
mod locks_pod;
mod logfile;
mod loggers;
mod lsm;
mod marked;
mod nerdctl;
mod oci;
mod operator;
mod pages;
mod pause;
mod pods;
mod pods_life;
mod policy;
mod port_lock;
mod posture;
mod posture_changes;
mod posture_injected;
mod probes;
mod probes_outside;
mod probes_topics;
mod profiles;
mod profiles_least;
mod reach;
mod rpc;
mod rpc_abuse;
mod sandbox;
mod sandbox_api;
mod sandbox_api_containers;
mod siblings;
mod signals;
mod stdio;
mod systemd;
mod terminal;
mod trees;
mod update;
mod userns;
mod userns_rootfs;
mod volumes;
mod volumes_later;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;

use casemate_tests::conformance::{self, List};
use casemate_tests::{World, ensure, results, skip};
use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    // Two cores are the usual machine, but trials wait more than they compute.
    args.test_threads = args.test_threads.or(Some(4));
    let mut trials: Vec<Trial> = [
        bootstrap::trials(),
        bootstrap_shim::trials(),
        lifecycle::trials(),
        signals::trials(),
        siblings::trials(),
        exec::trials(),
        exec_io::trials(),
        exec_joins::trials(),
        terminal::trials(),
        pause::trials(),
        rpc::trials(),
        rpc_abuse::trials(),
        update::trials(),
        stdio::trials(),
        loggers::trials(),
        logfile::trials(),
        events::trials(),
        death::trials(),
        descriptors::trials(),
        daemon::trials(),
        nerdctl::trials(),
        oci::trials(),
        operator::trials(),
        pages::trials(),
        broker::trials(),
        learn::trials(),
        learn_bounds::trials(),
        learn_hostile::trials(),
        profiles::trials(),
        profiles_least::trials(),
        items::trials(),
        errors::trials(),
        sandbox::trials(),
        sandbox_api::trials(),
        sandbox_api_containers::trials(),
        trees::trials(),
        limits::trials(),
        locks::trials(),
        lsm::trials(),
        marked::trials(),
        locks_pod::trials(),
        guard::trials(),
        hooks::trials(),
        pods::trials(),
        pods_life::trials(),
        port_lock::trials(),
        posture::trials(),
        posture_changes::trials(),
        posture_injected::trials(),
        probes::trials(),
        reach::trials(),
        probes_outside::trials(),
        hostile::trials(),
        hostile_node::trials(),
        policy::trials(),
        hostile_agent::trials(),
        hostile_races::trials(),
        hostile_shape::trials(),
        bad_input::trials(),
        userns::trials(),
        userns_rootfs::trials(),
        cri::trials(),
        systemd::trials(),
        faults::trials(),
        volumes::trials(),
        volumes_later::trials(),
        faults_wedge::trials(),
        faults_crowd::trials(),
        faults_daemon::trials(),
        install::trials(),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mut last = probes::last_trials();
    last.extend(hostile_node::exclusive_trials());
    let names: Vec<String> = trials
        .iter()
        .chain(&last)
        .map(|trial| trial.name().to_owned())
        .collect();
    let known = names.clone();
    trials.push(skip::trial("probes_topics_are_whole", move || {
        probes_topics::are_whole(&known, &probes::ids()?)
    }));
    trials.push(skip::trial("conformance_list_is_whole", move || {
        let missing = List::read()?.uncovered(names.iter().map(String::as_str));
        ensure!(
            missing.is_empty(),
            "items with neither a trial nor a line in tests/conformance-gaps.txt: {missing:?}"
        );
        Ok(())
    }));
    let list = std::env::var_os("CASEMATE_TEST_LIST");
    let listed = list.is_some();
    if let Some(list) = list {
        let kept = match chosen(Path::new(&list), trials.iter().chain(&last)) {
            Ok(kept) => kept,
            Err(why) => {
                println!("{}: {why}", Path::new(&list).display());
                return close(0, 1, 0, false);
            }
        };
        trials.retain(|trial| kept.contains(trial.name()));
        last.retain(|trial| kept.contains(trial.name()));
    }
    if args.list {
        let all = trials.into_iter().chain(last);
        return libtest_mimic::run(&args, all.collect()).exit_code();
    }
    if !rustix::process::geteuid().is_root() {
        for trial in &trials {
            println!("{}: skipped: needs root", trial.name());
        }
        return close(0, 0, trials.len() as u64, std::env::var_os("CI").is_some());
    }
    let null_before = common::null_mode();
    let conclusion = libtest_mimic::run(&args, trials);
    let mut failed = conclusion.num_failed;
    let mut passed = conclusion.num_passed;
    // What changes the whole node for a moment comes last, alone.
    let last = libtest_mimic::run(&args, last);
    failed += last.num_failed;
    passed += last.num_passed;
    // The host after the whole run is a test of its own.
    let mut left = World::get().map(World::close).unwrap_or_default();
    if common::null_mode() != null_before {
        left.push(format!(
            "/dev/null has mode {:o}, had {null_before:o}",
            common::null_mode()
        ));
    }
    if left.is_empty() {
        passed += 1;
    } else {
        failed += 1;
        println!("left on the host after the run:\n  {}", left.join("\n  "));
    }
    for (name, reason) in skip::skipped() {
        println!("{name}: skipped: {reason}");
    }
    skip::tell_unsteady();
    println!("{}", longest());
    if !listed && World::get().is_ok_and(World::is_casemate) {
        // Elsewhere than in the source tree there is no place for them.
        let whole = args.filter.is_none() && args.skip.is_empty();
        if let Err(error) = results::write(&conformance::results(), whole) {
            println!("results are not kept: {error}");
        }
    }
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("allowed-skips.txt");
    let unlisted = skip::not_allowed(&list);
    let in_ci = std::env::var_os("CI").is_some();
    if in_ci && !unlisted.is_empty() {
        println!(
            "skipped but not in tests/allowed-skips.txt: {}",
            unlisted.join(" ")
        );
    }
    close(
        passed,
        failed,
        conclusion.num_ignored + last.num_ignored,
        in_ci && !unlisted.is_empty(),
    )
}

/// The names that a list has, one a line, the rest of the line being a reason.
fn chosen<'a>(
    list: &Path,
    trials: impl Iterator<Item = &'a Trial>,
) -> Result<BTreeSet<String>, String> {
    let text = std::fs::read_to_string(list).map_err(|e| e.to_string())?;
    let known: BTreeSet<&str> = trials.map(Trial::name).collect();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_whitespace().next())
        .map(|name| match known.contains(name) {
            true => Ok(name.to_owned()),
            false => Err(format!("no trial {name}")),
        })
        .collect()
}

/// The trials that took longest, for whoever wants the run to be shorter.
fn longest() -> String {
    let all = results::longest();
    let told: Vec<String> = all
        .iter()
        .take(40)
        .map(|(name, took)| format!("{name} {}.{} s", took / 1000, took % 1000 / 100))
        .collect();
    format!("longest: {}", told.join(", "))
}

/// Prints the closing line and turns it into an exit code.
fn close(passed: u64, failed: u64, skipped: u64, too_many_skips: bool) -> ExitCode {
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    ExitCode::from(u8::from(failed > 0 || too_many_skips))
}

//! `casemate`: the operator's command. `casemate run` is the first look: one
//! process in the sandbox that pods get, with no containerd at all. The rest
//! looks after living pods.

mod bench;
mod bundle;
mod carried;
mod clock;
mod collect;
mod doctor;
mod elsewhere;
mod error;
mod events;
mod help;
mod inspect;
mod install;
mod metrics;
mod network;
mod operator;
mod out;
#[cfg(test)]
mod pages;
mod paint;
mod posture;
mod profile;
mod progress;
mod ps;
mod release;
mod report;
mod rootfs;
mod run;
mod shim;
mod stdio;
mod terminal;
mod why;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};

/// Exit status of our own failures, as with other container tools; everything
/// else is the workload's.
const OWN_FAILURE: i32 = 125;

/// The casemate sandbox on this node: looking after pods, and running one command
#[derive(Debug, Parser)]
#[command(version, after_help = OVERVIEW)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one command in a sandbox, without containerd
    #[command(after_help = EXAMPLES)]
    Run(Run),
    /// Look for what keeps this node from running pods
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::Doctor),
    /// List living pods and their containers
    #[command(after_help = ps::EXAMPLES)]
    Ps(ps::Ps),
    /// Tell all that is known of a living pod, and where each setting is from
    #[command(after_help = inspect::EXAMPLES)]
    Inspect(inspect::Inspect),
    /// Tell which calls of a pod were refused, why, and what would allow them
    #[command(after_help = why::EXAMPLES)]
    Why(why::Why),
    /// Print what happened in pods: refused calls, execs, refusals, losses
    #[command(after_help = events::EXAMPLES)]
    Events(events::Events),
    /// Compare a living pod with what was promised of it
    #[command(after_help = posture::EXAMPLES)]
    Posture(posture::Posture),
    /// Make profiles of what pods were seen to do, and compare them
    #[command(after_help = profile::EXAMPLES)]
    Profile(profile::Profile),
    /// Set up the programs and containerd on this node, and see that it works
    #[command(after_help = install::INSTALL_EXAMPLES)]
    Install(Box<install::Install>),
    /// Take away what install has set up
    #[command(after_help = install::UNINSTALL_EXAMPLES)]
    Uninstall(Box<install::Uninstall>),
    /// What the proof of an installation runs inside of a sandbox
    #[command(hide = true)]
    InsideProof {
        /// Be there to be looked at, until killed
        #[arg(long)]
        wait: bool,
    },
    /// Write a casemate that carries the programs beside this one, for a release
    #[command(hide = true)]
    Carry(release::Carry),
    /// Names of living pods, for shells to complete
    #[command(hide = true)]
    PodNames,
    /// Print what a pod's network guard has let through and refused
    #[command(after_help = network::EXAMPLES)]
    Network(network::Network),
    /// Print numbers of living pods for Prometheus
    #[command(after_help = metrics::EXAMPLES)]
    Metrics(metrics::Metrics),
    /// Gather what a bug report needs, without what workloads were given
    #[command(after_help = collect::EXAMPLES)]
    Collect(collect::Collect),
    /// Write a page about this node: pods, their locks, what was refused
    #[command(after_help = report::EXAMPLES)]
    Report(report::Report),
    /// Measure what a container costs here, beside runc
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::Bench),
    /// Print a script that completes commands in a shell
    #[command(after_help = help::COMPLETION)]
    Completion(help::Completion),
    /// Write manual pages
    #[command(after_help = help::MAN)]
    Man(help::Man),
}

const OVERVIEW: &str = "\
Examples:
  casemate doctor               can this node run pods?
  casemate ps                   which pods are there?
  casemate why POD              what was refused, and what would allow it?
  casemate inspect POD          what holds it, and where is that from?
  casemate COMMAND --help       more of each

Exit status: 0, or what the command's help says; 125 if casemate itself failed, a wrong
command line among that. Colours are for terminals; NO_COLOR turns them off.";

const EXAMPLES: &str = "\
Examples:
  casemate run -- id                          in a read-only root made of busybox
  casemate run -t -- sh                       a shell in it, with a terminal
  casemate run -- cat /proc/self/status       what holds the process, as it sees it
  echo hello | casemate run -- wc -c          streams are passed through
  casemate run --rootfs /srv/debian -- ls /   another root, read-only
  casemate run --rootfs DIR --writable -- sh -c 'echo x > /file'

The exit status is the command's, or 128 + signal; 127 if there is no such command
in the root, 126 if it can't be executed, 125 if casemate itself failed. Needs root.
The node's /etc/casemate/config.toml applies.";

/// What to run, and in what.
#[derive(Debug, Args)]
pub struct Run {
    /// Root file system; without it one is made of the host's static busybox
    #[arg(long, value_name = "DIR")]
    rootfs: Option<PathBuf>,
    /// Let the command write to the root file system
    #[arg(long)]
    writable: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    terminal: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<String>,
}

fn main() {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        // Help and version come this way too; a closed stream can't be told.
        let _lost = error.print();
        std::process::exit(if error.use_stderr() { OWN_FAILURE } else { 0 });
    });
    // What came of it, and the exit status of a failure.
    let (result, failure) = match cli.command {
        Command::Run(options) => (run::run(&options), OWN_FAILURE),
        Command::Ps(options) => (ps::run(&options), OWN_FAILURE),
        Command::Inspect(options) => (inspect::run(&options), OWN_FAILURE),
        Command::Events(options) => (events::run(&options), OWN_FAILURE),
        Command::Metrics(options) => (metrics::run(&options), OWN_FAILURE),
        Command::Collect(options) => (collect::run(&options), OWN_FAILURE),
        Command::Completion(options) => (help::completion(&options, &Cli::command()), OWN_FAILURE),
        Command::Man(options) => (help::man(&options, &Cli::command()), OWN_FAILURE),
        Command::Report(options) => (report::run(&options), OWN_FAILURE),
        Command::Bench(options) => (bench::run(&options), OWN_FAILURE),
        Command::Network(options) => (network::run(&options), OWN_FAILURE),
        Command::Posture(options) => (posture::run(&options), OWN_FAILURE),
        Command::Profile(options) => (profile::run(&options), OWN_FAILURE),
        Command::Why(options) => (why::run(&options), OWN_FAILURE),
        Command::Install(options) => (install::install(&options), 1),
        Command::Uninstall(options) => (install::uninstall(&options), 1),
        Command::PodNames => (help::pod_names(), OWN_FAILURE),
        Command::InsideProof { wait } => (Ok(install::inside(wait)), OWN_FAILURE),
        Command::Carry(options) => (release::carry(&options), OWN_FAILURE),
        Command::Doctor(options) => (doctor::run(&options), OWN_FAILURE),
    };
    // Not by returning: a thread may still be reading our standard input.
    std::process::exit(match result {
        Ok(status) => status,
        Err(error) => {
            let _lost = writeln!(std::io::stderr(), "casemate: {error}");
            error.status().unwrap_or(failure)
        }
    });
}

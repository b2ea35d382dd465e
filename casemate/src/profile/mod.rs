//! `casemate profile`: profiles of the node, made of what pods were seen to do.

mod compare;
mod export;
mod source;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use casemate_spec::config::{Config, DEFAULT_PATH, Problem};
use clap::{Args, Subcommand};
use seccomp_profiles::node::{self, NodeError};

use crate::error::RunError;
use crate::out;

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate profile export web-0                    a living pod that is learned from
  casemate profile export web-0 -o web.toml        into a file
  casemate profile export --container app --name shop /var/lib/casemate/learned
                                                   all recordings in a directory
  casemate profile check shop /var/lib/casemate/learned
                                                   would it refuse what was recorded?
  casemate profile diff default shop               what differs
  casemate profile list                            what this node has

How to learn from a pod and then hold it to that: docs/learning.md. Exit status: 0;
of diff and check 1 where there is something to tell; 125 if casemate itself failed.";

/// What to do with profiles.
#[derive(Debug, Args)]
pub struct Profile {
    #[command(subcommand)]
    command: Command,
    /// The node's configuration, which says where its profiles are
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH, global = true)]
    config: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write the least profile with which all that was recorded runs
    #[command(after_help = export::EXAMPLES)]
    Export(export::Export),
    /// Tell which calls two profiles answer differently
    #[command(after_help = compare::DIFF_EXAMPLES)]
    Diff(compare::Diff),
    /// Tell what of recordings a profile would have refused
    #[command(after_help = compare::CHECK_EXAMPLES)]
    Check(compare::Check),
    /// List the profiles that pods can ask for, and what is wrong with them
    List(compare::List),
    /// Print a profile
    Show(compare::Show),
}

/// Does it.
pub fn run(options: &Profile) -> Result<i32, RunError> {
    let directory = || directory(&options.config);
    match &options.command {
        Command::Export(options) => export::run(options),
        Command::Diff(options) => compare::diff(options, &directory),
        Command::Check(options) => compare::check(options, &directory),
        Command::List(options) => compare::list(options, &directory()?),
        Command::Show(options) => compare::show(options, &directory),
    }
}

/// Where the node has its profiles.
fn directory(config: &Path) -> Result<PathBuf, RunError> {
    let config = Config::read(config).map_err(|e| RunError::Refused(e.to_string()))?;
    Ok(config.profiles.directory)
}

fn print(text: &str) -> Result<(), RunError> {
    out::say(text)
}

/// Something that whoever reads the result should know.
fn warn(text: &str) {
    let _lost = writeln!(std::io::stderr(), "casemate: {text}");
}

/// What is wrong with the node's profiles, where its configuration can be read.
pub fn problems(config: &Path) -> Vec<Problem> {
    let Ok(directory) = directory(config) else {
        return Vec::new();
    };
    let problem = |file: PathBuf, error: NodeError| {
        let said = error.to_string();
        let start = format!("{}: ", file.display());
        let said = said.strip_prefix(&start).unwrap_or(&said);
        let (reason, way_out) = said.rsplit_once("; ").unwrap_or((said, "correct it"));
        Problem {
            file,
            line: None,
            key: String::new(),
            value: String::new(),
            reason: reason.to_owned(),
            way_out: format!("To mend it: {way_out}."),
        }
    };
    let names = match node::names(&directory) {
        Ok(names) => names,
        Err(error) => return vec![problem(directory, error)],
    };
    let read = names.into_iter().filter_map(|name| {
        let error = node::read(&directory, &name).err()?;
        Some(problem(directory.join(format!("{name}.toml")), error))
    });
    read.collect()
}

//! Completions for shells, and manual pages: both made of the command line as it
//! is.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use clap::{Args, Command};
use clap_complete::Shell;

use crate::error::{RunError, Step};

/// Help text.
pub const COMPLETION: &str = "\
Examples:
  casemate completion bash > /usr/share/bash-completion/completions/casemate
  casemate completion zsh > /usr/share/zsh/vendor-completions/_casemate
  casemate completion fish > /usr/share/fish/vendor_completions.d/casemate.fish

Exit status: 0, or 125 if casemate itself failed.";

/// Help text.
pub const MAN: &str = "\
Examples:
  casemate man /usr/local/share/man/man1     one page for each command
  casemate man /tmp/m && man -l /tmp/m/casemate-doctor.1

Exit status: 0, or 125 if casemate itself failed.";

/// For which shell.
#[derive(Debug, Args)]
pub struct Completion {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Where to.
#[derive(Debug, Args)]
pub struct Man {
    /// Directory of the pages; made if it isn't there
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Prints a script.
pub fn completion(options: &Completion, mut command: Command) -> Result<i32, RunError> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut command, "casemate", &mut script);
    std::io::stdout()
        .write_all(&script)
        .step("write to", "standard output")?;
    Ok(0)
}

/// Writes the pages.
pub fn man(options: &Man, command: Command) -> Result<i32, RunError> {
    let shown = options.directory.display();
    fs::create_dir_all(&options.directory).step("make", shown)?;
    clap_mangen::generate_to(command, &options.directory)
        .step("write manual pages to", options.directory.display())?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn every_command_has_examples_and_tells_its_exit_status() {
        for command in crate::Cli::command().get_subcommands() {
            if command.is_hide_set() || command.has_subcommands() {
                continue;
            }
            let name = command.get_name();
            let more = command.get_after_help().map(ToString::to_string);
            let more = more.unwrap_or_default();
            let spaced = more.replace('\n', " ");
            assert!(more.starts_with("Examples:"), "{name}: {more}");
            assert!(spaced.contains("xit status"), "{name}: {more}");
            assert!(command.get_about().is_some(), "{name}");
        }
        crate::Cli::command().debug_assert();
    }
}

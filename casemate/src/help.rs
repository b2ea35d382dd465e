//! Completions for shells, and manual pages: both made of the command line as it
//! is.

use std::fs;
use std::path::PathBuf;

use clap::{Args, Command};
use clap_complete::Shell;

use crate::error::{RunError, Step};
use crate::operator::{self, Pod};
use crate::out;

/// Help text.
pub const COMPLETION: &str = "\
Examples:
  casemate completion bash > /usr/share/bash-completion/completions/casemate
  casemate completion zsh > /usr/share/zsh/vendor-completions/_casemate
  casemate completion fish > /usr/share/fish/vendor_completions.d/casemate.fish
  source <(casemate completion bash)      in this shell alone

Pods are completed, too, in a shell of root's: nobody else may list them. Exit status: 0, or 125 if casemate itself failed.";

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

/// Commands whose argument is a pod.
const OF_PODS: &str = "inspect why events posture network";

/// Living pods instead of files, where a command takes a pod. The words are expanded by
/// the shell: `pod_names` gives none in which there would be something to expand.
const BASH: &str = r#"
_casemate_with_pods() {
    _casemate "$@"
    case ${COMP_WORDS[1]} in
        PODS) ;;
        profile) [[ ${COMP_WORDS[2]} == export ]] || return 0 ;;
        *) return 0 ;;
    esac
    local cur=${COMP_WORDS[COMP_CWORD]}
    [[ $cur == -* || $COMP_CWORD -lt 2 ]] && return 0
    [[ ${COMP_WORDS[1]} == profile && ( $COMP_CWORD -lt 3 || $cur == */* ) ]] && return 0
    COMPREPLY=($(compgen -W "$(casemate pod-names 2>/dev/null)" -- "$cur"))
}
complete -F _casemate_with_pods -o nosort -o bashdefault -o default casemate
"#;
const ZSH: &str = r#"
(( $+functions[_casemate_pods] )) || _casemate_pods() {
    local -a pods
    pods=(${(f)"$(casemate pod-names 2>/dev/null)"})
    compadd -a pods
}
"#;

/// Prints a script.
pub fn completion(options: &Completion, command: &Command) -> Result<i32, RunError> {
    out::say(script(options.shell, command))?;
    Ok(0)
}

fn script(shell: Shell, command: &Command) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shown(command), "casemate", &mut script);
    let mut script = String::from_utf8_lossy(&script).into_owned();
    match shell {
        Shell::Bash => script += &BASH.replace("PODS", &OF_PODS.replace(' ', "|")),
        Shell::Zsh => {
            script = script
                .lines()
                .map(|line| match line.contains("pod -- ") {
                    true => line.replace(":_default'", ":_casemate_pods'") + "\n",
                    false => format!("{line}\n"),
                })
                .collect();
            // Before what is run when the file is loaded.
            script = script.replacen('\n', &format!("\n{ZSH}"), 1);
        }
        Shell::Fish => {
            for command in OF_PODS.split(' ') {
                script += &format!(
                    "complete -c casemate -n \"__fish_casemate_using_subcommand {command}\" -f -a \
                     \"(casemate pod-names 2>/dev/null)\"\n"
                );
            }
        }
        _ => {}
    }
    script
}

/// What is listed of the command line: nothing that is hidden, and no `help` beside
/// each command's `--help`.
fn shown(command: &Command) -> Command {
    let all = command.get_subcommands().filter(|one| !one.is_hide_set());
    let mut shown = Command::new("casemate")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true);
    if let Some(about) = command.get_about() {
        shown = shown.about(about.clone());
    }
    if let Some(more) = command.get_after_help() {
        shown = shown.after_help(more.clone());
    }
    shown
        .args(command.get_arguments().cloned())
        .subcommands(all.map(|one| one.clone().disable_help_subcommand(true)))
}

/// Prints what shells complete: of each pod Kubernetes' name, or its id.
pub fn pod_names() -> Result<i32, RunError> {
    let pods = operator::pods()?;
    let lines: String = pods.iter().filter_map(completed).collect();
    out::say(lines)?;
    Ok(0)
}

/// A line, of letters alone that mean nothing to a shell.
fn completed(pod: &Pod) -> Option<String> {
    let is_plain = |text: &String| {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b"._-/".contains(&b);
        !text.is_empty() && !text.starts_with('-') && text.bytes().all(fine)
    };
    [pod.name(), pod.id.clone()]
        .into_iter()
        .find(is_plain)
        .map(|name| name + "\n")
}

/// Writes the pages.
pub fn man(options: &Man, command: &Command) -> Result<i32, RunError> {
    let directory = options.directory.display();
    fs::create_dir_all(&options.directory).step("make", directory)?;
    clap_mangen::generate_to(shown(command), &options.directory)
        .step("write manual pages to", options.directory.display())?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn a_name_that_a_shell_would_obey_is_not_completed() {
        let of = |name: &str| {
            let mut pod = Pod::of_test(name);
            "3f2a".clone_into(&mut pod.id);
            completed(&pod)
        };
        assert_eq!(of("web-0").as_deref(), Some("web-0/web-0\n"));
        for hostile in ["$(reboot)", "`id`", "a b", "a\nb", "-x", "a;b"] {
            assert_eq!(of(hostile).as_deref(), Some("3f2a\n"), "{hostile:?}");
        }
        assert_eq!(completed(&Pod::of_test("$(x)")), None);
    }

    #[test]
    fn what_is_hidden_is_not_completed_and_has_no_page() {
        let command = crate::Cli::command();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell, &command);
            for hidden in ["inside-proof", "inside__subcmd__proof"] {
                assert!(!script.contains(hidden), "{hidden} in {shell}");
            }
        }
        let listed: Vec<_> = shown(&command).get_subcommands().cloned().collect();
        assert!(listed.iter().all(|one| one.get_name() != "help"));
    }

    #[test]
    fn pods_are_completed_where_a_command_takes_one() {
        let command = crate::Cli::command();
        for name in OF_PODS.split(' ') {
            let one = command.find_subcommand(name);
            let takes = |one: &Command| one.get_arguments().any(|arg| arg.get_id() == "pod");
            assert!(one.is_some_and(takes), "{name}");
        }
        let zsh = script(Shell::Zsh, &command);
        assert_eq!(zsh.matches(":_casemate_pods'").count(), 5, "{zsh}");
    }

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

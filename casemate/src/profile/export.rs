//! `casemate profile export`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use seccomp_profiles::node::{self, WORKLOADS};
use seccomp_profiles::recording::Container;
use seccomp_profiles::surface::{Abi, reachable};
use seccomp_profiles::{
    Form, Hash, Profile, Program, Recording, export, minimal, shipped, shipped_program,
    shipped_program_as,
};

use super::{print, source, warn};
use crate::error::RunError;
use crate::install::files;

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate profile export web-0                        a living pod that is learned from
  casemate profile export web-0 -o /etc/casemate/profiles/web.toml
  casemate profile export --container app a.json b.json
  casemate profile export --format oci web-0           linux.seccomp, as runc reads it
  casemate profile export --format resource --namespace shop web-0
                                                       for the security-profiles-operator

A source with a / in it or .json at its end is a file or a directory of recordings,
any other the id or name of a living pod. Several become one. What is missing in a
recording is told on standard error.";

/// In which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A profile of the node
    Toml,
    /// `linux.seccomp` of OCI's config.json
    Oci,
    /// A SeccompProfile of Kubernetes' security-profiles-operator
    Resource,
}

/// Of what, and how.
#[derive(Debug, Args)]
pub struct Export {
    /// Pods, or files or directories of recordings
    #[arg(required = true, value_name = "POD|PATH")]
    sources: Vec<String>,
    /// Of which container, where there are several
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
    /// What to call the profile; else as the container
    #[arg(long)]
    name: Option<String>,
    /// The form
    #[arg(long, value_enum, default_value_t = Format::Toml)]
    format: Format,
    /// Of the resource
    #[arg(long)]
    namespace: Option<String>,
    /// Write to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Makes the profile and writes it.
pub fn run(options: &Export) -> Result<i32, RunError> {
    let mut all = Vec::new();
    for source in &options.sources {
        all.extend(source::recordings(source)?);
    }
    let (container, seen, recording) = source::container(all, options.container.as_deref())?;
    let name = options.name.as_deref().unwrap_or(&container);
    if !node::is_name(name) || WORKLOADS.contains(&name) {
        return Err(RunError::Refused(format!(
            "name a profile {name:?}: it takes a-z, 0-9 and -, at most 63, and no shipped \
             profile's name; use --name"
        )));
    }
    let base = &seen.base.name;
    let Some(base) = WORKLOADS
        .contains(&base.as_str())
        .then(|| shipped(base))
        .flatten()
    else {
        return Err(RunError::Refused(format!(
            "make a profile of what ran under {base}: that is no shipped profile; record under {}",
            WORKLOADS.join(", ")
        )));
    };
    told(&container, &seen, &base);
    let mut calls = seen.observed();
    if options.format != Format::Toml {
        for kind in export::runtimes().kinds() {
            calls.add(kind.number, &kind.args);
        }
        if base.name == "strict" {
            warn("strict refuses what runc's own init calls (fstatfs): record under default");
        }
    }
    let profile = minimal(name, &calls, &base);
    let text = match options.format {
        Format::Toml => {
            let path = options.output.as_deref().unwrap_or(Path::new(name));
            let checked = node::check(&profile, name, path);
            checked.map_err(|e| RunError::Refused(e.to_string()))?;
            format!(
                "{}{}",
                head(&container, &seen, &recording, &profile),
                export::toml(&profile)
            )
        }
        Format::Oci => json(&export::oci(&profile).map_err(refused)?)?,
        Format::Resource => {
            let namespace = options.namespace.as_deref();
            json(&export::resource(&profile, name, namespace).map_err(refused)?)?
        }
    };
    match &options.output {
        None => print(&text)?,
        Some(path) => files::write(path, text.as_bytes(), files::Owner::OURS)?,
    }
    Ok(0)
}

fn refused(error: export::ExportError) -> RunError {
    RunError::Refused(error.to_string())
}

fn json(what: &impl serde::Serialize) -> Result<String, RunError> {
    serde_json::to_string_pretty(what)
        .map(|text| text + "\n")
        .map_err(|e| RunError::Refused(format!("write JSON: {e}")))
}

/// Says what a reader of the profile should know of the recording.
fn told(name: &str, seen: &Container, base: &Profile) {
    let current = shipped_program_as(&base.name, Form::Enforce).map(|p| Hash::of(p).to_string());
    if current.as_deref() != Some(&seen.base.hash) {
        warn(&format!(
            "container {name} was recorded under {} of another release; it is cut down to this \
             one's",
            seen.base
        ));
    }
    let lost = seen.lost();
    if lost.calls > 0 {
        warn(&format!(
            "container {name}: {} kinds of calls had no room in the recording, and are missing",
            lost.calls
        ));
    }
    if seen.calls().next().is_none() {
        warn(&format!(
            "container {name}: no call was recorded; the profile is the least there is"
        ));
    }
}

/// x86-64 numbers that the agent's filter and this one leave in reach.
pub fn in_reach(profile: &Profile) -> Option<usize> {
    let agent = Program::from_bytes(shipped_program("agent")?)?;
    let own = seccomp_profiles::compile(profile).ok()?;
    Some(reachable(&[&agent, &own], Abi::X86_64).len())
}

/// What is known beside the calls, as comments.
fn head(name: &str, seen: &Container, recording: &Recording, profile: &Profile) -> String {
    let mut text = String::new();
    let mut line = |said: String| {
        let _infallible = writeln!(text, "# {said}");
    };
    let pods = recording.pods().count();
    let ids = seen.ids().count();
    line(format!(
        "What container {name} did, in {pods} pod{}, {ids} container{}, under {}.",
        if pods == 1 { "" } else { "s" },
        if ids == 1 { "" } else { "s" },
        seen.base,
    ));
    if let Some(count) = in_reach(profile) {
        line(format!("{count} system calls of x86-64 are in reach."));
    }
    let list = |ports: &std::collections::BTreeSet<u16>, of: &str| {
        let entries: Vec<String> = ports.iter().map(|port| format!("{of}:{port}")).collect();
        entries.join(",")
    };
    let (bound, connected) = (seen.ports_bound(), seen.ports_connected());
    if !bound.is_empty() {
        line(
            "It bound ports; narrow the addresses, and drop ports that it chose by chance:".into(),
        );
        line(format!(
            "  casemate.io/ingress: \"{}\"",
            list(bound, "0.0.0.0/0")
        ));
    }
    if !connected.is_empty() {
        line("It connected or sent to ports; narrow the addresses:".into());
        line(format!(
            "  casemate.io/egress: \"{}\"",
            list(connected, "0.0.0.0/0")
        ));
    }
    let directories: Vec<&str> = seen.directories().iter().map(String::as_str).collect();
    if !directories.is_empty() {
        line(format!("It named paths in: {}", directories.join(" ")));
    }
    let lost = seen.lost();
    if !lost.is_nothing() {
        line(format!(
            "Not in the recording: {} kinds of calls, {} ports, {} directories, {} unread.",
            lost.calls, lost.ports, lost.directories, lost.unread
        ));
    }
    text.push('\n');
    text
}

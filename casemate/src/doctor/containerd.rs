//! containerd, and the programs that it starts.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::check::{Verdict, bad};
use super::node::Node;
use crate::install::{Effective, Facts, bounded};
use crate::release::{self, SHIM};
use Verdict::{Good, Skipped};

/// For a program that prints its version.
const SOON: Duration = Duration::from_secs(5);
/// The prefix of annotations that are ours.
const ANNOTATIONS: &str = "casemate.io/*";
const INSTALL: &str = "casemate install";

pub fn release(node: &Node) -> Verdict {
    match &node.containerd {
        Ok(facts) => Good(format!(
            "{} at {}",
            facts.release.text,
            facts.program.display()
        )),
        Err(error) => bad(
            error.to_string(),
            "apt-get install containerd, or name it with --containerd",
        ),
    }
}

/// What the configuration comes to.
fn effective(node: &Node) -> Result<(&Facts, &Effective), Verdict> {
    let facts = node
        .containerd
        .as_ref()
        .map_err(|_| Skipped("no containerd".to_owned()))?;
    let effective = facts.effective.as_ref().map_err(|error| {
        bad(
            error.to_string(),
            format!("mend {}", facts.config.display()),
        )
    })?;
    Ok((facts, effective))
}

pub fn handler(node: &Node) -> Verdict {
    let (facts, effective) = match effective(node) {
        Ok(both) => both,
        Err(verdict) => return verdict,
    };
    if let Some(plugin) = effective.without_cri() {
        return Skipped(format!(
            "{} turns CRI off (disabled_plugins has {plugin}): there is no Kubernetes to serve",
            facts.config.display()
        ));
    }
    let name = &node.handler;
    let Some(handler) = effective.handler(name) else {
        return bad(
            format!("no handler {name} in {}", facts.config.display()),
            INSTALL,
        );
    };
    let ours = handler.kind == "io.containerd.casemate.v2"
        || Path::new(&handler.path).file_name() == Some(SHIM.as_ref());
    if !ours {
        return bad(
            format!(
                "handler {name} is {} {}: somebody else's",
                handler.kind, handler.path
            ),
            "choose another name: casemate install --handler NAME",
        );
    }
    if effective.has_options(name) {
        return bad(
            format!("handler {name} has an options table, which is for runc"),
            format!("remove it from {}", facts.config.display()),
        );
    }
    Good(format!("{name}: {} {}", handler.kind, handler.path))
}

pub fn annotations(node: &Node) -> Verdict {
    let handler = effective(node)
        .ok()
        .and_then(|(_, e)| e.handler(&node.handler));
    match handler {
        None => Skipped("no handler".to_owned()),
        Some(h) if h.annotations.iter().any(|a| a == ANNOTATIONS || a == "*") => {
            Good(h.annotations.join(", "))
        }
        Some(h) => bad(
            format!("pod_annotations = {:?}", h.annotations),
            format!("{INSTALL}, or pod_annotations = [\"{ANNOTATIONS}\"] in the handler's table"),
        ),
    }
}

pub fn running(node: &Node) -> Verdict {
    let Ok(facts) = &node.containerd else {
        return Skipped("no containerd".to_owned());
    };
    // A socket that nobody listens at refuses; one whose backlog is full waits.
    let address = facts.address.clone();
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _nobody = send.send(UnixStream::connect(address).map(drop));
    });
    let shown = facts.address.display();
    match receive.recv_timeout(SOON) {
        Ok(Ok(())) => Good(shown.to_string()),
        Ok(Err(error)) => bad(format!("{shown}: {error}"), "systemctl start containerd"),
        Err(_) => bad(
            format!("{shown}: no answer within {} s", SOON.as_secs()),
            "systemctl restart containerd",
        ),
    }
}

/// The shim that containerd would start.
pub fn shim(node: &Node) -> Option<PathBuf> {
    let configured = effective(node)
        .ok()
        .and_then(|(_, e)| e.handler(&node.handler))
        .map(|h| PathBuf::from(h.path))
        .filter(|path| !path.as_os_str().is_empty());
    if let Some(path) = configured {
        return path.exists().then_some(path);
    }
    // By name: in containerd's PATH, which is not to be seen from here.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let beside = std::env::current_exe().ok();
    std::env::split_paths(&path)
        .chain(["/usr/local/bin", "/usr/bin", "/opt/casemate/current/bin"].map(PathBuf::from))
        .chain(beside.and_then(|own| Some(own.parent()?.to_owned())))
        .map(|dir| dir.join(SHIM))
        .find(|path| path.is_file())
}

/// What a program says of its version: its own name, and then that.
fn version(program: &Path, flag: &str) -> Result<String, String> {
    let shown = program.display();
    let said =
        bounded(Command::new(program).arg(flag), SOON).map_err(|e| format!("{shown}: {e}"))?;
    let word = said.out.split_whitespace().nth(1).map(str::to_owned);
    word.filter(|word| said.success && word.starts_with(|c: char| c.is_ascii_digit()))
        .ok_or_else(|| format!("{shown} {flag}: {}", said.tail()))
}

/// Both, with their versions.
pub fn versions(node: &Node) -> Result<[(PathBuf, String); 2], String> {
    let shim = shim(node).ok_or_else(|| match release::carries() {
        true => format!("no {SHIM} where containerd looks; this casemate carries it"),
        false => format!("no {SHIM} where containerd looks"),
    })?;
    // The agent is looked for beside the program itself, whatever led there.
    let real = std::fs::canonicalize(&shim).map_err(|e| format!("{}: {e}", shim.display()))?;
    let agent = node.config.sandbox.agent_path(&real);
    let both = (version(&shim, "-v")?, version(&agent, "--version")?);
    Ok([(shim, both.0), (agent, both.1)])
}

pub fn programs(node: &Node) -> Verdict {
    let [(shim, one), (agent, two)] = match versions(node) {
        Ok(both) => both,
        Err(error) => return bad(error, INSTALL),
    };
    let own = env!("CARGO_PKG_VERSION");
    let found = format!("{} {one}, {} {two}", shim.display(), agent.display());
    if one != two {
        return bad(found, format!("{INSTALL}: it brings both of one release"));
    }
    match one == own {
        true => Good(found),
        false => bad(
            format!("{found}; this casemate is {own}"),
            format!("{INSTALL}, from the release that is to be used"),
        ),
    }
}

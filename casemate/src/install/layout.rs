//! Where everything is on this node, and whether it is the right node.

use std::fs;
use std::path::{Path, PathBuf};

use casemate_spec::Class;

use super::Node;
use super::binaries;
use crate::error::{RunError, Step};

/// The node's paths, as seen from here.
#[derive(Debug)]
pub struct Layout {
    /// Directory of the versions of the programs, and of `current`.
    pub prefix: PathBuf,
    /// Directory of journal, record, backups and lock.
    pub state: PathBuf,
    /// Directory of links, in containerd's PATH.
    pub links: PathBuf,
    /// containerd's program.
    pub containerd: PathBuf,
    /// containerd's configuration, or what it is generated from.
    pub config: ConfigFile,
    /// containerd's socket.
    pub address: PathBuf,
    /// systemd's unit.
    pub unit: String,
    /// The machine's id (machine-id(5)).
    pub machine: PathBuf,
    /// The runtime handler's name; those of classes begin with it.
    pub handler: String,
}

/// The file that an operator may change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigFile {
    /// containerd reads it.
    Plain(PathBuf),
    /// k3s and rke2 make containerd's own from it at each start; the directory.
    Template(PathBuf),
}

/// A Kubernetes distribution that brings its own containerd.
struct Distribution {
    /// Its directory.
    data: &'static str,
    /// containerd below it.
    program: &'static str,
    /// Its units, server and agent.
    units: [&'static str; 2],
}

const DISTRIBUTIONS: [Distribution; 2] = [
    Distribution {
        data: "/var/lib/rancher/k3s",
        program: "data/current/bin/containerd",
        units: ["k3s", "k3s-agent"],
    },
    Distribution {
        data: "/var/lib/rancher/rke2",
        program: "bin/containerd",
        units: ["rke2-server", "rke2-agent"],
    },
];
/// Of both.
const DISTRIBUTION_SOCKET: &str = "/run/k3s/containerd/containerd.sock";
const DISTRIBUTION_CONFIG: &str = "agent/etc/containerd";

impl Layout {
    /// For these options. With `--host-root` the process is in there afterwards.
    pub fn new(node: &Node) -> Result<Self, RunError> {
        if !rustix::process::geteuid().is_root() {
            return Err(RunError::Refused(
                "check: needs root, as it writes to system directories: use sudo".to_owned(),
            ));
        }
        let name = &node.handler;
        if name.is_empty()
            || !name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        {
            return Err(RunError::Refused(format!(
                "check --handler {name:?}: a name has small letters, digits and dashes"
            )));
        }
        if let Some(root) = &node.host_root {
            enter(root)?;
        }
        let root = match &node.root {
            Some(root) => fs::canonicalize(root).step("check --root", root.display())?,
            None => PathBuf::from("/"),
        };
        let below = |path: &str| root.join(path.trim_start_matches('/'));
        identity(node.machine_id.as_deref(), &below("/etc/machine-id"))?;
        let or = |given: &Option<PathBuf>, path: &str| match given {
            Some(path) => std::path::absolute(path).step("check", path.display()),
            None => Ok(below(path)),
        };
        let found = match node.config {
            Some(_) => None,
            None => DISTRIBUTIONS
                .iter()
                .find(|d| below(d.data).join(DISTRIBUTION_CONFIG).is_dir()),
        };
        let (config, address, unit, program) = match found {
            Some(d) => (
                ConfigFile::Template(below(d.data).join(DISTRIBUTION_CONFIG)),
                DISTRIBUTION_SOCKET,
                d.units
                    .into_iter()
                    .find(|unit| has_unit(&root, unit))
                    .unwrap_or(d.units[0]),
                Some(below(d.data).join(d.program)),
            ),
            None => (
                ConfigFile::Plain(or(&node.config, "/etc/containerd/config.toml")?),
                "/run/containerd/containerd.sock",
                "containerd",
                None,
            ),
        };
        Ok(Self {
            prefix: or(&node.prefix, "/opt/casemate")?,
            state: or(&node.state, "/var/lib/casemate/install")?,
            links: or(&node.links, "/usr/local/bin")?,
            containerd: match (&node.containerd, program) {
                (Some(given), _) => given.clone(),
                (None, Some(own)) => own,
                (None, None) => in_path("containerd").ok_or_else(|| {
                    RunError::Refused(
                        "check containerd: no such program in PATH; name it with --containerd"
                            .to_owned(),
                    )
                })?,
            },
            config,
            address: or(&node.address, address)?,
            unit: unit.to_owned(),
            machine: below("/etc/machine-id"),
            handler: node.handler.clone(),
        })
    }

    /// The link to the newest version.
    pub fn current(&self) -> PathBuf {
        self.prefix.join("current")
    }

    /// What containerd is told to run for pods of that class.
    pub fn shim(&self, class: Class) -> PathBuf {
        binaries::shim(&self.current(), class)
    }

    /// The name of a class's handler.
    pub fn handler(&self, class: Class) -> String {
        format!("{}{}", self.handler, class.suffix())
    }

    /// The names of all handlers that there can be.
    pub fn handlers(&self) -> [String; 3] {
        Class::ALL.map(|class| self.handler(class))
    }
}

/// From here on every path is the node's, also to the programs that are run.
fn enter(root: &Path) -> Result<(), RunError> {
    if !root.join("etc").is_dir() || !root.join("proc/self/status").exists() {
        return Err(RunError::Refused(format!(
            "check --host-root {}: no root file system with /etc and a mounted /proc; mount the \
             node's / there, recursively",
            root.display()
        )));
    }
    rustix::process::chroot(root).step("enter --host-root", root.display())?;
    rustix::process::chdir("/").step("enter --host-root", root.display())
}

fn identity(wanted: Option<&str>, path: &Path) -> Result<(), RunError> {
    let Some(wanted) = wanted else { return Ok(()) };
    let found = fs::read_to_string(path).step("check --machine-id: read", path.display())?;
    if found.trim() == wanted.trim() {
        return Ok(());
    }
    Err(RunError::Refused(format!(
        "check --machine-id {}: this machine is {}: nothing is done to the wrong node",
        wanted.trim(),
        found.trim()
    )))
}

fn has_unit(root: &Path, unit: &str) -> bool {
    [
        "etc/systemd/system",
        "usr/local/lib/systemd/system",
        "usr/lib/systemd/system",
    ]
    .iter()
    .any(|dir| root.join(dir).join(format!("{unit}.service")).exists())
}

fn in_path(program: &str) -> Option<PathBuf> {
    // A daemon's PATH has the system directories, ours may not.
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/bin", "/usr/bin", "/usr/local/sbin", "/usr/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

//! What is known of a node before it is judged.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use casemate_netguard::{GuardError, Rules};
use casemate_spec::Config;
use casemate_spec::config::{DEFAULT_PATH, Diagnosis, diagnose};
use casemate_sys::namespace::kind;

use super::attempt::{Sandbox, attempt, sandbox};
use crate::error::RunError;
use crate::install::{Facts, Places, facts};

/// As containerd's shims have it.
const CONFIG_VARIABLE: &str = "CASEMATE_CONFIG";

/// Where the configuration is.
pub fn config_path() -> PathBuf {
    std::env::var_os(CONFIG_VARIABLE).map_or_else(|| PathBuf::from(DEFAULT_PATH), PathBuf::from)
}

/// A node.
pub struct Node {
    /// Where its configuration is.
    pub path: PathBuf,
    /// What is wrong with that.
    pub diagnosis: Diagnosis,
    /// It, or the defaults where it is none.
    pub config: Config,
    /// A user namespace like a pod's.
    pub sandbox: Result<Sandbox, String>,
    /// What came of a guard in a network namespace of its own.
    pub guard: Result<(), String>,
    /// Its containerd.
    pub containerd: Result<Facts, RunError>,
    /// The handler that is looked for.
    pub handler: String,
}

impl Node {
    /// Looks at this one. The caller must have one thread.
    pub fn look(places: Places, handler: &str) -> Self {
        let path = config_path();
        let mut diagnosis = diagnose(&path);
        diagnosis.problems.extend(crate::profile::problems(&path));
        let config = Config::read(&path).unwrap_or_default();
        // Children first: what follows has threads.
        let sandbox = sandbox(config.ids.base);
        let guard = attempt(kind::NET, || guard().map_err(|e| e.to_string()));
        Self {
            diagnosis,
            sandbox,
            guard,
            containerd: facts(places, handler),
            handler: handler.to_owned(),
            path,
            config,
        }
    }

    /// The user namespace, if there is one.
    pub fn userns(&self) -> Option<&OwnedFd> {
        self.sandbox.as_ref().ok().map(|sandbox| &sandbox.userns)
    }

    /// containerd's directory for what stays.
    pub fn containerd_root(&self) -> PathBuf {
        let effective = self.containerd.as_ref().ok().map(|f| &f.effective);
        let root = effective.and_then(|e| e.as_ref().ok()?.root().map(PathBuf::from));
        root.unwrap_or_else(|| PathBuf::from("/var/lib/containerd"))
    }
}

/// As one with lists is.
fn guard() -> Result<(), GuardError> {
    casemate_netguard::install(&Rules {
        denied: Vec::new(),
        egress: Some(Vec::new()),
        ingress: Some(Vec::new()),
    })
    .map(drop)
}

/// The path, or what there is above it.
pub fn nearest(path: &Path) -> &Path {
    let existing = path.ancestors().find(|path| path.exists());
    existing.unwrap_or(Path::new("/"))
}

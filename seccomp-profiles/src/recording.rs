//! What pods did while they were learned from, as a file: JSON of [`VERSION`].
//!
//! A recording comes from inside of pods, and lies where others may write, so it is
//! read as hostile input: bounded, and each value checked. All that it can do is to
//! name calls, of which a profile of it then allows those that its base allows, too.

mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::observed::{Kind, Observed};
use crate::table;

/// Of the form that is written and read. In 1 calls were missing that every profile had
/// then, as the forker needed them.
pub const VERSION: u32 = 2;
/// No file is longer.
pub const LONGEST: usize = 4 << 20;
/// Longest text in it, in bytes.
const TEXT: usize = 256;
/// Longest name of a directory, in bytes.
const DIRECTORY: usize = 64;

/// A recording that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// It can't be read.
    #[error("read recording {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What it says is no recording.
    #[error("read recording {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Not JSON, or a field missing, unknown or of the wrong type.
    #[error("not a recording: {reason}")]
    Syntax {
        /// What the parser found, on one line.
        reason: String,
    },
    /// Too long.
    #[error("longer than {LONGEST} bytes; a recording never is: give the file of a pod")]
    TooLong,
    /// Of another form.
    #[error(
        "version is {version}, this binary reads {VERSION}; use the casemate that wrote it, or record anew"
    )]
    Version {
        /// As found.
        version: u32,
    },
    /// A value that a recording never has.
    #[error("{field}: {reason}; record anew")]
    Value {
        /// Where.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Two that can't become one.
    #[error(
        "container {container} was recorded under {first}, and under {second}; use recordings of one of them"
    )]
    Bases {
        /// Its name.
        container: String,
        /// One profile, with its hash.
        first: Base,
        /// The other one.
        second: Base,
    },
}

/// The profile under which something was recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its name.
    pub name: String,
    /// [`crate::Hash`] of the filter, in hexadecimal digits.
    pub hash: String,
}

impl std::fmt::Display for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let start = self.hash.get(..12).unwrap_or(&self.hash);
        write!(f, "{} ({start})", self.name)
    }
}

/// Of which pod a recording is.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pod {
    /// Its sandbox's id.
    pub id: String,
    /// As Kubernetes has it; empty without.
    pub namespace: String,
    /// As Kubernetes has it; empty without.
    pub name: String,
    /// As Kubernetes has it; empty without.
    pub uid: String,
}

/// What there was no room for, or what couldn't be read, by number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lost {
    /// Kinds of calls.
    pub calls: u64,
    /// Ports.
    pub ports: u64,
    /// Directories.
    pub directories: u64,
    /// Addresses and paths that the caller's memory didn't give.
    pub unread: u64,
}

impl Lost {
    fn add(&mut self, other: &Self) {
        self.calls = self.calls.saturating_add(other.calls);
        self.ports = self.ports.saturating_add(other.ports);
        self.directories = self.directories.saturating_add(other.directories);
        self.unread = self.unread.saturating_add(other.unread);
    }

    /// Whether something is missing that a profile should have.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// What one container did, all its restarts together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Under which profile it ran.
    pub base: Base,
    ids: BTreeSet<String>,
    calls: BTreeMap<Kind, u64>,
    bound: BTreeSet<u16>,
    connected: BTreeSet<u16>,
    directories: BTreeSet<String>,
    lost: Lost,
}

impl Container {
    /// Ids that are kept.
    pub const IDS: usize = 64;
    /// Kinds of calls that are kept.
    pub const KINDS: usize = 4096;
    /// Ports that are kept, each way.
    pub const PORTS: usize = 256;
    /// Directories that are kept.
    pub const DIRECTORIES: usize = 64;

    /// One that did nothing yet.
    #[must_use]
    pub fn new(id: &str, base: Base) -> Self {
        Self {
            base,
            ids: BTreeSet::from([id.to_owned()]),
            calls: BTreeMap::new(),
            bound: BTreeSet::new(),
            connected: BTreeSet::new(),
            directories: BTreeSet::new(),
            lost: Lost::default(),
        }
    }

    /// A call through the x86-64 ABI that ran `count` times; whether it is of a new
    /// kind. Numbers without a name are not kept: no profile can allow them.
    pub fn call(&mut self, number: u32, args: &[u64; 6], count: u64) -> bool {
        if table::name(number).is_none() {
            return false;
        }
        let kind = Kind::of(number, args);
        if let Some(known) = self.calls.get_mut(&kind) {
            *known = known.saturating_add(count);
            return false;
        }
        let args = [u64::MAX; 6];
        let alike = self
            .calls
            .range(Kind::first(number)..=Kind { number, args });
        if self.calls.len() >= Self::KINDS || alike.count() >= Observed::KINDS {
            self.lost.calls = self.lost.calls.saturating_add(1);
            return false;
        }
        self.calls.insert(kind, count);
        true
    }

    /// A port that it bound; whether it is new. 0, "any", is not kept.
    pub fn bound(&mut self, port: u16) -> bool {
        keep_port(&mut self.bound, port, &mut self.lost)
    }

    /// A port of others that it connected or sent to; whether it is new.
    pub fn connected(&mut self, port: u16) -> bool {
        keep_port(&mut self.connected, port, &mut self.lost)
    }

    /// An absolute path that it named, of which the first directory is kept; whether
    /// it is new. What can't be shown is not kept.
    pub fn path(&mut self, path: &str) -> bool {
        let Some(rest) = path.strip_prefix('/') else {
            return false;
        };
        let first = rest.trim_start_matches('/').split('/').next();
        let directory = format!("/{}", first.unwrap_or_default());
        if self.directories.contains(&directory) {
            return false;
        }
        if !is_directory(&directory) || self.directories.len() >= Self::DIRECTORIES {
            self.lost.directories = self.lost.directories.saturating_add(1);
            return false;
        }
        self.directories.insert(directory)
    }

    /// What was lost on the way here.
    pub fn lose(&mut self, lost: &Lost) {
        self.lost.add(lost);
    }

    /// Ids that it had.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.ids.iter().map(String::as_str)
    }

    /// Kinds of calls, with how often they ran.
    pub fn calls(&self) -> impl Iterator<Item = (&Kind, u64)> {
        self.calls.iter().map(|(kind, count)| (kind, *count))
    }

    /// The kinds of calls alone.
    #[must_use]
    pub fn observed(&self) -> Observed {
        let mut observed = Observed::default();
        for kind in self.calls.keys() {
            observed.add(kind.number, &kind.args);
        }
        observed
    }

    /// Families of the sockets that it made.
    #[must_use]
    pub fn families(&self) -> BTreeSet<u64> {
        let socket = table::number("socket");
        let sockets = self.calls.keys().filter(|k| Some(k.number) == socket);
        sockets.map(|kind| kind.args[0]).collect()
    }

    /// Ports that it bound.
    #[must_use]
    pub fn ports_bound(&self) -> &BTreeSet<u16> {
        &self.bound
    }

    /// Ports of others that it connected or sent to.
    #[must_use]
    pub fn ports_connected(&self) -> &BTreeSet<u16> {
        &self.connected
    }

    /// First directories of the absolute paths that it named.
    #[must_use]
    pub fn directories(&self) -> &BTreeSet<String> {
        &self.directories
    }

    /// What is not in here.
    #[must_use]
    pub fn lost(&self) -> &Lost {
        &self.lost
    }

    /// Takes in what another one of the same name did. Both have the same base.
    fn join(&mut self, other: Self) {
        for id in other.ids {
            if self.ids.len() < Self::IDS {
                self.ids.insert(id);
            }
        }
        for (kind, count) in other.calls {
            self.call(kind.number, &kind.args, count);
        }
        for port in other.bound {
            self.bound(port);
        }
        for port in other.connected {
            self.connected(port);
        }
        for directory in other.directories {
            self.path(&directory);
        }
        self.lost.add(&other.lost);
    }
}

fn keep_port(ports: &mut BTreeSet<u16>, port: u16, lost: &mut Lost) -> bool {
    if port == 0 || ports.contains(&port) {
        return false;
    }
    if ports.len() >= Container::PORTS {
        lost.ports = lost.ports.saturating_add(1);
        return false;
    }
    ports.insert(port)
}

/// `/`, or `/` and a name that can be shown.
fn is_directory(text: &str) -> bool {
    text.strip_prefix('/')
        .is_some_and(|name| is_text(name) && name.len() <= DIRECTORY && !name.contains('/'))
}

/// Printable, whatever shows it: also without what turns text around.
fn is_text(text: &str) -> bool {
    let hidden = |c: char| matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    text.len() <= TEXT && !text.chars().any(|c| c.is_control() || hidden(c))
}

/// What one pod did, or several of a kind, by container's name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recording {
    pods: BTreeSet<Pod>,
    containers: BTreeMap<String, Container>,
}

impl Recording {
    /// Pods that are named.
    pub const PODS: usize = 256;
    /// Containers that are kept.
    pub const CONTAINERS: usize = 64;

    /// Of a pod in which nothing ran yet.
    #[must_use]
    pub fn new(pod: Pod) -> Self {
        Self {
            pods: BTreeSet::from([pod]),
            containers: BTreeMap::new(),
        }
    }

    /// Says that it is of this pod, too.
    pub fn name_pod(&mut self, pod: Pod) {
        if self.pods.len() < Self::PODS {
            self.pods.insert(pod);
        }
    }

    /// Of which pods it is; of more than [`Recording::PODS`] only those.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.iter()
    }

    /// All containers, by name.
    pub fn containers(&self) -> impl Iterator<Item = (&str, &Container)> {
        self.containers
            .iter()
            .map(|(name, one)| (name.as_str(), one))
    }

    /// One of them.
    #[must_use]
    pub fn container(&self, name: &str) -> Option<&Container> {
        self.containers.get(name)
    }

    /// Takes in what a container called `name` did; whether there was room for it.
    ///
    /// # Errors
    /// [`RecordingError::Bases`]: one of its name ran under another profile.
    pub fn add(&mut self, name: &str, container: Container) -> Result<bool, RecordingError> {
        let full = self.containers.len() >= Self::CONTAINERS;
        match self.containers.get_mut(name) {
            Some(known) if known.base == container.base => known.join(container),
            Some(known) => {
                return Err(RecordingError::Bases {
                    container: name.to_owned(),
                    first: known.base.clone(),
                    second: container.base,
                });
            }
            None if full => return Ok(false),
            None => {
                self.containers.insert(name.to_owned(), container);
            }
        }
        Ok(true)
    }

    /// Takes in another one: containers of a name become one. What is beyond the
    /// bounds is left out.
    ///
    /// # Errors
    /// As [`Recording::add`].
    pub fn merge(&mut self, other: Self) -> Result<(), RecordingError> {
        for pod in other.pods {
            self.name_pod(pod);
        }
        for (name, container) in other.containers {
            self.add(&name, container)?;
        }
        Ok(())
    }
}

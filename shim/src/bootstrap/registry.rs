//! Living pods, for who looks after the node: one file for each, made by its
//! shim. An entry counts while the process that it names lives.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::proc;

/// Where the entries are.
pub const DIRECTORY: &str = "/run/casemate/pods";
/// An entry is smaller than this, in bytes.
const LARGEST: u64 = 16 * 1024;
/// The longest readable part of a file's name.
const NAME_MAX: usize = 100;

/// One pod. Fields are only added, with defaults: another release's `casemate`
/// reads them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pod {
    /// containerd namespace.
    pub namespace: String,
    /// Pod id: CRI's sandbox id, or that of the only container.
    pub pod: String,
    /// Kubernetes' names of it, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Kubernetes>,
    /// Bundle directory.
    pub bundle: PathBuf,
    /// The shim's pid.
    pub shim: u32,
    /// Field 22 of its `/proc/PID/stat`: with the pid, an identity.
    pub start_time: u64,
    /// Where the shim listens.
    pub socket: PathBuf,
    /// Since when, RFC 3339.
    pub since: String,
}

/// What Kubernetes calls a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Kubernetes {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
}

/// The entry's path for a pod whose shim listens at `socket`: the pod's id for
/// people, and what tells pods of one id apart.
pub fn path(pod: &str, socket: &Path) -> PathBuf {
    let readable: String = pod
        .chars()
        .map(|c| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '-' => c,
            _ => '_',
        })
        .take(NAME_MAX)
        .collect();
    let hash = socket.file_name().unwrap_or_default().to_string_lossy();
    let hash: String = hash.chars().take(16).collect();
    Path::new(DIRECTORY).join(format!("{readable}.{hash}.json"))
}

impl Pod {
    /// Writes the entry, which replaces one that a dead shim has left.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(dir) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        // One write: a reader sees all of it, or what isn't an entry yet.
        let bytes = serde_json::to_vec(self)?;
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(path)?
            .write_all(&bytes)
    }

    /// Reads an entry.
    pub fn read(path: &Path) -> io::Result<Pod> {
        if fs::symlink_metadata(path)?.len() > LARGEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    fn is_alive(&self) -> bool {
        proc::start_time(self.shim) == Some(self.start_time)
    }
}

/// Removes the entry at `path` of the shim `pid` that began at `start_time`, and
/// no other's.
pub fn remove(path: &Path, pid: u32, start_time: u64) -> io::Result<()> {
    match Pod::read(path) {
        Ok(entry) if (entry.shim, entry.start_time) != (pid, start_time) && entry.is_alive() => {
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => fs::remove_file(path),
    }
}

/// Removes the entries in `directory` whose shims are dead.
pub fn sweep(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let path = entry?.path();
        // One that can't be read is being written, or nobody's of ours.
        if Pod::read(&path).is_ok_and(|pod| !pod.is_alive()) {
            // Another sweep may have been faster.
            let _gone = fs::remove_file(&path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(shim: u32, start_time: u64) -> Pod {
        Pod {
            namespace: "ns".into(),
            pod: "a/b".into(),
            shim,
            start_time,
            ..Pod::default()
        }
    }

    #[test]
    fn a_name_is_readable_and_no_path() {
        let path = path("../é/x", Path::new("/run/s/0123456789abcdef0123"));
        assert_eq!(
            path,
            Path::new(DIRECTORY).join("_____x.0123456789abcdef.json")
        );
    }

    #[test]
    fn an_entry_goes_with_its_shim_and_another_shims_stays() {
        let dir = std::env::temp_dir().join(format!("casemate-pods-{}", std::process::id()));
        let path = dir.join("x.json");
        let me = std::process::id();
        let begun = proc::start_time(me).unwrap();
        entry(me, begun).write(&path).unwrap();
        assert_eq!(Pod::read(&path).unwrap(), entry(me, begun));
        sweep(&dir).unwrap();
        remove(&path, me, begun + 1).unwrap();
        assert!(path.exists(), "the entry of a living shim went");
        remove(&path, me, begun).unwrap();
        assert!(!path.exists());
        remove(&path, me, begun).unwrap();
        entry(me, begun + 1).write(&path).unwrap();
        sweep(&dir).unwrap();
        assert!(!path.exists(), "an entry of a dead shim stays");
        fs::remove_dir_all(dir).unwrap();
    }
}

//! The programs of one release: where they are to be had from.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use tempfile::TempDir;

use crate::carried;
use crate::error::{RunError, Step};
use crate::install::files::{digest, program};

/// What containerd starts.
pub const SHIM: &str = "containerd-shim-casemate-v2";
/// What the shim starts, which it looks for beside itself.
pub const AGENT: &str = "casemate-agent";
/// The operator's command.
pub const OWN: &str = "casemate";
/// What a `casemate` can carry.
pub const CARRIED: [&str; 2] = [SHIM, AGENT];
/// All of a release.
pub const PROGRAMS: [&str; 3] = [SHIM, AGENT, OWN];

/// Where a casemate puts what it carries while it runs that without having been
/// installed. Not below /run or /tmp, which some nodes mount noexec.
const UNPACKED: &str = "/var/lib";

/// A program's name and bytes.
type Named = (&'static str, Vec<u8>);

/// The programs of one build, read.
pub struct Release {
    /// In the order of [`PROGRAMS`], with their names.
    pub programs: Vec<Named>,
    /// Version and digest, which make a name.
    pub name: String,
}

impl Release {
    /// Those in `from`, or those that this program carries, or those beside it.
    ///
    /// # Errors
    /// There is none, one can't be read, or what is carried is damaged.
    pub fn find(from: Option<&Path>) -> Result<Self, RunError> {
        let own = own()?;
        let programs = match from {
            Some(dir) => read(dir)?,
            None => match carried(&own)? {
                Some(programs) => programs,
                None => read(own.parent().unwrap_or(Path::new("/")))?,
            },
        };
        let digests: String = programs.iter().map(|(_, bytes)| digest(bytes)).collect();
        let digest = digest(digests.as_bytes());
        let short = digest.get(..12).unwrap_or(&digest);
        Ok(Self {
            programs,
            name: format!("{}-{short}", env!("CARGO_PKG_VERSION")),
        })
    }
}

/// This program's file. Its link, not its name in `argv`: that may be anything.
pub fn own() -> Result<PathBuf, RunError> {
    std::env::current_exe().step("find", "this program")
}

/// A shim to run, with its agent beside it.
pub struct Runnable {
    /// Its file.
    pub shim: PathBuf,
    /// Where both were unpacked; goes with this.
    _unpacked: Option<TempDir>,
}

/// The shim beside this program, the one that it carries, or the one in `$PATH`.
///
/// # Errors
/// There is none, or what is carried is damaged or can't be written.
pub fn runnable() -> Result<Runnable, RunError> {
    let own = own()?;
    let there = |shim| Runnable {
        shim,
        _unpacked: None,
    };
    let beside = own.parent().unwrap_or(Path::new("/")).join(SHIM);
    if beside.is_file() {
        return Ok(there(beside));
    }
    if let Some(programs) = carried(&own)? {
        return unpack(&programs, Path::new(UNPACKED));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(SHIM))
        .find(|candidate| candidate.is_file())
        .map(there)
        .ok_or_else(|| {
            RunError::Refused(format!(
                "find {SHIM}: neither beside {}, nor carried by it, nor in $PATH; install it there",
                own.display()
            ))
        })
}

/// Whether this program carries the others.
pub fn carries() -> bool {
    own()
        .and_then(|own| carried(&own))
        .is_ok_and(|programs| programs.is_some())
}

fn read(dir: &Path) -> Result<Vec<Named>, RunError> {
    PROGRAMS
        .into_iter()
        .map(|name| {
            let path = dir.join(name);
            let bytes = fs::read(&path).map_err(|error| {
                RunError::Refused(format!(
                    "check {}: {error}: install needs {} in one directory, or a casemate that \
                     carries the others, as in a release; name the directory with --from",
                    path.display(),
                    PROGRAMS.join(", ")
                ))
            })?;
            Ok((name, if name == OWN { plain(&bytes)? } else { bytes }))
        })
        .collect()
}

fn plain(program: &[u8]) -> Result<Vec<u8>, RunError> {
    Ok(carried::parts(program)?.plain.to_vec())
}

fn carried(own: &Path) -> Result<Option<Vec<Named>>, RunError> {
    let bytes = fs::read(own).step("read", own.display())?;
    let parts = carried::parts(&bytes)?;
    Ok(parts.others.map(|others| {
        CARRIED
            .into_iter()
            .zip(others)
            .chain([(OWN, parts.plain)])
            .map(|(name, bytes)| (name, bytes.to_vec()))
            .collect()
    }))
}

/// Puts shim and agent into a directory of their own below `dir`.
fn unpack(programs: &[Named], dir: &Path) -> Result<Runnable, RunError> {
    let new = tempfile::Builder::new()
        .prefix("casemate-")
        .tempdir_in(dir)
        .step("make a directory in", dir.display())?;
    for (name, bytes) in programs.iter().filter(|(name, _)| *name != OWN) {
        program(&new.path().join(name), bytes)?;
    }
    Ok(Runnable {
        shim: new.path().join(SHIM),
        _unpacked: Some(new),
    })
}

/// `casemate carry`.
#[derive(Debug, Args)]
pub struct Carry {
    /// Where to write it
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Writes a `casemate` that carries the programs beside this one.
pub fn carry(options: &Carry) -> Result<i32, RunError> {
    let own = own()?;
    let all = read(own.parent().unwrap_or(Path::new("/")))?;
    let bytes = |wanted: &str| {
        all.iter()
            .find(|(name, _)| *name == wanted)
            .map_or(&[][..], |(_, bytes)| bytes)
    };
    let whole = carried::join(bytes(OWN), CARRIED.map(bytes))?;
    program(&options.output, &whole)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_unpacked_runs_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let programs = PROGRAMS.map(|name| (name, name.as_bytes().to_vec()));
        let runnable = unpack(&programs, dir.path()).unwrap();
        let agent = runnable.shim.with_file_name(AGENT);
        for (path, name) in [(&runnable.shim, SHIM), (&agent, AGENT)] {
            assert_eq!(fs::read(path).unwrap(), name.as_bytes());
            let mode = fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o755);
        }
        // The two, and nothing else.
        let within = runnable.shim.parent().unwrap();
        assert_eq!(fs::read_dir(within).unwrap().count(), 2);
        drop(runnable);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_without_them_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains(SHIM) && error.contains("--from"), "{error}");
    }
}

//! Files that are whole at any moment: written beside their place, then moved.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{RunError, Step};

/// Who may do what with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Owner {
    /// Permission bits.
    pub mode: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Owner {
    /// For a file of ours.
    pub const OURS: Self = Self {
        mode: 0o644,
        uid: 0,
        gid: 0,
    };
}

/// The bytes and owner of a file; `None` if there is none.
pub fn read(path: &Path) -> Result<Option<(Vec<u8>, Owner)>, RunError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).step("read", path.display()),
    };
    let about = file.metadata().step("read", path.display())?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).step("read", path.display())?;
    let owner = Owner {
        mode: about.mode() & 0o7777,
        uid: about.uid(),
        gid: about.gid(),
    };
    Ok(Some((bytes, owner)))
}

/// Puts `bytes` at `path`, at once and for good. A link is followed: what it leads
/// to is replaced, and it stays.
pub fn write(path: &Path, bytes: &[u8], owner: Owner) -> Result<(), RunError> {
    let path = match fs::canonicalize(path) {
        Ok(real) => real,
        Err(_) => path.to_owned(),
    };
    let beside = beside(&path);
    let made = make(&beside, bytes, owner).and_then(|()| fs::rename(&beside, &path));
    if made.is_err() {
        // What is left of it, if anything, is in nobody's way.
        let _gone = fs::remove_file(&beside);
    }
    made.and_then(|()| settle(&path))
        .step("write", path.display())
}

fn make(path: &Path, bytes: &[u8], owner: Owner) -> io::Result<()> {
    let _none = fs::remove_file(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    chown(path, Some(owner.uid), Some(owner.gid))?;
    file.set_permissions(Permissions::from_mode(owner.mode))?;
    file.sync_all()
}

/// A name that no pattern for configuration matches.
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.casemate-new"))
}

/// Removes what a run that was killed has left beside `path`.
pub fn unfinished(path: &Path) {
    let real = fs::canonicalize(path);
    for path in [Some(path), real.as_deref().ok()].into_iter().flatten() {
        let _none = fs::remove_file(beside(path));
    }
}

/// The directory's entry is on disk, too.
fn settle(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// Removes a file, if it is there.
pub fn remove(path: &Path) -> Result<(), RunError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).step("remove", path.display())
        }
        Err(_) => Ok(()),
        Ok(()) => settle(path).step("remove", path.display()),
    }
}

/// Has `path` be a link to `target`; whatever link was there leads to it at once.
pub fn link(path: &Path, target: &Path) -> Result<(), RunError> {
    let beside = beside(path);
    let _none = fs::remove_file(&beside);
    let made = symlink(target, &beside).and_then(|()| fs::rename(&beside, path));
    if made.is_err() {
        let _gone = fs::remove_file(&beside);
    }
    made.and_then(|()| settle(path))
        .step("link", path.display())
}

/// Where a link leads; `None` if there is nothing at all.
pub fn target(path: &Path) -> Result<Option<PathBuf>, RunError> {
    match fs::read_link(path) {
        Ok(target) => Ok(Some(target)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            Err(RunError::Refused(format!(
                "link {}: something else is there, and not of casemate's making; move it away",
                path.display()
            )))
        }
        Err(error) => Err(error).step("read link", path.display()),
    }
}

/// SHA-256, in hexadecimal.
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// Writes a program, and checks what arrived.
pub fn program(path: &Path, bytes: &[u8]) -> Result<(), RunError> {
    let owner = Owner {
        mode: 0o755,
        ..Owner::OURS
    };
    make(path, bytes, owner).step("write", path.display())?;
    let arrived = fs::read(path).step("read back", path.display())?;
    if arrived == bytes {
        return Ok(());
    }
    Err(RunError::Refused(format!(
        "write {}: reads differently from what was written; look at the disk",
        path.display()
    )))
}

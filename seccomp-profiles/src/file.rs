//! Profiles as files of the node.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::profile::{Profile, ProfileError};

/// No profile is longer; what is read is bounded by it.
const LIMIT: u64 = 1 << 20;

/// A file that holds no usable profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileFileError {
    /// It can't be read.
    #[error("read seccomp profile {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is too long.
    #[error("read seccomp profile {}: longer than {LIMIT} bytes; use masks in place of lists", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// What it says is no profile.
    #[error("{}: {source}", path.display())]
    Profile {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line or group and field.
        source: ProfileError,
    },
}

/// Reads a profile from a file of the form that the shipped ones have.
///
/// # Errors
/// [`ProfileFileError`], naming the file, and the line or the group and the field.
pub fn read(path: &Path) -> Result<Profile, ProfileFileError> {
    let io = |source| ProfileFileError::Io {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(io)?;
    file.take(LIMIT + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > LIMIT {
        return Err(ProfileFileError::TooLong {
            path: path.to_owned(),
        });
    }
    Profile::from_toml(&text).map_err(|source| ProfileFileError::Profile {
        path: path.to_owned(),
        source,
    })
}

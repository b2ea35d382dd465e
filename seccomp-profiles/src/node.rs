//! Profiles of a node: files beside its configuration, `NAME.toml`, each within one
//! of the shipped profiles.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use crate::action::Action;
use crate::compile::{CompileError, Form};
use crate::observed::Kind;
use crate::prepared::Prepared;
use crate::profile::{Profile, ProfileError};
use crate::program::Program;
use crate::shipped::{shipped_names, shipped_program_as};
use crate::within::{Beyond, beyond};

/// Those of the shipped profiles that are for workloads, tightest first.
pub const WORKLOADS: [&str; 3] = ["strict", "default", "compat"];
/// Longest name.
const NAME: usize = 63;
/// Longest file, in bytes. A learned profile has some 10 KiB.
const LONGEST: u64 = 256 * 1024;

/// A profile of the node that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// There is no such file.
    #[error("there is no {}; put it there, or ask for strict, default or compat", path.display())]
    Missing {
        /// Where it would be.
        path: PathBuf,
    },
    /// It can't be read.
    #[error("read {}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others than root could have written it.
    #[error("{}: {what}; chown root: and chmod go-w it", path.display())]
    Writable {
        /// File or directory.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Not a file, or not one of a profile.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the way out.
        reason: String,
    },
    /// What it says is no profile.
    #[error("{}: {source}", path.display())]
    Profile {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line or group and field.
        source: ProfileError,
    },
    /// It can't be compiled.
    #[error("{}: {source}", path.display())]
    Compile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: CompileError,
    },
    /// It allows more than the profile that it says it is within.
    #[error(
        "{}: allows {kind}, which {within} {answer}; remove it, or say within = \"…\" of a looser one", path.display()
    )]
    Beyond {
        /// The file.
        path: PathBuf,
        /// What it allows.
        kind: Box<Kind>,
        /// The shipped profile.
        within: String,
        /// That one's answer.
        answer: String,
    },
}

impl NodeError {
    /// Whether there is no such profile, rather than a bad one.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }
}

/// A profile of the node, ready for use.
#[derive(Debug, Clone)]
pub struct NodeFile {
    /// In all forms.
    pub prepared: Prepared,
    /// The shipped profile that it is within.
    pub within: String,
}

/// Whether `name` can be that of a profile: a file's, and nothing else.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !name.is_empty() && name.len() <= NAME && !name.starts_with('-') && name.bytes().all(plain)
}

/// Reads and checks the profile `name` of `directory`, and compiles it.
///
/// # Errors
/// [`NodeError`], one line with the way out.
pub fn read(directory: &Path, name: &str) -> Result<NodeFile, NodeError> {
    let path = directory.join(format!("{name}.toml"));
    check(&parse(directory, name)?, name, &path)
}

/// Reads the profile `name` of `directory`, and nothing more.
///
/// # Errors
/// As [`read`].
pub fn parse(directory: &Path, name: &str) -> Result<Profile, NodeError> {
    let path = directory.join(format!("{name}.toml"));
    let wrong = |reason: String| NodeError::File {
        path: path.clone(),
        reason,
    };
    if !is_name(name) {
        return Err(wrong(format!(
            "a profile's name has a-z, 0-9 and -, at most {NAME}; rename it"
        )));
    }
    if shipped_names().any(|shipped| shipped == name) {
        return Err(wrong("a shipped profile has this name; rename it".into()));
    }
    let text = text(directory, name, &path)?;
    Profile::from_toml(&text).map_err(|source| NodeError::Profile { path, source })
}

/// Checks and compiles a profile as one of the node's; `path` is for messages.
///
/// # Errors
/// As [`read`].
pub fn check(profile: &Profile, name: &str, path: &Path) -> Result<NodeFile, NodeError> {
    let wrong = |reason: String| NodeError::File {
        path: path.to_owned(),
        reason,
    };
    if profile.name != name {
        return Err(wrong(format!(
            "name = {:?}, where the file is called {name}; make them one",
            profile.name
        )));
    }
    let within = profile.within.as_deref().unwrap_or_default();
    if !WORKLOADS.contains(&within) {
        return Err(wrong(format!(
            "within = {within:?}; say which of strict, default and compat it is within"
        )));
    }
    let actions = [profile.default, profile.unknown, profile.x32];
    let groups = profile.groups.iter().map(|group| group.action);
    for action in groups.chain(actions) {
        if matches!(action, Action::Notify | Action::Trace(_) | Action::Trap) {
            return Err(wrong(format!(
                "action {action} is not for workloads; use errno(…), such as errno(EPERM)"
            )));
        }
    }
    let prepared = Prepared::of(profile).map_err(|source| NodeError::Compile {
        path: path.to_owned(),
        source,
    })?;
    let program = |bytes: &[u8]| Program::from_bytes(bytes);
    let outer = shipped_program_as(within, Form::Enforce).and_then(program);
    let (Some(inner), Some(outer)) = (program(prepared.program(Form::Enforce)), outer) else {
        return Err(wrong(format!("profile {within} isn't in this binary")));
    };
    if let Some(Beyond { call, refused }) = beyond(&inner, &outer) {
        let answer = match refused {
            Some(action) => format!("answers with {action}"),
            None => "can't be compared with, by its many conditions".to_owned(),
        };
        return Err(NodeError::Beyond {
            path: path.to_owned(),
            kind: Box::new(Kind::of(call.nr, &call.args)),
            within: within.to_owned(),
            answer,
        });
    }
    Ok(NodeFile {
        prepared: prepared.of_node(path, within),
        within: within.to_owned(),
    })
}

/// Names of all profiles in `directory`, in order; none, where there is no such
/// directory. Names of files that can't be profiles are there as well, for messages.
///
/// # Errors
/// [`NodeError::Io`].
pub fn names(directory: &Path) -> Result<Vec<String>, NodeError> {
    let io = |source| NodeError::Io {
        path: directory.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(io)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e == "toml")
            && let Some(stem) = path.file_stem()
        {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// What the file has in it, if nobody but root can have written it.
fn text(directory: &Path, name: &str, path: &Path) -> Result<String, NodeError> {
    let io = |path: &Path, error: Errno| match error {
        Errno::NOENT => NodeError::Missing {
            path: path.to_owned(),
        },
        Errno::LOOP => NodeError::File {
            path: path.to_owned(),
            reason: "a symbolic link; put the file itself there".into(),
        },
        other => NodeError::Io {
            path: path.to_owned(),
            source: other.into(),
        },
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let open = |at: &dyn std::os::fd::AsFd, name: &Path, flags| {
        openat(at.as_fd(), name, flags, Mode::empty()).map(File::from)
    };
    let place =
        open(&rustix::fs::CWD, directory, flags | OFlags::DIRECTORY).map_err(|e| match e {
            Errno::NOENT => io(path, e),
            e => io(directory, e),
        })?;
    roots_alone(&place, directory)?;
    let file = open(&place, Path::new(&format!("{name}.toml")), flags).map_err(|e| io(path, e))?;
    roots_alone(&file, path)?;
    let read = |source| NodeError::Io {
        path: path.to_owned(),
        source,
    };
    if !file.metadata().map_err(read)?.is_file() {
        return Err(NodeError::File {
            path: path.to_owned(),
            reason: "no file; put one there".into(),
        });
    }
    let mut text = String::new();
    file.take(LONGEST + 1)
        .read_to_string(&mut text)
        .map_err(read)?;
    if text.len() as u64 > LONGEST {
        return Err(NodeError::File {
            path: path.to_owned(),
            reason: format!("longer than {LONGEST} bytes; use masks in place of lists"),
        });
    }
    Ok(text)
}

fn roots_alone(file: &File, path: &Path) -> Result<(), NodeError> {
    let wrong = |what: String| NodeError::Writable {
        path: path.to_owned(),
        what,
    };
    let about = file.metadata().map_err(|source| NodeError::Io {
        path: path.to_owned(),
        source,
    })?;
    if about.uid() != 0 {
        return Err(wrong(format!("owned by user {}", about.uid())));
    }
    if about.mode() & 0o022 != 0 {
        return Err(wrong(format!("mode {:o}", about.mode() & 0o7777)));
    }
    Ok(())
}

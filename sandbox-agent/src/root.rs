//! Paths inside a container's tree: always resolved by the kernel below the
//! tree's root, never through magic links (openat2(2)).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{At, StepError};

/// How a path may be resolved.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// Symbolic links are followed, inside the root.
    InRoot,
    /// A symbolic link anywhere is refused: for the mounts that the sandbox
    /// itself stands on.
    Refused,
}

/// Opens `path` inside `root` with O_PATH.
pub fn open_path(root: impl AsFd, path: &str, links: Links) -> io::Result<OwnedFd> {
    let mut resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    if links == Links::Refused {
        resolve |= ResolveFlags::NO_SYMLINKS;
    }
    loop {
        match rustix::fs::openat2(
            root.as_fd(),
            path,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        ) {
            // A rename elsewhere raced with the walk; the kernel asks to try again.
            Err(Errno::AGAIN) => {}
            other => return Ok(other?),
        }
    }
}

/// Whether `fd` is a directory.
pub fn is_directory(fd: impl AsFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) == FileType::Directory)
}

/// The mount target `path` inside `root`; what is missing is made, owned by
/// the file ids in force. An existing target is only looked at, never opened
/// for writing (which would copy a lower file up).
pub fn target(
    root: impl AsFd,
    path: &str,
    directory: bool,
    links: Links,
) -> Result<OwnedFd, StepError> {
    let refused = |e: &io::Error| e.raw_os_error() == Some(Errno::LOOP.raw_os_error());
    match open_path(root.as_fd(), path, links) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) if refused(&e) => {
            let why = match links {
                Links::Refused => {
                    "a symbolic link stands where the sandbox mounts its own file system"
                }
                Links::InRoot => "its symbolic links go round in a circle or through /proc",
            };
            return Err(StepError::invalid("refuse the image:", path, why));
        }
        found => {
            let found = found
                .at("open mount target", path)
                .map_err(StepError::blame_request)?;
            if is_directory(&found).at("look at", path)? != directory {
                let kind = if directory {
                    "not a directory"
                } else {
                    "a directory, not a file"
                };
                return Err(StepError::invalid("mount on", path, kind));
            }
            return Ok(found);
        }
    }
    make_target(root.as_fd(), path, directory, links)
}

/// The most symbolic links to nothing that one target may lead through; as
/// many as the kernel follows in a path (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Makes what is missing of `path`. Where a link leads to nothing, that is
/// made, inside the root: images have `/var/run -> /run` and no /run.
fn make_target(
    root: BorrowedFd<'_>,
    path: &str,
    directory: bool,
    links: Links,
) -> Result<OwnedFd, StepError> {
    let mut parts: VecDeque<String> = components(path).collect();
    let mut walked = String::new();
    let mut followed = 0;
    let mut at = open_path(root, "/", links).at("open", "/")?;
    while let Some(part) = parts.pop_front() {
        let here = format!("{walked}/{part}");
        let last = parts.is_empty();
        let next = match open_path(root, &here, links) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if links == Links::InRoot
                    && let Ok(to) = rustix::fs::readlinkat(&at, part.as_str(), Vec::new())
                {
                    followed += 1;
                    if followed > MAX_LINKS {
                        return Err(StepError::invalid(
                            "make mount target",
                            path,
                            "too many symbolic links to nothing",
                        ));
                    }
                    let to = to.to_string_lossy();
                    for component in components(&to).collect::<Vec<_>>().into_iter().rev() {
                        parts.push_front(component);
                    }
                    if to.starts_with('/') {
                        walked.clear();
                        at = open_path(root, "/", links).at("open", "/")?;
                    }
                    continue;
                }
                let made = if last && !directory {
                    rustix::fs::openat(
                        &at,
                        part.as_str(),
                        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC,
                        Mode::from(0o644),
                    )
                    .map(drop)
                } else {
                    rustix::fs::mkdirat(&at, part.as_str(), Mode::from(0o755))
                };
                let object = if here == path {
                    here.clone()
                } else {
                    format!("{path}, its part {here}")
                };
                made.map_err(with_way_out)
                    .at("make mount target", &object)
                    .map_err(StepError::blame_request)?;
                open_path(root, &here, links)
            }
            other => other,
        };
        at = next.at("open", &here).map_err(StepError::blame_request)?;
        walked = here;
    }
    Ok(at)
}

/// Of a root that is read-only, what to do.
fn with_way_out(error: rustix::io::Errno) -> io::Error {
    match error {
        rustix::io::Errno::ROFS => io::Error::other(format!(
            "{error}; have it in the root, or let the root be written"
        )),
        other => other.into(),
    }
}

fn components(path: &str) -> impl Iterator<Item = String> + '_ {
    path.split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .map(str::to_owned)
}

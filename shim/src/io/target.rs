//! What a stream field names, and opening it without ever blocking.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, Mode, OFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::logger::Binary;
use super::{share, watch};
use crate::error::ShimError;

/// A stream field, parsed.
#[derive(Debug, PartialEq, Eq)]
pub enum Target {
    /// Empty: no stream.
    Null,
    /// A bare path or `fifo://`.
    Fifo(PathBuf),
    /// `file://`: appended to.
    File(PathBuf),
    /// `binary://` or `binary-v2://`: a program that reads.
    Logger(Binary),
}

/// Read end of the client's stdin fifo.
pub type Stdin = AsyncFd<OwnedFd>;

/// Where output goes.
#[derive(Debug)]
pub enum Output {
    /// Into a fifo.
    Fifo(Fifo),
    /// A regular file, appending.
    File(File),
    /// Read and forgotten (a terminal's output that nobody asked for).
    Null,
}

/// Our ends of an output fifo.
#[derive(Debug)]
pub struct Fifo {
    /// Where we write, non-blocking.
    pub write: Arc<AsyncFd<OwnedFd>>,
    /// A read end of our own: with it no reader that goes away is an error for the
    /// writer, and what was written while nobody read stays.
    keep: Option<OwnedFd>,
    /// A reader is known to have been there.
    had_reader: bool,
}

impl Fifo {
    /// The write end of a pipe whose reader we know.
    pub fn to_known_reader(write: AsyncFd<OwnedFd>) -> Fifo {
        Fifo {
            write: Arc::new(write),
            keep: None,
            had_reader: true,
        }
    }

    /// Whether somebody else has, or had, the fifo open for reading. To be asked
    /// when nothing more will be written: our own read end goes.
    pub fn has_had_reader(&mut self) -> bool {
        self.keep = None;
        if !self.had_reader {
            let mut fds = [PollFd::new(&*self.write, PollFlags::empty())];
            // A writer without a reader is in error (poll(2)).
            self.had_reader = rustix::event::poll(&mut fds, Some(&NOW)).is_ok()
                && !fds[0].revents().contains(PollFlags::ERR);
        }
        self.had_reader
    }
}

const NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

impl Output {
    /// The same file once more, for the second stream.
    pub fn share(&self) -> Result<Output, ShimError> {
        match self {
            Output::File(file) => share(file)
                .map(Output::File)
                .map_err(|error| ShimError::Unknown(format!("share the log file: {error}"))),
            Output::Fifo(_) | Output::Null => Ok(Output::Null),
        }
    }
}

impl Target {
    /// Parses a stream field.
    pub fn parse(field: &str) -> Result<Target, ShimError> {
        if field.is_empty() {
            return Ok(Target::Null);
        }
        match field.split_once("://") {
            None => Ok(Target::Fifo(field.into())),
            Some(("fifo", path)) => Ok(Target::Fifo(path.into())),
            Some(("file", path)) => Ok(Target::File(path.into())),
            Some((scheme @ ("binary" | "binary-v2"), rest)) => {
                Binary::parse(field, rest, scheme == "binary-v2").map(Target::Logger)
            }
            Some((scheme, _)) => Err(ShimError::InvalidArgument(format!(
                "unknown STDIO scheme {scheme:?} in {field:?}: use fifo://, file://, binary:// or \
                 binary-v2://"
            ))),
        }
    }

    /// The read end for copying, and a write end of our own.
    pub fn open_input(&self) -> Result<Option<(Stdin, OwnedFd)>, ShimError> {
        match self {
            Target::Null => Ok(None),
            Target::Fifo(path) => {
                let read = open_fifo(path, OFlags::RDONLY)?;
                let write = open_fifo(path, OFlags::WRONLY)?;
                Ok(Some((watched(path, read, Interest::READABLE)?, write)))
            }
            Target::File(path) => Err(ShimError::InvalidArgument(format!(
                "stdin {} must be a fifo, not file://",
                path.display()
            ))),
            Target::Logger(_) => Err(ShimError::InvalidArgument(
                "stdin must be a fifo, not binary:// or binary-v2://".to_owned(),
            )),
        }
    }

    /// What copying needs.
    pub fn open_output(&self) -> Result<Option<Output>, ShimError> {
        match self {
            Target::Null => Ok(None),
            Target::Fifo(path) => {
                // Refused only while there is no reader (fifo(7)), be it one that
                // waits in its own open for us. What it has seen of us must not
                // close again: that were the end.
                let early = open_fifo(path, OFlags::WRONLY).ok();
                let had_reader = early.is_some();
                let read = open_fifo(path, OFlags::RDONLY)?;
                let write = match early {
                    Some(write) => write,
                    None => open_fifo(path, OFlags::WRONLY)?,
                };
                Ok(Some(Output::Fifo(Fifo {
                    write: Arc::new(watched(path, write, Interest::WRITABLE)?),
                    keep: Some(read),
                    had_reader,
                })))
            }
            Target::File(path) => open_log(path).map(|file| Some(Output::File(file))),
            Target::Logger(_) => Err(ShimError::InvalidArgument(
                "stderr names a logging binary, but stdout doesn't: stdout's scheme is for both"
                    .to_owned(),
            )),
        }
    }
}

fn open_fifo(path: &Path, access: OFlags) -> Result<OwnedFd, ShimError> {
    let failed = |error: rustix::io::Errno| {
        ShimError::InvalidArgument(format!("open stream {}: {error}", path.display()))
    };
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo {
        Ok(fd)
    } else {
        Err(ShimError::InvalidArgument(format!(
            "stream {} is not a fifo: use file:// for a file",
            path.display()
        )))
    }
}

fn watched(path: &Path, fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, ShimError> {
    watch(fd, interest)
        .map_err(|error| ShimError::Unknown(format!("watch stream {}: {error}", path.display())))
}

fn open_log(path: &Path) -> Result<File, ShimError> {
    let failed =
        |error| ShimError::InvalidArgument(format!("open log file {}: {error}", path.display()));
    if !path.is_absolute() {
        let relative = std::io::Error::other("file:// takes an absolute path");
        return Err(failed(relative));
    }
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(failed)?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(failed)?;
    if file.metadata().map_err(failed)?.file_type().is_fifo() {
        let fifo = std::io::Error::other("it is a fifo: use fifo://");
        return Err(failed(fifo));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_decides() {
        assert_eq!(Target::parse("").unwrap(), Target::Null);
        assert_eq!(Target::parse("/f").unwrap(), Target::Fifo("/f".into()));
        assert_eq!(
            Target::parse("fifo:///f").unwrap(),
            Target::Fifo("/f".into())
        );
        assert_eq!(
            Target::parse("file:///f").unwrap(),
            Target::File("/f".into())
        );
        let unknown = Target::parse("ftp://h/f").unwrap_err();
        assert_eq!(unknown.code(), ttrpc::Code::INVALID_ARGUMENT);
        assert!(unknown.to_string().contains("unknown STDIO scheme"));
        for scheme in ["binary", "binary-v2"] {
            let logger = Target::parse(&format!("{scheme}:///bin/logger?a=b")).unwrap();
            assert!(matches!(logger, Target::Logger(_)), "{logger:?}");
            assert!(logger.open_input().is_err());
            assert!(logger.open_output().is_err());
        }
    }

    #[test]
    fn a_file_that_is_no_fifo_is_refused_by_name() {
        let error = Target::Fifo("/etc/hostname".into()).open_input();
        let text = error.err().unwrap().to_string();
        assert!(text.contains("/etc/hostname"), "{text}");
    }
}

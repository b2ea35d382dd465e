//! The one error type of the test bed.

use std::path::{Path, PathBuf};

/// Why a step of the test bed did not work.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A file operation failed.
    #[error("{step} {}: {source}", path.display())]
    File {
        /// What was being done, as a verb.
        step: &'static str,
        /// The file it was done to.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("start {program}: {source}; install it or put it on PATH")]
    Spawn {
        /// The program.
        program: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A program ended with an error, or not in time.
    #[error("{command}: {outcome}: {output}")]
    Command {
        /// The command line.
        command: String,
        /// Exit code, signal or time-out.
        outcome: String,
        /// What it wrote, on one line.
        output: String,
    },
    /// A ttrpc call failed.
    #[error("{method}: {source}")]
    Rpc {
        /// The RPC.
        method: String,
        /// ttrpc's own error, with the status the server sent.
        source: ttrpc::Error,
    },
    /// Something that should have come about did not, in the time given.
    #[error("waited {seconds} s for {what}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// An answer was not what the contract says.
    #[error("{0}")]
    Unexpected(String),
}

/// Result of a test bed step.
pub type Result<T> = std::result::Result<T, Failure>;

/// Makes an [`Failure::File`] out of an I/O error; for `map_err`.
pub fn file<E: Into<std::io::Error>>(step: &'static str, path: &Path) -> impl FnOnce(E) -> Failure {
    let path = path.to_owned();
    move |source| Failure::File {
        step,
        path,
        source: source.into(),
    }
}

impl Failure {
    /// The ttrpc status code's name, when the server answered with one.
    pub fn code(&self) -> Option<ttrpc::Code> {
        match self {
            Self::Rpc {
                source: ttrpc::Error::RpcStatus(status),
                ..
            } => Some(status.code()),
            _ => None,
        }
    }
}

//! What can go wrong: step, object, reason, way out, in one line.

use std::io;

/// A failure of our own, not of the command that was run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A step on the host.
    #[error("{step} {object}: {source}")]
    Host {
        /// What was done.
        step: &'static str,
        /// To what.
        object: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The shim answered a request with an error.
    #[error("{step}: {reason}")]
    Shim {
        /// What was asked for.
        step: &'static str,
        /// Its own words.
        reason: String,
    },
    /// The command of a run couldn't be run, and nothing else is wrong.
    #[error("run {command}: {reason}; it is looked for in the sandbox' root")]
    Command {
        /// Its name.
        command: String,
        /// What the sandbox says.
        reason: String,
        /// As shells have it: 126, or 127 where there is no such file.
        status: i32,
    },
    /// What was asked for can't be done here.
    #[error("{0}")]
    Refused(String),
}

impl RunError {
    /// An exit status of its own.
    pub fn status(&self) -> Option<i32> {
        match self {
            Self::Command { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether the host failed in this way.
    pub fn is(&self, kind: io::ErrorKind) -> bool {
        matches!(self, Self::Host { source, .. } if source.kind() == kind)
    }
}

/// Names the step and the object of a failure.
pub trait Step<T> {
    /// Wraps the error.
    fn step(self, step: &'static str, object: impl ToString) -> Result<T, RunError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str, object: impl ToString) -> Result<T, RunError> {
        self.map_err(|error| RunError::Host {
            step,
            object: object.to_string(),
            source: error.into(),
        })
    }
}

/// Names the request of an RPC that failed.
pub fn rpc(step: &'static str) -> impl Fn(ttrpc::Error) -> RunError {
    move |error| RunError::Shim {
        step,
        reason: match error {
            // The text alone: the code adds nothing for a person.
            ttrpc::Error::RpcStatus(status) => one_line(&status.message),
            other => one_line(&other.to_string()),
        },
    }
}

/// The text without line breaks and at its ends no blanks.
pub fn one_line(text: &str) -> String {
    text.trim().replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_that_names_step_and_object() {
        let failed: Result<(), _> = Err(io::Error::from_raw_os_error(2));
        let text = failed.step("open", "/x").unwrap_err().to_string();
        assert!(text.starts_with("open /x: No such file"), "{text}");
        let mut status = ttrpc::Status::new();
        status.message = "first\nsecond\n".into();
        let text = rpc("create")(ttrpc::Error::RpcStatus(status)).to_string();
        assert_eq!(text, "create: first second");
    }
}

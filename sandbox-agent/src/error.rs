//! Errors: the step that failed, its object, the reason.

use std::io;

/// A failed step.
#[derive(Debug, thiserror::Error)]
#[error("{step}{}{object}: {source}", if object.is_empty() { "" } else { " " })]
pub struct StepError {
    pub(crate) step: &'static str,
    pub(crate) object: String,
    pub(crate) source: io::Error,
    /// The request was at fault, not the sandbox.
    pub invalid: bool,
}

impl StepError {
    /// The request names something that isn't there or can't be used.
    pub fn invalid(step: &'static str, object: impl Into<String>, reason: &str) -> StepError {
        StepError {
            step,
            object: object.into(),
            source: io::Error::other(reason.to_owned()),
            invalid: true,
        }
    }

    /// Marks the error as the request's fault.
    pub fn blame_request(mut self) -> StepError {
        self.invalid = true;
        self
    }
}

/// Adds step and object to an I/O result.
pub trait At<T> {
    /// Names the step, and what it was done to.
    fn at(self, step: &'static str, object: impl AsRef<str>) -> Result<T, StepError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: &'static str, object: impl AsRef<str>) -> Result<T, StepError> {
        self.map_err(|e| StepError {
            step,
            object: object.as_ref().to_owned(),
            source: e.into(),
            invalid: false,
        })
    }
}

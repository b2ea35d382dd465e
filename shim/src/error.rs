//! Errors of the RPC surface and the one table that gives each its code.

use ttrpc::Code;

use crate::sandbox::SandboxError;

/// Why an RPC is refused. Each text is one line: it reaches users as it is.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// Unknown container or exec, or a process that has finished.
    #[error("{0}")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The object is in the wrong state for this request.
    #[error("{0}")]
    FailedPrecondition(String),
    /// A field of the request can't be used.
    #[error("{0}")]
    InvalidArgument(String),
    /// Not offered by this shim.
    #[error("{0}")]
    Unimplemented(String),
    /// The pod is lost or going away.
    #[error("{0}")]
    Unavailable(String),
    /// Everything else.
    #[error("{0}")]
    Unknown(String),
    /// An effect failed.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl ShimError {
    /// The status code containerd sees (`google.rpc.Code`).
    pub fn code(&self) -> Code {
        match self {
            ShimError::NotFound(_) | ShimError::Sandbox(SandboxError::NotFound(_)) => {
                Code::NOT_FOUND
            }
            ShimError::AlreadyExists(_) => Code::ALREADY_EXISTS,
            ShimError::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            ShimError::InvalidArgument(_)
            | ShimError::Sandbox(SandboxError::Invalid(_) | SandboxError::Refused { .. }) => {
                Code::INVALID_ARGUMENT
            }
            ShimError::Unimplemented(_) => Code::UNIMPLEMENTED,
            ShimError::Unavailable(_) | ShimError::Sandbox(SandboxError::Unavailable(_)) => {
                Code::UNAVAILABLE
            }
            ShimError::Unknown(_) | ShimError::Sandbox(SandboxError::Failed(_)) => Code::UNKNOWN,
        }
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(
            error.code(),
            one_line(&error.to_string()),
        ))
    }
}

/// The same error again, for every Create of a pod that could not start.
pub fn again(error: &SandboxError) -> SandboxError {
    match error {
        SandboxError::Invalid(text) => SandboxError::Invalid(text.clone()),
        SandboxError::Refused { rule, text } => SandboxError::Refused {
            rule,
            text: text.clone(),
        },
        SandboxError::NotFound(text) => SandboxError::NotFound(text.clone()),
        SandboxError::Unavailable(text) => SandboxError::Unavailable(text.clone()),
        SandboxError::Failed(text) => SandboxError::Failed(text.clone()),
    }
}

/// Joins the lines of a text: an answer and a log entry are one line each.
pub fn one_line(text: &str) -> String {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_the_code_that_containerd_expects() {
        let text = || "t".to_owned();
        let table = [
            (ShimError::NotFound(text()), 5),
            (ShimError::AlreadyExists(text()), 6),
            (ShimError::FailedPrecondition(text()), 9),
            (ShimError::InvalidArgument(text()), 3),
            (ShimError::Unimplemented(text()), 12),
            (ShimError::Unavailable(text()), 14),
            (ShimError::Unknown(text()), 2),
            (SandboxError::Invalid(text()).into(), 3),
            (SandboxError::NotFound(text()).into(), 5),
            (SandboxError::Unavailable(text()).into(), 14),
            (SandboxError::Failed(text()).into(), 2),
            (
                SandboxError::Refused {
                    rule: "r",
                    text: text(),
                }
                .into(),
                3,
            ),
        ];
        let mut seen = std::collections::BTreeSet::new();
        for (error, number) in table {
            assert_eq!(error.code() as i32, number, "{error:?}");
            seen.insert(place(&error));
            let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else {
                panic!("not a status");
            };
            assert_eq!(status.message, "t");
        }
        assert_eq!(seen.len(), VARIANTS, "a kind of error that no row is about");
    }

    const VARIANTS: usize = 12;

    /// Names each kind: a new one doesn't compile until it is in the table.
    fn place(error: &ShimError) -> usize {
        match error {
            ShimError::NotFound(_) => 0,
            ShimError::AlreadyExists(_) => 1,
            ShimError::FailedPrecondition(_) => 2,
            ShimError::InvalidArgument(_) => 3,
            ShimError::Unimplemented(_) => 4,
            ShimError::Unavailable(_) => 5,
            ShimError::Unknown(_) => 6,
            ShimError::Sandbox(SandboxError::Invalid(_)) => 7,
            ShimError::Sandbox(SandboxError::NotFound(_)) => 8,
            ShimError::Sandbox(SandboxError::Unavailable(_)) => 9,
            ShimError::Sandbox(SandboxError::Failed(_)) => 10,
            ShimError::Sandbox(SandboxError::Refused { .. }) => 11,
        }
    }

    #[test]
    fn an_error_text_is_one_line() {
        assert_eq!(one_line("a\n  b\n\nc\n"), "a; b; c");
    }
}

//! What a command has to say, on standard output.

use std::io::{ErrorKind, Write};

use crate::error::{RunError, Step};

/// Writes it all. Whoever stops reading (`| head`) has what it wanted: that is no
/// failure, and the exit status stays what it is.
pub fn say(text: impl AsRef<[u8]>) -> Result<(), RunError> {
    let mut out = std::io::stdout().lock();
    let written = out
        .write_all(text.as_ref())
        .and_then(|()| out.flush())
        .step("write to", "standard output");
    match written {
        Err(error) if error.is(ErrorKind::BrokenPipe) => Ok(()),
        other => other,
    }
}

//! Our own terminal while the container has one: raw, so that every key goes
//! through, and afterwards as it was.

use std::io;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::error::{RunError, Step};

/// A terminal in raw mode; restored when dropped.
pub struct Raw(Termios);

impl Raw {
    /// Puts the terminal on standard input into raw mode.
    pub fn new() -> Result<Raw, RunError> {
        let before = tcgetattr(io::stdin()).map_err(|error| {
            RunError::Refused(format!(
                "-t: standard input is not a terminal ({error}): leave -t away"
            ))
        })?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw).step("set up", "the terminal")?;
        Ok(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Fails only if the terminal is gone.
        let _gone = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Columns and rows.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

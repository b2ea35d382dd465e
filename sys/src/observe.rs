//! The listener's side of a filter that refuses nothing (seccomp_unotify(2)): each
//! call that is asked about is looked at, and runs.
//!
//! To let a call run is sound only where every other filter of the caller would have
//! let it run as well, as a question goes before their permissions: the kernel takes,
//! of all verdicts, errors before questions (seccomp(2)), and it runs what the filters
//! judged, the registers. What a pointer leads to may have changed since: it is worth
//! knowing, and nothing can be decided by it.
//!
//! So this is apart from [`crate::notify`], whose questions are about refused calls,
//! and which has no way to let one run: only [`Asked`] can, and only a
//! [`Listener`] makes one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::notify::{self, Question};

/// `SECCOMP_IOCTL_NOTIF_ID_VALID`: `_IOW('!', 2, __u64)`.
const ID_VALID: libc::c_ulong = 0x4008_2102;
/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE`.
const CONTINUE: u32 = 1;

/// The listener of a filter that refuses nothing.
#[derive(Debug)]
pub struct Listener(OwnedFd);

/// A call that waits to run.
#[derive(Debug)]
pub struct Asked<'a> {
    listener: &'a Listener,
    question: Question,
}

impl Listener {
    /// Of a filter that is known to refuse nothing.
    #[must_use]
    pub fn of(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// As [`notify::receive`], with its conditions.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn receive(&self) -> io::Result<Asked<'_>> {
        let question = notify::receive(&self.0)?;
        Ok(Asked {
            listener: self,
            question,
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Asked<'_> {
    /// Which call it is.
    #[must_use]
    pub fn question(&self) -> &Question {
        &self.question
    }

    /// Whether who asks still waits: then what was read of the process with its
    /// number was read of it, and of no other that has the number now.
    #[must_use]
    pub fn is_current(&self) -> bool {
        let mut id = self.question.id;
        notify::ioctl(self.listener, ID_VALID, &raw mut id).is_ok()
    }

    /// Lets the call run.
    ///
    /// # Errors
    /// `NotFound` when who asked has gone; else what the kernel answers.
    pub fn go_on(self) -> io::Result<()> {
        let mut answer = notify::Answer {
            id: self.question.id,
            value: 0,
            error: 0,
            flags: CONTINUE,
        };
        notify::ioctl(self.listener, notify::SEND, &raw mut answer)
    }
}

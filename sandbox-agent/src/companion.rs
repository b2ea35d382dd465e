//! What pause and learner have in common: children of the agent that move into the
//! containers' user namespace, and keep next to nothing there.

use std::os::fd::OwnedFd;

use casemate_sys::ident;
use casemate_sys::namespace::{self, kind};
use casemate_sys::process;

use crate::confine;
use crate::error::{At, StepError};

/// Moves the calling process there, with these capabilities at most, for good; its
/// own pidfd. Its filter is still to come.
pub fn settle(namespace_b: OwnedFd, capabilities: u64) -> Result<OwnedFd, StepError> {
    namespace::enter(&namespace_b, kind::USER).at("enter", "the containers' user namespace")?;
    drop(namespace_b);
    // The capabilities of B came with it, and maybe a sysctl's idea of dumps.
    ident::set_dumpable(false).at("set", "dumpable")?;
    ident::set_no_new_privs().at("set", "no_new_privs")?;
    confine::keep(capabilities)?;
    namespace::join_new_session_keyring().at("join", "session keyring")?;
    process::open_pidfd(process::own_pid()).at("open", "own pidfd")
}

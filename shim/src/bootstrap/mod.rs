//! The command-line half: flags, `start`, `delete`, `-info`, and the server's
//! own start.

pub mod daemon;
pub mod delete;
pub mod flags;
pub mod info;
pub mod journal;
pub mod proc;
pub mod registry;
pub mod server;
pub mod socket;
pub mod spec;
pub mod start;

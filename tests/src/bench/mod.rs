//! The parts of `make bench`: who is compared, what is measured, how it is shown.

pub mod clock;
pub mod memory;
pub mod peer;
pub mod phases;
pub mod report;
pub mod samples;
pub mod through;

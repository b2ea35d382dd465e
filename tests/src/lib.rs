//! What the end-to-end tests are made of: a private containerd, images built
//! without a registry, bundles and shims started by hand the way containerd
//! starts them, and a look at what is left on the host afterwards.
//!
//! Nothing here stands in for the kernel or for containerd. The one peer that
//! is ours is [`events::Recorder`], a ttrpc `Events` server that writes down
//! what a shim sends; it exists because containerd hands events on only after
//! decoding and reordering them.

pub mod bundle;
pub mod conformance;
pub mod ctr;
pub mod daemon;
pub mod error;
pub mod events;
pub mod exec;
pub mod generation;
pub mod image;
pub mod inject;
pub mod leaks;
pub mod ledger;
#[cfg(test)]
mod manifests;
pub mod node;
pub mod operator;
pub mod pages;
pub mod pod;
pub mod probes;
pub mod procs;
pub mod results;
pub mod run;
pub mod sandbox_api;
pub mod shim;
pub mod skip;
pub mod spec;
pub mod stdio;
pub mod trace;
pub mod world;

pub use error::{Failure, Result};
pub use world::World;

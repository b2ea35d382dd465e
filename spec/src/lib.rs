//! Reads an OCI runtime configuration, and turns it into a tightened one or a
//! refusal.
//!
//! Everything here is a pure function of bytes and configuration: nothing
//! touches the kernel, so each rule can be tested alone. The steps are
//! [`load()`] (tolerant of what other producers write, strict about types), then
//! [`tighten()`] (policy). [`load_process`] and [`tighten_process`] are the same
//! for the process of an exec, [`tighten_update`] for limits that change later.
//!
//! No field of the specification is ignored in silence: [`coverage()`] has one
//! row for each, and a field that has no row becomes a warning.

pub mod annotations;
pub mod caps;
pub mod class;
pub mod clock;
pub mod config;
pub mod coverage;
pub mod devices;
pub mod document;
pub mod error;
mod exec;
pub mod failures;
pub mod hooks;
pub mod host_paths;
mod images;
mod journal;
pub mod label;
pub mod load;
pub mod mount;
pub mod network_rules;
pub mod paths;
pub mod process;
mod resources;
pub mod rules;
pub mod schedule;
pub mod secrets;
pub mod sysctls;
pub mod tighten;
pub mod tightenings;
pub mod users;

pub use annotations::Annotations;
pub use caps::Caps;
pub use class::Class;
pub use clock::ClockOffset;
pub use config::{Config, Profile};
pub use coverage::{Coverage, How, coverage};
pub use devices::{DeviceSpec, NodeDevice};
pub use error::{ConfigError, Refusal, SpecError};
pub use failures::FAILURES;
pub use hooks::{HookSpec, HookSpecs};
pub use journal::Decision;
pub use label::Lsm;
pub use load::{Kind, Loaded, LoadedProcess, PodIdentity, load, load_process};
pub use mount::{
    Atime, IdMap, MountAttrs, MountFlags, MountKind, MountSpec, Propagation, PropagationKind,
};
pub use process::{ProcessSpec, Rlimit, tighten_process};
pub use resources::tighten_update;
pub use rules::{RULES, Rule};
pub use schedule::Schedule;
pub use tighten::{Context, Namespace, Namespaces, Tightened, tighten};
pub use tightenings::{TIGHTENINGS, Tightening};
pub use users::PodUsers;

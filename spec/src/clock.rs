//! The clocks of a time namespace.

use oci_spec::runtime::{Linux, LinuxNamespaceType};

use crate::error::{Refusal, one_line};
use crate::rules::TIME_NAMESPACE;

/// How far a clock is ahead of the node's (time_namespaces(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClockOffset {
    /// `monotonic` or `boottime`.
    pub clock: String,
    /// Whole seconds, less than 0 for behind.
    pub seconds: i64,
    /// Nanoseconds more, below 10^9.
    pub nanoseconds: u32,
}

/// `linux.timeOffsets`: `None` without a time namespace.
pub(crate) fn offsets(linux: &Linux) -> Result<Option<Vec<ClockOffset>>, Refusal> {
    let no = |field: &str, detail: String| Err(Refusal::new(&TIME_NAMESPACE, field, detail));
    let mut own = false;
    for namespace in linux.namespaces().iter().flatten() {
        if namespace.typ() != LinuxNamespaceType::Time {
            continue;
        }
        if own {
            return no("linux.namespaces", "time is there twice".into());
        }
        own = true;
        let path = namespace.path().clone().unwrap_or_default();
        if !path.as_os_str().is_empty() {
            let path = one_line(&path.to_string_lossy());
            return no("linux.namespaces", format!("joining that at {path}"));
        }
    }
    let mut offsets = Vec::new();
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        if !own {
            return no(
                "linux.timeOffsets",
                "there is no time namespace among linux.namespaces".into(),
            );
        }
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            let detail = format!("{} is not monotonic or boottime", one_line(clock));
            return no("linux.timeOffsets", detail);
        }
        let nanoseconds = offset.nanosecs().unwrap_or(0);
        if nanoseconds >= 1_000_000_000 {
            let detail = format!("{nanoseconds} nanoseconds are a second or more");
            return no(&format!("linux.timeOffsets.{clock}.nanosecs"), detail);
        }
        offsets.push(ClockOffset {
            clock: clock.clone(),
            seconds: offset.secs().unwrap_or(0),
            nanoseconds,
        });
    }
    offsets.sort_by(|a, b| a.clock.cmp(&b.clock));
    Ok(own.then_some(offsets))
}

//! How a process is scheduled: what makes it less than others is a wish like any
//! other, what makes it more would take from the node.

use oci_spec::runtime::{IOPriorityClass, LinuxSchedulerPolicy, Process};

use crate::config::Profile;
use crate::error::{Refusal, one_line};
use crate::journal::Journal;
use crate::rules::SCHEDULING;
use crate::tightenings;

/// `process.scheduler`, `process.ioPriority` and `process.execCPUAffinity`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Schedule {
    /// Policy (`SCHED_*` of sched(7)) and nice value, 0 to 19.
    pub scheduler: Option<(u32, i32)>,
    /// Class and level as ioprio_set(2) packs them.
    pub io_priority: Option<u16>,
    /// Processors of execs; empty: as the cgroup has it.
    pub exec_cpus: Vec<u16>,
}

// Policies of sched(7) that give up time rather than take it.
const OTHER: u32 = 0;
const BATCH: u32 = 3;
const IDLE: u32 = 5;

/// `IOPRIO_CLASS_SHIFT` of linux/ioprio.h.
const CLASS: u16 = 13;

/// More processors than a kernel can be built for.
const MOST_CPUS: u16 = 8192;

fn no<T>(field: &str, detail: impl AsRef<str>) -> Result<T, Refusal> {
    Err(Refusal::new(
        &SCHEDULING,
        format!("process.{field}"),
        detail,
    ))
}

/// Checks the three fields.
pub(crate) fn check(process: &Process, profile: Profile) -> Result<Schedule, Refusal> {
    let schedule = Schedule {
        scheduler: scheduler(process)?,
        io_priority: io_priority(process)?,
        exec_cpus: exec_cpus(process)?,
    };
    if profile == Profile::Strict {
        // It is the process itself that sets them, behind its filter.
        const WHY: &str = "the profile strict has no system call for it";
        if schedule.scheduler.is_some() {
            return no("scheduler", WHY);
        }
        if schedule.io_priority.is_some() {
            return no("ioPriority", WHY);
        }
    }
    Ok(schedule)
}

fn scheduler(process: &Process) -> Result<Option<(u32, i32)>, Refusal> {
    let Some(scheduler) = process.scheduler() else {
        return Ok(None);
    };
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => OTHER,
        LinuxSchedulerPolicy::SchedBatch => BATCH,
        LinuxSchedulerPolicy::SchedIdle => IDLE,
        other => return no("scheduler.policy", other.to_string()),
    };
    let nice = scheduler.nice().unwrap_or(0);
    if !(0..=19).contains(&nice) {
        return no(
            "scheduler.nice",
            format!("{nice} is not within 0 and 19; less than 0 takes time from others"),
        );
    }
    if let Some(priority) = scheduler.priority().filter(|p| *p != 0) {
        return no(
            "scheduler.priority",
            format!("{priority} is of the realtime policies"),
        );
    }
    for (name, value) in [
        ("runtime", scheduler.runtime()),
        ("deadline", scheduler.deadline()),
        ("period", scheduler.period()),
    ] {
        if let Some(value) = value.filter(|v| *v != 0) {
            return no(
                &format!("scheduler.{name}"),
                format!("{value} is of SCHED_DEADLINE"),
            );
        }
    }
    Ok(Some((policy, nice)))
}

fn io_priority(process: &Process) -> Result<Option<u16>, Refusal> {
    let Some(asked) = process.io_priority() else {
        return Ok(None);
    };
    let class = match asked.class() {
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
        other @ IOPriorityClass::IoprioClassRt => return no("ioPriority.class", other.to_string()),
    };
    match u16::try_from(asked.priority()) {
        Ok(level @ 0..=7) => Ok(Some(class << CLASS | level)),
        _ => no(
            "ioPriority.priority",
            format!("{} is not within 0 and 7", asked.priority()),
        ),
    }
}

fn exec_cpus(process: &Process) -> Result<Vec<u16>, Refusal> {
    let Some(affinity) = process.exec_cpu_affinity() else {
        return Ok(Vec::new());
    };
    // No process of a container is ever anywhere but in its cgroup, so that
    // the time that `initial` is about doesn't exist. It must make sense.
    if let Some(list) = affinity.initial() {
        cpus("execCPUAffinity.initial", list)?;
    }
    match affinity.cpu_affinity_final() {
        Some(list) => cpus("execCPUAffinity.final", list),
        None => Ok(Vec::new()),
    }
}

/// A list such as `0-3,7`.
fn cpus(field: &str, list: &str) -> Result<Vec<u16>, Refusal> {
    let mut all = Vec::new();
    for part in list.split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<u16>(), last.parse::<u16>()) {
            (Ok(first), Ok(last)) if first <= last && last < MOST_CPUS => all.extend(first..=last),
            _ => {
                return no(
                    field,
                    format!("{} is not a list such as 0-3,7", one_line(list)),
                );
            }
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

impl Schedule {
    /// What an exec gets that asks for `self` in a container that has `own`: no
    /// more than that.
    pub(crate) fn within(self, own: &Self, journal: &mut Journal) -> Self {
        let rank = |(policy, nice): (u32, i32)| (policy, nice);
        // A larger number is less, for classes and their levels too.
        let scheduler = match (self.scheduler, own.scheduler) {
            (Some(asked), Some(has)) if rank(asked) < rank(has) => {
                journal.tighten(tightenings::EXEC_POLICY, "lowered to the container's");
                Some(has)
            }
            (asked, has) => asked.or(has),
        };
        let io_priority = match (self.io_priority, own.io_priority) {
            (Some(asked), Some(has)) if asked < has => {
                journal.tighten(tightenings::EXEC_IO, "lowered to the container's");
                Some(has)
            }
            (asked, has) => asked.or(has),
        };
        Self {
            scheduler,
            io_priority,
            exec_cpus: if self.exec_cpus.is_empty() {
                own.exec_cpus.clone()
            } else {
                self.exec_cpus
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_processors_is_read_or_refused() {
        assert_eq!(cpus("f", "0-3,7,2").unwrap(), [0, 1, 2, 3, 7]);
        assert!(cpus("f", "").unwrap().is_empty());
        for bad in ["3-1", "x", "0-", "-1", "8192", "0-99999", "1;2"] {
            assert!(cpus("f", bad).is_err(), "{bad}");
        }
    }
}

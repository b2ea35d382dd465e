//! Whether there may be an exec, and that it asks for no more than its container
//! did. What an exec *gets* is cut to the container's in any case; one that asks
//! for more is refused, as whoever asked counted on it.

use oci_spec::runtime::Process;

use crate::caps::{self, Caps};
use crate::config::{Exec, ExecPolicy, ExecUsers};
use crate::error::Refusal;
use crate::process::ProcessSpec;
use crate::rules::{EXEC_CAPABILITIES, EXEC_DENIED, EXEC_TERMINAL, EXEC_USER};
use crate::tighten::Tightened;

/// Before anything else: whether there are execs at all, and the terminal.
pub(crate) fn admit(container: &Tightened, config: &Exec, terminal: bool) -> Result<(), Refusal> {
    if container.effective.exec == ExecPolicy::Deny {
        // Where it comes from tells whom to ask.
        let from = match container.asked.exec {
            Some(_) => "annotations[casemate.io/exec]",
            None => "exec.policy",
        };
        return Err(Refusal::new(&EXEC_DENIED, from, ""));
    }
    if terminal && !config.terminal {
        return Err(Refusal::new(&EXEC_TERMINAL, "exec.terminal", ""));
    }
    Ok(())
}

/// Whether `exec`, made of `written`, is no more than the container's process.
pub(crate) fn contain(
    written: &Process,
    exec: &ProcessSpec,
    container: &Tightened,
    config: &Exec,
) -> Result<(), Refusal> {
    let asked = written
        .capabilities()
        .as_ref()
        .map(|sets| Caps::from(sets).union())
        .unwrap_or_default();
    let more = asked & caps::ALL & !container.asked_capabilities;
    if more != 0 {
        let detail = caps::names(more).join(", ");
        return Err(Refusal::new(
            &EXEC_CAPABILITIES,
            "process.capabilities",
            detail,
        ));
    }
    if config.users == ExecUsers::Container {
        let own = &container.process;
        let no = |field: &str, id: u32| {
            let field = format!("process.user.{field}");
            Err(Refusal::new(&EXEC_USER, field, id.to_string()))
        };
        if exec.uid != own.uid {
            return no("uid", exec.uid);
        }
        if exec.gid != own.gid {
            return no("gid", exec.gid);
        }
        let others = &own.additional_gids;
        let foreign = |gid: &&u32| **gid != own.gid && !others.contains(*gid);
        if let Some(gid) = exec.additional_gids.iter().find(foreign) {
            return no("additionalGids", *gid);
        }
    }
    Ok(())
}

//! What processes of a container inherit from its forker, and the shim has set there:
//! some of it takes the host's privilege.

use casemate_protocol::plan::ProcessPlan;
use casemate_spec::{Config, ProcessSpec, secrets};
use casemate_sys::process;

use super::SandboxError;
use crate::host::Step;
use crate::plan;

/// The OOM score that all processes of the container inherit from the forker.
pub fn set_oom_score(pid: u32, score: i32, config: &Config) -> Result<(), SandboxError> {
    let path = format!("/proc/{pid}/oom_score_adj");
    let Err(error) = std::fs::write(&path, score.to_string()) else {
        return Ok(());
    };
    if !config.fallback.without_oom_score_adj {
        return Err(SandboxError::Failed(format!(
            "set process.oomScoreAdj to {score}: {error}; run containerd with CAP_SYS_RESOURCE, or \
             set fallback.without_oom_score_adj = true in config.toml"
        )));
    }
    log::warn!("process.oomScoreAdj {score} can't be set ({error}); left as it is");
    Ok(())
}

/// Limits above the forker's own hard ones need the host's privilege: they are
/// set on the forker by the shim, and inherited; the rest by the child. That of core
/// files is always the shim's: the child's filter has it stay as it is.
pub fn process_plan(
    spec: &ProcessSpec,
    filter: &(Vec<u8>, u32),
    parents: &[u32],
) -> Result<ProcessPlan, SandboxError> {
    let mut plan = plan::process(spec, filter);
    plan.limits.retain(|limit| {
        let own = process::get_limit(limit.resource).map_or(0, |(_, hard)| hard);
        limit.hard <= own && limit.resource != secrets::RLIMIT_CORE
    });
    for limit in &spec.rlimits {
        if plan.limits.iter().any(|l| l.resource == limit.resource) {
            continue;
        }
        for pid in parents {
            process::set_limit(*pid, limit.resource, limit.soft, limit.hard).step(
                "set process.rlimits above those of containerd, which takes CAP_SYS_RESOURCE: \
                 resource",
                format!("{} to {}", limit.resource, limit.hard),
            )?;
        }
    }
    Ok(plan)
}

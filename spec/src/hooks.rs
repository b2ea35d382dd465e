//! OCI hooks: programs that a specification has run at turns of a container's
//! life (config.md, "POSIX-platform Hooks").

use std::fmt;

use oci_spec::runtime::{Hook, Spec};

use crate::config;
use crate::error::{Refusal, one_line};
use crate::load::{Kind, PodIdentity};
use crate::paths::plain_absolute;
use crate::rules::{HOOK_FORM, HOOK_PAUSE, HOOKS};

/// One hook.
#[derive(Clone, PartialEq, Eq)]
pub struct HookSpec {
    /// Where it is written, as in `hooks.poststop[0]`.
    pub field: String,
    /// Plain absolute path of the program.
    pub path: String,
    /// Its arguments, the first of which is its name; never empty.
    pub args: Vec<String>,
    /// `NAME=value` entries.
    pub env: Vec<String>,
    /// Seconds that it may take, within `hooks.timeout`.
    pub timeout: u32,
}

// Arguments and environments hold secrets: `{:?}` must not print them.
impl fmt::Debug for HookSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HookSpec")
            .field("field", &self.field)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// The hooks of a container, each list in its order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HookSpecs {
    /// Before init is born, in the host's namespaces: `prestart`, then
    /// `createRuntime`.
    pub before_init: Vec<HookSpec>,
    /// Before the change of root, in the container's namespaces.
    pub create_container: Vec<HookSpec>,
    /// Before init executes, in the container.
    pub start_container: Vec<HookSpec>,
    /// After init has executed, in the host's namespaces.
    pub poststart: Vec<HookSpec>,
    /// After the container is gone, in the host's namespaces.
    pub poststop: Vec<HookSpec>,
}

impl HookSpecs {
    /// Whether something is to be done before the container's root is changed.
    #[must_use]
    pub fn wait_before_root(&self) -> bool {
        !(self.before_init.is_empty() && self.create_container.is_empty())
    }

    /// Whether a program of the node is to be run by the shim.
    #[must_use]
    pub fn on_node(&self) -> bool {
        !(self.before_init.is_empty() && self.poststart.is_empty() && self.poststop.is_empty())
    }
}

/// Checks all hooks.
pub(crate) fn check(
    spec: &Spec,
    pod: &PodIdentity,
    policy: &config::Hooks,
) -> Result<HookSpecs, Refusal> {
    let Some(hooks) = spec.hooks() else {
        return Ok(HookSpecs::default());
    };
    let all = |kind: &str, hooks: &Option<Vec<Hook>>| -> Result<Vec<HookSpec>, Refusal> {
        let each = hooks.iter().flatten().enumerate();
        each.map(|(i, hook)| one(&format!("hooks.{kind}[{i}]"), hook, policy))
            .collect()
    };
    #[allow(deprecated, reason = "still written by some")]
    let mut before_init = all("prestart", hooks.prestart())?;
    before_init.extend(all("createRuntime", hooks.create_runtime())?);
    let specs = HookSpecs {
        before_init,
        create_container: all("createContainer", hooks.create_container())?,
        start_container: all("startContainer", hooks.start_container())?,
        poststart: all("poststart", hooks.poststart())?,
        poststop: all("poststop", hooks.poststop())?,
    };
    if pod.kind == Kind::Sandbox && specs != HookSpecs::default() {
        return Err(Refusal::new(&HOOK_PAUSE, "hooks", ""));
    }
    Ok(specs)
}

fn one(field: &str, hook: &Hook, policy: &config::Hooks) -> Result<HookSpec, Refusal> {
    let written = hook.path().to_string_lossy();
    let shown = one_line(&written);
    let no = |detail: String| Err(Refusal::new(&HOOK_FORM, field, detail));
    let path = match plain_absolute(&written) {
        Ok(path) => path,
        Err(why) => return no(format!("{shown} is {why}")),
    };
    let args = match hook.args().clone().unwrap_or_default() {
        empty if empty.is_empty() => vec![path.clone()],
        args => args,
    };
    let env = hook.env().clone().unwrap_or_default();
    // Values may be secrets and aren't shown.
    if args.iter().any(|a| a.contains('\0')) {
        return no(format!("{shown}: an argument has a NUL in it"));
    }
    if env
        .iter()
        .any(|e| e.contains('\0') || e.find('=').is_none_or(|at| at == 0))
    {
        return no(format!("{shown}: a variable is not NAME=value"));
    }
    let timeout = match hook.timeout() {
        None => policy.timeout,
        Some(seconds) if seconds < 1 => return no(format!("{shown}: timeout {seconds}")),
        Some(seconds) => u32::try_from(seconds).map_or(policy.timeout, |s| s.min(policy.timeout)),
    };
    // Not a program of the node, and no more than the container may anyway.
    let inside = field.starts_with("hooks.startContainer");
    if !inside && !policy.allows(&path) {
        return Err(Refusal::new(&HOOKS, field, shown));
    }
    Ok(HookSpec {
        field: field.to_owned(),
        path,
        args,
        env,
        timeout,
    })
}

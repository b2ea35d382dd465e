//! Labels of AppArmor and SELinux: applied where the node takes them, refused
//! elsewhere. Nothing is ever started without a confinement that was asked for.

use oci_spec::runtime::{Linux, Spec};

use crate::error::Refusal;
use crate::process::ProcessSpec;
use crate::rules::{APPARMOR, Rule, SELINUX};
use crate::tighten::Context;

/// What a security module of the node makes of the labels that [`asked`] names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Lsm<'a> {
    /// The module isn't on.
    #[default]
    Missing,
    /// It takes them.
    Takes,
    /// It is on and can't: why.
    Refuses(&'a str),
}

/// The labels of a specification, for which a node must be asked.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// `process.apparmorProfile`, if it confines.
    pub apparmor: Option<String>,
    /// `process.selinuxLabel` and `linux.mountLabel`.
    pub selinux: Vec<String>,
}

/// What `spec` asks for.
pub fn asked(spec: &Spec) -> Asked {
    let process = spec.process().as_ref();
    let linux = spec.linux().as_ref();
    let process_label = process.and_then(|p| label(p.selinux_label().as_deref()));
    let mount_label = linux.and_then(|l| label(l.mount_label().as_deref()));
    Asked {
        apparmor: process.and_then(|p| profile(p.apparmor_profile().as_deref())),
        selinux: process_label.into_iter().chain(mount_label).collect(),
    }
}

/// An empty profile and `unconfined` ask for nothing.
pub(crate) fn profile(text: Option<&str>) -> Option<String> {
    label(text.filter(|t| *t != "unconfined"))
}

/// An empty label asks for nothing.
pub(crate) fn label(text: Option<&str>) -> Option<String> {
    text.filter(|t| !t.is_empty()).map(str::to_owned)
}

/// Checks the labels of a container; returns that of its mounts.
pub(crate) fn check(
    process: &ProcessSpec,
    linux: &Linux,
    context: &Context<'_>,
) -> Result<Option<String>, Refusal> {
    let mounts = label(linux.mount_label().as_deref());
    for (rule, field, wanted, module) in [
        (
            &APPARMOR,
            "process.apparmorProfile",
            &process.apparmor_profile,
            context.apparmor,
        ),
        (
            &SELINUX,
            "process.selinuxLabel",
            &process.selinux_label,
            context.selinux,
        ),
        (&SELINUX, "linux.mountLabel", &mounts, context.selinux),
    ] {
        if let Some(wanted) = wanted {
            one(rule, field, wanted, module)?;
        }
    }
    Ok(mounts)
}

/// The longest label: the kernel takes a page, with a word of ours before it.
const LONGEST: usize = 4000;

fn one(rule: &'static Rule, field: &str, wanted: &str, module: Lsm<'_>) -> Result<(), Refusal> {
    let refusal = |why: &str| Err(Refusal::new(rule, field, format!("{wanted}{why}")));
    if wanted.len() > LONGEST || wanted.chars().any(char::is_control) {
        return refusal(" (it is too long, or has control characters)");
    }
    match module {
        Lsm::Takes => Ok(()),
        Lsm::Missing => refusal(""),
        Lsm::Refuses(why) => refusal(&format!(" ({why})")),
    }
}

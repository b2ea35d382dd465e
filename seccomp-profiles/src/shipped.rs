//! The profiles under `profiles/`, compiled when the crate is built.

use std::borrow::Cow;

use crate::action::Action;
use crate::compile::Form;
use crate::explain::{Explainer, RuleInfo};
use crate::profile::Profile;
use crate::program::Program;

/// What a file under `profiles/` compiled to.
struct Shipped {
    name: &'static str,
    enforce: &'static [u8],
    notify: &'static [u8],
    explain: &'static [u8],
    rules: &'static [RuleInfo],
}

// `static SHIPPED: &[Shipped]` and, apart from it so that who needs no text carries
// none, `static TEXTS: &[(&str, &str)]`. Written by the build script, which fails
// the build when a profile does not compile.
include!(concat!(env!("OUT_DIR"), "/shipped.rs"));

fn find(name: &str) -> Option<&'static Shipped> {
    SHIPPED.iter().find(|shipped| shipped.name == name)
}

/// The names of the shipped profiles, in alphabetical order.
pub fn shipped_names() -> impl Iterator<Item = &'static str> {
    SHIPPED.iter().map(|shipped| shipped.name)
}

/// A shipped profile by name, read from its text.
#[must_use]
pub fn shipped(name: &str) -> Option<Profile> {
    Profile::from_toml(shipped_text(name)?).ok()
}

/// The file of a shipped profile.
#[must_use]
pub fn shipped_text(name: &str) -> Option<&'static str> {
    let (_, text) = TEXTS.iter().find(|(known, _)| *known == name)?;
    Some(text)
}

/// A shipped profile as an array of `struct sock_filter`, ready for seccomp(2).
#[must_use]
pub fn shipped_program(name: &str) -> Option<&'static [u8]> {
    shipped_program_as(name, Form::Enforce)
}

/// As [`shipped_program`], in another form.
#[must_use]
pub fn shipped_program_as(name: &str, form: Form) -> Option<&'static [u8]> {
    let shipped = find(name)?;
    Some(match form {
        Form::Enforce => shipped.enforce,
        Form::Notify => shipped.notify,
        Form::Explain => shipped.explain,
    })
}

/// The [`Explainer`] of a shipped profile.
#[must_use]
pub fn shipped_explainer(name: &str) -> Option<Explainer> {
    let shipped = find(name)?;
    let program = Program::from_bytes(shipped.explain)?;
    Some(Explainer::from_parts(program, shipped.rules.into()))
}

//! Profiles ready for use: in all forms, with what explains them.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::compile::{CompileError, Form, compile_as};
use crate::explain::{Explainer, rules};
use crate::graph::TooLarge;
use crate::hash::Hash;
use crate::marked;
use crate::profile::Profile;
use crate::program::Program;
use crate::shipped::{shipped_explainer, shipped_program_as};

/// A profile in all forms: what is compiled into this binary, or a file that was
/// compiled when it was read.
#[derive(Debug, Clone)]
pub struct Prepared {
    name: String,
    enforce: Cow<'static, [u8]>,
    notify: Cow<'static, [u8]>,
    explain: Cow<'static, [u8]>,
    explainer: Explainer,
    marked: Option<Marked>,
    /// The file it was read from, and the shipped profile that it is within.
    node: Option<(PathBuf, String)>,
}

/// What is installed in a profile's place where the forker's calls have to be told from
/// the workload's: see [`crate::marked`].
#[derive(Debug, Clone)]
pub struct Marked {
    /// In place of [`Form::Enforce`].
    pub enforce: Vec<u8>,
    /// In place of [`Form::Notify`].
    pub notify: Vec<u8>,
    /// The last filter of each process.
    pub closes: Vec<u8>,
}

impl Marked {
    fn of(enforce: &Program, notify: &Program) -> Result<Option<Self>, TooLarge> {
        let all = (
            marked::open(enforce)?,
            marked::open(notify)?,
            marked::close(&[enforce], None)?,
        );
        let (Some(enforce), Some(notify), Some(closes)) = all else {
            return Ok(None);
        };
        Ok(Some(Self {
            enforce: enforce.to_bytes(),
            notify: notify.to_bytes(),
            closes: closes.to_bytes(),
        }))
    }
}

impl Prepared {
    /// A shipped profile: nothing is compiled.
    #[must_use]
    pub fn shipped(name: &str) -> Option<Self> {
        let program = |form| shipped_program_as(name, form).map(Cow::Borrowed);
        Some(Self {
            name: name.to_owned(),
            enforce: program(Form::Enforce)?,
            notify: program(Form::Notify)?,
            explain: program(Form::Explain)?,
            explainer: shipped_explainer(name)?,
            // They have all that a forker calls: a test sees to it.
            marked: None,
            node: None,
        })
    }

    /// Compiles any profile.
    ///
    /// # Errors
    /// As [`crate::compile()`].
    pub fn of(profile: &Profile) -> Result<Self, CompileError> {
        let explain = compile_as(profile, Form::Explain)?;
        let enforce = compile_as(profile, Form::Enforce)?;
        let notify = compile_as(profile, Form::Notify)?;
        Ok(Self {
            name: profile.name.clone(),
            marked: Marked::of(&enforce, &notify)?,
            enforce: Cow::Owned(enforce.to_bytes()),
            notify: Cow::Owned(notify.to_bytes()),
            explain: Cow::Owned(explain.to_bytes()),
            explainer: Explainer::from_parts(explain, rules(profile).into()),
            node: None,
        })
    }

    /// The same, as one of the node's: of this file, within a shipped one.
    #[must_use]
    pub fn of_node(mut self, file: &Path, within: &str) -> Self {
        self.node = Some((file.to_owned(), within.to_owned()));
        self
    }

    /// Of one of the node's, its file and the shipped profile that it is within.
    #[must_use]
    pub fn node(&self) -> Option<(&Path, &str)> {
        let (file, within) = self.node.as_ref()?;
        Some((file, within))
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its program, as an array of `struct sock_filter`.
    #[must_use]
    pub fn program(&self, form: Form) -> &[u8] {
        match form {
            Form::Enforce => &self.enforce,
            Form::Notify => &self.notify,
            Form::Explain => &self.explain,
        }
    }

    /// What is to be installed in its place, where it lacks calls of the forker's.
    #[must_use]
    pub fn marked(&self) -> Option<&Marked> {
        self.marked.as_ref()
    }

    /// Of the filter that binds: what tells two profiles of one name apart.
    #[must_use]
    pub fn hash(&self) -> Hash {
        Hash::of(&self.enforce)
    }

    /// Says which rule refuses a call.
    #[must_use]
    pub fn explainer(&self) -> &Explainer {
        &self.explainer
    }
}

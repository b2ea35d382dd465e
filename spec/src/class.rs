//! The class of a pod: which runtime handler it was asked for by.
//!
//! A handler is the node's configuration, and so the operator's word; a pod only
//! names one. containerd tells a shim nothing of the handler's name, but runs it by
//! the name that the handler gives: `containerd-shim-casemate-strict-v2`, a link to
//! the one program.

use crate::annotations::Key;
use crate::config::{Config, Profile};

/// Begins the name of the shim's program.
const BEGIN: &str = "containerd-shim-casemate";
/// Ends it.
const END: &str = "-v2";

/// What the program's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Class {
    /// The node's configuration decides.
    #[default]
    Node,
    /// `strict`, whatever the node's configuration lets pods ask for.
    Strict,
    /// `compat`: that the handler is there is the operator's leave.
    Compat,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Node, Self::Strict, Self::Compat];

    /// As handlers and programs have it at the end; empty for the node's own.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "",
            Self::Strict => "strict",
            Self::Compat => "compat",
        }
    }

    /// Of a program's file name. One that isn't of the form says nothing.
    ///
    /// # Errors
    /// The class, where there is none of that name: it would be a handler that
    /// holds pods less than its operator means.
    pub fn of_program(name: &str) -> Result<Self, String> {
        let class = name.strip_prefix(BEGIN).and_then(|n| n.strip_suffix(END));
        let Some(class) = class else {
            return Ok(Self::Node);
        };
        let class = class.strip_prefix('-').unwrap_or(class);
        Self::of(class).ok_or_else(|| class.to_owned())
    }

    /// The one of that name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.name() == name)
    }

    /// The shim's program for it.
    #[must_use]
    pub fn program(self) -> String {
        format!("{BEGIN}{}{END}", self.suffix())
    }

    /// What a handler's name, or a runtime's, has at its end for it.
    #[must_use]
    pub fn suffix(self) -> String {
        match self {
            Self::Node => String::new(),
            class => format!("-{}", class.name()),
        }
    }

    /// The node's configuration, for pods of this class.
    #[must_use]
    pub fn applied_to(self, mut config: Config) -> Config {
        match self {
            Self::Node => {}
            Self::Strict => {
                config.profile = Profile::Strict;
                config.annotations.allow.retain(|key| *key != Key::Profile);
            }
            Self::Compat => config.profile = Profile::Compat,
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::annotations::Annotations;

    #[test]
    fn a_program_is_of_the_class_that_its_name_has() {
        for class in Class::ALL {
            assert_eq!(Class::of_program(&class.program()), Ok(class));
        }
        assert_eq!(
            Class::Strict.program(),
            "containerd-shim-casemate-strict-v2"
        );
        assert_eq!(Class::Node.program(), "containerd-shim-casemate-v2");
        // A copy with a name of its own, as tests and distributions make them.
        for other in ["shim", "containerd-shim-runc-v2", ""] {
            assert_eq!(Class::of_program(other), Ok(Class::Node), "{other}");
        }
        let misspelt = Class::of_program("containerd-shim-casemate-strct-v2");
        assert_eq!(misspelt, Err("strct".to_owned()));
    }

    #[test]
    fn a_pod_of_the_strict_class_stays_so() {
        let asks = |value: &str, config: &Config| {
            let all = [("casemate.io/profile".to_owned(), value.to_owned())].into();
            Annotations::read(&all).unwrap().under(config, &[])
        };
        let mut node = Config::default();
        node.annotations.allow.push(Key::Profile);
        // On this node a pod may ask for compat, but not by this class.
        assert_eq!(asks("compat", &node).unwrap().profile, Profile::Compat);
        let strict = Class::Strict.applied_to(node.clone());
        assert!(asks("default", &strict).is_err());
        assert!(asks("compat", &strict).is_err());
        assert_eq!(asks("strict", &strict).unwrap().profile, Profile::Strict);
        assert_eq!(Class::Node.applied_to(node.clone()), node);
    }

    #[test]
    fn a_pod_of_the_compat_class_can_be_held_tighter() {
        let compat = Class::Compat.applied_to(Config::default());
        let none = Annotations::default().under(&compat, &[]).unwrap();
        assert_eq!(none.profile, Profile::Compat);
        let all = [("casemate.io/profile".to_owned(), "strict".to_owned())].into();
        let asked = Annotations::read(&all).unwrap().under(&compat, &[]);
        assert_eq!(asked.unwrap().profile, Profile::Strict);
    }
}

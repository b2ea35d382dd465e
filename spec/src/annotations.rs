//! `casemate.io/…`: what a pod or a container asks of its sandbox, by annotation.
//!
//! Who writes a pod isn't who answers for the node, so an annotation only
//! tightens, unless `annotations.allow` of the node's configuration names its
//! key. A container's counts within its pod's.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::caps;
use crate::config::{Config, ExecPolicy, Profile};
use crate::error::{Refusal, one_line};
use crate::rules::{ANNOTATION_KEY, ANNOTATION_LOOSENS, ANNOTATION_POD, ANNOTATION_VALUE, LEARN};

/// What all our annotations begin with.
pub const PREFIX: &str = "casemate.io/";

/// Longest value that is read; that of a list of addresses.
const LONGEST: usize = 8192;

/// An annotation of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Key {
    /// Which system-call profile.
    Profile,
    /// Whether execs are allowed, recorded, denied.
    Exec,
    /// Whether the pod gets its token.
    ServiceAccountToken,
    /// Where connections may go.
    Egress,
    /// Where connections may come from.
    Ingress,
    /// The most capabilities.
    Capabilities,
}

impl Key {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Profile,
        Self::Exec,
        Self::ServiceAccountToken,
        Self::Egress,
        Self::Ingress,
        Self::Capabilities,
    ];

    /// Without the prefix.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Profile => "profile",
            Self::Exec => "exec",
            Self::ServiceAccountToken => "service-account-token",
            Self::Egress => "egress",
            Self::Ingress => "ingress",
            Self::Capabilities => "capabilities",
        }
    }

    /// What a value looks like.
    #[must_use]
    pub fn form(self) -> &'static str {
        match self {
            Self::Profile => "strict, default, compat, learn or the name of a profile of the node",
            Self::Exec => "allow, record or deny",
            Self::ServiceAccountToken => "withhold",
            Self::Egress | Self::Ingress => "not empty, and at most 8192 bytes",
            Self::Capabilities => "none, or names as in capabilities(7) with commas between",
        }
    }

    fn field(self) -> String {
        format!("annotations[{self}]")
    }

    fn loosens(self, detail: impl fmt::Display) -> Refusal {
        Refusal::new(&ANNOTATION_LOOSENS, self.field(), detail.to_string())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.name())
    }
}

/// A profile by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProfileName {
    /// One of the shipped ones.
    Shipped(Profile),
    /// One that the node has beside them.
    Named(String),
    /// The node's own, and what is called under it is written down.
    Learn,
}

impl fmt::Display for ProfileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shipped(profile) => f.write_str(profile.name()),
            Self::Named(name) => f.write_str(name),
            Self::Learn => f.write_str("learn"),
        }
    }
}

/// A profile that the node has beside the shipped ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeProfile {
    /// Its name.
    pub name: String,
    /// The narrowest shipped profile that allows all that it does.
    pub within: Profile,
}

/// All annotations of one document, typed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Annotations {
    /// `casemate.io/profile`.
    pub profile: Option<ProfileName>,
    /// `casemate.io/exec`.
    pub exec: Option<ExecPolicy>,
    /// `casemate.io/service-account-token` is `withhold`.
    pub withhold_token: bool,
    /// `casemate.io/egress`, as written.
    pub egress: Option<String>,
    /// `casemate.io/ingress`, as written.
    pub ingress: Option<String>,
    /// `casemate.io/capabilities`, as a mask.
    pub capabilities: Option<u64>,
}

/// What the configuration and the annotations come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// What is asked of the workload; of a profile of the node, the shipped one
    /// that it is within.
    pub profile: Profile,
    /// Which filter.
    pub profile_name: String,
    /// What is called under it is written down.
    pub learn: bool,
    /// What becomes of execs.
    pub exec: ExecPolicy,
    /// The most capabilities.
    pub capabilities: u64,
}

impl Annotations {
    /// Picks ours out of a document's annotations.
    ///
    /// # Errors
    /// A key with our prefix that doesn't exist, or a value that makes no sense.
    pub fn read(all: &BTreeMap<String, String>) -> Result<Self, Refusal> {
        let mut read = Self::default();
        for (written, value) in all {
            let Some(name) = written.strip_prefix(PREFIX) else {
                continue;
            };
            let Some(key) = Key::ALL.into_iter().find(|k| k.name() == name) else {
                return Err(Refusal::new(&ANNOTATION_KEY, "annotations", written));
            };
            read.set(key, value).ok_or_else(|| {
                let detail = format!("{} is not {}", one_line(&quoted(value)), key.form());
                Refusal::new(&ANNOTATION_VALUE, key.field(), detail)
            })?;
        }
        Ok(read)
    }

    fn set(&mut self, key: Key, value: &str) -> Option<()> {
        match key {
            Key::Profile => self.profile = Some(profile(value)?),
            Key::Exec => self.exec = Some(ExecPolicy::of(value)?),
            Key::ServiceAccountToken if value == "withhold" => self.withhold_token = true,
            Key::ServiceAccountToken => return None,
            Key::Egress => self.egress = Some(text(value)?),
            Key::Ingress => self.ingress = Some(text(value)?),
            Key::Capabilities => self.capabilities = Some(mask(value)?),
        }
        Some(())
    }

    /// A container's, within those of its pod: what the pod says holds, and the
    /// container may say more of the same.
    ///
    /// # Errors
    /// One that would loosen what the pod says, or that only a pod can have.
    pub fn within(self, pod: &Self) -> Result<Self, Refusal> {
        for (key, own, pods) in [
            (Key::Egress, &self.egress, &pod.egress),
            (Key::Ingress, &self.ingress, &pod.ingress),
        ] {
            if own.is_some() && own != pods {
                return Err(Refusal::new(&ANNOTATION_POD, key.field(), ""));
            }
        }
        let profile = match (self.profile, &pod.profile) {
            (own, None) => own,
            (None, pods) => pods.clone(),
            (Some(own), Some(pods)) if own == *pods => Some(own),
            // What a profile of the node has in it isn't known here.
            (Some(ProfileName::Shipped(own)), Some(ProfileName::Shipped(pods))) if own < *pods => {
                Some(ProfileName::Shipped(own))
            }
            (Some(own), Some(pods)) => {
                let detail = format!("{own}, where the pod's is {pods}");
                return Err(Key::Profile.loosens(detail));
            }
        };
        let exec = match (self.exec, pod.exec) {
            (Some(own), Some(pods)) if own > pods => {
                let detail = format!("{}, where the pod's is {}", own.name(), pods.name());
                return Err(Key::Exec.loosens(detail));
            }
            (own, pods) => own.or(pods),
        };
        let capabilities = match (self.capabilities, pod.capabilities) {
            (Some(own), Some(pods)) if own & !pods != 0 => {
                let more = caps::names(own & !pods).join(", ");
                return Err(Key::Capabilities.loosens(format!("{more}, which the pod's lacks")));
            }
            (own, pods) => own.or(pods),
        };
        Ok(Self {
            profile,
            exec,
            withhold_token: self.withhold_token || pod.withhold_token,
            egress: pod.egress.clone(),
            ingress: pod.ingress.clone(),
            capabilities,
        })
    }

    /// What they come to under the node's configuration. `profiles` are those
    /// that the node has beside the shipped ones.
    ///
    /// # Errors
    /// One that would loosen what the configuration says, without leave.
    pub fn under(&self, config: &Config, profiles: &[NodeProfile]) -> Result<Effective, Refusal> {
        let may = |key| config.annotations.allow.contains(&key);
        let mut effective = Effective {
            profile: config.profile,
            profile_name: config.profile.name().to_owned(),
            learn: false,
            exec: config.exec.policy,
            capabilities: config.capabilities.allow,
        };
        if self.profile == Some(ProfileName::Learn) {
            // Nothing is looser by it: the node's own profile holds.
            if !config.learn.allow {
                return Err(Refusal::new(&LEARN, Key::Profile.field(), ""));
            }
            effective.learn = true;
        } else if let Some(asked) = &self.profile {
            let profile = match asked {
                ProfileName::Shipped(profile) => *profile,
                ProfileName::Learn => config.profile,
                ProfileName::Named(name) => match profiles.iter().find(|p| p.name == *name) {
                    Some(profile) => profile.within,
                    None => {
                        let file = config.profiles.directory.join(format!("{name}.toml"));
                        let detail = format!(
                            "{name} is no profile of this node, as there is no {}",
                            file.display()
                        );
                        return Err(Refusal::new(
                            &ANNOTATION_VALUE,
                            Key::Profile.field(),
                            detail,
                        ));
                    }
                },
            };
            if profile > config.profile && !may(Key::Profile) {
                let detail = format!("{asked}, where the node's is {}", config.profile.name());
                return Err(Key::Profile.loosens(detail));
            }
            effective.profile = profile;
            effective.profile_name = asked.to_string();
        }
        if let Some(asked) = self.exec {
            if asked > config.exec.policy && !may(Key::Exec) {
                let node = config.exec.policy.name();
                let detail = format!("{}, where the node's is {node}", asked.name());
                return Err(Key::Exec.loosens(detail));
            }
            effective.exec = asked;
        }
        if let Some(asked) = self.capabilities {
            let more = asked & !config.capabilities.allow;
            if more != 0 && !may(Key::Capabilities) {
                let detail = format!(
                    "{}, which the node's list lacks",
                    caps::names(more).join(", ")
                );
                return Err(Key::Capabilities.loosens(detail));
            }
            effective.capabilities = asked;
        }
        Ok(effective)
    }
}

fn quoted(value: &str) -> String {
    if value.is_empty() {
        "\"\"".to_owned()
    } else {
        value.to_owned()
    }
}

fn profile(value: &str) -> Option<ProfileName> {
    if let Some(shipped) = Profile::of(value) {
        return Some(ProfileName::Shipped(shipped));
    }
    if value == "learn" {
        return Some(ProfileName::Learn);
    }
    // The name of a file, and of nothing else.
    let good = !value.is_empty()
        && value.len() <= 63
        && !value.starts_with('-')
        && value
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    good.then(|| ProfileName::Named(value.to_owned()))
}

fn text(value: &str) -> Option<String> {
    let value = value.trim();
    let good = !value.is_empty() && value.len() <= LONGEST && !value.contains('\0');
    good.then(|| value.to_owned())
}

fn mask(value: &str) -> Option<u64> {
    if value == "none" {
        return Some(0);
    }
    value.split(',').try_fold(0, |mask, name| {
        caps::number(name.trim()).map(|n| mask | 1 << n)
    })
}

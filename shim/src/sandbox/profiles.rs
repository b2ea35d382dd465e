//! The profiles of a pod's containers. One of the node's is read when the pod first
//! asks for it, and stays what it was for as long as the pod lives.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use casemate_spec::annotations::{NodeProfile, ProfileName};
use casemate_spec::{Annotations, Config, Profile};
use seccomp_profiles::Prepared;
use seccomp_profiles::node::{self, NodeFile};

use super::SandboxError;

/// Of one pod.
pub struct Profiles {
    directory: PathBuf,
    known: Mutex<BTreeMap<String, Arc<NodeFile>>>,
    /// Names are taken for those of profiles, whatever there is.
    any: bool,
}

impl Profiles {
    /// Of a pod under this configuration.
    pub fn new(config: &Config) -> Profiles {
        Profiles {
            directory: config.profiles.directory.clone(),
            known: Mutex::default(),
            any: false,
        }
    }

    /// For a document that was accepted, and of which nothing will be started.
    pub fn any(config: &Config) -> Profiles {
        Profiles {
            any: true,
            ..Profiles::new(config)
        }
    }

    /// One of the node's, if it has one of this name.
    fn named(&self, name: &str) -> Result<Option<Arc<NodeFile>>, SandboxError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = known.get(name) {
            return Ok(Some(file.clone()));
        }
        match node::read(&self.directory, name) {
            Ok(file) => {
                let file = Arc::new(file);
                known.insert(name.to_owned(), file.clone());
                Ok(Some(file))
            }
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(SandboxError::Failed(format!("profile {name}: {error}"))),
        }
    }

    /// What the policy must know of a profile of the node that a document asks for.
    pub fn asked(
        &self,
        annotations: &BTreeMap<String, String>,
        pod: Option<&Annotations>,
    ) -> Result<Vec<NodeProfile>, SandboxError> {
        let own = Annotations::read(annotations)?.profile;
        let Some(ProfileName::Named(name)) = own.or_else(|| pod.and_then(|p| p.profile.clone()))
        else {
            return Ok(Vec::new());
        };
        let within = match self.any {
            true => Some(Profile::Strict),
            false => {
                let file = self.named(&name)?;
                file.and_then(|file| Profile::of(&file.within))
            }
        };
        let known = within.map(|within| NodeProfile { name, within });
        Ok(known.into_iter().collect())
    }

    /// The profile of this name, which the policy has granted.
    pub fn get(&self, name: &str) -> Result<Arc<Prepared>, SandboxError> {
        if let Some(shipped) = Prepared::shipped(name) {
            return Ok(Arc::new(shipped));
        }
        match self.named(name)? {
            Some(file) => Ok(Arc::new(file.prepared.clone())),
            None => Err(SandboxError::Failed(format!(
                "profile {name} has gone from {}; put it back",
                self.directory.display()
            ))),
        }
    }
}

//! User namespaces that a container asks for, against those its pod has.
//!
//! Containers always live in the pod's own namespace B. What a specification
//! says counts as a mapping only: it must be the pod's, and a path must lead to
//! the namespace that was pinned for the pod, or to B (as the pause's does).

use std::os::fd::OwnedFd;

use casemate_spec::PodUsers;

use super::SandboxError;
use crate::host::Step;
use crate::host::users;

/// Ids that somebody else chose for the pod.
pub struct Chosen {
    /// Host id of the containers' root.
    first: u32,
    /// The namespace that was made for the pod, if there is one. Held, so that no
    /// other can have its number.
    pinned: Option<OwnedFd>,
}

impl Chosen {
    /// What the pod's own specification says, verified.
    pub fn of(wanted: Option<&PodUsers>) -> Result<Option<Chosen>, SandboxError> {
        let Some(wanted) = wanted else {
            return Ok(None);
        };
        let open = |path: &String| users::open(path, wanted.first);
        Ok(Some(Chosen {
            first: wanted.first,
            pinned: wanted.path.as_ref().map(open).transpose()?,
        }))
    }

    /// Host id of the containers' root.
    pub fn first(&self) -> u32 {
        self.first
    }

    /// The namespace that was made for the pod.
    pub fn pinned(&self) -> Option<&OwnedFd> {
        self.pinned.as_ref()
    }
}

/// Checks what a container's specification says. `own` is B.
pub fn check(
    wanted: Option<&PodUsers>,
    pod: Option<&Chosen>,
    own: &OwnedFd,
) -> Result<(), SandboxError> {
    let (wanted, pod) = match (wanted, pod) {
        (None, None) => return Ok(()),
        (Some(wanted), Some(pod)) if wanted.first == pod.first => (wanted, pod),
        (wanted, pod) => {
            let says = |first: Option<u32>| match first {
                Some(first) => format!("host ids from {first}"),
                None => "no host ids".to_owned(),
            };
            return Err(SandboxError::Invalid(format!(
                "the container asks for {} (linux.uidMappings), and its pod has {}; containers of \
                 a pod share the pod's ids",
                says(wanted.map(|w| w.first)),
                match pod {
                    Some(pod) => says(Some(pod.first)),
                    None => "ids that casemate chose".to_owned(),
                }
            )));
        }
    };
    let Some(path) = &wanted.path else {
        return Ok(());
    };
    let is = rustix::fs::stat(path.as_str()).step("look at user namespace", path)?;
    let own = rustix::fs::fstat(own).step("look at", "user namespace")?;
    let pinned = match &pod.pinned {
        Some(pinned) => Some(rustix::fs::fstat(pinned).step("look at", "user namespace")?),
        None => None,
    };
    let known = [Some(own), pinned];
    if known
        .iter()
        .flatten()
        .any(|k| (k.st_dev, k.st_ino) == (is.st_dev, is.st_ino))
    {
        return Ok(());
    }
    Err(SandboxError::Invalid(format!(
        "a user namespace that is {path}, which is not the pod's own, isn't supported \
         (linux.namespaces[type=user]); containers of a pod share the pod's namespaces"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pods_own_mapping_and_namespaces_are_accepted() {
        let me = std::process::id();
        let own = OwnedFd::from(std::fs::File::open("/proc/self/ns/user").unwrap());
        let wanted = |first, path: &str| PodUsers {
            first,
            path: (!path.is_empty()).then(|| path.to_owned()),
        };
        let pod = Chosen {
            first: 65536,
            pinned: None,
        };
        check(None, None, &own).unwrap();
        check(Some(&wanted(65536, "")), Some(&pod), &own).unwrap();
        let pauses = wanted(65536, &format!("/proc/{me}/ns/user"));
        check(Some(&pauses), Some(&pod), &own).unwrap();
        for (wanted, pod, part) in [
            (Some(wanted(131_072, "")), Some(&pod), "131072"),
            (None, Some(&pod), "no host ids"),
            (Some(wanted(65536, "")), None, "casemate chose"),
            (
                Some(wanted(65536, &format!("/proc/{me}/ns/net"))),
                Some(&pod),
                "not the pod's own",
            ),
            (
                Some(wanted(65536, "/nonexistent")),
                Some(&pod),
                "/nonexistent",
            ),
        ] {
            let text = check(wanted.as_ref(), pod, &own).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
    }
}

//! A cgroup for a container or for the agent: written down, made by us or by
//! systemd, taken away.

use std::time::Duration;

use casemate_cgroup::{Cgroup, Hierarchy, Scope, systemd};
use casemate_spec::Kind;
use oci_spec::runtime::LinuxResources;
use tokio::time::Instant;

use super::{SandboxError, cgroup_error, record};
use crate::bootstrap::journal::{Entry, Journal};
use crate::host::scope::{self, Holder};

/// A cgroup that is written down and, if systemd makes it, asked for.
pub(super) struct Begun<'a> {
    hierarchy: &'a Hierarchy,
    journal: &'a Journal,
    container: &'a str,
    path: &'a str,
    scope: Option<(Scope, Holder)>,
}

/// Begins to make the cgroup at `path` (a value of `linux.cgroupsPath`) for
/// `container`; the agent's is for no container, `""`.
pub(super) fn begin<'a>(
    hierarchy: &'a Hierarchy,
    journal: &'a Journal,
    container: &'a str,
    path: &'a str,
    resources: Option<&LinuxResources>,
) -> Result<Begun<'a>, SandboxError> {
    let mut scope = Scope::parse(path).map_err(cgroup_error)?;
    if let Some(named) = scope.take_if(|_| !systemd::is_running()) {
        log::info!(
            "linux.cgroupsPath = {path:?} is systemd's form, but systemd is not process 1 here: \
             the cgroup is made through the file system at {:?}",
            named.path()
        );
    }
    let dirs = match &scope {
        None => hierarchy.dirs(path),
        // Slices are systemd's to make and to remove.
        Some(_) => hierarchy.leaves(path),
    };
    let dirs = dirs.map_err(cgroup_error)?;
    let container_id = container.to_owned();
    if let Some(scope) = &scope {
        let entry = Entry::Scope {
            container: container_id.clone(),
            slice: scope.slice().to_owned(),
            unit: scope.unit().to_owned(),
        };
        record(journal, entry)?;
    }
    let entry = Entry::Cgroup {
        container: container_id,
        dirs,
    };
    record(journal, entry)?;
    let none = LinuxResources::default();
    let resources = resources.unwrap_or(&none);
    let ask = |named: Scope| {
        scope::start(&named, resources, hierarchy.is_v2()).map(|holder| (named, holder))
    };
    Ok(Begun {
        hierarchy,
        journal,
        container,
        path,
        scope: scope.map(ask).transpose()?,
    })
}

impl Begun<'_> {
    /// Waits for systemd, if it was asked, and makes the rest. What comes with
    /// the cgroup has to live until a process of ours is inside.
    pub(super) async fn finish(self) -> Result<(Cgroup, Option<Holder>), SandboxError> {
        if let Some((_, holder)) = &self.scope {
            holder.done().await?;
        }
        self.make()
    }

    /// As [`Begun::finish`], for where nothing else is going on.
    pub(super) fn finish_now(self) -> Result<(Cgroup, Option<Holder>), SandboxError> {
        if let Some((_, holder)) = &self.scope {
            holder.done_now()?;
        }
        self.make()
    }

    fn make(self) -> Result<(Cgroup, Option<Holder>), SandboxError> {
        let Some((scope, holder)) = self.scope else {
            let cgroup = Cgroup::create(self.hierarchy, self.path).map_err(cgroup_error)?;
            return Ok((cgroup, None));
        };
        let dirs = self.hierarchy.missing(&scope);
        if !dirs.is_empty() {
            let entry = Entry::Cgroup {
                container: self.container.to_owned(),
                dirs,
            };
            record(self.journal, entry)?;
        }
        let cgroup = Cgroup::complete(self.hierarchy, &scope).map_err(cgroup_error)?;
        Ok((cgroup, Some(holder)))
    }
}

/// Removes a cgroup whose processes have been killed. The last exit is on its
/// way, and the cgroup is busy until then. False if it still is after `limit`.
pub(super) async fn remove(cgroup: &Cgroup, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    let removed = loop {
        match cgroup.remove(Duration::ZERO) {
            Ok(()) => break true,
            Err(e) if Instant::now() >= until => {
                log::error!("remove the cgroup of a container: {e}");
                break false;
            }
            Err(_) => tokio::time::sleep(pause).await,
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    };
    if let Some(scope) = cgroup.scope() {
        scope::stop(scope).await;
    }
    removed
}

/// Makes systemd keep the limits that were just set, if the cgroup is a scope.
pub async fn keep_limits(cgroup: &Cgroup, resources: &LinuxResources) -> Result<(), SandboxError> {
    if let Some(named) = cgroup.scope() {
        scope::set(named, &cgroup.held(resources), cgroup.is_v2()).await?;
        // It wrote what it knows once more, and a file named exactly may say otherwise.
        cgroup.apply(resources).map_err(cgroup_error)?;
    }
    Ok(())
}

/// The agent's own leaf: the pod's limits cover it, no container's do. Where CRI names
/// one for the sandbox, that: nobody else is in it, and cAdvisor, whose word about a
/// pod's network the kubelet takes, looks for the sandbox's id there. Else beside the
/// pod's first container and below the same parent.
pub(super) fn agent_place(first: &str, kind: Kind, pod_id: &str) -> String {
    if kind == Kind::Sandbox {
        return first.to_owned();
    }
    if let Ok(Some(scope)) = Scope::parse(first) {
        return format!("{}:casemate:{pod_id}", scope.slice());
    }
    let parent = first.rsplit_once('/').map_or("", |(parent, _)| parent);
    format!("{parent}/casemate-{pod_id}")
}

#[cfg(test)]
mod tests {
    use casemate_spec::Kind;

    use super::agent_place;

    #[test]
    fn the_agent_is_where_the_sandbox_is_or_beside_its_first_container() {
        for (container, agent) in [
            ("/a/b/c", "/a/b/casemate-p"),
            ("/c", "/casemate-p"),
            ("a-b.slice:cri-containerd:c", "a-b.slice:casemate:p"),
            (":x:c", "system.slice:casemate:p"),
        ] {
            assert_eq!(agent_place(container, Kind::Single, "p"), agent);
            assert_eq!(agent_place(container, Kind::Sandbox, "p"), container);
        }
    }
}

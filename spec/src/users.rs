//! User namespaces that the kubelet chose (`hostUsers: false`): a range of host
//! ids, and maybe a namespace pinned somewhere that has it.

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};

use crate::config::{Ids, POD_IDS};
use crate::error::{Refusal, one_line};
use crate::paths::plain_absolute;
use crate::rules::{NAMESPACE_LIST, Rule, USER_NAMESPACE, USER_NAMESPACE_IDS};

/// Host ids that somebody else chose for a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodUsers {
    /// Host id, of user and group, of the containers' 0. With the 65535 after
    /// it, these are all that the pod has.
    pub first: u32,
    /// A namespace that is said to have this mapping, as the host sees it.
    pub path: Option<String>,
}

/// What the specification says of a user namespace; `None` if nothing.
pub(crate) fn check(linux: &Linux, ids: &Ids) -> Result<Option<PodUsers>, Refusal> {
    let mut named = linux
        .namespaces()
        .iter()
        .flatten()
        .filter(|n| n.typ() == LinuxNamespaceType::User);
    let namespace = named.next();
    if named.next().is_some() {
        return Err(Refusal::new(
            &NAMESPACE_LIST,
            "linux.namespaces",
            "user is there twice",
        ));
    }
    let uids = linux.uid_mappings().as_deref().unwrap_or_default();
    let gids = linux.gid_mappings().as_deref().unwrap_or_default();
    let Some(namespace) = namespace else {
        return if uids.is_empty() && gids.is_empty() {
            Ok(None)
        } else {
            Err(Refusal::new(
                &USER_NAMESPACE,
                "linux.uidMappings",
                "mappings without a user namespace in linux.namespaces",
            ))
        };
    };
    let path = match namespace.path().as_ref().map(|p| p.to_string_lossy()) {
        Some(path) if !path.is_empty() => match plain_absolute(&path) {
            Ok(path) => Some(path),
            Err(why) => {
                return Err(Refusal::new(
                    &NAMESPACE_LIST,
                    "linux.namespaces",
                    format!("user at {} is {why}", one_line(&path)),
                ));
            }
        },
        _ => None,
    };
    let first = first_id(uids, "linux.uidMappings", &USER_NAMESPACE)?;
    let group = first_id(gids, "linux.gidMappings", &USER_NAMESPACE)?;
    if group != first {
        return Err(Refusal::new(
            &USER_NAMESPACE,
            "linux.gidMappings",
            format!("group ids from {group}, but user ids from {first}"),
        ));
    }
    exclusive(first, ids)?;
    Ok(Some(PodUsers { first, path }))
}

/// The host's first id of a mapping that maps all of a pod's ids and nothing
/// else.
pub(crate) fn first_id(
    mappings: &[LinuxIdMapping],
    field: &str,
    rule: &'static Rule,
) -> Result<u32, Refusal> {
    let no = |detail: String| Err(Refusal::new(rule, field, detail));
    match mappings {
        [one] if one.container_id() == 0 && one.size() == POD_IDS => Ok(one.host_id()),
        [] => no("missing".into()),
        [one] => no(format!(
            "{} ids from {} in the container, not 65536 from 0",
            one.size(),
            one.container_id()
        )),
        more => no(format!("{} lines, not one", more.len())),
    }
}

/// Nobody else may have these ids: not the host, not the pods whose ids are
/// casemate's own choice.
fn exclusive(first: u32, ids: &Ids) -> Result<(), Refusal> {
    let no = |what: String| {
        let last = u64::from(first) + u64::from(POD_IDS) - 1;
        Err(Refusal::new(
            &USER_NAMESPACE_IDS,
            "linux.uidMappings",
            format!("{first} to {last} {what}"),
        ))
    };
    let end = u64::from(first) + u64::from(POD_IDS);
    if first < POD_IDS {
        return no("are ids of the host itself, which are below 65536".into());
    }
    // The last id, 2^32-1, means "no id" to the kernel (chown(2)).
    if end > u64::from(u32::MAX) {
        return no("are beyond 32 bits".into());
    }
    let own = u64::from(ids.base);
    let own_end = own + u64::from(ids.count) * u64::from(ids.size);
    if u64::from(first) < own_end && own < end {
        return no(format!(
            "overlap {own} to {}, which casemate hands out",
            own_end - 1
        ));
    }
    Ok(())
}

//! A pod's CRI configuration as the specification that containerd's own sandbox
//! controller would have written for its pause container: so the pod is made,
//! or refused, by the same rules whichever way it came.

use std::os::fd::{AsRawFd, OwnedFd};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use rustix::fs::OFlags;
use serde_json::{Map, Value, json};

use super::config::{Ids, Mode, PodConfig};
use crate::error::ShimError;
use crate::sandbox::Files;

/// The node's resolver, for pods that have none of their own.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// More than a resolver reads.
const RESOLV_CONF_MAX: u64 = 64 << 10;
/// Not a copy of the node's, which is nobody's business in a pod; kubelet
/// binds in one of its own.
const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// The user namespace that a pod's network namespace was made in. containerd
/// pins only the latter, so it has a path while it is open here alone.
pub struct Owner(OwnedFd);

impl Owner {
    /// That of the namespace at `netns`; none if it is the host's own.
    pub fn of(netns: &str) -> Result<Option<Owner>, ShimError> {
        let failed = |error: std::io::Error| {
            ShimError::InvalidArgument(format!(
                "CreateSandbox: netns_path {netns:?}: look for its user namespace: {error}"
            ))
        };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = |path: &str| {
            rustix::fs::open(path, flags, rustix::fs::Mode::empty())
                .map_err(|error| failed(error.into()))
        };
        let owner = casemate_sys::namespace::owner(open(netns)?).map_err(failed)?;
        let own = open("/proc/self/ns/user")?;
        let is_hosts = crate::host::users::same(&owner, &own).map_err(failed)?;
        Ok((!is_hosts).then_some(Owner(owner)))
    }

    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }
}

/// The specification.
pub fn write(
    config: &PodConfig,
    request: &CreateSandboxRequest,
    users: Option<&Owner>,
) -> Result<Vec<u8>, ShimError> {
    let mut annotations: Map<String, Value> = request
        .annotations
        .iter()
        .chain(&config.annotations)
        .map(|(key, value)| (key.clone(), json!(value)))
        .collect();
    for (key, value) in [
        ("container-type", "sandbox"),
        ("sandbox-id", &request.sandbox_id),
        ("sandbox-name", &config.name),
        ("sandbox-namespace", &config.namespace),
        ("sandbox-uid", &config.uid),
    ] {
        annotations.insert(format!("io.kubernetes.cri.{key}"), json!(value));
    }
    let mut linux = json!({
        "namespaces": namespaces(config, &request.netns_path, users)?,
        "sysctl": config.sysctls,
        "cgroupsPath": cgroups_path(&config.cgroup_parent, &request.sandbox_id),
        // Nothing runs that could see them; empty lists would be told of.
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
    });
    if let Some(users) = &config.userns {
        linux["uidMappings"] = users.uids.iter().map(mapping).collect();
        linux["gidMappings"] = users.gids.iter().map(mapping).collect();
    }
    let mut process = json!({
        "args": ["/pause"],
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "noNewPrivileges": true,
    });
    if config.selinux.iter().any(|part| !part.is_empty()) {
        process["selinuxLabel"] = json!(config.selinux.join(":"));
    }
    let document = json!({
        "ociVersion": "1.2.0",
        "hostname": config.hostname,
        "root": {"path": "rootfs", "readonly": true},
        "process": process,
        "annotations": annotations,
        "linux": linux,
    });
    serde_json::to_vec(&document)
        .map_err(|error| ShimError::Unknown(format!("write the sandbox's specification: {error}")))
}

/// A namespace that is left out is the host's, and the policy says whether the
/// pod may have that.
fn namespaces(
    config: &PodConfig,
    netns: &str,
    users: Option<&Owner>,
) -> Result<Vec<Value>, ShimError> {
    let mut list = vec![json!({"type": "mount"})];
    match (config.network, netns) {
        (Mode::Node, "") => {}
        (Mode::Node, path) => {
            return Err(ShimError::InvalidArgument(format!(
                "CreateSandbox: netns_path is {path:?}, but namespace_options.network is NODE; \
                 leave out one of them"
            )));
        }
        (Mode::Pod, "") => list.push(json!({"type": "network"})),
        (Mode::Pod, path) => list.push(json!({"type": "network", "path": path})),
        (Mode::Container, _) => {
            return Err(ShimError::InvalidArgument(
                "CreateSandbox: namespace_options.network is CONTAINER; a pod has one network: \
                 POD or NODE"
                    .to_owned(),
            ));
        }
    }
    if config.network != Mode::Node {
        list.push(json!({"type": "uts"}));
    }
    for (kind, mode) in [("pid", config.pid), ("ipc", config.ipc)] {
        if mode != Mode::Node {
            list.push(json!({"type": kind}));
        }
    }
    if config.userns.is_some() {
        list.push(match users {
            Some(users) => json!({"type": "user", "path": users.path()}),
            None => json!({"type": "user"}),
        });
    }
    Ok(list)
}

/// Where containerd would put a container of that parent: in systemd's form
/// below a slice.
fn cgroups_path(parent: &str, id: &str) -> String {
    let base = parent.trim_end_matches('/').rsplit('/').next();
    match base {
        _ if parent.is_empty() => String::new(),
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => format!("/{}/{id}", parent.trim_matches('/')),
    }
}

fn mapping(ids: &Ids) -> Value {
    json!({"containerID": ids.inside, "hostID": ids.host, "size": ids.count})
}

/// The files that every container of the pod is shown.
pub fn files(config: &PodConfig, pod_id: &str) -> Result<Files, ShimError> {
    let hostname = match config.hostname.as_str() {
        "" => pod_id.chars().take(63).collect(),
        name => name.to_owned(),
    };
    let resolv_conf = if config.dns.iter().all(Vec::is_empty) {
        node_resolver()?
    } else {
        resolver(&config.dns)?
    };
    Ok(Files {
        hostname: format!("{hostname}\n"),
        hosts: HOSTS.to_owned(),
        resolv_conf,
    })
}

fn resolver([servers, searches, options]: &[Vec<String>; 3]) -> Result<String, ShimError> {
    for word in [servers, searches, options].into_iter().flatten() {
        // Each would be read as something else: a second line, a comment.
        if word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(ShimError::InvalidArgument(format!(
                "CreateSandbox: dns_config: {word:?} is not one word"
            )));
        }
    }
    let mut text = String::new();
    if !searches.is_empty() {
        text += &format!("search {}\n", searches.join(" "));
    }
    for server in servers {
        text += &format!("nameserver {server}\n");
    }
    if !options.is_empty() {
        text += &format!("options {}\n", options.join(" "));
    }
    Ok(text)
}

fn node_resolver() -> Result<String, ShimError> {
    use std::io::Read;
    let mut text = String::new();
    let file = match std::fs::File::open(RESOLV_CONF) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(text),
        Err(error) => {
            return Err(ShimError::Unknown(format!("open {RESOLV_CONF}: {error}")));
        }
    };
    file.take(RESOLV_CONF_MAX)
        .read_to_string(&mut text)
        .map_err(|error| ShimError::Unknown(format!("read {RESOLV_CONF}: {error}")))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_spec::{Config, Context, Namespace, load, tighten};

    fn request(netns: &str) -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "s".into(),
            netns_path: netns.into(),
            ..CreateSandboxRequest::default()
        }
    }

    fn tightened(config: &PodConfig, netns: &str) -> Result<casemate_spec::Tightened, String> {
        let document = write(config, &request(netns), None).map_err(|error| error.to_string())?;
        let loaded = load(&document).map_err(|error| error.to_string())?;
        let context = Context {
            id: "s",
            ..Context::default()
        };
        tighten(loaded, &Config::default(), &context).map_err(|error| error.to_string())
    }

    #[test]
    fn an_ordinary_pod_passes_the_policy_without_a_warning() {
        let config = PodConfig {
            name: "web".into(),
            hostname: "web-0".into(),
            cgroup_parent: "/kubepods/pod1".into(),
            sysctls: [("net.ipv4.tcp_syncookies".to_owned(), "1".to_owned())].into(),
            ..PodConfig::default()
        };
        let spec = tightened(&config, "/run/netns/a").unwrap();
        assert_eq!(spec.warnings, Vec::<String>::new());
        assert_eq!(
            spec.namespaces.network,
            Namespace::Path("/run/netns/a".into())
        );
        assert_eq!(spec.hostname.as_deref(), Some("web-0"));
        assert_eq!(spec.cgroups_path, "/kubepods/pod1/s");
        assert_eq!(spec.sysctl["net.ipv4.tcp_syncookies"], "1");
        assert_eq!(spec.pod.pod_name.as_deref(), Some("web"));
    }

    #[test]
    fn the_hosts_namespaces_and_sysctls_are_refused_by_the_policys_rules() {
        let base = PodConfig::default;
        let sysctls = [("kernel.panic".to_owned(), "1".to_owned())].into();
        for (config, netns, part) in [
            (
                PodConfig {
                    network: Mode::Node,
                    ..base()
                },
                "",
                "hostNetwork",
            ),
            (
                PodConfig {
                    pid: Mode::Node,
                    ..base()
                },
                "",
                "hostPID",
            ),
            (
                PodConfig {
                    ipc: Mode::Node,
                    ..base()
                },
                "",
                "hostIPC",
            ),
            (
                PodConfig {
                    network: Mode::Node,
                    ..base()
                },
                "/n",
                "netns_path",
            ),
            (
                PodConfig {
                    network: Mode::Container,
                    ..base()
                },
                "",
                "CONTAINER",
            ),
            (PodConfig { sysctls, ..base() }, "", "kernel.panic"),
            (
                PodConfig {
                    cgroup_parent: "/a/../..".into(),
                    ..base()
                },
                "",
                "cgroupsPath",
            ),
            (
                PodConfig {
                    selinux: ["u".into(), "r".into(), "t".into(), "l".into()],
                    ..base()
                },
                "",
                "selinuxLabel",
            ),
        ] {
            let error = tightened(&config, netns).map(|_| ()).unwrap_err();
            assert!(error.contains(part), "{error}; want {part}");
        }
    }

    #[test]
    fn the_cgroup_is_where_containerd_would_have_it() {
        assert_eq!(cgroups_path("", "s"), "");
        assert_eq!(cgroups_path("/a/b/", "s"), "/a/b/s");
        assert_eq!(
            cgroups_path("/a.slice/b.slice", "s"),
            "b.slice:cri-containerd:s"
        );
    }

    #[test]
    fn a_resolver_is_written_word_by_word() {
        let words = |list: &[&str]| list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let dns = [
            words(&["10.0.0.1", "10.0.0.2"]),
            words(&["a.b", "c"]),
            words(&["ndots:5"]),
        ];
        assert_eq!(
            resolver(&dns).unwrap(),
            "search a.b c\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        let bad = [words(&["1\nnameserver 2"]), Vec::new(), Vec::new()];
        assert!(resolver(&bad).is_err());
    }
}

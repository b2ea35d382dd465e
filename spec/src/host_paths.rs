//! Which of the node's files a bind may show. Pure: where a source really is, and
//! what is mounted where, are facts that the caller brings.
//!
//! A place is known in two ways, by its path with all links resolved, and by its
//! file system and the path within that: a directory that is mounted twice has
//! two of the former and one of the latter.

use crate::config::HostPaths;
use crate::error::Refusal;
use crate::load::{Loaded, PodIdentity};
use crate::mount::MountSpec;
use crate::paths::within;
use crate::rules::{HOST_PATH, HOST_PATH_NOT_ALLOWED, HOST_PATH_POD, HOST_PATH_SOCKET, Rule};

/// Never shown: what the node is run by. Nor is what has one of these in it.
/// (The kernel's own file systems are known by their type, wherever they are
/// mounted: nothing of them is shown, and no list can allow it.)
pub const DENIED: [&str; 17] = [
    "/boot",
    "/dev",
    "/etc",
    "/root",
    "/run",
    "/var/run",
    "/var/lib/cni",
    "/var/lib/containerd",
    "/var/lib/containers",
    "/var/lib/cri-dockerd",
    "/var/lib/crio",
    "/var/lib/docker",
    "/var/lib/etcd",
    "/var/lib/k0s",
    "/var/lib/kubelet",
    "/var/lib/rancher",
    "/opt/containerd",
];

/// In one of those, and nobody's secret: shown, to be read, with all below it. Where
/// the name is a link, only if it leads to itself or to one of the places beside it,
/// where the usual programs have it lead: a link elsewhere is somebody's own idea, and
/// what it leads to may be a secret.
const HARMLESS: [(&str, &[&str]); 12] = [
    ("/etc/hosts", &[]),
    ("/etc/localtime", &["/usr/share/zoneinfo"]),
    ("/etc/timezone", &["/usr/share/zoneinfo"]),
    (
        "/etc/resolv.conf",
        &[
            "/run/NetworkManager",
            "/run/resolvconf",
            "/run/systemd/resolve",
        ],
    ),
    ("/etc/os-release", &["/usr/lib"]),
    // Certificates of authorities; keys are beside these directories and not in them.
    ("/etc/ssl/certs", CERTIFICATES),
    ("/etc/ssl/cert.pem", CERTIFICATES),
    ("/etc/ssl/ca-bundle.pem", CERTIFICATES),
    ("/etc/ca-certificates", CERTIFICATES),
    ("/etc/pki/ca-trust", CERTIFICATES),
    ("/etc/pki/tls/certs", CERTIFICATES),
    ("/etc/pki/tls/cert.pem", CERTIFICATES),
];

/// Where distributions keep the certificates of authorities.
const CERTIFICATES: &[&str] = &[
    "/etc/ssl/certs",
    "/etc/ca-certificates",
    "/etc/pki/ca-trust",
    "/usr/share/ca-certificates",
    "/usr/share/pki",
    "/var/lib/ca-certificates",
];

/// What the kubelet has for a pod in that pod's directory, as far as containers
/// get to see it.
const OF_A_POD: [&str; 4] = ["volumes", "volume-subpaths", "containers", "etc-hosts"];

/// What containerd has for a sandbox in that sandbox's directory.
const OF_A_SANDBOX: [&str; 4] = ["hostname", "hosts", "resolv.conf", "shm"];

/// One line of /proc/self/mountinfo (proc(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// `major:minor` of the file system.
    pub device: String,
    /// What of the file system is mounted.
    pub root: String,
    /// Where.
    pub point: String,
}

/// All mounts of the node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mounts(Vec<Mounted>);

impl Mounts {
    /// Reads the text of /proc/self/mountinfo; lines that make no sense are
    /// left out.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let mut fields = line.split(' ').skip(2);
            Some(Mounted {
                device: fields.next()?.to_owned(),
                root: unescape(fields.next()?),
                point: unescape(fields.next()?),
            })
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// Where `path`, all of whose links are resolved, is within its file system.
    fn place(&self, path: &str) -> Place {
        // Of several at one point, the last covers the others.
        let on = self
            .0
            .iter()
            .filter(|m| below(path, &m.point))
            .max_by_key(|m| m.point.len());
        let origin = on.map(|m| {
            let rest = path.get(m.point.len()..).unwrap_or_default();
            (m.device.clone(), join(&m.root, rest))
        });
        Place {
            path: path.to_owned(),
            origin,
        }
    }

    /// What is mounted below `path`.
    fn below(&self, path: &str) -> impl Iterator<Item = Place> {
        self.0
            .iter()
            .filter(move |m| m.point != path && below(&m.point, path))
            .map(|m| Place {
                path: m.point.clone(),
                origin: Some((m.device.clone(), m.root.clone())),
            })
    }
}

/// A place of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    path: String,
    /// File system, and path within.
    origin: Option<(String, String)>,
}

impl Place {
    /// Whether this is `other`, or below it.
    fn is_in(&self, other: &Self) -> bool {
        let origin = match (&self.origin, &other.origin) {
            (Some((d, p)), Some((e, q))) => d == e && below(p, q),
            _ => false,
        };
        origin || below(&self.path, &other.path)
    }
}

/// As [`within`], where `dir` may be `/`.
fn below(path: &str, dir: &str) -> bool {
    dir == "/" || within(path, dir)
}

fn join(root: &str, rest: &str) -> String {
    let rest = rest.trim_matches('/');
    let root = root.trim_end_matches('/');
    match rest {
        "" if root.is_empty() => "/".to_owned(),
        "" => root.to_owned(),
        rest => format!("{root}/{rest}"),
    }
}

/// Space, tab, line feed and backslash are `\` and three octal digits there.
fn unescape(field: &str) -> String {
    if !field.contains('\\') {
        return field.to_owned();
    }
    let mut text = String::with_capacity(field.len());
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        text.push_str(before);
        let octal = after.get(..3).and_then(|o| u8::from_str_radix(o, 8).ok());
        match octal {
            Some(byte) => {
                text.push(char::from(byte));
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                text.push('\\');
                rest = after;
            }
        }
    }
    text + rest
}

/// The source of a bind, opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Which of the mounts.
    pub mount: usize,
    /// Where it is, all links resolved.
    pub path: String,
    /// It is a socket.
    pub socket: bool,
}

/// A path that a list names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// As it is written there.
    pub name: String,
    /// With all links resolved; the name itself where there is no such file.
    pub path: String,
}

/// The lists, as they are on this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lists {
    /// `host_paths.allow`.
    pub allow: Vec<Named>,
    /// `host_paths.deny`.
    pub deny: Vec<Named>,
    /// `host_paths.read_only`.
    pub read_only: Vec<Named>,
    /// [`DENIED`], the kubelet's directory, and the daemon's own.
    pub node: Vec<Named>,
    /// Files of the node that are nobody's secret, and shown to be read.
    pub harmless: Vec<Named>,
}

impl Lists {
    /// Looks all names up; `daemon` are directories and sockets of the container
    /// manager.
    pub fn look_up(config: &HostPaths, daemon: &[&str], resolve: impl Fn(&str) -> String) -> Self {
        let named = |name: &str| Named {
            name: name.to_owned(),
            path: resolve(name),
        };
        let list = |names: &[String]| names.iter().map(|n| named(n)).collect();
        let mut node: Vec<Named> = DENIED.iter().map(|n| named(n)).collect();
        node.push(named(&config.kubelet));
        node.extend(daemon.iter().map(|n| named(n)));
        Self {
            allow: list(&config.allow),
            deny: list(&config.deny),
            read_only: list(&config.read_only),
            node,
            harmless: HARMLESS
                .iter()
                .map(|(name, homes)| (named(name), homes))
                .filter(|(named, homes)| {
                    let mut homes = homes.iter();
                    named.path == named.name || homes.any(|home| below(&named.path, home))
                })
                .map(|(named, _)| named)
                .collect(),
        }
    }
}

/// The ids by which a pod's own directories are known.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Owner {
    /// The pod's uid.
    pub uid: Option<String>,
    /// The sandbox's id.
    pub sandbox: Option<String>,
}

impl Owner {
    /// From what CRI says of a container.
    pub(crate) fn of(loaded: &Loaded) -> Self {
        let get = |key: &str| loaded.annotations.get(key).filter(|v| !v.is_empty());
        Self {
            uid: loaded.pod.pod_uid.clone().or_else(|| {
                // containerd 1.6 says no uid; the cgroup's parent has it.
                let cgroup = loaded.spec.linux().as_ref()?.cgroups_path().as_ref()?;
                uid_of_cgroup(&cgroup.to_string_lossy(), &loaded.pod)
            }),
            sandbox: get("io.kubernetes.cri.sandbox-id").cloned(),
        }
    }

    /// Whether `path` is in the mount of an image that is a volume of this very
    /// sandbox's: `…/io.containerd.…/image-volumes/ID/IMAGE`, and what is in the image.
    fn has_image_volume(&self, path: &str) -> bool {
        let Some((home, rest)) = path.split_once("/image-volumes/") else {
            return false;
        };
        let plugin = home.rsplit('/').next();
        let mut parts = rest.split('/');
        plugin.is_some_and(|plugin| plugin.starts_with("io.containerd."))
            && parts
                .next()
                .is_some_and(|id| self.sandbox.as_deref() == Some(id))
            && parts.next().is_some_and(|image| !image.is_empty())
    }

    /// Whether `path` is a file of this very sandbox's, as containerd makes them
    /// below its root or state: `…/io.containerd.…/sandboxes/ID/shm`.
    fn has_sandbox_file(&self, path: &str) -> bool {
        let mut parts = path.rsplit('/');
        let (Some(file), Some(id), Some("sandboxes"), Some(plugin)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return false;
        };
        OF_A_SANDBOX.contains(&file)
            && self.sandbox.as_deref() == Some(id)
            && plugin.starts_with("io.containerd.")
    }
}

/// `…/pod<uid>/<id>`, or `kubepods-…-pod<uid>.slice:…:…` with `_` for `-`. Of
/// containers of a pod alone.
fn uid_of_cgroup(path: &str, pod: &PodIdentity) -> Option<String> {
    if pod.kind == crate::load::Kind::Single {
        return None;
    }
    let uid = match path.split_once(':') {
        Some((slice, _)) => {
            let slice = slice.strip_suffix(".slice")?;
            slice
                .rsplit_once("-pod")
                .map_or(slice.strip_prefix("pod"), |(_, uid)| Some(uid))?
        }
        None => path.rsplit('/').nth(1)?.strip_prefix("pod")?,
    };
    (!uid.is_empty()).then(|| uid.replace('_', "-"))
}

/// What becomes of the binds that are shown.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verdict {
    /// Mounts that are shown to be read, and the list's entry that says so.
    pub read_only: Vec<(usize, String)>,
}

/// Whether a source is one of the pod's own, as the kubelet and containerd make
/// them; none: it is neither's, and the lists decide.
///
/// # Errors
/// It is the kubelet's, and not for this pod.
pub fn own(source: &Source, owner: &Owner, kubelet: &Named) -> Result<Option<()>, Refusal> {
    if below(&source.path, &kubelet.path) {
        let rest = source.path.get(kubelet.path.len()..).unwrap_or_default();
        let mut parts = rest.trim_start_matches('/').split('/');
        let own = parts.next() == Some("pods")
            && parts
                .next()
                .is_some_and(|p| owner.uid.as_deref() == Some(p))
            && parts.next().is_some_and(|p| OF_A_POD.contains(&p));
        if own {
            return Ok(Some(()));
        }
        let uid = owner.uid.as_deref().unwrap_or("unknown");
        let detail = format!("{} (this pod's uid is {uid})", source.path);
        return Err(refusal(&HOST_PATH_POD, source, detail));
    }
    let containerds = owner.has_sandbox_file(&source.path) || owner.has_image_volume(&source.path);
    Ok(containerds.then_some(()))
}

/// Decides over sources that aren't the pod's own.
///
/// # Errors
/// The first that may not be shown.
pub fn judge(
    sources: &[Source],
    specs: &[MountSpec],
    (config, lists): (&HostPaths, &Lists),
    mounts: &Mounts,
) -> Result<Verdict, Refusal> {
    let placed = |list: &[Named]| -> Vec<(String, Place)> {
        list.iter()
            .map(|n| (n.name.clone(), mounts.place(&n.path)))
            .collect()
    };
    let [allow, deny, read_only, node, harmless] = [
        &lists.allow,
        &lists.deny,
        &lists.read_only,
        &lists.node,
        &lists.harmless,
    ]
    .map(|list| placed(list));
    let mut verdict = Verdict::default();
    for source in sources {
        let place = mounts.place(&source.path);
        let recursive = specs.get(source.mount).is_some_and(|s| s.flags.rbind);
        let below: Vec<Place> = if recursive {
            mounts.below(&source.path).collect()
        } else {
            Vec::new()
        };
        // One of the list that the source is, is in, or has in it.
        let touches = |list: &[(String, Place)]| -> Option<String> {
            let all = || std::iter::once(&place).chain(&below);
            list.iter()
                .find(|(_, p)| all().any(|s| s.is_in(p) || p.is_in(s)))
                .map(|(name, _)| name.clone())
        };
        let is_in = |list: &[(String, Place)]| list.iter().any(|(_, p)| place.is_in(p));
        let no = |rule, of: &str| {
            let detail = if of == source.path {
                source.path.clone()
            } else {
                format!("{} (because of {of})", source.path)
            };
            Err(refusal(rule, source, detail))
        };
        if let Some(name) = touches(&deny) {
            return no(&HOST_PATH, &name);
        }
        if is_in(&allow) {
            continue;
        }
        if config.only_allowed {
            return no(&HOST_PATH_NOT_ALLOWED, &source.path);
        }
        // Not where something else is mounted below, which this would show, too.
        if below.is_empty() && !source.socket && is_in(&harmless) {
            verdict.read_only.push((source.mount, source.path.clone()));
            continue;
        }
        if let Some(name) = touches(&node) {
            return no(&HOST_PATH, &name);
        }
        if source.socket {
            return no(&HOST_PATH_SOCKET, &source.path);
        }
        if let Some(name) = touches(&read_only) {
            verdict.read_only.push((source.mount, name));
        }
    }
    Ok(verdict)
}

fn refusal(rule: &'static Rule, source: &Source, detail: String) -> Refusal {
    Refusal::new(rule, format!("mounts[{}].source", source.mount), detail)
}

/// Makes what the verdict says so read-only; a line for each that wasn't.
pub fn apply(verdict: &Verdict, specs: &mut [MountSpec]) -> Vec<String> {
    let mut notes = Vec::new();
    for (mount, because) in &verdict.read_only {
        let Some(spec) = specs.get_mut(*mount) else {
            continue;
        };
        // tightenings::HOST_PATH_READ_ONLY
        if spec.make_read_only() {
            notes.push(format!(
                "mounts[{mount}].options: {} is read-only, as {because} is (host_paths.read_only)",
                spec.destination
            ));
        }
    }
    notes
}

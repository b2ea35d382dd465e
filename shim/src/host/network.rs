//! The pod's network namespace: owned by the host's user namespace, or by one
//! that was made for the pod and that nobody lives in. What the shim sets in it,
//! the pod can't undo.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use casemate_netguard::{Line, Rules, Watch};
use casemate_spec::Namespace;
use casemate_sys::mount::{NewFs, attr, clone_tree};
use casemate_sys::namespace::{self, kind};
use rustix::fs::{Mode, OFlags};

use super::Step;
use super::guard::Guard;
use super::ids::CONTAINER_IDS;
use super::users::same;
use crate::sandbox::SandboxError;

/// The namespace, and a read-only view of its /sys.
pub struct Network {
    /// `None`: the host's own.
    namespace: Option<OwnedFd>,
    host: OwnedFd,
    sysfs: OwnedFd,
    /// What its guard was made to be.
    guard: Option<(Rules, bool)>,
}

fn open_ns(path: &str) -> Result<OwnedFd, SandboxError> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .step("open namespace", path)
}

impl Network {
    /// Makes or opens the namespace and prepares it for containers whose root
    /// is host id `container_root`. `sysctls` are the spec's `net.*`; `pinned` is
    /// a user namespace that a given one may belong to, beside the host's. `guard`
    /// is for what isn't the host's; what hears of its refusals comes back as well.
    pub fn prepare(
        wanted: &Namespace,
        pinned: Option<&OwnedFd>,
        container_root: u32,
        sysctls: &[(&str, &str)],
        guard: &Guard,
    ) -> Result<(Network, Option<Watch>), SandboxError> {
        let host = open_ns("/proc/self/ns/net")?;
        let namespace = match wanted {
            Namespace::Host => None,
            Namespace::Path(path) => {
                let fd = open_ns(path)?;
                check_owner(&fd, pinned, path)?;
                namespace::enter(&fd, kind::NET).step("enter network namespace", path)?;
                Some(fd)
            }
            Namespace::New => {
                namespace::unshare(kind::NET).step("unshare", "network namespace")?;
                match open_ns("/proc/thread-self/ns/net") {
                    Ok(fd) => Some(fd),
                    Err(e) => {
                        back(&host);
                        return Err(e);
                    }
                }
            }
        };
        let new = matches!(wanted, Namespace::New);
        let prepared =
            set_up(namespace.is_some(), new, container_root, sysctls).and_then(|sysfs| {
                let mut held = None;
                if namespace.is_some() {
                    let locks = guard.port_locks();
                    if locks.connect.ports().or(locks.listen.ports()).is_some() {
                        without_ways_past_landlock()?;
                    }
                    held = guard.install(new)?;
                }
                Ok((sysfs, held))
            });
        back(&host);
        let (sysfs, held) = prepared?;
        let (watch, guard) = match held {
            Some(held) => (held.watch, Some((held.rules, held.shows))),
            None => (None, None),
        };
        let network = Network {
            namespace,
            host,
            sysfs,
            guard,
        };
        Ok((network, watch))
    }

    /// Runs `f` inside the namespace.
    pub fn inside<T>(
        &self,
        f: impl FnOnce() -> Result<T, SandboxError>,
    ) -> Result<T, SandboxError> {
        let Some(own) = &self.namespace else {
            return f();
        };
        namespace::enter(own, kind::NET).step("enter", "the pod's network namespace")?;
        let result = f();
        back(&self.host);
        result
    }

    /// The namespace; `None` is the host's.
    pub fn namespace(&self) -> Option<&OwnedFd> {
        self.namespace.as_ref()
    }

    /// What its guard was made to be, where there is one.
    pub fn guard(&self) -> Option<Vec<Line>> {
        let (rules, shows) = self.guard.as_ref()?;
        Some(casemate_netguard::promised(rules, *shows))
    }

    /// Inode of the namespace that the pod is in.
    pub fn identity(&self) -> Option<u64> {
        let namespace = self.namespace.as_ref().unwrap_or(&self.host);
        Some(rustix::fs::fstat(namespace).ok()?.st_ino)
    }

    /// One more detached, read-only mount of the namespace's /sys. A mount
    /// that is attached nowhere can be cloned since Linux 6.15; before (and
    /// with `older_ways`) a new one is made.
    pub fn sysfs(&self, older_ways: bool) -> Result<OwnedFd, SandboxError> {
        if !older_ways && let Ok(clone) = clone_tree(&self.sysfs, Path::new(""), false, false) {
            return Ok(clone);
        }
        self.inside(mount_sysfs)
    }
}

/// Whoever has capabilities in the user namespace that owns `network` can
/// change it. That may be the host, or a namespace that was made for this pod and
/// that nobody lives in.
fn check_owner(
    network: &OwnedFd,
    pinned: Option<&OwnedFd>,
    path: &str,
) -> Result<(), SandboxError> {
    let owner = namespace::owner(network).step("look for the owner of network namespace", path)?;
    let host = open_ns("/proc/self/ns/user")?;
    let known = same(&owner, &host).step("look at", "user namespaces")?
        || match pinned {
            Some(pinned) => same(&owner, pinned).step("look at", "user namespaces")?,
            None => false,
        };
    if known {
        return Ok(());
    }
    Err(SandboxError::Invalid(format!(
        "network namespace {path} (linux.namespaces) belongs to a user namespace that is neither \
         the host's nor the one that linux.namespaces names: who has capabilities there could \
         change the pod's network; make it in one of these"
    )))
}

/// Back to the host's namespace, or not at all: a shim that talks to
/// containerd from a pod's network is worse than none.
fn back(host: &OwnedFd) {
    if namespace::enter(host, kind::NET).is_err() {
        std::process::abort();
    }
}

fn set_up(
    own: bool,
    new: bool,
    container_root: u32,
    sysctls: &[(&str, &str)],
) -> Result<OwnedFd, SandboxError> {
    if new {
        namespace::loopback_up().step("bring up", "lo")?;
    }
    if own {
        // No capability over this namespace exists in the pod, so ports below
        // 1024 and ping are opened by its own parameters. Groups are host ids.
        let last = container_root + CONTAINER_IDS - 1;
        set("net/ipv4/ip_unprivileged_port_start", "0")?;
        set(
            "net/ipv4/ping_group_range",
            &format!("{container_root} {last}"),
        )?;
        for (name, value) in sysctls {
            if *name != "net.ipv4.ping_group_range" {
                set(&name.replace('.', "/"), value)?;
            }
        }
    }
    mount_sysfs()
}

/// Turns off what Landlock's rules for ports don't see: Fast Open, whose data goes with
/// the first packet and connects without connect(2), and Multipath TCP.
fn without_ways_past_landlock() -> Result<(), SandboxError> {
    set("net/ipv4/tcp_fastopen", "0")?;
    match fs::exists("/proc/sys/net/mptcp/enabled") {
        Ok(false) => Ok(()),
        _ => set("net/mptcp/enabled", "0"),
    }
}

fn mount_sysfs() -> Result<OwnedFd, SandboxError> {
    NewFs::open("sysfs")
        .and_then(|fs| fs.mount(attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC))
        .step("mount", "sysfs of the pod's network namespace")
}

fn set(name: &str, value: &str) -> Result<(), SandboxError> {
    fs::write(format!("/proc/sys/{name}"), value).step("set sysctl", format!("{name}={value}"))
}

//! The guard of the pod's network: what its connections may reach, as rules of
//! nftables that are there before the agent is.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::IpAddr;
use std::time::Instant;

use casemate_netguard::{Direction, GuardError, Ports, Protocol, Refused, Rules, Target, Watch};
use casemate_protocol::plan::LaunchPlan;
use casemate_spec::config::{Network as Config, WithoutNftables};
use casemate_spec::network_rules::{self, Destination, Entry, PortLock, Transport, nameservers};
use casemate_spec::{MountKind, Namespace, Tightened};
use casemate_sys::landlock;
use rustix::io::Errno;
use tokio::io::Interest;

use crate::record::{Record, Records};
use crate::sandbox::{Files, SandboxError};

/// More than a resolver reads.
const RESOLV_CONF_SIZE: u64 = 64 * 1024;

/// What is to hold in the pod's network namespace.
pub struct Guard {
    rules: Rules,
    without: WithoutNftables,
    locks: PortLocks,
    /// Why each of the denied is.
    denied: Vec<(Entry, &'static str)>,
}

/// The second lock of a pod with lists, on TCP's ports: Landlock's, of each container.
#[derive(Debug, Clone, Default)]
pub struct PortLocks {
    /// Ports that TCP connects to.
    pub connect: PortLock,
    /// Ports that TCP listens on.
    pub listen: PortLock,
}

impl PortLocks {
    /// As the lists have it, if Landlock has rules for ports here.
    fn of(rules: &network_rules::Rules) -> PortLocks {
        let locks = PortLocks {
            connect: rules.connect.clone(),
            listen: rules.listen.clone(),
        };
        let is_asked = locks.connect.ports().or(locks.listen.ports()).is_some();
        if !is_asked || landlock::abi() >= landlock::net::SINCE {
            return locks;
        }
        const OLD: &str = "this kernel's Landlock has no rules for ports (Linux 6.7)";
        log::warn!("loopback:… of the pod's lists doesn't lock ports: {OLD}");
        let old = |lock: PortLock| match lock {
            PortLock::On(_) => PortLock::Off(OLD),
            off => off,
        };
        PortLocks {
            connect: old(locks.connect),
            listen: old(locks.listen),
        }
    }

    /// Has a container's domain hold them.
    pub fn lock(&self, plan: &mut LaunchPlan) {
        let ports = |lock: &PortLock| lock.ports().map(<[_]>::to_vec);
        plan.connect_ports = ports(&self.connect);
        plan.listen_ports = ports(&self.listen);
    }
}

/// What holds in a network namespace.
pub struct Held {
    /// Hears of refusals, where the kernel can tell of them.
    pub watch: Option<Watch>,
    /// The rules.
    pub rules: Rules,
    /// Refused packets are shown.
    pub shows: bool,
}

impl Guard {
    /// By the pod's annotations and the node's configuration. `files` are those
    /// that a pod gets from us.
    pub fn of(
        spec: &Tightened,
        config: &Config,
        files: Option<&Files>,
    ) -> Result<Guard, SandboxError> {
        let rules = network_rules::Rules::of(
            spec.asked.egress.as_deref(),
            spec.asked.ingress.as_deref(),
            config,
            spec.namespaces.network == Namespace::Host,
            || resolvers(spec, files),
        )
        .map_err(|e| SandboxError::Invalid(e.to_string()))?;
        let locks = PortLocks::of(&rules);
        let list = |entries: Vec<Entry>| entries.iter().map(|e| target(e, "")).collect();
        Ok(Guard {
            rules: Rules {
                denied: rules.denied.iter().map(|(e, by)| target(e, by)).collect(),
                egress: rules.egress.map(list),
                ingress: rules.ingress.map(list),
            },
            without: config.without_nftables,
            locks,
            denied: rules.denied,
        })
    }

    /// The lock on ports.
    pub fn port_locks(&self) -> &PortLocks {
        &self.locks
    }

    /// Makes records of what `watch` hears.
    pub fn tell(&self, watch: Option<Watch>, records: &Records) {
        if let Some(watch) = watch {
            tokio::spawn(tell(watch, self.denied.clone(), records.clone()));
        }
    }

    /// Makes it hold in the calling thread's network namespace, which is `new` or
    /// may have been another pod's before. What now holds there, if anything does.
    pub fn install(&self, new: bool) -> Result<Option<Held>, SandboxError> {
        if new && self.rules.is_empty() {
            return Ok(None);
        }
        let begun = Instant::now();
        let error = match casemate_netguard::install(&self.rules) {
            Ok(installed) => {
                log::debug!("the pod's network is guarded after {:?}", begun.elapsed());
                let any = !self.rules.is_empty();
                if any && !installed.shows {
                    log::warn!(
                        "refused connections are counted, and no events: this kernel lacks \
                         CONFIG_NETFILTER_NETLINK_LOG, CONFIG_NFT_LOG or CONFIG_NFT_LIMIT"
                    );
                }
                let watch = (any && installed.shows).then(Watch::new);
                let watch = watch.and_then(|made| {
                    made.inspect_err(|e| log::warn!("refused connections are no events: {e}"))
                        .ok()
                });
                return Ok(Some(Held {
                    watch,
                    rules: self.rules.clone(),
                    shows: installed.shows,
                }));
            }
            Err(error) => error,
        };
        if !is_missing(&error) {
            return Err(SandboxError::Failed(format!(
                "guard the pod's network: {error}"
            )));
        }
        if self.rules.is_empty() {
            return Ok(None);
        }
        let lists = self.rules.needs_tracking();
        if !lists && self.without == WithoutNftables::Allow {
            log::warn!(
                "the pod's network isn't guarded: {error}; metadata services and network.deny are \
                 within its reach (network.without_nftables)"
            );
            return Ok(None);
        }
        let way_out = if lists {
            "and connection tracking (CONFIG_NFT_CT), or remove the pod's annotations \
             casemate.io/egress and casemate.io/ingress"
        } else {
            "or set network.without_nftables = \"allow\" in config.toml"
        };
        Err(SandboxError::Failed(format!(
            "guard the pod's network: {error}; use a kernel with nf_tables (CONFIG_NF_TABLES_INET, \
             CONFIG_NFT_REJECT_INET) {way_out}"
        )))
    }
}

/// Makes a record of the first refused packet of each destination. The kernel tells
/// of ten a second at most, and nothing runs while nothing is refused.
async fn tell(watch: Watch, denied: Vec<(Entry, &'static str)>, records: Records) {
    let Ok(watch) = crate::io::watch(watch, Interest::READABLE) else {
        return;
    };
    while let Ok(mut ready) = watch.readable().await {
        match watch.get_ref().next() {
            Ok(Some(refused)) => records.push(&record(&refused, &denied)),
            Ok(None) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => ready.clear_ready(),
            // Some were lost; the kernel's own counters have them.
            Err(e) if e.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => {}
            Err(e) => {
                log::warn!("refused connections are no events any more: {e}");
                return;
            }
        }
    }
}

fn record(refused: &Refused, denied: &[(Entry, &'static str)]) -> Record {
    let to = Destination {
        egress: refused.direction == Direction::Out,
        address: refused.address,
        protocol: refused.protocol,
        port: refused.port,
    };
    let explained = to.explain(denied.iter().copied());
    Record::Network {
        direction: if to.egress { "egress" } else { "ingress" },
        destination: to.to_string(),
        rule: explained.rule,
        allow: explained.allow,
    }
}

/// The kernel lacks what is asked for, or a part of it.
fn is_missing(error: &GuardError) -> bool {
    match error {
        GuardError::Missing(_) => true,
        GuardError::Refused { reason, .. } => {
            reason.kind() == ErrorKind::NotFound
                || reason.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error())
        }
        _ => false,
    }
}

fn target(entry: &Entry, by: &str) -> Target {
    let protocols = match (entry.transport, entry.ports) {
        (Some(Transport::Tcp), _) => vec![Protocol::Tcp],
        (Some(Transport::Udp), _) => vec![Protocol::Udp],
        (Some(Transport::Sctp), _) => vec![Protocol::Sctp],
        (None, Some(_)) => vec![Protocol::Tcp, Protocol::Udp],
        (None, None) => Vec::new(),
    };
    let name = match by {
        "" => entry.to_string(),
        by => format!("{entry} ({by})"),
    };
    Target {
        name,
        address: entry.net.address,
        prefix: entry.net.prefix,
        ports: entry.ports.map(|(first, last)| Ports { first, last }),
        protocols,
    }
}

/// The nameservers that the pod's containers will have: of the file that
/// containerd shows to the sandbox container, or of ours.
fn resolvers(spec: &Tightened, files: Option<&Files>) -> Vec<IpAddr> {
    if let Some(files) = files {
        return nameservers(&files.resolv_conf);
    }
    let mut binds = spec.mounts.iter().filter(|m| m.kind == MountKind::Bind);
    let Some(bind) = binds.find(|m| m.destination == "/etc/resolv.conf") else {
        return Vec::new();
    };
    let mut text = String::new();
    let read = File::open(&bind.source)
        .and_then(|file| file.take(RESOLV_CONF_SIZE).read_to_string(&mut text));
    match read {
        Ok(_) => nameservers(&text),
        Err(e) => {
            log::warn!("read {} for cluster-dns: {e}", bind.source);
            Vec::new()
        }
    }
}

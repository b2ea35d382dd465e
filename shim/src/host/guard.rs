//! The guard of the pod's network: what its connections may reach, as rules of
//! nftables that are there before the agent is.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::IpAddr;
use std::time::Instant;

use casemate_netguard::{GuardError, Ports, Protocol, Rules, Target};
use casemate_spec::config::{Network as Config, WithoutNftables};
use casemate_spec::network_rules::{self, Entry, Transport, nameservers};
use casemate_spec::{MountKind, Namespace, Tightened};
use rustix::io::Errno;

use crate::sandbox::{Files, SandboxError};

/// More than a resolver reads.
const RESOLV_CONF_SIZE: u64 = 64 * 1024;

/// What is to hold in the pod's network namespace.
pub struct Guard {
    rules: Rules,
    without: WithoutNftables,
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
        let list = |entries: Vec<Entry>| entries.iter().map(|e| target(e, "")).collect();
        Ok(Guard {
            rules: Rules {
                denied: rules.denied.iter().map(|(e, by)| target(e, by)).collect(),
                egress: rules.egress.map(list),
                ingress: rules.ingress.map(list),
            },
            without: config.without_nftables,
        })
    }

    /// Makes it hold in the calling thread's network namespace, which is `new` or
    /// may have been another pod's before.
    pub fn install(&self, new: bool) -> Result<(), SandboxError> {
        if new && self.rules.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let Err(error) = casemate_netguard::install(&self.rules) else {
            log::debug!("the pod's network is guarded after {:?}", begun.elapsed());
            return Ok(());
        };
        if !is_missing(&error) {
            return Err(SandboxError::Failed(format!(
                "guard the pod's network: {error}"
            )));
        }
        if self.rules.is_empty() {
            return Ok(());
        }
        let lists = self.rules.needs_tracking();
        if !lists && self.without == WithoutNftables::Allow {
            log::warn!(
                "the pod's network isn't guarded: {error}; metadata services and network.deny are \
                 within its reach (network.without_nftables)"
            );
            return Ok(());
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

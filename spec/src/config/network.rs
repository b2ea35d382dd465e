//! `[network]`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;
use crate::network_rules::{self, Cidr, Entry, MOST};

/// What no pod reaches, and what every pod does.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Metadata services of clouds.
    pub metadata: Metadata,
    /// Nothing of a pod's goes there, beside them.
    pub deny: Vec<Entry>,
    /// Where the node itself asks from (probes): these come in whatever
    /// `casemate.io/ingress` says.
    pub nodes: Vec<Cidr>,
    /// What `cluster-dns` stands for; empty: the pod's own nameservers.
    pub cluster_dns: Vec<IpAddr>,
    /// On a kernel without nf_tables.
    pub without_nftables: WithoutNftables,
}

/// Whether pods reach the metadata services of clouds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metadata {
    /// They don't.
    #[default]
    Block,
    /// As the network has it.
    Allow,
}

/// What becomes of pods on a kernel without nf_tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WithoutNftables {
    /// They are refused.
    #[default]
    Refuse,
    /// They start without, unless they have lists of their own.
    Allow,
}

impl Network {
    /// Whether the values make sense together.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        for (field, length) in [
            ("network.deny", self.deny.len()),
            ("network.nodes", self.nodes.len()),
            ("network.cluster_dns", self.cluster_dns.len()),
        ] {
            if length > MOST {
                return Err(ConfigError::Invalid {
                    field,
                    value: format!("{length} entries"),
                    reason: format!("each is a rule that packets meet; use {MOST} or less"),
                });
            }
        }
        for entry in &self.deny {
            if network_rules::is_loopback(&entry.net) {
                return Err(ConfigError::Invalid {
                    field: "network.deny",
                    value: entry.to_string(),
                    reason: "loopback is the pod's own and always passes; remove it".into(),
                });
            }
        }
        Ok(())
    }
}

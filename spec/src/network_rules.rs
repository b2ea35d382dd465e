//! Where a pod's connections may go to and come from: `casemate.io/egress`,
//! `casemate.io/ingress` and `[network]` of the node's configuration.
//!
//! A list has entries with commas between: `CIDR:port[/protocol]`, `cluster-dns`,
//! `loopback:port`, or the word `none` alone.

mod ports;
mod refused;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::config::{Metadata, Network};
use crate::error::{Refusal, one_line};
use crate::rules::{HOST_NETWORK_LISTS, NETWORK_LIST};

pub use ports::{Loopback, MOST_PORTS, PortLock};
pub use refused::{Destination, Explained, denied_by};

/// The annotation that says where connections go.
pub const EGRESS: &str = "casemate.io/egress";
/// The annotation that says where connections come from.
pub const INGRESS: &str = "casemate.io/ingress";

/// The most entries of a list: each is a rule that packets meet in turn.
pub const MOST: usize = 256;

const FORM: &str = "an address or CIDR alone, or CIDR:port[/protocol], as 10.0.0.0/8:443, \
                    [2001:db8::]/32:8000-8999/tcp or 192.0.2.7:*";

/// An address, or a range of addresses that begin alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// The first address.
    pub address: IpAddr,
    /// How many of its bits they share.
    pub prefix: u8,
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// `tcp`.
    Tcp,
    /// `udp`.
    Udp,
    /// `sctp`.
    Sctp,
}

/// One entry of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Entry {
    /// Of the other side.
    pub net: Cidr,
    /// From the first to the last; `None` is `*`.
    pub ports: Option<(u16, u16)>,
    /// `None`: TCP and UDP, and with all ports every protocol there is.
    pub transport: Option<Transport>,
}

/// What a list says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct List {
    /// Addresses and ports.
    pub entries: Vec<Entry>,
    /// The cluster's nameservers too.
    pub cluster_dns: bool,
    /// The pod's own addresses.
    pub loopback: Loopback,
}

/// What is wrong with an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{entry} {reason}; write {form}", form = FORM)]
pub struct EntryError {
    /// As written.
    pub entry: String,
    /// What is wrong.
    pub reason: String,
}

/// What holds for a pod's network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// Nothing goes there: the entry, and whose it is.
    pub denied: Vec<(Entry, &'static str)>,
    /// If given, connections go nowhere else.
    pub egress: Option<Vec<Entry>>,
    /// If given, connections come from nowhere else.
    pub ingress: Option<Vec<Entry>>,
    /// The ports that TCP connects to.
    pub connect: PortLock,
    /// The ports that TCP listens on.
    pub listen: PortLock,
}

/// Metadata services: what answers there hands out the node's identity and
/// credentials to whoever asks.
///
/// Who has them: 169.254.169.254 nearly every cloud (AWS IMDS, Google, Azure,
/// Oracle, `OpenStack`, `DigitalOcean`, IBM, Hetzner…); 169.254.170.2 task
/// credentials of AWS ECS; 169.254.170.23 and fd00:ec2::23 EKS Pod Identity;
/// fd00:ec2::254 AWS IMDS; fd20:ce::254 Google; 100.100.100.200 Alibaba Cloud;
/// 169.254.0.23 Tencent Cloud; 169.254.42.42 and fd00:42::42 Scaleway;
/// 192.0.0.192 Oracle Cloud Classic; fd00:c1::a9fe:a9fe Oracle Cloud;
/// fd00:a9fe:a9fe::1 Akamai (Linode); fe80::a9fe:a9fe `OpenStack` (Neutron);
/// 64:ff9b::a9fe:0/112 the first ones through NAT64 (RFC 6052). At 168.63.129.16
/// Azure's nodes get names, which stay, and their configuration with secrets,
/// at two ports. Resolvers and clocks at neighbouring addresses
/// (169.254.169.253, 169.254.169.123) stay.
const METADATA: [&str; 16] = [
    "169.254.169.254",
    "169.254.170.2",
    "169.254.170.23",
    "169.254.0.23",
    "169.254.42.42",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16:80/tcp",
    "168.63.129.16:32526/tcp",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "fd00:42::42",
    "fd00:c1::a9fe:a9fe",
    "fd00:a9fe:a9fe::1",
    "fe80::a9fe:a9fe",
];
const METADATA_BY_NAT64: &str = "64:ff9b::a9fe:0/112";

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix {
            whole if whole == bits(self.address) => write!(f, "{}", self.address),
            prefix => write!(f, "{}/{prefix}", self.address),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            net,
            ports,
            transport,
        } = self;
        match (net.address.is_ipv6(), ports, transport) {
            (_, None, None) => return write!(f, "{net}"),
            (true, ..) => write!(f, "[{}]", net.address)?,
            (false, ..) => write!(f, "{}", net.address)?,
        }
        if net.prefix != bits(net.address) {
            write!(f, "/{}", net.prefix)?;
        }
        match ports {
            None => write!(f, ":*")?,
            Some((first, last)) if first == last => write!(f, ":{first}")?,
            Some((first, last)) => write!(f, ":{first}-{last}")?,
        }
        match transport {
            Some(transport) => write!(f, "/{transport}"),
            None => Ok(()),
        }
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv6() { 128 } else { 32 }
}

/// The address as a number of 128 bits, from the left.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)) << 96,
        IpAddr::V6(v6) => v6.into(),
    }
}

/// Of the pod itself.
pub(crate) fn is_loopback(net: &Cidr) -> bool {
    net.address.is_loopback()
}

fn wrong(entry: &str, reason: impl Into<String>) -> EntryError {
    EntryError {
        entry: format!("\"{}\"", one_line(entry)),
        reason: reason.into(),
    }
}

impl FromStr for Cidr {
    type Err = EntryError;

    fn from_str(text: &str) -> Result<Self, EntryError> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address = address
            .strip_prefix('[')
            .and_then(|a| a.strip_suffix(']'))
            .unwrap_or(address);
        let address: IpAddr = address
            .parse()
            .map_err(|_| wrong(text, "has no address of IPv4 or IPv6"))?;
        let whole = bits(address);
        let prefix = match prefix {
            None => whole,
            Some(prefix) => decimal(prefix)
                .filter(|p| *p <= u16::from(whole))
                .and_then(|p| u8::try_from(p).ok())
                .ok_or_else(|| wrong(text, format!("has a prefix that isn't 0 to {whole}")))?,
        };
        if let IpAddr::V6(v6) = address
            && v6.to_ipv4_mapped().is_some()
        {
            return Err(wrong(text, "is an address of IPv4 in the form of IPv6"));
        }
        let kept = number(address) & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
        if kept != number(address) {
            let first = match address {
                IpAddr::V4(_) => Ipv4Addr::from(u32::try_from(kept >> 96).unwrap_or(0)).into(),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(kept)),
            };
            return Err(wrong(
                text,
                format!("has bits behind its prefix (is {first}/{prefix} meant?)"),
            ));
        }
        Ok(Self { address, prefix })
    }
}

fn decimal(text: &str) -> Option<u16> {
    // Not what `parse` takes beside: a sign.
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())?
}

impl Entry {
    /// An entry with its ports, which have to be there.
    fn with_ports(text: &str) -> Result<Self, EntryError> {
        let (before, transport) = match text.rsplit_once('/') {
            Some((before, "tcp")) => (before, Some(Transport::Tcp)),
            Some((before, "udp")) => (before, Some(Transport::Udp)),
            Some((before, "sctp")) => (before, Some(Transport::Sctp)),
            Some((_, word)) if word.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                return Err(wrong(text, "has a protocol that isn't tcp, udp or sctp"));
            }
            _ => (text, None),
        };
        let Some((net, ports)) = before.rsplit_once(':') else {
            return Err(wrong(text, "has no port"));
        };
        if net.matches(':').count() > 0 && !net.starts_with('[') {
            return Err(wrong(text, "has an address of IPv6 without [ and ]"));
        }
        let net = net.parse().map_err(|e: EntryError| wrong(text, e.reason))?;
        let ports = match ports {
            "*" => None,
            one => Some(ports::range(text, one)?),
        };
        Ok(Self {
            net,
            ports,
            transport,
        })
    }

    fn whole(net: Cidr) -> Self {
        Self {
            net,
            ports: None,
            transport: None,
        }
    }
}

impl FromStr for Entry {
    type Err = EntryError;

    /// With ports, or an address alone: everything there.
    fn from_str(text: &str) -> Result<Self, EntryError> {
        let (address, prefix) = text.split_once('/').unwrap_or((text, ""));
        if address.parse::<IpAddr>().is_ok() && !prefix.contains(':') {
            text.parse().map(Self::whole)
        } else {
            Self::with_ports(text)
        }
    }
}

impl TryFrom<String> for Entry {
    type Error = EntryError;
    fn try_from(text: String) -> Result<Self, EntryError> {
        text.parse()
    }
}

impl TryFrom<String> for Cidr {
    type Error = EntryError;
    fn try_from(text: String) -> Result<Self, EntryError> {
        text.parse()
    }
}

impl From<Entry> for String {
    fn from(entry: Entry) -> String {
        entry.to_string()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> String {
        cidr.to_string()
    }
}

impl FromStr for List {
    type Err = EntryError;

    fn from_str(text: &str) -> Result<Self, EntryError> {
        let mut list = Self::default();
        if text.trim() == "none" {
            return Ok(list);
        }
        for (n, entry) in text.split(',').map(str::trim).enumerate() {
            if n >= MOST {
                return Err(wrong(entry, format!("is one of more than {MOST} entries")));
            }
            match entry {
                "" => return Err(wrong(entry, "is no entry")),
                "none" => return Err(wrong(entry, "stands beside other entries")),
                "cluster-dns" => list.cluster_dns = true,
                entry => match entry.strip_prefix("loopback:") {
                    Some(ports) => list.loopback.add(entry, ports)?,
                    None => list.entries.push(Entry::with_ports(entry)?),
                },
            }
        }
        PortLock::of(&list.loopback, &list.entries)?;
        Ok(list)
    }
}

/// The nameservers of a resolv.conf(5); lines that make no sense are left out,
/// as the resolver does.
#[must_use]
pub fn nameservers(resolv_conf: &str) -> Vec<IpAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next())?
        })
        .filter_map(|word| word.split('%').next()?.parse().ok())
        .take(MOST)
        .collect()
}

impl Rules {
    /// What holds for a pod with these annotations. `host`: it is on the host's
    /// network. `resolvers` finds the pod's own nameservers.
    ///
    /// # Errors
    /// An annotation that makes no sense, or can't be honoured.
    pub fn of(
        egress: Option<&str>,
        ingress: Option<&str>,
        network: &Network,
        host: bool,
        resolvers: impl FnOnce() -> Vec<IpAddr>,
    ) -> Result<Self, Refusal> {
        let (egress, ingress) = lists(egress, ingress, host)?;
        if host {
            return Ok(Self::default());
        }
        let mut connect = PortLock::default();
        let egress = match egress {
            None => None,
            Some(list) => {
                let mut entries = list.entries;
                if list.cluster_dns {
                    entries.extend(dns(network, resolvers)?);
                }
                connect =
                    PortLock::of(&list.loopback, &entries).map_err(|e| of_list(EGRESS, &e))?;
                Some(entries)
            }
        };
        let mut listen = PortLock::default();
        if let Some(list) = &ingress {
            // Not the node's: they have all ports, and the pod listens on its own.
            listen =
                PortLock::of(&list.loopback, &list.entries).map_err(|e| of_list(INGRESS, &e))?;
        }
        let ingress = ingress.map(|list| {
            let nodes = network.nodes.iter().copied().map(Entry::whole);
            nodes.chain(list.entries).collect()
        });
        let mut denied = Vec::new();
        if network.metadata == Metadata::Block {
            let metadata = METADATA.iter().chain([&METADATA_BY_NAT64]);
            let entries = metadata.filter_map(|text| text.parse().ok());
            denied.extend(entries.map(|entry: Entry| (entry, "metadata")));
        }
        denied.extend(network.deny.iter().map(|entry| (*entry, "network.deny")));
        Ok(Self {
            denied,
            egress,
            ingress,
            connect,
            listen,
        })
    }
}

type Lists = (Option<List>, Option<List>);

/// The lists as they are written, of a pod that may have them.
pub(crate) fn lists(
    egress: Option<&str>,
    ingress: Option<&str>,
    host: bool,
) -> Result<Lists, Refusal> {
    let read = |key: &str, value: Option<&str>| match value {
        Some(_) if host => Err(Refusal::new(&HOST_NETWORK_LISTS, field(key), "")),
        Some(text) => match text.parse::<List>() {
            Ok(list) if list.cluster_dns && key == INGRESS => {
                let detail = "\"cluster-dns\" is where connections go to";
                Err(Refusal::new(&NETWORK_LIST, field(key), detail))
            }
            Ok(list) => Ok(Some(list)),
            Err(e) => Err(of_list(key, &e)),
        },
        None => Ok(None),
    };
    Ok((read(EGRESS, egress)?, read(INGRESS, ingress)?))
}

fn of_list(key: &str, e: &EntryError) -> Refusal {
    let detail = format!("{} {}", e.entry, e.reason);
    Refusal::new(&NETWORK_LIST, field(key), detail)
}

fn field(key: &str) -> String {
    format!("annotations[{key}]")
}

fn dns(network: &Network, resolvers: impl FnOnce() -> Vec<IpAddr>) -> Result<Vec<Entry>, Refusal> {
    let addresses = if network.cluster_dns.is_empty() {
        resolvers()
    } else {
        network.cluster_dns.clone()
    };
    if addresses.is_empty() {
        let detail = "\"cluster-dns\" stands for nothing: the pod has no nameservers in its \
                      resolv.conf, and network.cluster_dns of the node's configuration is empty";
        return Err(Refusal::new(&NETWORK_LIST, field(EGRESS), detail));
    }
    Ok(addresses
        .into_iter()
        .map(|address| Entry {
            net: Cidr {
                address,
                prefix: bits(address),
            },
            ports: Some((53, 53)),
            transport: None,
        })
        .collect())
}

#[cfg(test)]
mod tests;

//! Refused connections, explained: by which rule, and what would allow them.

use std::fmt;
use std::net::IpAddr;

use super::{Cidr, EGRESS, Entry, INGRESS, Transport, bits, number};

/// Where a refused packet went to, or came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    /// It left the pod (or came in).
    pub egress: bool,
    /// Of the other side.
    pub address: IpAddr,
    /// As IP numbers it.
    pub protocol: u8,
    /// Where the protocol has ports.
    pub port: Option<u16>,
}

/// Why it was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explained {
    /// The rule, as counters have it.
    pub rule: String,
    /// The narrowest thing that would allow it.
    pub allow: String,
}

impl fmt::Display for Destination {
    /// As an entry of a list, where there is one for it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.transport(), self.port) {
            (Some(transport), Some(port)) => write!(f, "{}/{transport}", self.at(&port)),
            _ => write!(f, "{} (protocol {})", self.address, self.protocol),
        }
    }
}

impl Destination {
    fn transport(&self) -> Option<Transport> {
        match self.protocol {
            6 => Some(Transport::Tcp),
            17 => Some(Transport::Udp),
            132 => Some(Transport::Sctp),
            _ => None,
        }
    }

    fn at(&self, port: &dyn fmt::Display) -> String {
        match self.address {
            IpAddr::V4(v4) => format!("{v4}:{port}"),
            IpAddr::V6(v6) => format!("[{v6}]:{port}"),
        }
    }

    /// By which rule of a pod with these denied, in their order, each with whose
    /// it is.
    pub fn explain<'a>(&self, denied: impl IntoIterator<Item = (Entry, &'a str)>) -> Explained {
        let met = denied
            .into_iter()
            .find(|(entry, _)| self.egress && self.is_of(entry));
        match met {
            Some((entry, by)) => Explained {
                rule: format!("egress denied {entry} ({by})"),
                allow: match by {
                    "metadata" => "no annotation: network.metadata = \"allow\" in config.toml, \
                                   for all pods of the node"
                        .into(),
                    by => format!("no annotation: remove {entry} from {by} in config.toml"),
                },
            },
            None => {
                let (word, key) = match self.egress {
                    true => ("egress", EGRESS),
                    false => ("ingress", INGRESS),
                };
                let entry = match (self.transport(), self.port) {
                    (Some(transport), Some(port)) => format!("{}/{transport}", self.at(&port)),
                    // Protocols without ports have no narrower one.
                    _ => self.at(&"*"),
                };
                Explained {
                    rule: format!("{word} denied: not on the list"),
                    allow: format!("{key}: \"{entry}\", beside what the list has"),
                }
            }
        }
    }

    fn is_of(&self, entry: &Entry) -> bool {
        let transport = match (entry.transport, entry.ports) {
            (Some(wanted), _) => self.transport() == Some(wanted),
            (None, None) => true,
            (None, Some(_)) => matches!(self.transport(), Some(Transport::Tcp | Transport::Udp)),
        };
        let port = entry.ports.is_none_or(|(first, last)| {
            self.port.is_some_and(|port| (first..=last).contains(&port))
        });
        transport && port && is_in(&entry.net, self.address)
    }
}

fn is_in(net: &Cidr, address: IpAddr) -> bool {
    let behind = u32::from(bits(address)) - u32::from(net.prefix.min(bits(address)));
    let first = 128 - u32::from(bits(address)) + behind;
    let cut = |address| number(address).checked_shr(first).unwrap_or(0);
    address.is_ipv6() == net.address.is_ipv6() && cut(address) == cut(net.address)
}

/// An entry that a counter names as `ENTRY (by)`.
#[must_use]
pub fn denied_by(name: &str) -> Option<(Entry, &str)> {
    let (entry, by) = name.strip_prefix("egress denied ")?.rsplit_once(" (")?;
    Some((entry.parse().ok()?, by.strip_suffix(')')?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(address: &str, protocol: u8, port: u16) -> Explained {
        let to = Destination {
            egress: true,
            address: address.parse().unwrap(),
            protocol,
            port: Some(port).filter(|port| *port > 0),
        };
        let denied = [
            "egress denied 169.254.169.254 (metadata)",
            "egress denied 10.0.0.0/8:80-90/tcp (network.deny)",
            "egress denied [fd00::]/16:53 (network.deny)",
            "egress denied: not on the list",
        ];
        to.explain(denied.iter().filter_map(|name| denied_by(name)))
    }

    #[test]
    fn the_rule_and_the_narrowest_way_out_are_named() {
        let list = "egress denied: not on the list";
        for (address, protocol, port, rule, allow) in [
            (
                "169.254.169.254",
                6,
                80,
                "egress denied 169.254.169.254 (metadata)",
                "network.metadata = \"allow\"",
            ),
            (
                "10.1.2.3",
                6,
                90,
                "egress denied 10.0.0.0/8:80-90/tcp (network.deny)",
                "remove 10.0.0.0/8:80-90/tcp from network.deny",
            ),
            (
                "fd00:1::1",
                17,
                53,
                "egress denied [fd00::]/16:53 (network.deny)",
                "no annotation",
            ),
            (
                "10.1.2.3",
                6,
                91,
                list,
                "casemate.io/egress: \"10.1.2.3:91/tcp\"",
            ),
            ("10.1.2.3", 17, 80, list, "\"10.1.2.3:80/udp\""),
            ("11.1.2.3", 6, 80, list, "\"11.1.2.3:80/tcp\""),
            ("fd01::1", 132, 53, list, "\"[fd01::1]:53/sctp\""),
            ("10.1.2.3", 1, 0, list, "\"10.1.2.3:*\""),
        ] {
            let found = explained(address, protocol, port);
            assert_eq!(found.rule, rule, "{address}");
            assert!(found.allow.contains(allow), "{address}: {found:?}");
        }
    }

    #[test]
    fn what_is_said_to_allow_it_is_an_entry() {
        for text in ["10.1.2.3:91/tcp", "[fd01::1]:53/sctp", "10.1.2.3:*"] {
            text.parse::<super::super::List>().unwrap();
        }
    }
}

//! Expressions of nf_tables: what a rule looks at, counts and decides
//! (`nf_tables.h`; in words, nft(8)).

use std::net::IpAddr;

use crate::wire::Attributes;
use crate::{Direction, Ports, Protocol, Target};

/// The register that all comparisons use.
const REGISTER: u32 = 1;

/// The same place as four small ones, and those that follow (`NFT_REG32_00`).
const SMALL: u32 = 8;

const LIST_ELEMENT: u16 = 1;

/// Protocols that have ports.
const WITH_PORTS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// The interface lo, which has this number in every network namespace.
const LOOPBACK: u32 = 1;

const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const AT_MOST: u32 = 3;
const AT_LEAST: u32 = 5;

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    /// Go on in that chain, and come back.
    Jump(&'static str),
    /// Go on in that chain.
    Goto(&'static str),
}

/// A set, by its name and its number in the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetName {
    pub name: &'static str,
    pub number: u32,
    /// Of addresses of IPv6.
    pub v6: bool,
}

/// The expressions of one rule.
pub struct Expressions<'a, 'b>(pub &'a mut Attributes<'b>);

impl Expressions<'_, '_> {
    fn add(&mut self, name: &str, fill: impl FnOnce(&mut Attributes<'_>)) {
        self.0.nested(LIST_ELEMENT, |a| {
            a.text(1, name);
            a.nested(2, fill);
        });
    }

    fn meta(&mut self, key: u32) {
        self.meta_to(REGISTER, key);
    }

    fn meta_to(&mut self, register: u32, key: u32) {
        self.add("meta", |a| {
            a.number(1, register);
            a.number(2, key);
        });
    }

    fn compare(&mut self, how: u32, value: &[u8]) {
        self.add("cmp", |a| {
            a.number(1, REGISTER);
            a.number(2, how);
            a.nested(3, |a| a.bytes(1, value));
        });
    }

    fn mask(&mut self, mask: &[u8]) {
        self.add("bitwise", |a| {
            a.number(1, REGISTER);
            a.number(2, REGISTER);
            a.number(3, u32::try_from(mask.len()).unwrap_or(0));
            a.nested(4, |a| a.bytes(1, mask));
            a.nested(5, |a| a.bytes(1, &vec![0; mask.len()]));
        });
    }

    /// Bytes of the network (1) or transport (2) header.
    fn payload(&mut self, base: u32, offset: u32, length: u32) {
        self.payload_to(REGISTER, base, offset, length);
    }

    fn payload_to(&mut self, register: u32, base: u32, offset: u32, length: u32) {
        self.add("payload", |a| {
            a.number(1, register);
            a.number(2, base);
            a.number(3, offset);
            a.number(4, length);
        });
    }

    /// Comes from, or goes to, lo.
    pub fn loopback(&mut self, direction: Direction) {
        self.meta(match direction {
            Direction::In => 4,
            Direction::Out => 5,
        });
        self.compare(EQUAL, &LOOPBACK.to_ne_bytes());
    }

    /// Belongs to a connection that was let through, or tells about one.
    pub fn known_connection(&mut self) {
        const ESTABLISHED_OR_RELATED: u32 = 2 | 4;
        self.add("ct", |a| {
            a.number(1, REGISTER);
            a.number(2, 0);
        });
        self.mask(&ESTABLISHED_OR_RELATED.to_ne_bytes());
        self.compare(NOT_EQUAL, &0u32.to_ne_bytes());
    }

    /// IPv6 (or IPv4).
    pub fn family(&mut self, v6: bool) {
        self.meta(15);
        self.compare(EQUAL, &[if v6 { 10 } else { 2 }]);
    }

    fn protocol(&mut self, protocol: Protocol) {
        self.meta(16);
        self.compare(EQUAL, &[protocol.number()]);
    }

    /// TCP.
    pub fn tcp(&mut self) {
        self.protocol(Protocol::Tcp);
    }

    /// Has no ports.
    pub fn without_ports(&mut self) {
        self.meta(16);
        for protocol in WITH_PORTS {
            self.compare(NOT_EQUAL, &[protocol.number()]);
        }
    }

    /// Loads what a set of refusals tells apart: the other side's address,
    /// protocol, and destination port, which is 0 where there are none.
    pub fn destination(&mut self, direction: Direction, v6: bool, ports: bool) {
        let (offset, length) = address_at(direction, v6);
        self.payload_to(REGISTER, 1, offset, length);
        let behind = SMALL + length / 4;
        self.meta_to(behind, 16);
        if ports {
            self.payload_to(behind + 1, 2, 2, 2);
        } else {
            self.add("immediate", |a| {
                a.number(1, behind + 1);
                a.nested(2, |a| a.bytes(1, &[0; 4]));
            });
        }
    }

    /// What was loaded isn't in the set.
    pub fn is_not_in(&mut self, set: SetName) {
        const INVERTED: u32 = 1;
        self.add("lookup", |a| {
            a.text(1, set.name);
            a.number(2, REGISTER);
            a.number(4, set.number);
            a.number(5, INVERTED);
        });
    }

    /// Puts what was loaded into the set, or counts it there.
    pub fn count_in(&mut self, set: SetName) {
        const UPDATE: u32 = 1;
        self.add("dynset", |a| {
            a.text(1, set.name);
            a.number(2, set.number);
            a.number(3, UPDATE);
            a.number(4, REGISTER);
            a.nested(7, |a| {
                a.text(1, "counter");
                a.nested(2, zero_counter);
            });
        });
    }

    /// Not more often than so many times a second.
    pub fn at_most(&mut self, a_second: u32) {
        self.add("limit", |a| {
            a.bytes(1, &u64::from(a_second).to_be_bytes());
            a.bytes(2, &1u64.to_be_bytes());
            a.number(3, a_second);
            a.number(4, 0);
        });
    }

    /// Shows its beginning to whoever listens to the group.
    pub fn show(&mut self, group: u16, length: u32) {
        self.add("log", |a| {
            a.bytes(1, &group.to_be_bytes());
            a.number(3, length);
            a.bytes(4, &1u16.to_be_bytes());
        });
    }

    /// Types of ICMPv6, of which one is within `first` and `last`.
    pub fn icmp6(&mut self, first: u8, last: u8) {
        self.meta(16);
        self.compare(EQUAL, &[58]);
        self.payload(2, 0, 1);
        self.compare(AT_LEAST, &[first]);
        self.compare(AT_MOST, &[last]);
    }

    /// Goes to, or comes from, the target; `protocol` is one of its own.
    pub fn target(&mut self, direction: Direction, target: &Target, protocol: Option<Protocol>) {
        self.family(target.address.is_ipv6());
        let prefix = usize::from(target.prefix);
        if prefix > 0 {
            let bytes = match target.address {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            let (offset, length) = address_at(direction, target.address.is_ipv6());
            self.payload(1, offset, length);
            if prefix < bytes.len() * 8 {
                let mask: Vec<u8> = (0..bytes.len())
                    .map(|n| {
                        let bits = prefix.saturating_sub(n * 8).min(8);
                        u8::try_from(0xff00_u32 >> bits & 0xff).unwrap_or(0)
                    })
                    .collect();
                self.mask(&mask);
            }
            self.compare(EQUAL, &bytes);
        }
        if let Some(protocol) = protocol {
            self.protocol(protocol);
        }
        if let Some(Ports { first, last }) = target.ports {
            // Destination ports are at the same place in TCP, UDP and SCTP.
            self.payload(2, 2, 2);
            if first == last {
                self.compare(EQUAL, &first.to_be_bytes());
            } else {
                self.compare(AT_LEAST, &first.to_be_bytes());
                self.compare(AT_MOST, &last.to_be_bytes());
            }
        }
    }

    /// Counts what came this far.
    pub fn counter(&mut self) {
        self.add("counter", zero_counter);
    }

    /// Ends it.
    pub fn verdict(&mut self, verdict: Verdict) {
        const JUMP: u32 = -3_i32 as u32;
        const GOTO: u32 = -4_i32 as u32;
        self.add("immediate", |a| {
            a.number(1, 0);
            a.nested(2, |a| {
                a.nested(2, |a| match verdict {
                    Verdict::Accept => a.number(1, 1),
                    Verdict::Jump(chain) => {
                        a.number(1, JUMP);
                        a.text(2, chain);
                    }
                    Verdict::Goto(chain) => {
                        a.number(1, GOTO);
                        a.text(2, chain);
                    }
                });
            });
        });
    }

    /// Tells the sender: a reset of TCP, or that it is prohibited.
    pub fn reject(&mut self, reset: bool) {
        const RESET: u32 = 1;
        const ANY_FAMILY: u32 = 2;
        const PROHIBITED: u8 = 3;
        self.add("reject", |a| {
            if reset {
                a.number(1, RESET);
            } else {
                a.number(1, ANY_FAMILY);
                a.bytes(2, &[PROHIBITED]);
            }
        });
    }
}

fn zero_counter(a: &mut Attributes<'_>) {
    a.bytes(1, &[0; 8]);
    a.bytes(2, &[0; 8]);
}

/// Where the other side's address is in the network header, and its length.
fn address_at(direction: Direction, v6: bool) -> (u32, u32) {
    match (v6, direction) {
        (false, Direction::In) => (12, 4),
        (false, Direction::Out) => (16, 4),
        (true, Direction::In) => (8, 16),
        (true, Direction::Out) => (24, 16),
    }
}

//! Where refused packets wanted to go: counted by the kernel in the table's sets,
//! and the first of each destination shown to a [`Watch`].

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use crate::socket::Socket;
use crate::table::{counter, sets};
use crate::wire::{self, Messages, answers, attributes, flag};
use crate::{Direction, GROUP, GuardError, Protocol, TABLE};

const GET_SET_ELEMENT: u16 = 13;
/// A packet, in nfnetlink_log's numbers: subsystem and message.
const PACKET: u16 = 4 << 8;

/// Refused packets of one destination (of one source, for those that come in).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Which way they went.
    pub direction: Direction,
    /// Of the other side.
    pub address: IpAddr,
    /// As IP numbers it.
    pub protocol: u8,
    /// Destination port, if the protocol has ports.
    pub port: Option<u16>,
    /// How many.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What has been refused of late in the calling thread's network namespace, the most
/// packets first. Bounded: more destinations than a set has room for aren't told
/// apart, and only in the rules' own counters.
///
/// # Errors
/// The kernel lacks nf_tables, or the caller the capability.
pub fn refused() -> Result<Vec<Refused>, GuardError> {
    let mut found = Vec::new();
    for (direction, set) in sets() {
        // One for each: what is left of a list that fails must not answer the next.
        let socket = Socket::open()?;
        let mut ask = Messages::default();
        ask.add(GET_SET_ELEMENT, flag::DUMP, set.name, |a| {
            a.text(1, TABLE);
            a.text(2, set.name);
        });
        let read = socket.list(&ask, |answer| {
            let lists = answer.attributes().filter(|(kind, _)| *kind == 3);
            for (_, element) in lists.flat_map(|(_, list)| attributes(list)) {
                found.extend(of_element(direction, set.v6, element));
            }
        });
        match read {
            // Another one's table, or a direction that nobody restricts.
            Err(GuardError::Io(e)) if e.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    found.sort_by(|a, b| b.packets.cmp(&a.packets).then(a.address.cmp(&b.address)));
    Ok(found)
}

fn of_element(direction: Direction, v6: bool, element: &[u8]) -> Option<Refused> {
    let of = |kind| attributes(element).find(|(k, _)| *k == kind);
    let (_, key) = of(1)?;
    let (_, key) = attributes(key).find(|(kind, _)| *kind == 1)?;
    let (packets, bytes) = of(7).and_then(|(_, e)| counter(e)).unwrap_or_default();
    let address = address(key, 0, v6)?;
    let behind = if v6 { 16 } else { 4 };
    let protocol = *key.get(behind)?;
    Some(Refused {
        direction,
        address,
        protocol,
        port: has_ports(protocol)
            .then(|| number(key, behind + 4))
            .flatten(),
        packets,
        bytes,
    })
}

fn has_ports(protocol: u8) -> bool {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
        .iter()
        .any(|known| known.number() == protocol)
}

fn address(bytes: &[u8], at: usize, v6: bool) -> Option<IpAddr> {
    let bytes = bytes.get(at..)?;
    if v6 {
        Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into())
    } else {
        Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into())
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Hears of the first refused packet of each destination. Made by who has
/// CAP_NET_ADMIN over the namespace; what it hears it hears without.
#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Watch {
    /// One for the calling thread's network namespace; there can be one at a time.
    ///
    /// # Errors
    /// Somebody has it already, the kernel has no nfnetlink_log, or the caller no
    /// capability.
    pub fn new() -> Result<Watch, GuardError> {
        const BIND: u8 = 1;
        const WHOLE_PACKETS: u8 = 2;
        let socket = Socket::open()?;
        let mut ask = Messages::default();
        ask.configure_log(GROUP, |a| a.bytes(1, &[BIND]));
        socket.ask(&ask)?;
        let mut ask = Messages::default();
        ask.configure_log(GROUP, |a| {
            // As much of each as the rule has; one at a time, at once.
            a.bytes(2, &[0, 0, 0, 0, WHOLE_PACKETS, 0]);
            a.number(5, 1);
        });
        socket.ask(&ask)?;
        Ok(Watch(socket.into()))
    }

    /// The next one, without waiting: an error of kind `WouldBlock` if there is none.
    /// `None` is something that makes no sense.
    ///
    /// # Errors
    /// Of recv(2); with ENOBUFS some were lost.
    pub fn next(&self) -> io::Result<Option<Refused>> {
        let mut buffer = [0; 2048];
        let (length, _) =
            rustix::net::recv(&self.0, &mut buffer[..], rustix::net::RecvFlags::empty())?;
        let bytes = buffer.get(..length).unwrap_or_default();
        Ok(answers(bytes).find_map(|answer| {
            if answer.kind != PACKET {
                return None;
            }
            of_packet(&answer)
        }))
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What is shown of a packet: attributes of the kernel's, and a beginning of the
/// packet that whoever sent it has made up.
fn of_packet(answer: &wire::Answer<'_>) -> Option<Refused> {
    const LOCAL_IN: u8 = 1;
    const LOCAL_OUT: u8 = 3;
    let of = |wanted| answer.attributes().find(|(kind, _)| *kind == wanted);
    let (_, header) = of(1)?;
    let direction = match *header.get(2)? {
        LOCAL_IN => Direction::In,
        LOCAL_OUT => Direction::Out,
        _ => return None,
    };
    let (_, packet) = of(9)?;
    of_headers(direction, packet)
}

fn of_headers(direction: Direction, packet: &[u8]) -> Option<Refused> {
    let (v6, at) = match (packet.first()? >> 4, direction) {
        (4, Direction::In) => (false, 12),
        (4, Direction::Out) => (false, 16),
        (6, Direction::In) => (true, 8),
        (6, Direction::Out) => (true, 24),
        _ => return None,
    };
    let address = address(packet, at, v6)?;
    let (protocol, transport) = if v6 {
        behind_extensions(packet)?
    } else {
        let words = usize::from(packet.first()? & 0xf);
        (*packet.get(9)?, words * 4)
    };
    let port = has_ports(protocol).then(|| number(packet, transport + 2));
    Some(Refused {
        direction,
        address,
        protocol,
        port: port.flatten(),
        packets: 1,
        bytes: packet.len().try_into().unwrap_or(0),
    })
}

/// Protocol and place of what follows the headers of IPv6 (RFC 8200, 4): of a few of
/// them, as the packet is a stranger's.
fn behind_extensions(packet: &[u8]) -> Option<(u8, usize)> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    let (mut protocol, mut at) = (*packet.get(6)?, 40);
    for _ in 0..4 {
        let length = match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION => (usize::from(*packet.get(at + 1)?) + 1) * 8,
            FRAGMENT => 8,
            _ => break,
        };
        protocol = *packet.get(at)?;
        at += length;
    }
    Some((protocol, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(direction: Direction, packet: &[u8]) -> Option<(String, u8, Option<u16>)> {
        let read = of_headers(direction, packet)?;
        Some((read.address.to_string(), read.protocol, read.port))
    }

    /// Else a set that is once full would tell nothing new as long as the pod lives.
    #[test]
    fn what_was_refused_is_forgotten() {
        use casemate_sys::namespace::{self, kind};
        const GET_SET: u16 = 10;
        const TIMEOUT: u16 = 11;
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let timeouts = std::thread::spawn(|| {
            namespace::unshare(kind::NET).unwrap();
            crate::install(&crate::Rules {
                egress: Some(Vec::new()),
                ingress: Some(Vec::new()),
                ..crate::Rules::default()
            })
            .unwrap();
            let mut ask = Messages::default();
            ask.add(GET_SET, flag::DUMP, "sets", |a| a.text(1, TABLE));
            let mut timeouts = Vec::new();
            let read = Socket::open().unwrap().list(&ask, |answer| {
                let timeout = answer.attributes().find(|(kind, _)| *kind == TIMEOUT);
                let first = timeout.and_then(|(_, bytes)| bytes.first_chunk());
                timeouts.push(first.map(|bytes| u64::from_be_bytes(*bytes)));
            });
            read.unwrap();
            timeouts
        });
        let timeouts = timeouts.join().unwrap();
        assert_eq!(timeouts.len(), sets().count());
        assert!(timeouts.iter().all(Option::is_some), "{timeouts:?}");
    }

    #[test]
    fn headers_are_read() {
        let mut v4 = vec![0; 24];
        (v4[0], v4[9]) = (0x45, 6);
        v4[12..16].copy_from_slice(&[10, 0, 0, 1]);
        v4[16..20].copy_from_slice(&[10, 0, 0, 2]);
        v4[22..24].copy_from_slice(&443u16.to_be_bytes());
        let of = |address: &str, port| Some((address.to_owned(), 6, port));
        assert_eq!(read(Direction::Out, &v4), of("10.0.0.2", Some(443)));
        assert_eq!(read(Direction::In, &v4), of("10.0.0.1", Some(443)));
        let mut v6 = vec![0; 56];
        (v6[0], v6[6], v6[40]) = (0x60, 60, 6);
        v6[24..40].copy_from_slice(&Ipv6Addr::LOCALHOST.octets());
        v6[50..52].copy_from_slice(&80u16.to_be_bytes());
        assert_eq!(read(Direction::Out, &v6), of("::1", Some(80)));
    }

    #[test]
    fn nonsense_is_nothing_or_less() {
        for first in [0x45, 0x4f, 0x60, 0x75, 0] {
            for next in [0, 6, 43, 44, 60] {
                for length in 0..80 {
                    let mut packet = vec![0xff; length];
                    for (at, value) in [(0, first), (6, next), (40, 60), (41, 255)] {
                        if let Some(byte) = packet.get_mut(at) {
                            *byte = value;
                        }
                    }
                    for direction in [Direction::In, Direction::Out] {
                        let _ = of_headers(direction, &packet);
                    }
                }
            }
        }
        assert_eq!(read(Direction::Out, &[0x45; 19]), None);
    }
}

//! What netlink configures (T22): queueing, devices, routes, netfilter, IPsec.
//! Each message asks for something that would be made, or found faulty, by who
//! has CAP_NET_ADMIN over the network namespace.

use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketType, socket};

use crate::{Check, Done, No, gained};

const ROUTE: u32 = 0;
const XFRM: u32 = 6;
const NETFILTER: u32 = 12;
const GENERIC: u32 = 16;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const EXCL: u16 = 0x200;

const LOOPBACK: i32 = 1;

/// Errors that come once the sender's rights were looked at.
const BEHIND: &[Errno] = &[
    Errno::INVAL,
    Errno::NOENT,
    Errno::NODEV,
    Errno::NXIO,
    Errno::OPNOTSUPP,
    Errno::EXIST,
    Errno::AFNOSUPPORT,
    Errno::RANGE,
    Errno::SRCH,
    Errno::ADDRNOTAVAIL,
    Errno::NOBUFS,
    Errno::BUSY,
    Errno::NETUNREACH,
    Errno::NOPROTOOPT,
    Errno::PROTONOSUPPORT,
    // ENOTSUPP, which is the kernel's own.
    Errno::from_raw_os_error(524),
];

/// One attribute: length, type, value, padding.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(4);
    let mut out = length.to_ne_bytes().to_vec();
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

/// Sends one message and reads the answer to it.
fn ask(protocol: u32, kind: u16, flags: u16, body: &[u8]) -> Done {
    let protocol = std::num::NonZeroU32::new(protocol).map(Protocol::from_raw);
    let socket = socket(AddressFamily::NETLINK, SocketType::RAW, protocol).map_err(No::Before)?;
    let length = u32::try_from(body.len() + 16).unwrap_or(16);
    let mut packet = length.to_ne_bytes().to_vec();
    packet.extend(kind.to_ne_bytes());
    packet.extend((REQUEST | flags).to_ne_bytes());
    packet.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    packet.extend(body);
    rustix::net::send(&socket, &packet, SendFlags::empty())?;
    let limit = Some(std::time::Duration::from_secs(3));
    rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, limit)?;
    let mut answer = [0; 8192];
    let (n, _) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty())?;
    let word = |at: usize| {
        let bytes = answer.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, i32::from_ne_bytes)
    };
    // NLMSG_ERROR: the number is negative, or 0.
    if n >= 20 && answer[4] == 2 && answer[5] == 0 && word(16) != 0 {
        return Err(No::Errno(Errno::from_raw_os_error(-word(16))));
    }
    Ok(String::new())
}

/// `struct tcmsg` of the loopback device, at its root.
fn traffic(kind: &str) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend(LOOPBACK.to_ne_bytes());
    body.extend(0u32.to_ne_bytes());
    body.extend(u32::MAX.to_ne_bytes());
    body.extend(0u32.to_ne_bytes());
    body.extend(text(1, kind));
    body
}

/// `struct ifinfomsg` of a new device.
fn device(kind: &str) -> Vec<u8> {
    let mut body = vec![0; 16];
    body.extend(text(3, "probe0"));
    body.extend(attribute(18, &text(1, kind)));
    body
}

fn address() -> Vec<u8> {
    let mut body = vec![2, 8, 0, 254];
    body.extend(LOOPBACK.to_ne_bytes());
    body.extend(attribute(2, &[127, 0, 0, 9]));
    body.extend(attribute(1, &[127, 0, 0, 9]));
    body
}

const QDISCS: [&str; 22] = [
    "htb", "tbf", "ingress", "clsact", "pfifo", "bfifo", "prio", "hfsc", "qfq", "drr", "ets",
    "netem", "sfq", "fq", "fq_codel", "codel", "cake", "choke", "red", "taprio", "multiq", "plug",
];

const DEVICES: [&str; 16] = [
    "dummy",
    "bridge",
    "veth",
    "vlan",
    "bond",
    "team",
    "macvlan",
    "macvtap",
    "ipvlan",
    "vxlan",
    "geneve",
    "gre",
    "sit",
    "gtp",
    "wireguard",
    "vrf",
];

/// Other changes that NETLINK_ROUTE takes: name, what, type, zeros in the body.
const CHANGES: [(&str, &str, u16, usize); 16] = [
    ("setlink", "a device's settings", 19, 16),
    ("dellink", "a device removed", 17, 16),
    ("newroute", "a route", 24, 12),
    ("newneigh", "a neighbour", 28, 12),
    ("newrule", "a rule of routing", 32, 12),
    ("newtclass", "a class of queueing", 40, 20),
    ("newtfilter", "a classifier", 44, 20),
    ("newaction", "an action of classifiers", 48, 4),
    ("newprefix", "a prefix", 52, 12),
    ("newneightbl", "the neighbour table", 64, 4),
    ("newaddrlabel", "an address label", 72, 12),
    ("newnsid", "an id of a network namespace", 88, 4),
    ("newchain", "a chain of classifiers", 100, 20),
    ("newnexthop", "a next hop", 104, 8),
    ("newlinkprop", "another name of a device", 108, 16),
    ("newtunnel", "a tunnel's mapping", 120, 8),
];

const SUBSYSTEMS: [(&str, u16); 12] = [
    ("conntrack", 1),
    ("expectations", 2),
    ("queue", 3),
    ("log", 4),
    ("osf", 5),
    ("ipset", 6),
    ("accounting", 7),
    ("timeouts", 8),
    ("helpers", 9),
    ("nftables", 10),
    ("compat", 11),
    ("hooks", 12),
];

/// A batch that makes a table, as nft(8) sends it; the answer is to the table.
fn new_table() -> Done {
    let protocol = std::num::NonZeroU32::new(NETFILTER).map(Protocol::from_raw);
    let socket = socket(AddressFamily::NETLINK, SocketType::RAW, protocol).map_err(No::Before)?;
    let message = |kind: u16, flags: u16, seq: u32, body: &[u8]| {
        let length = u32::try_from(body.len() + 16).unwrap_or(16);
        let mut out = length.to_ne_bytes().to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend((REQUEST | flags).to_ne_bytes());
        out.extend(seq.to_ne_bytes());
        out.extend([0; 4]);
        out.extend(body);
        out
    };
    let subsystem = [0, 0, 0, 10];
    let table = [&[2, 0, 0, 0][..], &text(1, "probe")].concat();
    let batch = [
        message(0x10, 0, 1, &subsystem),
        message(10 << 8, ACK | CREATE, 2, &table),
        message(0x11, 0, 3, &subsystem),
    ]
    .concat();
    rustix::net::send(&socket, &batch, SendFlags::empty())?;
    let mut answer = [0; 4096];
    let limit = Some(std::time::Duration::from_secs(3));
    rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, limit)?;
    let (_, _) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty())?;
    let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    if code == 0 {
        Ok("a table".to_owned())
    } else {
        Err(Errno::from_raw_os_error(-code).into())
    }
}

/// The checks of this file.
pub fn checks() -> Vec<Check> {
    let mut all = Vec::new();
    for kind in QDISCS {
        all.push(
            Check::new(
                &format!("T22.qdisc-{kind}"),
                "a queueing discipline of this kind",
                move || ask(ROUTE, 36, ACK | CREATE | EXCL, &traffic(kind)),
            )
            .entered(&[Errno::INVAL, Errno::OPNOTSUPP, Errno::EXIST])
            .absent(&[Errno::NOENT]),
        );
    }
    for kind in DEVICES {
        all.push(
            Check::new(
                &format!("T22.device-{kind}"),
                "a network device of this kind",
                move || ask(ROUTE, 16, ACK | CREATE | EXCL, &device(kind)),
            )
            .entered(&[Errno::INVAL, Errno::NODEV, Errno::EXIST])
            .absent(&[Errno::OPNOTSUPP]),
        );
    }
    all.push(
        Check::new("T22.address", "an address of its own choice", || {
            ask(ROUTE, 20, ACK | CREATE, &address())
        })
        .entered(BEHIND),
    );
    for (name, means, kind, zeros) in CHANGES {
        all.push(
            Check::new(&format!("T22.{name}"), means, move || {
                ask(ROUTE, kind, ACK | CREATE, &vec![0; zeros])
            })
            .entered(BEHIND),
        );
    }
    for (name, number) in SUBSYSTEMS {
        all.push(
            Check::new(
                &format!("T22.netfilter-{name}"),
                "this part of netfilter takes its message",
                move || ask(NETFILTER, number << 8, ACK | CREATE, &[2, 0, 0, 0]),
            )
            .entered(BEHIND),
        );
    }
    all.push(Check::new("T22.nftables-table", "a table of nftables", new_table).entered(BEHIND));
    for (name, kind, zeros) in [
        ("state", 0x10u16, 224),
        ("policy", 0x13, 168),
        ("spi", 0x16, 232),
        ("migrate", 0x21, 64),
        ("flush", 0x1c, 8),
    ] {
        all.push(
            Check::new(
                &format!("T22.xfrm-{name}"),
                "IPsec takes its message",
                move || ask(XFRM, kind, ACK, &vec![0; zeros]),
            )
            .entered(BEHIND),
        );
    }
    all.push(Check::new(
        "T22.generic",
        "families of generic netlink are listed",
        || gained(ask(GENERIC, 16, DUMP, &[3, 1, 0, 0])),
    ));
    all
}

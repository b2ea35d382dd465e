//! Sockets: families, types, protocols, options, requests (T22).

use std::os::fd::AsRawFd;

use casemate_sys::attempt;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, socket};

use crate::{Arg, Check, Done, gained};

/// A flag of socket(2) that doesn't exist. The kernel answers EINVAL for it
/// before it looks at family and protocol, built in or not; so that answer says
/// that the call was let through with this family.
const NO_FLAG: usize = 0x10_0000;
const THROUGH: &[Errno] = &[Errno::INVAL];

const STREAM: usize = 1;
const DGRAM: usize = 2;
const RAW: usize = 3;

/// Families beside those of local and internet sockets; netlink is apart.
const FAMILIES: [(&str, usize); 39] = [
    ("AX25", 3),
    ("IPX", 4),
    ("APPLETALK", 5),
    ("NETROM", 6),
    ("BRIDGE", 7),
    ("ATMPVC", 8),
    ("X25", 9),
    ("ROSE", 11),
    ("DECnet", 12),
    ("NETBEUI", 13),
    ("SECURITY", 14),
    ("KEY", 15),
    ("PACKET", 17),
    ("ASH", 18),
    ("ECONET", 19),
    ("ATMSVC", 20),
    ("RDS", 21),
    ("SNA", 22),
    ("IRDA", 23),
    ("PPPOX", 24),
    ("LLC", 26),
    ("IB", 27),
    ("MPLS", 28),
    ("CAN", 29),
    ("TIPC", 30),
    ("BLUETOOTH", 31),
    ("IUCV", 32),
    ("RXRPC", 33),
    ("ISDN", 34),
    ("PHONET", 35),
    ("IEEE802154", 36),
    ("CAIF", 37),
    ("ALG", 38),
    ("NFC", 39),
    ("VSOCK", 40),
    ("KCM", 41),
    ("QIPCRTR", 42),
    ("SMC", 43),
    ("XDP", 44),
];

/// Protocols of netlink, beside NETLINK_ROUTE.
pub const NETLINKS: [(&str, usize); 18] = [
    ("USERSOCK", 2),
    ("FIREWALL", 3),
    ("SOCK_DIAG", 4),
    ("NFLOG", 5),
    ("XFRM", 6),
    ("SELINUX", 7),
    ("ISCSI", 8),
    ("AUDIT", 9),
    ("FIB_LOOKUP", 10),
    ("CONNECTOR", 11),
    ("NETFILTER", 12),
    ("IP6_FW", 13),
    ("KOBJECT_UEVENT", 15),
    ("GENERIC", 16),
    ("SCSITRANSPORT", 18),
    ("ECRYPTFS", 19),
    ("RDMA", 20),
    ("CRYPTO", 21),
];

/// Kinds of internet sockets that few programs need: type and protocol.
const KINDS: [(&str, usize, usize); 9] = [
    ("icmp-raw", RAW, 1),
    ("any-raw", RAW, 255),
    ("packet", 10, 3),
    ("sctp", STREAM, 132),
    ("sctp-seqpacket", 5, 132),
    ("dccp", 6, 33),
    ("udplite", DGRAM, 136),
    ("l2tp", DGRAM, 115),
    ("mptcp", STREAM, 262),
];

fn open(family: usize, kind: usize, protocol: usize) -> Done {
    gained(attempt::raw(
        "socket",
        &[Arg::Int(family), Arg::Int(kind), Arg::Int(protocol)],
    ))
}

/// Any type of the family.
fn open_any(family: usize) -> Done {
    let mut last = Errno::AFNOSUPPORT.into();
    for kind in [STREAM, DGRAM, RAW, 5, 4] {
        match open(family, kind, 0) {
            Ok(_) => return Ok(format!("type {kind}")),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn families(all: &mut Vec<Check>) {
    const NONE: &[Errno] = &[
        Errno::AFNOSUPPORT,
        Errno::PROTONOSUPPORT,
        Errno::SOCKTNOSUPPORT,
        Errno::NOSYS,
    ];
    for (name, family) in FAMILIES {
        all.push(
            Check::new(
                &format!("T22.family-{name}"),
                "socket(2) gets to the kernel with this family",
                move || open(family, RAW | NO_FLAG, 0),
            )
            .entered(THROUGH),
        );
        all.push(
            Check::new(
                &format!("T22.open-{name}"),
                "a socket of this family",
                move || open_any(family),
            )
            .absent(NONE),
        );
    }
    // Above the 32 bits that the kernel looks at.
    all.push(
        Check::new(
            "T22.family-ALG-high",
            "the same, with bits that hide it",
            || open(1 << 32 | 38, RAW | NO_FLAG, 0),
        )
        .entered(THROUGH),
    );
    for (name, protocol) in NETLINKS {
        all.push(
            Check::new(
                &format!("T22.netlink-{name}"),
                "socket(2) gets to the kernel with this netlink protocol",
                move || open(16, RAW | NO_FLAG, protocol),
            )
            .entered(THROUGH),
        );
    }
    for (name, kind, protocol) in KINDS {
        for (version, family) in [("4", 2), ("6", 10)] {
            if name == "packet" && version == "6" {
                continue;
            }
            all.push(
                Check::new(
                    &format!("T22.ip{version}-{name}"),
                    "an internet socket of this kind",
                    move || open(family, kind, protocol),
                )
                .absent(NONE),
            );
            all.push(
                Check::new(
                    &format!("T22.entry-ip{version}-{name}"),
                    "socket(2) gets to the kernel with this kind of internet socket",
                    move || open(family, kind | NO_FLAG, protocol),
                )
                .entered(THROUGH),
            );
        }
    }
}

struct Opt {
    id: &'static str,
    means: &'static str,
    /// Family and type of the socket.
    on: (AddressFamily, SocketType),
    level: usize,
    name: usize,
    value: &'static [u8],
    entered: &'static [Errno],
    absent: &'static [Errno],
}

const TCP: (AddressFamily, SocketType) = (AddressFamily::INET, SocketType::STREAM);
const TCP6: (AddressFamily, SocketType) = (AddressFamily::INET6, SocketType::STREAM);
const UDP: (AddressFamily, SocketType) = (AddressFamily::INET, SocketType::DGRAM);
const ONE: &[u8] = &[1, 0, 0, 0];
const BEHIND: &[Errno] = &[
    Errno::INVAL,
    Errno::FAULT,
    Errno::BADF,
    Errno::NOENT,
    Errno::NOTCONN,
];
const NO_OPTION: &[Errno] = &[Errno::NOPROTOOPT, Errno::NOSYS];

const fn opt(
    id: &'static str,
    means: &'static str,
    on: (AddressFamily, SocketType),
    (level, name): (usize, usize),
    value: &'static [u8],
) -> Opt {
    Opt {
        id,
        means,
        on,
        level,
        name,
        value,
        entered: BEHIND,
        absent: NO_OPTION,
    }
}

const OPTIONS: [Opt; 20] = [
    opt("ulp-tls", "TLS in the kernel", TCP, (6, 31), b"tls"),
    opt("ulp-tls-6", "TLS in the kernel", TCP6, (6, 31), b"tls"),
    opt("ulp-espintcp", "ESP in TCP", TCP, (6, 31), b"espintcp"),
    opt("ulp-smc", "SMC below TCP", TCP, (6, 31), b"smc"),
    opt(
        "attach-filter",
        "a BPF filter on a socket",
        TCP,
        (1, 26),
        &[0; 16],
    ),
    opt(
        "attach-bpf",
        "a BPF program on a socket",
        TCP,
        (1, 50),
        &[0xff; 4],
    ),
    opt(
        "reuseport-cbpf",
        "a BPF program that picks sockets",
        UDP,
        (1, 51),
        &[0; 16],
    ),
    opt(
        "reuseport-ebpf",
        "a BPF program that picks sockets",
        UDP,
        (1, 52),
        &[0xff; 4],
    ),
    opt("iptables", "rules of iptables", TCP, (0, 64), &[0; 96]),
    opt("arptables", "rules of arptables", TCP, (0, 96), &[0; 96]),
    opt("ebtables", "rules of ebtables", TCP, (0, 128), &[0; 120]),
    opt("ip6tables", "rules of ip6tables", TCP6, (41, 64), &[0; 96]),
    opt("ipvs", "services of IPVS", TCP, (0, 1154), &[0; 64]),
    opt(
        "xfrm-policy",
        "an IPsec policy on a socket",
        UDP,
        (0, 17),
        &[0; 168],
    ),
    opt(
        "xfrm-policy-6",
        "an IPsec policy on a socket",
        TCP6,
        (41, 35),
        &[0; 168],
    ),
    opt("udp-encap", "ESP in UDP", UDP, (17, 100), &[2, 0, 0, 0]),
    opt("transparent", "others' addresses", UDP, (0, 19), ONE),
    opt("mark", "marks that choose routes", UDP, (1, 36), ONE),
    opt(
        "buffer-force",
        "buffers beyond the limit",
        UDP,
        (1, 33),
        ONE,
    ),
    opt(
        "tcp-repair",
        "rewrites a connection's state",
        TCP,
        (6, 19),
        ONE,
    ),
];

fn set(option: &Opt) -> Done {
    let socket = socket(option.on.0, option.on.1, None)?;
    gained(attempt::raw(
        "setsockopt",
        &[
            Arg::Int(socket.as_raw_fd() as usize),
            Arg::Int(option.level),
            Arg::Int(option.name),
            Arg::Bytes(option.value),
            Arg::Int(option.value.len()),
        ],
    ))
}

fn get(level: usize, name: usize) -> Done {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    gained(attempt::raw(
        "getsockopt",
        &[
            Arg::Int(socket.as_raw_fd() as usize),
            Arg::Int(level),
            Arg::Int(name),
            Arg::Bytes(&[0; 4]),
            Arg::Bytes(&[84, 0, 0, 0]),
        ],
    ))
}

/// Requests on an internet socket, with a `struct ifreq` of the loopback device.
const REQUESTS: [(&str, &str, usize); 11] = [
    (
        "flags",
        "a device is switched on or off (SIOCSIFFLAGS)",
        0x8914,
    ),
    ("address", "a device's address (SIOCSIFADDR)", 0x8916),
    ("name", "a device's name (SIOCSIFNAME)", 0x8923),
    ("mtu", "a device's MTU (SIOCSIFMTU)", 0x8922),
    ("queue", "a device's queue (SIOCSIFTXQLEN)", 0x8943),
    ("multicast", "a multicast address (SIOCADDMULTI)", 0x8931),
    ("route", "a route (SIOCADDRT)", 0x890b),
    ("arp", "an entry of the ARP table (SIOCSARP)", 0x8955),
    ("bridge", "a bridge (SIOCBRADDBR)", 0x89a0),
    (
        "timestamps",
        "timestamps of a device (SIOCSHWTSTAMP)",
        0x89b0,
    ),
    ("bond", "a device into a bond (SIOCBONDENSLAVE)", 0x8990),
];

fn request(number: usize) -> Done {
    const LOOPBACK: &[u8] = &[
        b'l', b'o', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x49, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    gained(attempt::raw(
        "ioctl",
        &[
            Arg::Int(socket.as_raw_fd() as usize),
            Arg::Int(number),
            Arg::Bytes(LOOPBACK),
        ],
    ))
}

/// The checks of this file.
pub fn checks() -> Vec<Check> {
    let mut all = Vec::new();
    families(&mut all);
    for option in &OPTIONS {
        all.push(
            Check::new(&format!("T22.option-{}", option.id), option.means, || {
                set(option)
            })
            .entered(option.entered)
            .absent(option.absent),
        );
    }
    all.push(
        Check::new("T22.read-iptables", "rules of iptables are read", || {
            get(0, 64)
        })
        .entered(BEHIND)
        .absent(NO_OPTION),
    );
    for (name, means, number) in REQUESTS {
        all.push(
            Check::new(&format!("T22.request-{name}"), means, move || {
                request(number)
            })
            .entered(&[
                Errno::INVAL,
                Errno::NODEV,
                Errno::OPNOTSUPP,
                Errno::BUSY,
                Errno::NOBUFS,
                Errno::AFNOSUPPORT,
                Errno::FAULT,
                Errno::EXIST,
                Errno::PFNOSUPPORT,
            ])
            .absent(&[Errno::NOPKG, Errno::NOSYS]),
        );
    }
    all
}

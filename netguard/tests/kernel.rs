//! Rules in real network namespaces. Needs root.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use casemate_netguard::{
    Direction, MOST_REFUSED, Ports, Protocol, Refused, Rules, Target, Watch, counters, install,
    installed, promised, refused,
};
use casemate_sys::namespace::{self, kind};

/// Two namespaces and a wire between: `inside` runs with 192.0.2.2 and
/// 2001:db8::2 there, `outside` with .1 here.
fn with_wire(test: impl FnOnce(&dyn Fn(&mut dyn FnMut())) + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    std::thread::spawn(move || {
        namespace::unshare(kind::NET).unwrap();
        let host = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        namespace::unshare(kind::NET).unwrap();
        let pod = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        let to = |ns: &std::fs::File| namespace::enter(ns, kind::NET).unwrap();
        let ip = |line: &str| {
            let status = Command::new("ip").args(line.split(' ')).status().unwrap();
            assert!(status.success(), "ip {line}");
        };
        namespace::loopback_up().unwrap();
        to(&host);
        namespace::loopback_up().unwrap();
        // The other end lands where a process of that namespace is: a sleeper.
        to(&pod);
        let mut sleeper = Command::new("sleep").arg("60").spawn().unwrap();
        to(&host);
        ip("link add host0 type veth peer name pod0");
        ip(&format!("link set pod0 netns {}", sleeper.id()));
        for line in [
            "addr add 192.0.2.1/24 dev host0",
            "addr add 169.254.169.254/32 dev host0",
            "addr add 2001:db8::1/64 dev host0 nodad",
            "addr add fd00:ec2::254/128 dev host0 nodad",
            "link set host0 up",
        ] {
            ip(line);
        }
        to(&pod);
        for line in [
            "addr add 192.0.2.2/24 dev pod0",
            "addr add 2001:db8::2/64 dev pod0 nodad",
            "link set pod0 up",
            "route add default via 192.0.2.1",
            "route add default via 2001:db8::1",
        ] {
            ip(line);
        }
        to(&host);
        let run = |inside: &mut dyn FnMut()| {
            to(&pod);
            inside();
            to(&host);
        };
        test(&run);
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
    })
    .join()
    .unwrap();
}

fn target(text: &str) -> Target {
    let (address, prefix) = text.split_once('/').unwrap_or((text, ""));
    let address: IpAddr = address.parse().unwrap();
    let whole = if address.is_ipv6() { 128 } else { 32 };
    Target {
        name: text.to_owned(),
        address,
        prefix: prefix.parse().unwrap_or(whole),
        ports: None,
        protocols: Vec::new(),
    }
}

fn port(text: &str, port: u16, protocol: Protocol) -> Target {
    Target {
        name: format!("{text}:{port}"),
        ports: Some(Ports {
            first: port,
            last: port,
        }),
        protocols: vec![protocol],
        ..target(text)
    }
}

/// How a connection ended, in at most a second: nobody listens anywhere, so a
/// packet that gets through is answered by a reset as well; so listen.
fn connect(to: &str) -> Result<(), ErrorKind> {
    let begun = Instant::now();
    let end = TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_secs(3));
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{to}: {end:?} after {:?}",
        begun.elapsed()
    );
    end.map(|_| ()).map_err(|e| e.kind())
}

fn count(name: &str) -> u64 {
    let all = counters().unwrap().expect("no table");
    all.iter()
        .find(|c| c.name == name)
        .unwrap_or_else(|| panic!("no {name} in {all:?}"))
        .packets
}

#[test]
fn denied_addresses_are_refused_at_once_and_counted() {
    with_wire(|inside| {
        let listeners = [
            TcpListener::bind("0.0.0.0:80").unwrap(),
            TcpListener::bind("[::]:81").unwrap(),
        ];
        inside(&mut || {
            for to in [
                "169.254.169.254:80",
                "192.0.2.1:80",
                "[fd00:ec2::254]:81",
                "[2001:db8::1]:81",
            ] {
                connect(to).unwrap();
            }
            assert_eq!(counters().unwrap(), None);
            let rules = Rules {
                denied: vec![target("169.254.169.254"), target("fd00:ec2::/32")],
                ..Rules::default()
            };
            install(&rules).unwrap();
            assert_eq!(
                connect("169.254.169.254:80"),
                Err(ErrorKind::ConnectionRefused)
            );
            assert_eq!(
                connect("[fd00:ec2::254]:81"),
                Err(ErrorKind::ConnectionRefused)
            );
            let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
            let sent = udp.send_to(b"x", "169.254.169.254:53").unwrap_err();
            assert_eq!(sent.kind(), ErrorKind::PermissionDenied);
            connect("192.0.2.1:80").unwrap();
            connect("[2001:db8::1]:81").unwrap();
            assert_eq!(count("egress denied 169.254.169.254"), 2);
            assert_eq!(count("egress denied fd00:ec2::/32"), 1);
            // Again, with other rules: these alone count, from the start.
            let rules = Rules {
                denied: vec![target("192.0.2.0/28")],
                ..Rules::default()
            };
            install(&rules).unwrap();
            connect("169.254.169.254:80").unwrap();
            assert!(connect("192.0.2.1:80").is_err());
            assert_eq!(counters().unwrap().unwrap().len(), 1);
            install(&Rules::default()).unwrap();
            connect("192.0.2.1:80").unwrap();
        });
        drop(listeners);
    });
}

#[test]
fn lists_let_through_what_they_have_and_replies() {
    with_wire(|inside| {
        let allowed = TcpListener::bind("0.0.0.0:443").unwrap();
        let other = TcpListener::bind("0.0.0.0:444").unwrap();
        let v6 = TcpListener::bind("[2001:db8::1]:445").unwrap();
        let names = UdpSocket::bind("192.0.2.1:53").unwrap();
        inside(&mut || {
            let rules = Rules {
                egress: Some(vec![
                    port("192.0.2.0/24", 443, Protocol::Tcp),
                    port("192.0.2.1", 53, Protocol::Udp),
                    port("2001:db8::/64", 445, Protocol::Tcp),
                ]),
                ingress: Some(vec![port("192.0.2.0/24", 8080, Protocol::Tcp)]),
                ..Rules::default()
            };
            install(&rules).unwrap();
            connect("192.0.2.1:443").unwrap();
            connect("[2001:db8::1]:445").unwrap();
            for to in [
                "192.0.2.1:444",
                "169.254.169.254:443",
                "[fd00:ec2::254]:445",
            ] {
                assert_eq!(connect(to), Err(ErrorKind::ConnectionRefused), "{to}");
            }
            let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
            udp.send_to(b"question", "192.0.2.1:53").unwrap();
            assert!(udp.send_to(b"question", "192.0.2.1:54").is_err());
            let mut buffer = [0; 16];
            let (_, from) = names.recv_from(&mut buffer).unwrap();
            names.send_to(b"answer", from).unwrap();
            let (length, _) = udp.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"answer");
            let own = TcpListener::bind("127.0.0.1:0").unwrap();
            connect(&own.local_addr().unwrap().to_string()).unwrap();
            assert_eq!(count("egress denied: not on the list"), 4);
            assert_eq!(count("egress allowed 192.0.2.0/24:443"), 1);
        });
        // The other way: from outside.
        let mut servers = Vec::new();
        inside(&mut || {
            servers.push(TcpListener::bind("0.0.0.0:8080").unwrap());
            servers.push(TcpListener::bind("0.0.0.0:8081").unwrap());
        });
        connect("192.0.2.2:8080").unwrap();
        assert_eq!(connect("192.0.2.2:8081"), Err(ErrorKind::ConnectionRefused));
        inside(&mut || {
            assert_eq!(count("ingress denied: not on the list"), 1);
            assert_eq!(count("ingress allowed 192.0.2.0/24:8080"), 1);
            // Nothing at all, both ways.
            let none = Rules {
                egress: Some(Vec::new()),
                ingress: Some(Vec::new()),
                ..Rules::default()
            };
            install(&none).unwrap();
            assert!(connect("192.0.2.1:443").is_err());
        });
        assert!(connect("192.0.2.2:8080").is_err());
        drop((allowed, other, v6));
    });
}

/// Destinations as text: protocol, address, port, packets.
fn shown(all: &[Refused]) -> Vec<String> {
    let mut shown: Vec<String> = all
        .iter()
        .map(|r| {
            let way = match r.direction {
                Direction::In => "from",
                Direction::Out => "to",
            };
            let port = r.port.map_or(0, u32::from);
            format!("{} {way} {} {port} {}x", r.protocol, r.address, r.packets)
        })
        .collect();
    shown.sort();
    shown
}

fn heard(watch: &Watch) -> Vec<Refused> {
    let mut all = Vec::new();
    loop {
        match watch.next() {
            Ok(refused) => all.extend(refused),
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock, "{e}");
                return all;
            }
        }
    }
}

#[test]
fn refused_destinations_are_told_apart_and_told() {
    with_wire(|inside| {
        let mut watches = Vec::new();
        inside(&mut || {
            let rules = Rules {
                denied: vec![target("169.254.169.254")],
                egress: Some(vec![port("192.0.2.0/24", 443, Protocol::Tcp)]),
                ingress: Some(vec![port("192.0.2.0/24", 8080, Protocol::Tcp)]),
            };
            // Addresses of IPv6 work a moment after the wire is there.
            let _refused = TcpStream::connect("[2001:db8::1]:443");
            assert!(install(&rules).unwrap().shows);
            assert_eq!(refused().unwrap(), []);
            let watch = Watch::new().unwrap();
            // There is one at a time.
            Watch::new().unwrap_err();
            for _ in 0..3 {
                connect("192.0.2.1:444").unwrap_err();
            }
            connect("169.254.169.254:80").unwrap_err();
            connect("[2001:db8::1]:443").unwrap_err();
            let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
            udp.send_to(b"x", "192.0.2.1:53").unwrap_err();
            // Of a protocol without ports: an echo request.
            let kind = rustix::net::SocketType::RAW;
            let icmp = Some(rustix::net::ipproto::ICMP);
            let raw = rustix::net::socket(rustix::net::AddressFamily::INET, kind, icmp).unwrap();
            let to: std::net::SocketAddrV4 = "192.0.2.1:0".parse().unwrap();
            let echo = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
            let flags = rustix::net::SendFlags::empty();
            rustix::net::sendto(&raw, &echo, flags, &to).unwrap_err();
            let wanted = [
                "1 to 192.0.2.1 0 1x",
                "17 to 192.0.2.1 53 1x",
                "6 to 169.254.169.254 80 1x",
                "6 to 192.0.2.1 444 3x",
                "6 to 2001:db8::1 443 1x",
            ];
            let found = refused().unwrap();
            assert_eq!(shown(&found), wanted);
            assert_eq!(found[0].packets, 3, "the most first: {found:?}");
            let once: Vec<String> = wanted.iter().map(|w| w.replace("3x", "1x")).collect();
            assert_eq!(shown(&heard(&watch)), once);
            // Again: counted, and nobody's news.
            connect("192.0.2.1:444").unwrap_err();
            assert_eq!(shown(&heard(&watch)), [""; 0]);
            assert!(shown(&refused().unwrap()).contains(&"6 to 192.0.2.1 444 4x".to_owned()));
            watches.push(watch);
        });
        connect("192.0.2.2:8081").unwrap_err();
        inside(&mut || {
            assert_eq!(shown(&heard(&watches[0])), ["6 from 192.0.2.1 8081 1x"]);
            let told = shown(&refused().unwrap());
            assert!(
                told.contains(&"6 from 192.0.2.1 8081 1x".to_owned()),
                "{told:?}"
            );
            // Another pod's, in the same namespace.
            watches.clear();
            Watch::new().unwrap();
        });
    });
}

#[test]
fn what_is_told_apart_is_bounded() {
    with_wire(|inside| {
        inside(&mut || {
            let rules = Rules {
                egress: Some(Vec::new()),
                ..Rules::default()
            };
            install(&rules).unwrap();
            let watch = Watch::new().unwrap();
            let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
            let sent = MOST_REFUSED + 100;
            for n in 0..sent {
                let to = format!("10.0.{}.{}:9", n / 200, n % 200 + 1);
                udp.send_to(b"x", to).unwrap_err();
            }
            let told = refused().unwrap();
            assert_eq!(told.len(), MOST_REFUSED as usize);
            let count = count("egress denied: not on the list");
            assert_eq!(count, u64::from(sent));
            let heard = heard(&watch).len();
            assert!((1..100).contains(&heard), "{heard} were shown at once");
        });
    });
}

/// Each pod's start has one of these in it: a fresh namespace, and some twenty
/// addresses denied. The bound is for a busy machine.
#[test]
fn it_is_there_in_no_time() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    std::thread::spawn(|| {
        let mut denied: Vec<Target> = (1..=9).map(|n| target(&format!("169.254.0.{n}"))).collect();
        denied.extend((1..=8).map(|n| target(&format!("fd00::{n}"))));
        let rules = Rules {
            denied,
            ..Rules::default()
        };
        let mut times: Vec<Duration> = (0..50)
            .map(|_| {
                namespace::unshare(kind::NET).unwrap();
                let begun = Instant::now();
                install(&rules).unwrap();
                begun.elapsed()
            })
            .collect();
        times.sort();
        println!("median {:?}, worst {:?}", times[25], times[49]);
        assert!(times[25] < Duration::from_millis(5), "{times:?}");
    })
    .join()
    .unwrap();
}

/// All kinds of expressions: what the kernel has of them is what was promised, and
/// stays so when packets are counted.
#[test]
fn what_is_installed_is_told_in_the_words_of_the_promise() {
    with_wire(|inside| {
        inside(&mut || {
            assert_eq!(installed().unwrap(), [], "nothing is there yet");
            let wide = Target {
                ports: Some(Ports {
                    first: 8000,
                    last: 8999,
                }),
                protocols: vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp],
                ..target("2001:db8:1::/52")
            };
            let denied = vec![target("169.254.169.254"), target("fd00:ec2::254")];
            for rules in [
                Rules::default(),
                Rules {
                    denied: denied.clone(),
                    ..Rules::default()
                },
                Rules {
                    denied: denied.clone(),
                    egress: Some(vec![
                        target("0.0.0.0/0"),
                        target("192.0.2.0/25"),
                        port("192.0.2.1", 53, Protocol::Udp),
                        wide,
                    ]),
                    ingress: Some(Vec::new()),
                },
            ] {
                let shows = install(&rules).unwrap().shows;
                assert_eq!(installed().unwrap(), promised(&rules, shows));
                let _refused = UdpSocket::bind("192.0.2.2:0")
                    .unwrap()
                    .send_to(b"x", "169.254.169.254:80");
                assert_eq!(installed().unwrap(), promised(&rules, shows), "counted");
            }
            // Another address is another rule, and so is one that is missing.
            let rules = Rules {
                denied: denied[..1].to_vec(),
                ..Rules::default()
            };
            install(&Rules {
                denied: vec![target("169.254.169.253")],
                ..Rules::default()
            })
            .unwrap();
            assert_ne!(installed().unwrap(), promised(&rules, true));
            install(&Rules::default()).unwrap();
            assert_ne!(installed().unwrap(), promised(&rules, true));
        });
    });
}

//! The guard of the pod's network, on a bridge with somebody on the other side.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use casemate_netguard::{Counter, counters};
use casemate_sys::landlock;
use casemate_sys::namespace::{self, kind};
use casemate_tests::operator::{casemate, lines};
use casemate_tests::run::{run, until};
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::{ensure, ensure_eq, world};
use k8s_cri::v1::{DnsConfig, PodSandboxConfig};
use serde_json::Value;

use super::client::Pod;
use super::config::{self, container};
use super::{Cri, Test};
use crate::common::casemate_only;

crate::cri_tests![
    guard_metadata_is_cut_off,
    guard_egress_list,
    guard_egress_none_and_names,
    guard_ingress_list,
    guard_stays,
    guard_has_a_second_lock,
    guard_tells_what_it_refused,
    guard_lists_that_make_no_sense,
];

/// With `sandboxer = "shim"`.
pub const BY_API: &[(&str, Test)] = &[("guard_by_the_sandbox_api", by_api)];
/// They change the node's configuration for a moment.
pub const ALONE: &[(&str, Test)] = &[("guard_as_the_node_says", as_the_node_says)];

/// What services of metadata have nearly everywhere.
const METADATA: &str = "169.254.169.254";
const METADATA_V6: &str = "fd00:ec2::254";
const NEIGHBOUR_V6: &str = "fd00:ec2::1";
const BRIDGE: &str = "cmbr0";
/// What is refused, is refused at once: `nc` would wait for longer.
const AT_ONCE: Duration = Duration::from_secs(3);

/// Runs `f` in a thread inside of a network namespace.
fn within<T: Send>(namespace: &Path, f: impl FnOnce() -> T + Send) -> Result<T, Stop> {
    let fd = fs::File::open(namespace)?;
    let done = std::thread::scope(|scope| {
        let thread = scope.spawn(|| namespace::enter(&fd, kind::NET).map(|()| f()));
        thread.join()
    });
    match done {
        Ok(result) => Ok(result?),
        Err(_) => fail("a thread panicked"),
    }
}

/// The node's side of the bridge.
fn gateway(cri: &Cri) -> String {
    format!("10.213.{}.1", cri.generation.tag())
}

/// A server of the node's on one port of all its addresses; ends when dropped.
struct Server(Arc<AtomicBool>);

impl Server {
    fn start(cri: &Cri, port: u16) -> Result<Server, Stop> {
        let listener = within(cri.node.netns.path(), || {
            TcpListener::bind(format!("[::]:{port}"))
        })??;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((mut stream, _)) = listener.accept() {
                    let _ = stream.write_all(b"from-the-node\n");
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Ok(Server(stop))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn ip(args: &[&str]) -> Outcome {
    run(Command::new("ip").args(args), &[], Duration::from_secs(10))?.ok()?;
    Ok(())
}

/// Gives the bridge the addresses of metadata services, and a pod's interface
/// one of IPv6. Only there when a pod is.
fn addresses(cri: &Cri, pid: u32) -> Outcome {
    let node = cri.node.netns.path().display().to_string();
    let node = node.trim_start_matches("/run/netns/");
    for address in [
        format!("{METADATA}/32"),
        format!("{METADATA_V6}/64"),
        format!("{NEIGHBOUR_V6}/64"),
    ] {
        let mut args = vec!["-n", node, "addr", "replace", &address, "dev", BRIDGE];
        if address.contains("::") {
            args.push("nodad");
        }
        ip(&args)?;
    }
    within(Path::new(&format!("/proc/{pid}/ns/net")), || {
        let own = format!("fd00:ec2::{:x}/64", pid % 0xf000 + 0x1000);
        ip(&["addr", "replace", &own, "dev", "eth0", "nodad"])
    })?
}

/// What the pod's guard has counted under a name.
fn count(pid: u32, name: &str) -> Result<u64, Stop> {
    let path = format!("/proc/{pid}/ns/net");
    let read = within(Path::new(&path), counters)?;
    let all: Vec<Counter> = match read {
        Ok(Some(all)) => all,
        other => return fail(format!("counters: {other:?}")),
    };
    match all.iter().find(|c| c.name == name) {
        Some(counter) => Ok(counter.packets),
        None => fail(format!("no {name} in {all:?}")),
    }
}

/// Connects over TCP and takes what is said; refused is an empty answer.
fn ask(pod: &Pod<'_>, id: &str, address: &str, port: u16) -> Result<String, Stop> {
    let begun = Instant::now();
    let script = format!("nc -w 8 {address} {port} </dev/null");
    let ran = pod.exec(id, &["/bin/sh", "-c", &script])?;
    ensure!(begun.elapsed() < AT_ONCE, "{address} hangs: {ran:?}");
    if ran.code != 0 {
        ensure!(ran.err.contains("refused"), "{address}: {ran:?}");
    }
    Ok(ran.out)
}

fn reached(pod: &Pod<'_>, id: &str, address: &str, port: u16) -> Outcome {
    let said = ask(pod, id, address, port)?;
    ensure_eq!(said, "from-the-node\n", "from {address} port {port}");
    Ok(())
}

fn refused(pod: &Pod<'_>, id: &str, address: &str, port: u16) -> Outcome {
    let said = ask(pod, id, address, port)?;
    ensure_eq!(said, "", "from {address} port {port}");
    Ok(())
}

/// Metadata services are out of reach of a pod, others aren't, and nobody can
/// change that, whatever capabilities there are in the pod.
pub fn holds(cri: &Cri, pod: &Pod<'_>, id: &str, port: u16) -> Outcome {
    let pid = pod.pid(id)?;
    let _server = Server::start(cri, port)?;
    addresses(cri, pid)?;
    reached(pod, id, &gateway(cri), port)?;
    reached(pod, id, NEIGHBOUR_V6, port)?;
    refused(pod, id, METADATA, port)?;
    refused(pod, id, METADATA_V6, port)?;
    for address in [METADATA, METADATA_V6] {
        let denied = count(pid, &format!("egress denied {address} (metadata)"))?;
        ensure!(denied >= 1, "{address}: {denied} counted");
    }
    // As root of the containers' user namespace, with all capabilities and
    // neither filter nor Landlock, from the host.
    let probe = world::probe()?;
    let mut enter = Command::new(&probe);
    enter.args(["enter", "net,user", &pid.to_string(), "unguard"]);
    let ran = run(&mut enter, &[], Duration::from_secs(10))?;
    ensure!(ran.code() != 0, "the guard was removed");
    ensure!(ran.err().contains("not permitted"), "{}", ran.err());
    // The same from the pod's own network namespace, as the host's root: it works.
    refused(pod, id, METADATA, port)?;
    Command::new(&probe)
        .args(["enter", "net", &pid.to_string(), "unguard"])
        .status()?;
    reached(pod, id, METADATA, port)
}

fn guard_metadata_is_cut_off(cri: &Cri) -> Outcome {
    casemate_only()?;
    let mut pod = cri.pod("metadata")?;
    let id = pod.sleeper("app")?;
    let datagram = |to: &str| pod.exec(&id, &["/bin/probe", "udp", to]);
    ensure_eq!(datagram(&format!("{}:53", gateway(cri)))?.code, 0, "UDP");
    let ran = datagram(&format!("{METADATA}:53"))?;
    ensure!(ran.err.contains("not permitted"), "over UDP: {ran:?}");
    // It takes the guard away.
    pod.posture = false;
    holds(cri, &pod, &id, 8102)?;
    pod.remove()
}

fn annotated(cri: &Cri, name: &str, annotations: &[(&str, &str)]) -> PodSandboxConfig {
    let mut config = config::pod(cri, name);
    for (key, value) in annotations {
        let key = format!("casemate.io/{key}");
        config.annotations.insert(key, (*value).to_owned());
    }
    config
}

fn guard_egress_list(cri: &Cri) -> Outcome {
    casemate_only()?;
    let gateway = gateway(cri);
    let list = format!("{gateway}:8110/tcp, [{NEIGHBOUR_V6}]:8110, {METADATA}:8110");
    let pod = cri.pod_with(annotated(cri, "egress", &[("egress", &list)]))?;
    let id = pod.sleeper("app")?;
    let pid = pod.pid(&id)?;
    addresses(cri, pid)?;
    let _servers = [Server::start(cri, 8110)?, Server::start(cri, 8111)?];
    reached(&pod, &id, &gateway, 8110)?;
    reached(&pod, &id, NEIGHBOUR_V6, 8110)?;
    for (address, port) in [
        (&*gateway, 8111),
        (NEIGHBOUR_V6, 8111),
        // Denied by the node, whatever a list says.
        (METADATA, 8110),
    ] {
        refused(&pod, &id, address, port)?;
    }
    let ran = pod.exec(&id, &["/bin/probe", "ping", &gateway])?;
    ensure!(ran.code != 0, "ping, which isn't on the list: {ran:?}");
    let allowed = format!("egress allowed {gateway}:8110/tcp");
    ensure_eq!(count(pid, &allowed)?, 1, "{allowed}");
    let denied = count(pid, "egress denied: not on the list")?;
    ensure!(denied >= 3, "denied: {denied}");
    ensure_eq!(
        count(pid, &format!("egress denied {METADATA} (metadata)"))?,
        1,
        "metadata"
    );
    // What the operator sees.
    let mut command = Command::new(world::binaries().join("casemate"));
    command.args(["network", &pod.id]);
    let table = run(&mut command, &[], Duration::from_secs(10))?.ok()?.out();
    for rule in [&*allowed, "egress denied: not on the list"] {
        ensure!(table.contains(rule), "no {rule} in {table}");
    }
    // The other way is open, and replies pass.
    let script = "while :; do echo from-the-pod | nc -l -p 8112; done";
    pod.run(container("server", &["/bin/sh", "-c", script]))?;
    let address = pod.ip()?;
    let from = |port| said(cri, &address, port);
    ensure_eq!(from(8112)?, "from-the-pod\n", "from the pod");
    // Loopback is the pod's own.
    let out = pod.exec_sh(&id, "nc -w 2 127.0.0.1 8112 </dev/null")?;
    ensure_eq!(out, "from-the-pod\n", "over loopback");
    pod.remove()
}

/// What a server in a pod says to the node; waits for it to listen. Refused is
/// an empty text.
fn said(cri: &Cri, address: &str, port: u16) -> Result<String, Stop> {
    use std::io::Read;
    let to: SocketAddr = match address.parse::<IpAddr>() {
        Ok(address) => (address, port).into(),
        Err(e) => return fail(format!("{address}: {e}")),
    };
    for _ in 0..50 {
        let begun = Instant::now();
        let text = within(cri.node.netns.path(), || {
            let mut text = String::new();
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(8))?;
            stream.set_read_timeout(Some(Duration::from_secs(8)))?;
            stream.read_to_string(&mut text).map(|_| text)
        })?;
        ensure!(begun.elapsed() < AT_ONCE, "{to} hangs: {text:?}");
        match text {
            Ok(text) if !text.is_empty() => return Ok(text),
            _ => std::thread::sleep(Duration::from_millis(100)),
        }
    }
    Ok(String::new())
}

fn guard_egress_none_and_names(cri: &Cri) -> Outcome {
    casemate_only()?;
    let gateway = gateway(cri);
    let pod = cri.pod_with(annotated(cri, "none", &[("egress", "none")]))?;
    let id = pod.sleeper("app")?;
    let _server = Server::start(cri, 8120)?;
    refused(&pod, &id, &gateway, 8120)?;
    pod.remove()?;
    // The pod's own nameserver and nothing else.
    let mut config = annotated(cri, "names", &[("egress", "cluster-dns")]);
    config.dns_config = Some(DnsConfig {
        servers: vec![gateway.clone()],
        ..Default::default()
    });
    let pod = cri.pod_with(config)?;
    let id = pod.sleeper("app")?;
    refused(&pod, &id, &gateway, 8120)?;
    let bound = format!("{gateway}:53");
    let names = within(cri.node.netns.path(), || UdpSocket::bind(bound))??;
    names.set_read_timeout(Some(Duration::from_secs(10)))?;
    let datagram = |port: u16| pod.exec(&id, &["/bin/probe", "udp", &format!("{gateway}:{port}")]);
    ensure_eq!(datagram(53)?.code, 0, "port 53");
    let mut buffer = [0; 64];
    let length = names.recv(&mut buffer)?;
    ensure_eq!(buffer.get(..length), Some(&b"question"[..]), "asked");
    let ran = datagram(54)?;
    ensure!(ran.err.contains("not permitted"), "port 54: {ran:?}");
    let pid = pod.pid(&id)?;
    ensure_eq!(
        count(pid, &format!("egress allowed {gateway}:53"))?,
        1,
        "names"
    );
    pod.remove()
}

fn guard_ingress_list(cri: &Cri) -> Outcome {
    casemate_only()?;
    let list = format!("{}:8130", gateway(cri));
    let pod = cri.pod_with(annotated(cri, "ingress", &[("ingress", &list)]))?;
    let serve = |port: u16| format!("while :; do echo from-the-pod | nc -l -p {port}; done");
    let script = format!("({}) & {}", serve(8130), serve(8131));
    let id = pod.run(container("app", &["/bin/sh", "-c", &script]))?;
    let address = pod.ip()?;
    ensure_eq!(said(cri, &address, 8130)?, "from-the-pod\n", "listed");
    // Another pod isn't the node.
    let other = cri.pod("other")?;
    let others = other.sleeper("app")?;
    refused(&other, &others, &address, 8130)?;
    let inside = pod.exec_sh(&id, "nc -w 2 127.0.0.1 8131 </dev/null")?;
    ensure_eq!(inside, "from-the-pod\n", "over loopback");
    let to: SocketAddr = (
        address.parse::<IpAddr>().map_err(std::io::Error::other)?,
        8131,
    )
        .into();
    let begun = Instant::now();
    let end = within(cri.node.netns.path(), || {
        TcpStream::connect_timeout(&to, Duration::from_secs(8)).map(|_| ())
    })?;
    ensure!(
        end.is_err() && begun.elapsed() < AT_ONCE,
        "not listed: {end:?}"
    );
    // What goes out is free, and its answers come in.
    let _server = Server::start(cri, 8132)?;
    reached(&pod, &id, &gateway(cri), 8132)?;
    let pid = pod.pid(&id)?;
    // More than one, where the node asked before there was a server.
    let allowed = count(pid, &format!("ingress allowed {list}"))?;
    ensure!(allowed >= 1, "allowed: {allowed}");
    ensure_eq!(count(pid, "ingress denied: not on the list")?, 2, "denied");
    other.remove()?;
    pod.remove()
}

/// A container's root can't remove it (with all capabilities: [`holds`]).
fn guard_stays(cri: &Cri) -> Outcome {
    casemate_only()?;
    let pod = cri.pod("stays")?;
    let ran = pod.to_end(container("app", &["/bin/probe", "unguard"]))?;
    ensure!(ran.code != 0, "the guard was removed from inside: {ran:?}");
    ensure!(ran.err.contains("probe: "), "{ran:?}");
    let id = pod.sleeper("after")?;
    count(
        pod.pid(&id)?,
        &format!("egress denied {METADATA} (metadata)"),
    )?;
    pod.remove()
}

/// Once as a record, with each destination's count and way out on request.
fn guard_tells_what_it_refused(cri: &Cri) -> Outcome {
    casemate_only()?;
    let gateway = gateway(cri);
    let list = format!("{gateway}:8170/tcp");
    let pod = cri.pod_with(annotated(
        cri,
        "refused",
        &[("egress", &list), ("ingress", "none")],
    ))?;
    let id = pod.sleeper("app")?;
    let _server = Server::start(cri, 8170)?;
    reached(&pod, &id, &gateway, 8170)?;
    for _ in 0..3 {
        refused(&pod, &id, &gateway, 8171)?;
    }
    refused(&pod, &id, METADATA, 80)?;
    let to: SocketAddr = (
        pod.ip()?.parse::<IpAddr>().map_err(std::io::Error::other)?,
        8172,
    )
        .into();
    let end = within(cri.node.netns.path(), || {
        TcpStream::connect_timeout(&to, Duration::from_secs(8)).map(|_| ())
    })?;
    ensure!(end.is_err(), "from outside: {end:?}");
    let wanted = [
        (
            format!("egress {gateway}:8171/tcp"),
            format!("casemate.io/egress: \"{gateway}:8171/tcp\""),
        ),
        (
            format!("egress {METADATA}:80/tcp"),
            "network.metadata = \"allow\"".to_owned(),
        ),
        (
            format!("ingress {gateway}:8172/tcp"),
            format!("casemate.io/ingress: \"{gateway}:8172/tcp\""),
        ),
    ];
    // Records: one for each destination, and none for what is let through.
    let records = || lines(&["events", &pod.id]);
    let networks = || -> Vec<Value> {
        let all = records().unwrap_or_default();
        all.into_iter().filter(|r| r["kind"] == "network").collect()
    };
    until("records of refusals", Duration::from_secs(30), || {
        networks().len() >= wanted.len()
    })?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let all = networks();
    ensure_eq!(all.len(), wanted.len(), "records in {all:?}");
    for (what, allow) in &wanted {
        let is_it =
            |r: &&Value| format!("{} {}", text(&r["direction"]), text(&r["destination"])) == *what;
        let record = all.iter().find(is_it);
        let told = record.map(|r| text(&r["allow"])).unwrap_or_default();
        ensure!(told.contains(allow), "{what}: no {allow} in {all:?}");
    }
    for command in ["why", "network"] {
        let told = casemate(&[command, &pod.id])?.ok()?.out();
        for part in [
            format!("3x packets to {gateway}:8171/tcp\n  rule   egress denied: not on the list"),
            format!(
                "1x packets to {METADATA}:80/tcp\n  rule   egress denied {METADATA} (metadata)"
            ),
            format!("1x packets from {gateway}:8172/tcp"),
        ] {
            ensure!(told.contains(&part), "{command}: no {part:?} in {told}");
        }
        for (_, allow) in &wanted {
            ensure!(told.contains(allow), "{command}: no {allow:?} in {told}");
        }
        let json = lines(&[command, "--json", &pod.id])?;
        let key = if command == "why" {
            "network"
        } else {
            "refused"
        };
        ensure_eq!(
            json[0][key].as_array().map(Vec::len),
            Some(wanted.len()),
            "{command} --json"
        );
    }
    pod.remove()
}

/// With the guard taken away from outside, Landlock still has the ports, of a
/// server that is really elsewhere.
fn guard_has_a_second_lock(cri: &Cri) -> Outcome {
    casemate_only()?;
    if landlock::abi() < landlock::net::SINCE {
        return skip("Landlock has no rules for ports here");
    }
    let gateway = gateway(cri);
    let list = format!("{gateway}:8160/tcp, loopback:none");
    let mut pod = cri.pod_with(annotated(cri, "second", &[("egress", &list)]))?;
    let id = pod.sleeper("app")?;
    let _servers = [Server::start(cri, 8160)?, Server::start(cri, 8161)?];
    reached(&pod, &id, &gateway, 8160)?;
    let pid = pod.pid(&id)?.to_string();
    pod.posture = false;
    let mut remove = Command::new(world::probe()?);
    remove.args(["enter", "net", &pid, "unguard"]);
    run(&mut remove, &[], Duration::from_secs(10))?.ok()?;
    reached(&pod, &id, &gateway, 8160)?;
    let script = format!("nc -w 8 {gateway} 8161 </dev/null");
    let ran = pod.exec(&id, &["/bin/sh", "-c", &script])?;
    ensure!(
        ran.code != 0 && ran.err.contains("ermission denied"),
        "port 8161, with the guard gone: {ran:?}"
    );
    pod.remove()
}

fn guard_lists_that_make_no_sense(cri: &Cri) -> Outcome {
    casemate_only()?;
    for (key, value, why) in [
        ("egress", "10.0.0.1/8:443", "is 10.0.0.0/8 meant?"),
        ("egress", "10.0.0.0/8", "has no port"),
        ("ingress", "cluster-dns", "where connections go to"),
    ] {
        let text = cri.refusal(annotated(cri, "nonsense", &[(key, value)]))?;
        for part in [
            why,
            &format!("casemate.io/{key}"),
            "Write none, or CIDR:port",
        ] {
            ensure!(text.contains(part), "{key} {value}: {text}");
        }
    }
    Ok(())
}

fn by_api(cri: &Cri) -> Outcome {
    casemate_only()?;
    let gateway = gateway(cri);
    let config = annotated(cri, "api", &[("egress", &format!("{gateway}:8140"))]);
    let pod = cri.pod_of(casemate_tests::generation::BY_API, config)?;
    let id = pod.sleeper("app")?;
    let _servers = [Server::start(cri, 8140)?, Server::start(cri, 8141)?];
    reached(&pod, &id, &gateway, 8140)?;
    refused(&pod, &id, &gateway, 8141)?;
    pod.remove()
}

/// `[network]` of the configuration, as it is when a pod starts.
fn as_the_node_says(cri: &Cri) -> Outcome {
    casemate_only()?;
    let file = cri.node.daemon.node_config();
    let file = file.with_file_name("config.d/guard.toml");
    let gateway = gateway(cri);
    fs::write(
        &file,
        format!(
            "[network]\nmetadata = \"allow\"\ndeny = [\"{gateway}:8151/tcp\"]\nnodes = [\"{gateway}\"]\n"
        ),
    )?;
    let pod = cri.pod_with(annotated(cri, "node-says", &[("ingress", "none")]));
    fs::remove_file(&file)?;
    let pod = pod?;
    let script = "while :; do echo from-the-pod | nc -l -p 8152; done";
    let id = pod.run(container("app", &["/bin/sh", "-c", script]))?;
    addresses(cri, pod.pid(&id)?)?;
    let _servers = [Server::start(cri, 8150)?, Server::start(cri, 8151)?];
    reached(&pod, &id, METADATA, 8150)?;
    reached(&pod, &id, METADATA_V6, 8150)?;
    reached(&pod, &id, &gateway, 8150)?;
    refused(&pod, &id, &gateway, 8151)?;
    // The node itself asks, as probes of the kubelet do; nobody else gets in.
    let address = pod.ip()?;
    ensure_eq!(said(cri, &address, 8152)?, "from-the-pod\n", "a probe");
    let other = cri.pod("other")?;
    let others = other.sleeper("app")?;
    refused(&other, &others, &address, 8152)?;
    other.remove()?;
    pod.remove()
}

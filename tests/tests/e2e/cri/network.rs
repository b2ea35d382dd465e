//! The network that CNI made, and names.

use std::fs;
use std::time::Duration;

use casemate_tests::run::until;
use casemate_tests::skip::Outcome;
use casemate_tests::{ensure, ensure_eq};
use k8s_cri::v1::ContainerConfig;

use super::Cri;
use super::client::directory;
use super::config::{self, container, mount};

crate::cri_tests![
    pods_reach_each_other,
    ping_without_capabilities,
    localhost_is_the_pods,
    names_of_the_pod,
    c135_sysctls,
];

/// Drops all capabilities, as `drop: [ALL]` does.
fn no_capabilities(config: &mut ContainerConfig) {
    let all = vec!["ALL".to_owned()];
    config::security(config)
        .capabilities
        .get_or_insert_default()
        .drop_capabilities = all;
}

fn pods_reach_each_other(cri: &Cri) -> Outcome {
    let server = cri.pod("server")?;
    let client = cri.pod("client")?;
    // Port 80, with no capability at all and an id that is not root's.
    let script = "while :; do echo from-server | nc -l -p 80; done";
    let mut listener = container("app", &["/bin/sh", "-c", script]);
    no_capabilities(&mut listener);
    config::security(&mut listener).run_as_user = Some(k8s_cri::v1::Int64Value { value: 1000 });
    server.run(listener)?;
    let address = server.ip()?;
    let id = client.sleeper("app")?;
    let ask = format!("timeout 10 nc -w 5 {address} 80 </dev/null");
    let mut last = String::new();
    let answered = until("an answer over TCP", Duration::from_secs(30), || {
        last = format!("{:?}", client.exec(&id, &["/bin/sh", "-c", &ask]));
        last.contains("from-server")
    });
    ensure!(answered.is_ok(), "from {address}: {last}");
    server.remove()?;
    client.remove()
}

fn ping_without_capabilities(cri: &Cri) -> Outcome {
    let one = cri.pod("pinged")?;
    let two = cri.pod("pinging")?;
    let address = one.ip()?;
    let script = format!("grep CapEff /proc/self/status; probe ping {address}");
    let mut config = container("app", &["/bin/sh", "-c", &script]);
    no_capabilities(&mut config);
    let ran = two.to_end(config)?;
    ensure_eq!(ran.code, 0, "ping: {ran:?}");
    ensure!(ran.out.contains("CapEff:\t0000000000000000"), "{}", ran.out);
    ensure!(ran.out.contains("answered"), "{}", ran.out);
    one.remove()?;
    two.remove()
}

fn localhost_is_the_pods(cri: &Cri) -> Outcome {
    let pod = cri.pod("localhost")?;
    let script = "while :; do echo neighbour | nc -l -p 8081; done";
    pod.run(container("server", &["/bin/sh", "-c", script]))?;
    let script = "for n in 1 2 3 4 5 6 7 8 9 10; do nc -w 2 127.0.0.1 8081 </dev/null && exit; \
                  sleep 0.5; done; exit 1";
    let out = pod.sh("client", script, |_| ())?;
    ensure_eq!(out, "neighbour\n", "from the other container");
    let links = pod.sh("links", "ls /sys/class/net", |_| ())?;
    ensure_eq!(links, "eth0\nlo\n", "interfaces");
    pod.remove()
}

fn names_of_the_pod(cri: &Cri) -> Outcome {
    let dir = directory(cri, "hosts")?;
    let hosts = dir.join("hosts");
    fs::write(&hosts, "127.0.0.1 localhost\n192.0.2.7 by-the-kubelet\n")?;
    let pod = cri.pod("names")?;
    let script = "hostname; cat /etc/hostname /etc/resolv.conf";
    let out = pod.sh("app", script, |_| ())?;
    let lines: Vec<&str> = out.lines().collect();
    ensure_eq!(
        lines.get(..2),
        Some(&["names", "names"][..]),
        "names in {out}"
    );
    for wanted in [
        "nameserver 192.0.2.53",
        "search test.invalid",
        "options ndots:5",
    ] {
        ensure!(lines.contains(&wanted), "no {wanted:?} in {out}");
    }
    let out = pod.sh("hosts", "cat /etc/hosts", |c| {
        c.mounts.push(mount(&hosts, "/etc/hosts"));
    })?;
    ensure!(out.contains("192.0.2.7 by-the-kubelet"), "hosts: {out}");
    let ran = pod.to_end(container("set", &["/bin/hostname", "other"]))?;
    ensure!(ran.code != 0, "a container changed its pod's name: {ran:?}");
    pod.remove()
}

fn c135_sysctls(cri: &Cri) -> Outcome {
    let mut config = config::pod(cri, "sysctls");
    let sysctls = [
        ("net.ipv4.ip_local_port_range", "20000\t30000"),
        ("kernel.shm_rmid_forced", "1"),
    ];
    let path = |name: &str| format!("/proc/sys/{}", name.replace('.', "/"));
    let mut before = Vec::new();
    for (name, value) in sysctls {
        before.push(fs::read_to_string(path(name))?);
        let linux = config.linux.get_or_insert_default();
        linux
            .sysctls
            .insert(name.to_owned(), value.replace('\t', " "));
    }
    let pod = cri.pod_with(config)?;
    for ((name, value), before) in sysctls.iter().zip(before) {
        let script = format!("cat {}", path(name));
        let inside = pod.sh(&name.replace(['.', '_'], "-"), &script, |_| ())?;
        ensure_eq!(inside.trim(), *value, "{name} inside");
        ensure_eq!(
            fs::read_to_string(path(name))?,
            before,
            "{name} on the host"
        );
        ensure!(before.trim() != *value, "{name} has that value on the host");
    }
    pod.remove()
}

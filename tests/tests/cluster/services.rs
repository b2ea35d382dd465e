//! The services of the node, and what each is told.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use casemate_tests::generation::{Generation, PAUSE};
use casemate_tests::run::run;
use casemate_tests::skip::Outcome;
use casemate_tests::world;
use serde_json::{Value, json};

use crate::node::{LIMIT, SERVICE, address, host, pods};
use crate::registry;

/// Who asks the API server, as that user.
pub fn kubeconfig(who: &str, ca: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "t",
        "clusters": [{"name": "t", "cluster": {
            "server": format!("https://{SERVICE}:443"), "certificate-authority": ca,
        }}],
        "users": [{"name": who, "user": {"token": who}}],
        "contexts": [{"name": "t", "context": {"cluster": "t", "user": who}}],
    })
    .to_string()
}

/// What each node has in /etc, and its containerd.
pub fn base(dir: &Path, generation: Generation, number: u8) -> Outcome {
    let etc = dir.join("etc");
    for name in ["containerd/certs.d/_default", "cni/net.d"] {
        fs::create_dir_all(etc.join(name))?;
    }
    fs::create_dir_all(dir.join("units"))?;
    unit(dir, "containerd", "exec /usr/bin/containerd")?;
    let network = json!({
        "cniVersion": "1.0.0", "name": "node", "plugins": [{
            "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
            "ipam": {
                "type": "host-local", "ranges": [[{"subnet": pods(number)}]],
                "routes": [{"dst": "0.0.0.0/0"}]
            }
        }]
    });
    fs::write(
        etc.join("cni/net.d/10-bridge.conflist"),
        network.to_string(),
    )?;
    fs::write(etc.join("containerd/config.toml"), containerd(generation))?;
    let images = registry::ADDRESS;
    fs::write(
        etc.join("containerd/certs.d/_default/hosts.toml"),
        format!(
            "server = \"http://{images}\"\n[host.\"http://{images}\"]\n\
             capabilities = [\"pull\", \"resolve\"]\n"
        ),
    )?;
    for (name, text) in [
        (
            "machine-id",
            format!("{number}123456789abcdef0123456789abcdef\n"),
        ),
        (
            "hosts",
            format!(
                "127.0.0.1 localhost\n{} {}\n",
                address(number),
                host(number)
            ),
        ),
        ("resolv.conf", "nameserver 192.0.2.53\n".to_owned()),
    ] {
        fs::write(etc.join(name), text)?;
    }
    Ok(())
}

/// A service of the node.
pub fn unit(dir: &Path, name: &str, command: &str) -> Outcome {
    let unit = dir.join("units").join(name);
    fs::write(&unit, format!("#!/bin/sh\n{command}\n"))?;
    Ok(world::set_mode(&unit, 0o755)?)
}

/// What a node has in /etc, and its services: the first has the cluster's, too.
pub fn fill(dir: &Path, generation: Generation, number: u8) -> Outcome {
    base(dir, generation, number)?;
    for (name, command) in services(number) {
        unit(dir, name, &command)?;
    }
    let kubernetes = dir.join("etc/kubernetes");
    fs::create_dir_all(&kubernetes)?;
    let host = host(number);
    for (name, who) in [("admin", "admin"), ("kubelet", &host)] {
        let config = kubeconfig(who, "/etc/kubernetes/pki/apiserver.crt");
        fs::write(kubernetes.join(name), config)?;
    }
    fs::write(
        kubernetes.join("tokens.csv"),
        "admin,admin,1,\"system:masters\"\n\
         node1,system:node:node1,2,\"system:nodes\"\n\
         node2,system:node:node2,3,\"system:nodes\"\n\
         node3,system:node:node3,4,\"system:nodes\"\n",
    )?;
    let key = kubernetes.join("sa.key");
    run(
        Command::new("openssl")
            .args(["genrsa", "-out"])
            .arg(key)
            .arg("2048"),
        &[],
        LIMIT,
    )?
    .ok()?;
    fs::write(kubernetes.join("kubelet.json"), kubelet().to_string())?;
    Ok(())
}

/// As a node's administrator has it, before casemate.
fn containerd(generation: Generation) -> String {
    let (version, images, runtime) = match generation {
        Generation::V1_6 | Generation::V1_7 => {
            let cri = "io.containerd.grpc.v1.cri";
            (2, cri, cri)
        }
        _ => (
            3,
            "io.containerd.cri.v1.images",
            "io.containerd.cri.v1.runtime",
        ),
    };
    let (pause, bin) = match version {
        2 => (
            format!("[plugins.\"{images}\"]\n  sandbox_image = \"{PAUSE}\"\n"),
            "bin_dir = \"/opt/cni/bin\"",
        ),
        _ => (
            format!(
                "[plugins.\"{images}\".pinned_images]\n  sandbox = \"{PAUSE}\"\n\
                 [plugins.\"{runtime}\"]\n"
            ),
            "bin_dirs = [\"/opt/cni/bin\"]",
        ),
    };
    format!(
        r#"# the node's own
version = {version}
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
{pause}  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."{runtime}".cni]
    {bin}
    conf_dir = "/etc/cni/net.d"
[plugins."{images}".registry]
  config_path = "/etc/containerd/certs.d"
[plugins."io.containerd.nri.v1.nri"]
  disable = true # no NRI here
"#
    )
}

/// The kubelet's configuration: version 1 of cgroups, which it wants to be told, no
/// score of its own against out-of-memory kills, for which this machine's root lacks a
/// capability, and quicker to look than it would be.
pub fn kubelet() -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "failCgroupV1": false, "failSwapOn": false,
        "cgroupDriver": "cgroupfs", "cgroupRoot": "/",
        "oomScoreAdj": 0, "makeIPTablesUtilChains": false, "readOnlyPort": 0,
        "clusterDNS": ["10.96.0.10"], "clusterDomain": "cluster.local",
        "evictionHard": {
            "memory.available": "50Mi", "nodefs.available": "1%",
            "imagefs.available": "1%", "nodefs.inodesFree": "1%",
        },
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        "syncFrequency": "5s", "nodeStatusUpdateFrequency": "2s",
        "crashLoopBackOff": {"maxContainerRestartPeriod": "2s"},
    })
}

fn services(number: u8) -> BTreeMap<&'static str, String> {
    let (host, address) = (host(number), address(number));
    let kubelet = kubelet_as(&format!(
        "--config=/etc/kubernetes/kubelet.json --kubeconfig=/etc/kubernetes/kubelet \
         --hostname-override={host} --node-ip={address}"
    ));
    if number != 1 {
        return [("kubelet", kubelet)].into();
    }
    let kube = "exec /srv/kube";
    let as_admin = "--kubeconfig=/etc/kubernetes/admin --leader-elect=false";
    let account = "/etc/kubernetes/sa.key";
    BTreeMap::from([
        ("kubelet", kubelet),
        (
            "etcd",
            format!("{kube}/etcd --data-dir=/var/lib/etcd --unsafe-no-fsync"),
        ),
        (
            "kube-apiserver",
            format!(
                "{kube}/kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
                 --cert-dir=/etc/kubernetes/pki --secure-port=443 --advertise-address={address} \
                 --service-account-key-file={account} \
                 --service-account-signing-key-file={account} \
                 --service-account-issuer=https://kubernetes.default.svc \
                 --token-auth-file=/etc/kubernetes/tokens.csv --authorization-mode=Node,RBAC \
                 --enable-admission-plugins=NodeRestriction --allow-privileged=true \
                 --kubelet-preferred-address-types=InternalIP \
                 --service-cluster-ip-range=10.96.0.0/24"
            ),
        ),
        (
            "kube-controller-manager",
            format!(
                "{kube}/kube-controller-manager {as_admin} --cert-dir=/run/controllers \
                 --service-account-private-key-file={account} \
                 --root-ca-file=/etc/kubernetes/pki/apiserver.crt"
            ),
        ),
        (
            "kube-scheduler",
            format!("{kube}/kube-scheduler {as_admin} --cert-dir=/run/scheduler"),
        ),
    ])
}

/// The kubelet sees the sysctls that it would set as it wants to find them: they are the
/// whole machine's.
const KUBELET: &str = r#"exec unshare --mount --propagation unchanged sh -ec '
mount --make-private /proc
mkdir -p /run/sysctl
for one in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    name=${one%=*}
    file=/run/sysctl/${name##*/}
    echo "${one#*=}" >"$file"
    mount --bind "$file" "/proc/sys/$name"
done
exec /srv/kube/kubelet ARGUMENTS'"#;

/// The kubelet's service with these arguments.
pub fn kubelet_as(arguments: &str) -> String {
    KUBELET.replace("ARGUMENTS", arguments)
}

//! A node that is a machine of its own: a virtual one, emulated, where systemd is process
//! 1 and runs containerd and the kubelet, with cgroup v2 and the systemd driver. Its control
//! plane is the other node's.
//!
//! `make cluster-machine-test`; other runs leave these trials out.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use casemate_tests::run::{run, until};
use casemate_tests::skip::{Outcome, Stop, fail, skip, trial};
use casemate_tests::{ensure, ensure_eq};
use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

use crate::installer::{SYSTEM, TREE, installed, job, label, lines, same, told, unschedulable};
use crate::kube::{
    Class, Cluster, Kept, container_id, here, is_ready, kept, last, programs, status,
};
use crate::node::{LIMIT, address, host, pods};
use crate::nodes::{installer_on, named, placed};
use crate::registry;
use crate::services::fill;

/// Environment variable that names the Debian suite whose kernel and systemd it has.
const VARIABLE: &str = "CASEMATE_TEST_MACHINE";
/// An emulated processor is some ten times slower.
const PATIENT: Duration = Duration::from_secs(900);
const NUMBER: u8 = 3;
/// The other node's end of the wire.
const TAP: &str = "machine";

/// Whether these are asked for, and nothing else.
pub fn wanted() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|suite| !suite.is_empty())
}

/// In this order.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("cluster_machine_is_installed_on", is_installed_on),
        trial("cluster_machine_limits_are_of_scopes", limits),
        trial("cluster_machine_services_restart", services_restart),
        trial("cluster_machine_uninstall", uninstall),
    ]
}

/// The machine; it ends when this is dropped.
struct Machine {
    cluster: Arc<Cluster>,
    child: Child,
    dir: tempfile::TempDir,
}

static MACHINE: Kept<Machine> = Mutex::new(None);

/// It, with casemate installed by the DaemonSet; started at the first call.
fn machine() -> Result<Arc<Machine>, Stop> {
    kept(&MACHINE, "the machine isn't a node", begin)
}

/// Ends it.
pub fn close() {
    let mut slot = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    drop(slot.take());
}

/// What stands in `etc`, for systemd and cgroup v2, and for a registry that isn't its own.
fn settle(dir: &Path) -> Outcome {
    let change = |path: &str, pairs: &[(&str, &str)]| -> Outcome {
        let path = dir.join("etc").join(path);
        let mut text = fs::read_to_string(&path)?;
        for (from, to) in pairs {
            ensure!(text.contains(from), "no {from:?} in {}", path.display());
            text = text.replace(from, to);
        }
        Ok(fs::write(path, text)?)
    };
    let from = registry::ADDRESS;
    let to = format!("{}:{}", address(1), registry::PORT);
    change("containerd/certs.d/_default/hosts.toml", &[(from, &to)])?;
    change(
        "kubernetes/kubelet.json",
        &[
            ("\"cgroupfs\"", "\"systemd\""),
            ("\"failCgroupV1\":false", "\"failCgroupV1\":true"),
        ],
    )?;
    let runc = "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.runc]\n\
                \x20 runtime_type = \"io.containerd.runc.v2\"\n\
                \x20 [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.runc.options]\n\
                \x20   SystemdCgroup = true\n\
                [plugins.\"io.containerd.nri.v1.nri\"]\n";
    let nri = "[plugins.\"io.containerd.nri.v1.nri\"]\n";
    change("containerd/config.toml", &[(nri, runc)])
}

/// The wire to the first node, and what is behind it.
fn wire(cluster: &Cluster) -> Outcome {
    let (here, there, behind) = (address(1), address(NUMBER), pods(NUMBER));
    for args in [
        format!("tuntap add dev {TAP} mode tap"),
        format!("link set {TAP} up"),
        format!("route add {there}/32 dev {TAP} src {here}"),
        format!("route add {behind} via {there} dev {TAP} onlink src {here}"),
    ] {
        let mut ip = cluster.node.beside(Path::new("ip"));
        run(ip.args(args.split(' ')), &[], LIMIT)?.ok()?;
    }
    let forward = "echo 1 >/proc/sys/net/ipv4/ip_forward";
    cluster.node.must(&["sh", "-c", forward]).map(drop)
}

fn begin() -> Result<Machine, Stop> {
    let suite = std::env::var(VARIABLE).unwrap_or_default();
    if !Path::new("/dev/net/tun").exists() {
        return skip("no /dev/net/tun here, which the machine's network needs");
    }
    let cluster = installed()?;
    let Some(containerd) = cluster.generation.binaries() else {
        return skip(cluster.generation.missing());
    };
    wire(&cluster)?;
    let dir = tempfile::Builder::new().prefix("cmm").tempdir_in("/tmp")?;
    fill(dir.path(), cluster.generation, NUMBER)?;
    settle(dir.path())?;
    let pki = dir.path().join("etc/kubernetes/pki");
    fs::create_dir_all(&pki)?;
    let certificate = cluster.node.path("/etc/kubernetes/pki/apiserver.crt");
    fs::copy(certificate, pki.join("apiserver.crt"))?;
    let script = dir.path().join("machine.sh");
    fs::write(&script, include_str!("machine.sh"))?;
    let tree = dir.path().join("tree.sh");
    fs::write(&tree, TREE)?;
    let (cni, kubelet) = (
        containerd.join("../../cni/bin").canonicalize()?,
        programs().join("kubelet").canonicalize()?,
    );
    let containerd = containerd.canonicalize()?;
    let copied = [dir.path(), &containerd, &cni, &kubelet].map(|path| path.display().to_string());
    let console = fs::File::create(dir.path().join("console"))?;
    let child = cluster
        .node
        .beside(&here().join("scripts/vm.sh"))
        .arg(&suite)
        .arg("bash")
        .args([&script, dir.path()])
        .args([host(NUMBER), address(NUMBER), address(1)])
        .args([&containerd, &cni, &kubelet, &tree])
        .env("VM_SYSTEMD", "1")
        .env("VM_NIC", TAP)
        .env("VM_COPY", copied.join(" "))
        .env("VM_SECONDS", "3000")
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console)
        .process_group(0)
        .spawn()?;
    let machine = Machine {
        cluster,
        child,
        dir,
    };
    machine.join()?;
    Ok(machine)
}

/// For a look at it from inside, by the kubelet's own way.
const SHELL: &str = "
apiVersion: v1
kind: Pod
metadata: {name: shell}
spec:
  nodeName: node3
  hostPID: true
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: IMAGE
    command: [sleep, infinity]
    securityContext: {privileged: true}
    volumeMounts: [{name: host, mountPath: /host, mountPropagation: HostToContainer}]
  volumes:
  - {name: host, hostPath: {path: /}}
";

impl Machine {
    /// Waits until it is a node, with a shell on it and with casemate.
    fn join(&self) -> Outcome {
        let cluster = &self.cluster;
        let status = "jsonpath={.status.conditions[?(@.type=='Ready')].status}";
        let node = host(NUMBER);
        let ready = ["get", "node", &node, "-o", status];
        self.until("the machine to be a node", || {
            cluster
                .kubectl(&ready)
                .is_ok_and(|said| said.out() == "True")
        })?;
        cluster.apply(Class::Runc, SHELL)?;
        self.until("a shell on it", || self.must("true").is_ok())?;
        self.until("its label", || {
            label(cluster, &node).is_ok_and(|label| label == "true")
        })
    }

    /// Waits, for as long as it runs.
    fn until(&self, what: &str, mut is: impl FnMut() -> bool) -> Outcome {
        let mut ended = false;
        let alive = Path::new("/proc")
            .join(self.child.id().to_string())
            .join("exe");
        let came = until(what, PATIENT, || {
            ended = fs::read_link(&alive).is_err();
            let done = ended || is();
            if !done {
                // What is asked costs the emulated processor.
                std::thread::sleep(Duration::from_secs(2));
            }
            done
        });
        let why = match came {
            Ok(_) if !ended => return Ok(()),
            Ok(_) => format!("{what}: it has ended"),
            Err(error) => error.to_string(),
        };
        let console = fs::read_to_string(self.dir.path().join("console")).unwrap_or_default();
        let log = self.must("tail -n 5 /var/log/kubelet.log /var/log/containerd.log");
        fail(format!(
            "{why}: {} {} {}",
            last(&console),
            last(&log.unwrap_or_default()),
            told(&self.cluster)
        ))
    }

    /// A script on it; it must work; what it said.
    fn must(&self, script: &str) -> Result<String, Stop> {
        let exec = ["-n", "runc", "exec", "shell", "--", "chroot", "/host"];
        // By its path: of other names busybox' chroot(1) has its own idea.
        let args = [&exec[..], &["/bin/sh", "-c", script]].concat();
        self.cluster.must(&args, "")
    }

    /// Makes a pod there of this text, and waits until it is ready.
    fn pod(&self, class: Class, name: &str, text: &str) -> Result<Value, Stop> {
        let cluster = &self.cluster;
        cluster.apply(class, text)?;
        let mut pod = Value::Null;
        self.until(&format!("the pod {name} to be ready"), || {
            pod = cluster
                .object(class.namespace(), "pod", name)
                .unwrap_or_default();
            is_ready(&pod)
        })?;
        Ok(pod)
    }

    /// A file of the cgroup that has this in its name.
    fn cgroup(&self, part: &str, file: &str) -> Result<String, Stop> {
        let script = format!(
            "cat \"$(find /sys/fs/cgroup/kubepods.slice -type d -name '*{part}*' | head -n 1)/{file}\""
        );
        Ok(self.must(&script)?.trim().to_owned())
    }

    fn starts(&self) -> Result<usize, Stop> {
        Ok(self.must("cat /var/log/starts")?.lines().count())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Ok(to) = std::env::var("CASEMATE_TEST_KEEP")
            && !to.is_empty()
        {
            let _ = fs::create_dir_all(&to);
            let _ = fs::copy(
                self.dir.path().join("console"),
                Path::new(&to).join("console"),
            );
            for service in ["kubelet", "containerd"] {
                let said = self.must(&format!("cat /var/log/{service}.log"));
                let to = PathBuf::from(&to).join(format!("machine-{service}.log"));
                let _ = fs::write(to, said.unwrap_or_default());
            }
        }
        // The script ends the machine when it is ended itself.
        if let Some(group) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = kill_process_group(group, Signal::TERM);
        }
        let ended = until("the machine to end", Duration::from_secs(20), || {
            !matches!(self.child.try_wait(), Ok(None))
        });
        if ended.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let mut ip = self.cluster.node.beside(Path::new("ip"));
        let _ = run(ip.args(["link", "del", TAP]), &[], LIMIT);
    }
}

/// A real systemd restarts containerd, once, as it was asked by the installer's pod.
fn is_installed_on() -> Outcome {
    let machine = machine()?;
    let cluster = &machine.cluster;
    ensure_eq!(machine.must("cat /proc/1/comm")?, "systemd\n", "process 1");
    ensure_eq!(machine.starts()?, 2, "starts of containerd");
    let installer = installer_on(cluster, &host(NUMBER))?;
    let name = installer["metadata"]["name"].as_str().unwrap_or_default();
    let said = cluster.must(&["-n", SYSTEM, "logs", name, "-c", "install"], "")?;
    for line in [
        "restart: containerd is back",
        "a container of class strict ran in its sandbox",
        "a pod of handler casemate ran by CRI",
        "a pod of handler casemate-strict ran by CRI",
    ] {
        ensure!(said.contains(line), "no {line:?} in {said}");
    }
    let text = named("there", Some(&host(NUMBER)));
    machine.pod(Class::Casemate, "there", &text)?;
    ensure_eq!(placed(cluster, "there")?, host(NUMBER), "the pod's node");
    machine.must("casemate posture there")?;
    let pods = machine.must("casemate ps")?;
    ensure!(pods.contains("casemate/there"), "casemate ps: {pods}");
    // As `kubectl debug node/…` and its `chroot /host` have it, which is no node's place.
    let said = machine.must("casemate doctor || true")?;
    ensure!(
        said.contains("nsenter -t 1 -m -- casemate doctor"),
        "in a chroot: {said}"
    );
    machine.must("busybox nsenter -t 1 -m -- casemate doctor")?;
    let said = cluster.exec_ok(Class::Casemate, "there", "id -u")?;
    ensure_eq!(said, "0\n", "exec");
    cluster.delete(Class::Casemate, "there")
}

const LIMITED: &str = "
apiVersion: v1
kind: Pod
metadata: {name: limited}
spec:
  CLASS
  nodeSelector: {kubernetes.io/hostname: node3}
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: IMAGE
    command: [sh, -c, 'echo begun; sleep infinity']
    resources: {limits: {cpu: 100m, memory: 32Mi}}
";

const HUNGRY: &str = "
apiVersion: v1
kind: Pod
metadata: {name: hungry}
spec:
  CLASS
  nodeSelector: {kubernetes.io/hostname: node3}
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers:
  - name: c
    image: IMAGE
    command: [sh, -c, 'tail /dev/zero']
    resources: {limits: {cpu: 500m, memory: 32Mi}}
";

const MIB: u64 = 1 << 20;

/// The container's limits are those of a scope of systemd's, and the pod's slice has room
/// for what RuntimeClass says that a sandbox needs.
fn limits() -> Outcome {
    let machine = machine()?;
    let cluster = &machine.cluster;
    for (class, overhead) in [(Class::Runc, 0), (Class::Casemate, 3 * MIB)] {
        let pod = machine.pod(class, "limited", LIMITED)?;
        let scope = format!("cri-containerd-{}.scope", container_id(&pod, "c"));
        let memory = machine.cgroup(&scope, "memory.max")?;
        ensure_eq!(memory, (32 * MIB).to_string(), "{class:?}: memory");
        let cpu = machine.cgroup(&scope, "cpu.max")?;
        ensure_eq!(cpu, "10000 100000", "{class:?}: processor");
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
        let slice = format!("pod{}.slice", uid.replace('-', "_"));
        let memory = machine.cgroup(&slice, "memory.max")?;
        let wanted = 32 * MIB + overhead;
        ensure_eq!(memory, wanted.to_string(), "{class:?}: memory of the pod");
        let known = format!("systemctl show -p MemoryMax --value {scope}");
        let known = machine.must(&known)?;
        ensure_eq!(
            known.trim(),
            (32 * MIB).to_string(),
            "{class:?}: memory as systemd has it"
        );
        ensure_eq!(
            cluster.logs(class, "limited", "c")?,
            "begun\n",
            "{class:?}: logs"
        );
        if class == Class::Casemate {
            machine.must("casemate posture limited")?;
        }
        cluster.delete(class, "limited")?;

        cluster.apply(class, HUNGRY)?;
        let mut pod = Value::Null;
        machine.until("a pod to be out of memory", || {
            pod = cluster
                .object(class.namespace(), "pod", "hungry")
                .unwrap_or_default();
            pod["status"]["phase"] == "Failed"
        })?;
        let ended = &status(&pod, "c")["state"]["terminated"];
        ensure_eq!(ended["reason"], "OOMKilled", "{class:?}: {ended}");
        cluster.delete(class, "hungry")?;
    }
    Ok(())
}

/// A pod goes on, with what it had, when the services that made it are restarted.
fn services_restart() -> Outcome {
    let machine = machine()?;
    let cluster = &machine.cluster;
    let text = LIMITED.replace("limited", "stays");
    let before = machine.pod(Class::Casemate, "stays", &text)?;
    cluster.exec_ok(Class::Casemate, "stays", "echo here >/tmp/mark")?;
    let id = container_id(&before, "c");
    machine.must("systemctl daemon-reload")?;
    let memory = machine.cgroup(id, "memory.max")?;
    ensure_eq!(memory, (32 * MIB).to_string(), "memory after daemon-reload");
    let starts = machine.starts()?;
    for service in ["kubelet", "containerd"] {
        let main = || machine.must(&format!("systemctl show -p MainPID --value {service}"));
        let before = main()?;
        // Not at once: who asks is answered by way of these services.
        machine.must(&format!(
            "setsid sh -c 'sleep 2; systemctl restart {service}' >/dev/null 2>&1 </dev/null &"
        ))?;
        let mark = || cluster.exec(Class::Casemate, "stays", "cat /tmp/mark");
        machine.until(&format!("{service} to be back"), || {
            main().is_ok_and(|now| now != before && now != "0\n")
                && mark().is_ok_and(|said| said.out() == "here\n")
        })?;
    }
    ensure_eq!(machine.starts()?, starts + 1, "starts of containerd");
    let after = cluster.object("casemate", "pod", "stays")?;
    ensure_eq!(container_id(&after, "c"), id, "its container");
    ensure_eq!(status(&after, "c")["restartCount"], 0, "restarts");
    machine.must("casemate posture stays")?;
    cluster.delete(Class::Casemate, "stays")
}

fn uninstall() -> Outcome {
    let machine = machine()?;
    let cluster = &machine.cluster;
    let node = host(NUMBER);
    let delete = ["-n", SYSTEM, "delete", "daemonset", "casemate-installer"];
    cluster.must(&[&delete[..], &["--wait"]].concat(), "")?;
    machine.until("the node's last sandbox to end", || {
        machine
            .must("casemate ps")
            .is_ok_and(|said| !said.contains("k8s.io"))
    })?;
    let unlabel = [
        "label",
        "node",
        &node,
        "casemate.io/ready-",
        "casemate.io/compat-",
    ];
    cluster.must(&unlabel, "")?;
    let starts = machine.starts()?;
    job(cluster, &node, "Complete")?;
    let tree = format!("sh {}", machine.dir.path().join("tree.sh").display());
    let mut after = String::new();
    // containerd, by which it is asked, has just been restarted.
    machine.until("an answer", || {
        machine.must(&tree).is_ok_and(|said| {
            after = said;
            true
        })
    })?;
    let after = lines(&after);
    let before = lines(&machine.must("cat /root/before")?);
    same(&before, &after)?;
    ensure_eq!(machine.starts()?, starts + 1, "starts of containerd");
    // The class doesn't find it any more, and others do.
    let text = named("late", Some(&node));
    cluster.apply(Class::Casemate, &text)?;
    unschedulable(cluster, "late")?;
    machine.pod(Class::Runc, "late", &text)?;
    Ok(())
}

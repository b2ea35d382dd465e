//! The node: namespaces in which services run as on a machine of their own.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use casemate_tests::generation::{Generation, Netns};
use casemate_tests::procs;
use casemate_tests::run::{Output, run, until};
use casemate_tests::skip::{Outcome, Stop, fail};

/// For one command in it.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Of the API's service, on the first node: there is no kube-proxy, so the server
/// listens there itself.
pub const SERVICE: &str = "10.96.0.1";

/// A node's address, on its loopback.
pub fn address(number: u8) -> String {
    format!("192.0.2.{number}")
}

/// The addresses of its pods.
pub fn pods(number: u8) -> String {
    format!("10.213.{}.0/24", 199 + number)
}

/// What Kubernetes calls it.
pub fn host(number: u8) -> String {
    format!("node{number}")
}

/// The node; it ends when this is dropped.
pub struct Node {
    number: u8,
    /// What Kubernetes calls it.
    pub host: String,
    name: String,
    pub netns: Netns,
    /// Process 1 of the node, as seen from here.
    first: u32,
    child: Child,
    dir: tempfile::TempDir,
}

impl Node {
    /// Makes it, without services: what is in `etc` and `units` is given by `fill`.
    pub fn start(
        number: u8,
        generation: Generation,
        kube: &Path,
        fill: impl FnOnce(&Path) -> Outcome,
    ) -> Result<Self, Stop> {
        let Some(containerd) = generation.binaries() else {
            return casemate_tests::skip::skip(generation.missing());
        };
        let cni = containerd.join("../../cni/bin");
        let host = host(number);
        let name = format!("casemate-cluster-{}-{number}", std::process::id());
        let netns = Netns::make(&name)?;
        let service = (number == 1).then(|| SERVICE.to_owned());
        for address in [address(number)].into_iter().chain(service) {
            let address = format!("{address}/32");
            let add = ["-n", &name, "addr", "add", &address, "dev", "lo"];
            run(Command::new("ip").args(add), &[], LIMIT)?.ok()?;
        }
        let dir = tempfile::Builder::new().prefix("cmk").tempdir_in("/tmp")?;
        casemate_tests::world::set_mode(dir.path(), 0o711)?;
        fill(dir.path())?;
        let script = dir.path().join("node.sh");
        fs::write(&script, include_str!("node.sh"))?;
        let log = fs::File::create(dir.path().join("node.log"))?;
        let mut child = Command::new("nsenter")
            .arg(format!("--net={}", netns.path().display()))
            .arg("bash")
            .arg(&script)
            .arg(dir.path())
            .args([&name, &host])
            .args([containerd.as_path(), &cni, kube])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?;
        let mut said = String::new();
        if let Some(out) = child.stdout.take() {
            // The end of it, or the line that it is up.
            let _ = BufReader::new(out).read_line(&mut said);
        }
        let first = procs::all().into_iter().find(|pid| {
            procs::status_field(*pid, "PPid").is_some_and(|p| p == child.id().to_string())
        });
        let mut node = Self {
            number,
            host,
            name,
            netns,
            first: first.unwrap_or_default(),
            child,
            dir,
        };
        if said.trim() != "up" || node.first == 0 {
            let log = fs::read_to_string(node.dir.path().join("node.log"));
            node.end();
            return fail(format!("the node can't be made: {}", log?));
        }
        Ok(node)
    }

    /// Its address.
    pub fn address(&self) -> String {
        address(self.number)
    }

    /// A wire from this one to that, and over it the ways to each other's address and
    /// pods, and from there to the API's service.
    pub fn join(&self, other: &Self) -> Outcome {
        let (here, there) = (&self.name, &other.name);
        let own = format!("to-{}", other.host);
        let up = format!("to-{}", self.host);
        let (a, b, others) = (self.address(), other.address(), pods(other.number));
        let (service, pods) = (format!("{SERVICE}/32"), pods(self.number));
        let ip = |args: &str| -> Outcome {
            run(Command::new("ip").args(args.split(' ')), &[], LIMIT)?.ok()?;
            Ok(())
        };
        ip(&format!(
            "link add {own} netns {here} type veth peer name {up} netns {there}"
        ))?;
        ip(&format!("-n {here} link set {own} up"))?;
        ip(&format!("-n {there} link set {up} up"))?;
        ip(&format!("-n {here} route add {b}/32 dev {own} src {a}"))?;
        ip(&format!("-n {there} route add {a}/32 dev {up} src {b}"))?;
        ip(&format!(
            "-n {here} route add {others} via {b} dev {own} onlink src {a}"
        ))?;
        for to in [&pods, &service] {
            ip(&format!(
                "-n {there} route add {to} via {a} dev {up} onlink src {b}"
            ))?;
        }
        for node in [self, other] {
            node.must(&["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"])?;
        }
        Ok(())
    }

    /// A file of the node's, as far as it isn't in memory or below /usr.
    pub fn path(&self, path: &str) -> PathBuf {
        self.dir
            .path()
            .join("root")
            .join(path.trim_start_matches('/'))
    }

    /// What a service has said.
    pub fn log(&self, service: &str) -> String {
        fs::read_to_string(self.path(&format!("/var/log/{service}.log"))).unwrap_or_default()
    }

    /// A command in the node.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-a", "-t", &self.first.to_string(), "--"]);
        command.args(args);
        command
    }

    /// It must work; what it said.
    pub fn must(&self, args: &[&str]) -> Result<String, Stop> {
        Ok(run(&mut self.command(args), &[], LIMIT)?.ok()?.out())
    }

    /// `systemctl VERB UNIT`.
    pub fn systemctl(&self, verb: &str, unit: &str) -> Outcome {
        self.must(&["systemctl", verb, unit]).map(drop)
    }

    /// Starts containerd, and waits until it answers: it makes directories of its own.
    pub fn containerd(&self) -> Outcome {
        self.systemctl("start", "containerd")?;
        until("containerd to answer", LIMIT, || {
            self.must(&["ctr", "version"]).is_ok()
        })?;
        Ok(())
    }

    /// How often a service was started.
    pub fn starts(&self, service: &str) -> usize {
        let text = fs::read_to_string(self.path("/var/log/starts")).unwrap_or_default();
        text.lines().filter(|line| *line == service).count()
    }

    /// A command of this machine's in the node's network.
    pub fn beside(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns.path().display()));
        command.arg("--").arg(program);
        command
    }

    /// A request to a server in the node's network.
    pub fn curl(&self, args: &[&str]) -> Result<Output, Stop> {
        let mut command = self.beside(Path::new("curl"));
        Ok(run(
            command.args(["-sS", "-m", "10"]).args(args),
            &[],
            LIMIT,
        )?)
    }

    /// The directories of a cgroup of the node's.
    pub fn cgroups(&self, path: &str) -> Vec<PathBuf> {
        let hierarchies = fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten();
        hierarchies
            .map(|h| h.path().join(&self.name).join(path.trim_start_matches('/')))
            .filter(|dir| dir.is_dir())
            .collect()
    }

    /// Ends everything that runs on it.
    fn end(&mut self) {
        drop(self.child.stdin.take());
        let ended = until("the node to end", Duration::from_secs(10), || {
            !matches!(self.child.try_wait(), Ok(None))
        });
        if ended.is_err() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        for dir in self.cgroups("") {
            let _ = until("cgroups to be free", Duration::from_secs(10), || {
                remove_tree(&dir);
                !dir.exists()
            });
        }
    }
}

/// Removes a cgroup and those in it, as far as nobody is in them.
fn remove_tree(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = fs::remove_dir(dir);
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
    }
}

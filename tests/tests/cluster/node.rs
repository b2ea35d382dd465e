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

/// The node's address, on its loopback.
pub const ADDRESS: &str = "192.0.2.1";
/// Of the API's service: there is no kube-proxy, so the server listens there itself.
pub const SERVICE: &str = "10.96.0.1";

/// The node; it ends when this is dropped.
pub struct Node {
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
        generation: Generation,
        kube: &Path,
        fill: impl FnOnce(&Path) -> Outcome,
    ) -> Result<Self, Stop> {
        let Some(containerd) = generation.binaries() else {
            return casemate_tests::skip::skip(generation.missing());
        };
        let cni = containerd.join("../../cni/bin");
        let name = format!("casemate-cluster-{}", std::process::id());
        let netns = Netns::make(&name)?;
        for address in [ADDRESS, SERVICE] {
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
            .arg(&name)
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

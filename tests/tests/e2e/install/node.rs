//! A node to install on: directories of its own, a real containerd that a script
//! restarts, and a look at everything that must be as it was.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use casemate_tests::ctr::Ctr;
use casemate_tests::generation::{self, Generation, Netns, PAUSE};
use casemate_tests::run::{Output, run, until};
use casemate_tests::skip::{Outcome, Stop, skip};
use casemate_tests::{World, procs, world};
use rustix::process::Signal;

/// Emulated, it takes many times as long.
const LIMIT: Duration = Duration::from_secs(240);

/// The node. Its containerd ends with it.
pub struct Node {
    pub dir: PathBuf,
    pub generation: Generation,
    /// Its containerd is where a distribution has it, so it needn't be named.
    pub is_found: bool,
    /// What its pods' network is in, if they have one.
    network: Option<Netns>,
    bin: PathBuf,
}

/// What is in a file, or where a link leads.
pub type Tree = BTreeMap<PathBuf, String>;

impl Node {
    /// One with containerd's plain configuration, not running yet.
    pub fn new(generation: Generation) -> Result<Self, Stop> {
        let Some(bin) = generation.binaries().or_else(|| of_the_system(generation)) else {
            return skip(generation.missing());
        };
        let world = World::get()?;
        // Short: the socket's path is below it.
        let dir = world.dir().join(world.id("i").replace(world.mark(), ""));
        for name in [
            "etc/containerd",
            "run",
            "usr/local/bin",
            "var/lib",
            "opt",
            "cni",
        ] {
            fs::create_dir_all(dir.join(name))?;
        }
        let node = Self {
            dir,
            generation,
            is_found: false,
            network: None,
            bin,
        };
        fs::write(node.config(), node.plain())?;
        fs::write(node.dir.join("restart"), node.script())?;
        Ok(node)
    }

    /// One whose containerd runs.
    pub fn running(generation: Generation) -> Result<Self, Stop> {
        let node = Self::new(generation)?;
        node.up()?;
        Ok(node)
    }

    /// One that has run pods: with a network for them, and what containerd has them begin
    /// with in its configuration.
    #[allow(dead_code, reason = "the trials against an API server need none")]
    pub fn with_pods(generation: Generation) -> Result<Self, Stop> {
        let mut node = Self::new(generation)?;
        let name = World::get()?.id("in");
        node.network = Some(Netns::make(&name)?);
        let (plugin, image, bin) = match generation {
            Generation::V1_6 | Generation::V1_7 => (
                "\"io.containerd.grpc.v1.cri\"]",
                format!("sandbox_image = \"{PAUSE}\"\n"),
                format!("bin_dir = {:?}", generation::plugins()),
            ),
            Generation::V2_1 | Generation::V2_3 => (
                "\"io.containerd.cri.v1.images\".pinned_images]",
                format!("sandbox = \"{PAUSE}\"\n"),
                format!("bin_dirs = [{:?}]", generation::plugins()),
            ),
        };
        let header = format!("[plugins.{plugin}\n");
        let mut text = node.plain();
        match text.find(&header) {
            Some(at) => text.insert_str(at + header.len(), &image),
            None => text += &format!("{header}{image}"),
        }
        let text = text.replace("    conf_dir =", &format!("    {bin}\n    conf_dir ="));
        fs::write(node.config(), text)?;
        let list = node.dir.join("cni/10-bridge.conflist");
        fs::write(list, generation::network(&node.dir, "10.213.99.0/24"))?;
        fs::write(node.dir.join("restart"), node.script())?;
        node.up()?;
        Ok(node)
    }

    /// containerd's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/containerd/containerd.sock")
    }

    pub fn config(&self) -> PathBuf {
        self.dir.join("etc/containerd/config.toml")
    }

    /// Its program.
    pub fn containerd(&self) -> PathBuf {
        self.bin.join("containerd")
    }

    fn plain(&self) -> String {
        let dir = self.dir.display();
        let (version, cri) = match self.generation {
            Generation::V1_6 | Generation::V1_7 => (2, "io.containerd.grpc.v1.cri"),
            Generation::V2_1 | Generation::V2_3 => (3, "io.containerd.cri.v1.runtime"),
        };
        let stream = "stream_server_address = \"127.0.0.1\"\n  stream_server_port = \"0\"\n";
        let old = version == 2;
        let (own, other) = match old {
            true => (stream, String::new()),
            false => (
                "",
                format!("[plugins.\"io.containerd.grpc.v1.cri\"]\n  {stream}"),
            ),
        };
        format!(
            r#"# the node's own
version = {version}
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
root = "{dir}/root"
state = "{dir}/state"
[grpc]
  address = "{dir}/run/containerd/containerd.sock"
[ttrpc]
  address = "{dir}/run/containerd/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/plugins"
[plugins."io.containerd.nri.v1.nri"]
  disable = true # no NRI here
{other}[plugins."{cri}"]
  {own}  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."{cri}".cni]
    conf_dir = "{dir}/cni"
"#
        )
    }

    /// Ends the daemon and starts it, with `extra` (shell) in between.
    fn script(&self) -> String {
        let (dir, bin) = (self.dir.display(), self.bin.display());
        let enter = self.network.as_ref().map(|netns| {
            let path = netns.path().display();
            format!("nsenter --net={path} ")
        });
        let enter = enter.unwrap_or_default();
        format!(
            r#"exec 9>&-
if [ -e {dir}/pid ]; then
  p=$(cat {dir}/pid); kill $p 2>/dev/null
  while [ -e /proc/$p/exe ]; do sleep 0.02; done
fi
echo >> {dir}/restarts
[ ! -e {dir}/slow ] || sleep 2
if [ -e {dir}/refuse ] && grep -rq casemate {dir}/etc/containerd; then exit 0; fi
PATH={dir}/usr/local/bin:{bin}:/usr/sbin:/usr/bin:/sbin:/bin \
  {enter}setsid {bin}/containerd --config {dir}/etc/containerd/config.toml >>{dir}/log 2>&1 </dev/null &
echo $! > {dir}/pid
"#
        )
    }

    pub fn restart_command(&self) -> String {
        format!("sh {}/restart", self.dir.display())
    }

    /// Starts containerd, again if it runs.
    pub fn up(&self) -> Outcome {
        run(Command::new("sh").arg(self.dir.join("restart")), &[], LIMIT)?.ok()?;
        self.answers()
    }

    pub fn answers(&self) -> Outcome {
        let ctr = self.ctr();
        until("containerd to answer", Duration::from_secs(30), || {
            ctr.run(&["version"], Duration::from_secs(5))
                .is_ok_and(|o| o.code() == 0)
        })?;
        Ok(())
    }

    /// How often it was started.
    pub fn starts(&self) -> usize {
        let text = fs::read_to_string(self.dir.join("restarts"));
        text.unwrap_or_default().lines().count()
    }

    pub fn ctr(&self) -> Ctr {
        Ctr::new(&self.socket(), world::NAMESPACE).with_path(&self.bin.display().to_string())
    }

    /// `casemate VERB` for this node, with its restart command.
    pub fn command(&self, verb: &str, more: &[&str]) -> Command {
        let mut command = self.bare(verb, more);
        if !more.contains(&"--no-restart") {
            command.args(["--restart-command", &self.restart_command()]);
        }
        command
    }

    /// `casemate VERB` for this node.
    pub fn bare(&self, verb: &str, more: &[&str]) -> Command {
        let mut command = Command::new(world::binaries().join("casemate"));
        command.arg(verb).arg("--root").arg(&self.dir);
        if !self.is_found && !more.contains(&"--containerd") {
            command.arg("--containerd").arg(self.containerd());
        }
        if !more.contains(&"--timeout") {
            command.args(["--timeout", "20"]);
        }
        command.args(more);
        command
    }

    pub fn casemate(&self, verb: &str, more: &[&str]) -> Result<Output, Stop> {
        Ok(run(&mut self.command(verb, more), &[], LIMIT)?)
    }

    /// It must work; what it said.
    pub fn must(&self, verb: &str, more: &[&str]) -> Result<String, Stop> {
        Ok(self.casemate(verb, more)?.ok()?.out())
    }

    /// It must fail with exit status 1 and one line that has all these in it.
    pub fn refuses(&self, verb: &str, more: &[&str], parts: &[&str]) -> Outcome {
        let ran = self.casemate(verb, more)?;
        let (code, said) = (ran.code(), ran.err());
        let lines = said.lines().count();
        casemate_tests::ensure!(
            code == 1 && lines == 1,
            "{verb} {more:?}: status {code}, {lines} lines: {said} {}",
            ran.out()
        );
        for part in parts {
            casemate_tests::ensure!(said.contains(part), "{verb}: no {part:?} in {said}");
        }
        Ok(())
    }

    /// What containerd makes of the configuration; it must be able to read it.
    pub fn dump(&self) -> Result<String, Stop> {
        let mut command = Command::new(self.containerd());
        command.arg("--config").arg(self.config());
        Ok(run(command.args(["config", "dump"]), &[], LIMIT)?
            .ok()?
            .out())
    }

    /// Everything on the node that isn't containerd's own.
    pub fn tree(&self) -> Tree {
        let mut tree = Tree::new();
        for name in ["etc", "usr", "var", "opt"] {
            walk(&self.dir.join(name), &mut tree);
        }
        tree
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let ctr = self.ctr();
        if ctr
            .run(&["version"], Duration::from_secs(5))
            .is_ok_and(|o| o.code() == 0)
        {
            ctr.clear();
        }
        let pid = fs::read_to_string(self.dir.join("pid")).unwrap_or_default();
        if let Some(who) = pid.trim().parse().ok().and_then(procs::identity) {
            procs::signal(who.pid, Signal::TERM);
            let _ = until("containerd to end", Duration::from_secs(10), || {
                !procs::alive(who)
            });
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The directory of the containerd that PATH leads to, if it is of that generation: in
/// a virtual machine there is no other.
fn of_the_system(generation: Generation) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let dir = std::env::split_paths(&path).find(|dir| dir.join("containerd").exists());
    dir.filter(|_| generation::system() == generation.version())
}

/// Adds everything below `path`.
pub fn walk(path: &Path, tree: &mut Tree) {
    let Ok(about) = fs::symlink_metadata(path) else {
        return;
    };
    let what = if about.is_symlink() {
        format!("-> {:?}", fs::read_link(path))
    } else if about.is_dir() {
        "directory".to_owned()
    } else if path.ends_with("install/lock") {
        // Has the last holder's pid.
        "lock".to_owned()
    } else {
        let bytes = fs::read(path).unwrap_or_default();
        let text = match bytes.len() {
            0..5000 => String::from_utf8_lossy(&bytes).into_owned(),
            // Programs: those of one build are told by their length.
            length => format!("{length} bytes"),
        };
        format!("{:o} {} {text}", about.permissions().mode(), about.uid())
    };
    tree.insert(path.to_owned(), what);
    if about.is_dir() {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            walk(&entry.path(), tree);
        }
    }
}

/// Fails unless both are the same; names what differs.
pub fn same(what: &str, before: &Tree, after: &Tree) -> Outcome {
    let differ: Vec<String> = before
        .iter()
        .filter(|(path, text)| after.get(*path) != Some(text))
        .map(|(path, text)| format!("{}: was {text:?}, is {:?}", path.display(), after.get(path)))
        .chain(
            after
                .keys()
                .filter(|path| !before.contains_key(*path))
                .map(|path| format!("{} is new", path.display())),
        )
        .collect();
    casemate_tests::ensure!(differ.is_empty(), "{what}: {}", differ.join("; "));
    Ok(())
}

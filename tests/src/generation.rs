//! Generations of containerd, unpacked side by side by `scripts/daemons.sh`,
//! and how each is told to serve CRI.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use crate::daemon::{CONFIG_VARIABLE, Daemon, LEARNED, NODE_CONFIG, PROFILES};
use crate::error::{Result, file};
use crate::run::run;
use crate::world::set_mode;

/// Environment variable that names the directory of `scripts/daemons.sh`.
pub const DAEMONS_VARIABLE: &str = "CASEMATE_TEST_DAEMONS";

/// Local name of the pause image.
pub const PAUSE: &str = "casemate.test/pause:latest";

/// The runtime class of pods that are made by the sandbox API, since 2.1.
pub const BY_API: &str = "casemate-by-api";

/// A line of containerd releases that speak to a shim in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Generation {
    /// 1.6: a bare address, task API 2.
    V1_6,
    /// 1.7: user namespaces made by the runtime.
    V1_7,
    /// 2.1: JSON answers, task API 3, user namespaces made by CRI.
    V2_1,
    /// 2.3: bootstrap by protobuf.
    V2_3,
}

impl Generation {
    /// All of them, oldest first.
    pub const ALL: [Self; 4] = [Self::V1_6, Self::V1_7, Self::V2_1, Self::V2_3];

    /// As people say it, and the name of the directory.
    pub fn version(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
            Self::V2_3 => "2.3",
        }
    }

    /// As names of trials have it.
    pub fn tag(self) -> &'static str {
        match self {
            Self::V1_6 => "16",
            Self::V1_7 => "17",
            Self::V2_1 => "21",
            Self::V2_3 => "23",
        }
    }

    /// Why there is no such containerd here.
    pub fn missing(self) -> String {
        format!(
            "no containerd {} in {}: scripts/daemons.sh says why",
            self.version(),
            daemons().display()
        )
    }

    /// The directory of its programs, if it is there.
    pub fn binaries(self) -> Option<PathBuf> {
        let dir = daemons().join(self.version()).join("bin");
        dir.join("containerd").exists().then_some(dir)
    }

    /// Starts it in `dir` with CRI on, inside of the network namespace `netns`,
    /// with `path` behind its own programs, and `shim` as a runtime class of
    /// its own beside the one that is found by name.
    pub fn start(self, dir: &Path, path: &str, shim: &Path, netns: &Netns) -> Result<Daemon> {
        let own = self
            .binaries()
            .map(|dir| format!("{}:", dir.display()))
            .unwrap_or_default();
        let cni = dir.join("cni");
        fs::create_dir_all(&cni).map_err(file("make", &cni))?;
        let conf = cni.join("10-bridge.conflist");
        let subnet = format!("10.213.{}.0/24", self.tag());
        fs::write(&conf, network(dir, &subnet)).map_err(file("write", &conf))?;
        let config = match self {
            Self::V1_6 | Self::V1_7 => version_2(dir, shim),
            Self::V2_1 | Self::V2_3 => version_3(dir, shim),
        } + &self.classes(dir, shim)?;
        by_api(dir)?;
        without_terminals(dir, shim)?;
        // 1.6 knows no runtime_path in CRI's configuration, and finds shims by name.
        let path = format!("{own}{path}:{}", dir.join("classes").display());
        Daemon::configured(dir, &path, &config, Some(netns.path()))
    }
}

impl Generation {
    /// The handlers of the other classes, as `casemate install` has them: a link of
    /// that name to the shim.
    fn classes(self, dir: &Path, shim: &Path) -> Result<String> {
        let links = dir.join("classes");
        fs::create_dir_all(&links).map_err(file("make", &links))?;
        let plugin = match self {
            Self::V1_6 | Self::V1_7 => "io.containerd.grpc.v1.cri",
            Self::V2_1 | Self::V2_3 => "io.containerd.cri.v1.runtime",
        };
        let mut text = String::new();
        for class in ["strict", "compat", "strct"] {
            let link = links.join(format!("containerd-shim-casemate-{class}-v2"));
            symlink(shim, &link).map_err(file("link", &link))?;
            let kind = match self {
                Self::V2_1 => "io.containerd.runc.v2".to_owned(),
                _ => format!("io.containerd.casemate-{class}.v2"),
            };
            text += &format!(
                "[plugins.\"{plugin}\".containerd.runtimes.casemate-{class}]\n\
                 runtime_type = \"{kind}\"\nruntime_path = \"{}\"\n\
                 pod_annotations = [\"casemate.io/*\"]\n",
                link.display()
            );
        }
        Ok(text)
    }
}

/// The line of the containerd that PATH leads to, as `1.6`.
pub fn system() -> &'static str {
    static VERSION: LazyLock<String> = LazyLock::new(|| {
        let text = run(
            Command::new("containerd").arg("--version"),
            &[],
            Duration::from_secs(60),
        )
        .map(|o| o.out())
        .unwrap_or_default();
        let number = text
            .split_whitespace()
            .map(|word| word.trim_start_matches('v'))
            .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
            .unwrap_or("?");
        number.split('.').take(2).collect::<Vec<_>>().join(".")
    });
    &VERSION
}

/// The directory of `scripts/daemons.sh`.
pub fn daemons() -> PathBuf {
    std::env::var_os(DAEMONS_VARIABLE).map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/daemons"),
        PathBuf::from,
    )
}

/// Turns the sandbox API on for the daemon's shims, and lets pods be learned from: the
/// rest is as the environment has it.
fn by_api(dir: &Path) -> Result<()> {
    let path = dir.join(NODE_CONFIG);
    let drop_ins = path.with_file_name("config.d");
    fs::create_dir_all(&drop_ins).map_err(file("make", &drop_ins))?;
    let text = match std::env::var_os(CONFIG_VARIABLE) {
        Some(other) => fs::read(&other).map_err(file("read", Path::new(&other)))?,
        None => Vec::new(),
    };
    fs::write(&path, text).map_err(file("write", &path))?;
    let on = drop_ins.join("api.toml");
    fs::write(&on, "sandbox.api = true\n").map_err(file("write", &on))?;
    let learn = drop_ins.join("learn.toml");
    let place = dir.join(LEARNED);
    let profiles = dir.join(PROFILES);
    fs::create_dir_all(&profiles).map_err(file("make", &profiles))?;
    let text = format!(
        "[learn]\nallow = true\ndirectory = \"{}\"\n[profiles]\ndirectory = \"{}\"\n",
        place.display(),
        profiles.display()
    );
    fs::write(&learn, text).map_err(file("write", &learn))
}

/// The runtime class whose shims allow no execs with a terminal.
pub const NO_TERMINALS: &str = "casemate-no-terminals";

/// A program for it: the shim with a configuration of its own.
fn without_terminals(dir: &Path, shim: &Path) -> Result<()> {
    let config = dir.join("no-terminals.toml");
    fs::write(&config, "[exec]\nterminal = false\n").map_err(file("write", &config))?;
    let program = dir.join(NO_TERMINALS);
    let script = format!(
        "#!/bin/sh\nexport {CONFIG_VARIABLE}='{}'\nexec '{}' \"$@\"\n",
        config.display(),
        shim.display()
    );
    fs::write(&program, script).map_err(file("write", &program))?;
    set_mode(&program, 0o755)
}

/// Where CNI's plugins are.
#[must_use]
pub fn plugins() -> PathBuf {
    daemons().join("cni/bin")
}

/// One bridge, addresses from `subnet`, no masquerading, so no iptables.
#[must_use]
pub fn network(dir: &Path, subnet: &str) -> String {
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "casemate",
        "plugins": [{
            "type": "bridge", "bridge": "cmbr0", "isGateway": true, "ipMasq": false,
            "ipam": {
                "type": "host-local", "dataDir": dir.join("ipam"),
                "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]
            }
        }]
    })
    .to_string()
}

/// What versions 2 and 3 of the file have in common.
fn common(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"root = "{dir}/root"
state = "{dir}/state"
[grpc]
  address = "{dir}/c.sock"
[ttrpc]
  address = "{dir}/c.sock.ttrpc"
[debug]
  level = "info"
[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/opt"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
"#
    )
}

const SNAPSHOTTERS: &str = r#"disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]"#;

fn version_2(dir: &Path, shim: &Path) -> String {
    let (common, shown, cni) = (common(dir), dir.display(), plugins());
    let shim = shim.display();
    let cni = cni.display();
    format!(
        r#"version = 2
{SNAPSHOTTERS}
{common}
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni}"
    conf_dir = "{shown}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.casemate]
      runtime_type = "io.containerd.casemate.v2"
      pod_annotations = ["casemate.io/*"]
      container_annotations = ["casemate.io/*"]
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.casemate-by-path]
      runtime_type = "io.containerd.runc.v2"
      runtime_path = "{shim}"
      pod_annotations = ["casemate.io/*"]
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{NO_TERMINALS}]
      runtime_type = "io.containerd.runc.v2"
      runtime_path = "{shown}/{NO_TERMINALS}"
"#
    )
}

fn version_3(dir: &Path, shim: &Path) -> String {
    let (common, shown, cni) = (common(dir), dir.display(), plugins());
    let shim = shim.display();
    let cni = cni.display();
    format!(
        r#"version = 3
{SNAPSHOTTERS}
{common}
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{PAUSE}"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{cni}"]
    conf_dir = "{shown}/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.casemate]
      runtime_type = "io.containerd.casemate.v2"
      pod_annotations = ["casemate.io/*"]
      container_annotations = ["casemate.io/*"]
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.casemate-by-path]
      runtime_type = "io.containerd.runc.v2"
      runtime_path = "{shim}"
      pod_annotations = ["casemate.io/*"]
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{NO_TERMINALS}]
      runtime_type = "io.containerd.runc.v2"
      runtime_path = "{shown}/{NO_TERMINALS}"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{BY_API}]
      runtime_type = "io.containerd.casemate.v2"
      sandboxer = "shim"
"#
    )
}

/// A named network namespace that takes the place of the node's: bridges,
/// addresses and the streaming server's port exist in there alone.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    /// Makes it, with its loopback up.
    pub fn make(name: &str) -> Result<Self> {
        let limit = Duration::from_secs(10);
        run(Command::new("ip").args(["netns", "add", name]), &[], limit)?.ok()?;
        let made = Self {
            name: name.to_owned(),
            path: Path::new("/run/netns").join(name),
        };
        let up = ["-n", name, "link", "set", "lo", "up"];
        run(Command::new("ip").args(up), &[], limit)?.ok()?;
        Ok(made)
    }

    /// The file that it is bound to.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = run(
            Command::new("ip").args(["netns", "del", &self.name]),
            &[],
            Duration::from_secs(10),
        );
    }
}

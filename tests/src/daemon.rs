//! A containerd of our own: root, state and sockets in a fresh directory, so
//! that the system's containerd, if there is one, never notices. Which one is a
//! matter of PATH ([`crate::generation`]).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::Signal;

use crate::ctr::Ctr;
use crate::error::{Failure, Result, file};
use crate::procs::{self, Identity};
use crate::run::until;

/// The shims' variable with the path of the node's configuration.
pub const CONFIG_VARIABLE: &str = "CASEMATE_CONFIG";
/// That configuration of a daemon of its own, where there is one.
pub const NODE_CONFIG: &str = "casemate/config.toml";
/// Where its pods' recordings are, in the daemon's directory.
pub const LEARNED: &str = "learned";
/// Below a daemon's directory: where its node has profiles.
pub const PROFILES: &str = "profiles";

/// A running private containerd; stopped when dropped.
pub struct Daemon {
    dir: PathBuf,
    path: String,
    netns: Option<PathBuf>,
    running: Mutex<Option<(std::process::Child, Identity)>>,
}

impl Daemon {
    /// Starts a containerd in `dir`, which must not exist yet, with this PATH.
    pub fn start(dir: &Path, path: &str) -> Result<Self> {
        Self::configured(dir, path, &plain(dir), None)
    }

    /// casemate's configuration of its own; there may be none.
    pub fn node_config(&self) -> PathBuf {
        self.dir.join(NODE_CONFIG)
    }

    /// What was learned from pods, where its configuration has that.
    pub fn learned(&self) -> PathBuf {
        self.dir.join(LEARNED)
    }

    /// Where its node has profiles, where its configuration says so.
    pub fn profiles(&self) -> PathBuf {
        self.dir.join(PROFILES)
    }

    /// Starts one with this configuration file, inside of that network
    /// namespace.
    pub fn configured(dir: &Path, path: &str, config: &str, netns: Option<&Path>) -> Result<Self> {
        fs::create_dir_all(dir).map_err(file("make", dir))?;
        let daemon = Self {
            dir: dir.to_owned(),
            path: path.to_owned(),
            netns: netns.map(Path::to_owned),
            running: Mutex::new(None),
        };
        let file_path = daemon.dir.join("config.toml");
        fs::write(&file_path, config).map_err(file("write", &file_path))?;
        daemon.up()?;
        Ok(daemon)
    }

    /// Starts the daemon (again) on the same state.
    pub fn up(&self) -> Result<()> {
        let log = self.log_path();
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(file("open", &log))?;
        let twin = log.try_clone().map_err(file("duplicate", &self.dir))?;
        // setsid(1) execs in place when it is no group leader, and so does
        // nsenter(1), so the pid is containerd's own.
        let mut command = Command::new("setsid");
        if let Some(netns) = &self.netns {
            command
                .arg("nsenter")
                .arg(format!("--net={}", netns.display()));
        }
        let node = self.node_config();
        if node.exists() {
            command.env(CONFIG_VARIABLE, node);
        }
        let child = command
            .arg("containerd")
            .arg("--config")
            .arg(self.dir.join("config.toml"))
            .env("PATH", &self.path)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(twin)
            .spawn()
            .map_err(|source| Failure::Spawn {
                program: "setsid containerd".to_owned(),
                source,
            })?;
        let Some(identity) = procs::identity(child.id()) else {
            return Err(Failure::Unexpected(format!(
                "containerd died at once: {}",
                self.log_tail()
            )));
        };
        if let Ok(mut slot) = self.running.lock() {
            *slot = Some((child, identity));
        }
        let ctr = self.ctr("default");
        until("containerd to answer", Duration::from_secs(30), || {
            ctr.run(&["version"], Duration::from_secs(5))
                .is_ok_and(|o| o.code() == 0)
        })
        .map_err(|e| Failure::Unexpected(format!("{e}: {}", self.log_tail())))?;
        Ok(())
    }

    /// Stops the daemon, and only it: shims go on, as in a daemon's upgrade.
    pub fn down(&self) {
        let Some((mut child, identity)) = self.running.lock().ok().and_then(|mut s| s.take())
        else {
            return;
        };
        procs::signal(identity.pid, Signal::TERM);
        let ended = until("containerd to end", Duration::from_secs(10), || {
            !matches!(child.try_wait(), Ok(None))
        });
        if ended.is_err() {
            let _ = child.kill();
        }
        let _ = child.wait();
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: Signal) {
        if let Ok(slot) = self.running.lock()
            && let Some((_, identity)) = &*slot
        {
            procs::signal(identity.pid, signal);
        }
    }

    /// Kills the daemon, as a crash would, and only it.
    pub fn crash(&self) {
        if let Some((mut child, _)) = self.running.lock().ok().and_then(|mut s| s.take()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Ends all tasks of all namespaces, stops the daemon, removes its files.
    pub fn stop(&self) {
        let namespaces = self
            .ctr("default")
            .run(&["namespaces", "ls", "-q"], Duration::from_secs(10))
            .map(|o| o.out())
            .unwrap_or_default();
        for namespace in namespaces.lines() {
            self.ctr(namespace).clear();
        }
        self.down();
        // Mounts of tasks that a broken shim left: lazily, newest first.
        let ours = self.dir.display().to_string();
        for line in crate::leaks::mounts_with(&ours).iter().rev() {
            if let Some(target) = line.split(' ').nth(1) {
                let _ = rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH);
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
    }

    /// The gRPC socket.
    pub fn address(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// The directory of a task's bundle.
    pub fn bundle(&self, namespace: &str, id: &str) -> PathBuf {
        self.dir
            .join("state/io.containerd.runtime.v2.task")
            .join(namespace)
            .join(id)
    }

    /// The daemon's root directory (snapshots, content).
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("containerd.log")
    }

    /// The daemon's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().rev().take(5).collect();
        lines.join(" | ")
    }

    /// A `ctr` for this daemon.
    pub fn ctr(&self, namespace: &str) -> Ctr {
        Ctr::new(&self.address(), namespace).with_path(&self.path)
    }
}

/// Version 2 of the configuration file: read by 1.6 and 1.7, and migrated by
/// 2.x. CRI and the snapshotters that need other file systems are off.
fn plain(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "version = 2\n\
         root = \"{dir}/root\"\n\
         state = \"{dir}/state\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \
           \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.btrfs\", \
           \"io.containerd.snapshotter.v1.devmapper\", \"io.containerd.snapshotter.v1.zfs\", \
           \"io.containerd.tracing.processor.v1.otlp\", \"io.containerd.internal.v1.tracing\"]\n\
         [grpc]\n  address = \"{dir}/c.sock\"\n\
         [ttrpc]\n  address = \"{dir}/c.sock.ttrpc\"\n\
         [debug]\n  level = \"info\"\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n  path = \"{dir}/opt\"\n"
    )
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.down();
    }
}

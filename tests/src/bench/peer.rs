//! The runtimes that are compared: ours, and those that the machine has.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use casemate_sys::namespace::{self, kind};
use casemate_tests::bundle::Task;
use casemate_tests::ctr::Ctr;
use casemate_tests::daemon::Daemon;
use casemate_tests::error::{Failure, Result, file};
use casemate_tests::run::run;
use casemate_tests::world::{self, World};
use protobuf::CodedOutputStream;
use protobuf::well_known_types::any::Any;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};

/// Name of our own runtime in the table.
pub const OURS: &str = "casemate";
/// All columns of the table.
pub const NAMES: [&str; 4] = [OURS, "runc", "crun", "runsc"];

const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// One runtime, ready to be measured.
pub struct Peer {
    /// Column of the table.
    pub name: &'static str,
    /// What it says about its version.
    pub version: String,
    /// Runtime name for containerd.
    pub runtime: &'static str,
    /// The shim's binary.
    shim: PathBuf,
    /// The OCI runtime below containerd's own shim.
    binary: Option<PathBuf>,
    /// A mount namespace of its own, where the runtime needs one.
    namespace: Option<OwnedFd>,
    /// The containerd that it is run by.
    pub daemon: Arc<Daemon>,
}

impl Peer {
    /// Looks for the runtime `name`; the error is what the table shows.
    pub fn find(name: &'static str, tools: &Path) -> std::result::Result<Self, String> {
        let world = World::get().map_err(|e| e.to_string())?;
        let text = |e: Failure| e.to_string();
        if name == OURS {
            let shim = world.shim().map_err(text)?;
            let version = version(&shim, "-v");
            let daemon = world.daemon().map_err(text)?;
            return Ok(Self {
                name,
                version,
                runtime: "io.containerd.casemate.v2",
                shim,
                binary: None,
                namespace: None,
                daemon,
            });
        }
        let missing = || "not installed".to_owned();
        let shim = in_path("containerd-shim-runc-v2", tools).ok_or_else(missing)?;
        let binary = in_path(name, tools).ok_or_else(missing)?;
        let version = version(&binary, "--version");
        let hidden = name == "crun" && Path::new(UNIFIED).exists();
        let namespace = hidden
            .then(without_unified)
            .transpose()
            .map_err(|e| format!("private mount namespace: {e}"))?;
        let binary = match name {
            "runsc" => wrapper(&binary, world.dir()).map_err(text)?,
            _ => binary,
        };
        let mut peer = Self {
            name,
            version,
            runtime: "io.containerd.runc.v2",
            shim,
            binary: Some(binary.clone()),
            namespace,
            daemon: world.daemon().map_err(text)?,
        };
        if name != "runc" {
            let dir = world.dir().join(format!("{name}.d"));
            let path = as_runc(&binary, &world.dir().join(format!("{name}.bin")))
                .map(|first| format!("{}:{}", first.display(), world.path()))
                .map_err(text)?;
            let daemon = peer.within(|| Daemon::start(&dir, &path)).map_err(text)?;
            peer.daemon = Arc::new(daemon);
        }
        Ok(peer)
    }

    /// Whether its containerd is not the one that the others share.
    pub fn has_own_daemon(&self) -> bool {
        !matches!(self.name, OURS | "runc")
    }

    /// Whether it sees other mounts than the rest.
    pub fn is_apart(&self) -> bool {
        self.namespace.is_some()
    }

    /// Calls `step` where the runtime's processes are to be born. The thread
    /// that this takes is made before `step` starts and is not in its figures.
    pub fn within<T: Send>(&self, step: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let Some(home) = &self.namespace else {
            return step();
        };
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    // A thread that shares its root directory with others may
                    // not change namespaces (setns(2)): unshare it first.
                    namespace::unshare(kind::MOUNT)
                        .and_then(|()| namespace::enter(home, kind::MOUNT))
                        .map_err(file("enter the mount namespace for", Path::new(self.name)))?;
                    step()
                })
                .join()
                .unwrap_or_else(|_| Err(Failure::Unexpected(format!("{}: panicked", self.name))))
        })
    }

    /// `ctr` for this runtime's containerd.
    pub fn ctr(&self) -> Ctr {
        self.daemon.ctr("bench")
    }

    /// Flags that give a workload the filter it has on a Kubernetes node: ours
    /// always does, the others when told so. gVisor's own kernel is its filter.
    pub fn filter_flags(&self) -> &'static [&'static str] {
        match self.name {
            "runc" | "crun" => &["--seccomp"],
            _ => &[],
        }
    }

    /// A bundle for this runtime's shim.
    pub fn bundle(&self, args: &[&str]) -> Result<Task> {
        let mut task = Task::new(self.name, args)?;
        task.shim.program = self.shim.clone();
        task.options = match &self.binary {
            Some(binary) => Some(runc_options(&binary.display().to_string())?),
            None => None,
        };
        Ok(task)
    }
}

/// `containerd.runc.v1.Options` with `binary_name`, its field 6.
fn runc_options(binary: &str) -> Result<Any> {
    let mut value = Vec::new();
    let mut stream = CodedOutputStream::vec(&mut value);
    stream
        .write_string(6, binary)
        .and_then(|()| stream.flush())
        .map_err(|e| Failure::Unexpected(format!("encode runc options: {e}")))?;
    drop(stream);
    Ok(Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        value,
        ..Default::default()
    })
}

/// A directory in which `runc` is that binary: `ctr container create` of
/// containerd 1.6 has no flag to name another one.
fn as_runc(binary: &Path, dir: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(dir).map_err(file("make", dir))?;
    let link = dir.join("runc");
    std::os::unix::fs::symlink(binary, &link).map_err(file("link", &link))?;
    Ok(dir.to_owned())
}

fn in_path(program: &str, tools: &Path) -> Option<PathBuf> {
    let system = std::env::var("PATH").unwrap_or_default();
    system
        .split(':')
        .map(PathBuf::from)
        .chain(["/usr/sbin".into(), "/sbin".into(), tools.to_owned()])
        .map(|dir| dir.join(program))
        .find(|path| path.exists())
}

fn version(program: &Path, flag: &str) -> String {
    run(
        Command::new(program).arg(flag),
        &[],
        Duration::from_secs(10),
    )
    .map(|o| format!("{} {}", o.out(), o.err()))
    .unwrap_or_default()
    .lines()
    .next()
    .unwrap_or_default()
    .trim()
    .to_owned()
}

/// runsc with the platform that needs neither KVM nor ptrace, and without its
/// network stack, which would have to be fed with an interface.
fn wrapper(runsc: &Path, dir: &Path) -> Result<PathBuf> {
    let path = dir.join("runsc.sh");
    let text = format!(
        "#!/bin/sh\nexec {} --platform=systrap --network=none \"$@\"\n",
        runsc.display()
    );
    std::fs::write(&path, text).map_err(file("write", &path))?;
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&path, mode).map_err(file("chmod", &path))?;
    Ok(path)
}

/// A mount namespace in which the hybrid layout looks like plain version 1:
/// crun refuses the mixture.
fn without_unified() -> std::io::Result<OwnedFd> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                namespace::unshare(kind::MOUNT)?;
                mount_change(
                    "/",
                    MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
                )?;
                unmount(UNIFIED, UnmountFlags::DETACH)?;
                std::fs::File::open("/proc/thread-self/ns/mnt").map(OwnedFd::from)
            })
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("panicked")))
    })
}

/// The `microbench` program of this crate.
pub fn microbench() -> Result<PathBuf> {
    let path = world::binaries().join("microbench");
    if path.exists() {
        return Ok(path);
    }
    Err(Failure::Unexpected(format!(
        "no {}: cargo build --release -p casemate-tests",
        path.display()
    )))
}

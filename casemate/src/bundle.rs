//! What containerd would have prepared: a directory with `config.json`, and
//! the fifos. Goes with the value.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;
use rustix::fs::{CWD, FileType, Mode};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Run;
use crate::error::{RunError, Step};
use crate::rootfs;

/// What container engines grant by default; the node's policy takes from it.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The directory of one run.
pub struct Bundle {
    dir: TempDir,
    /// Container id, also the pod's.
    pub id: String,
    /// Source of the root file system.
    root: PathBuf,
    writable: bool,
}

impl Bundle {
    /// Makes it, for these options.
    pub fn new(options: &Run) -> Result<Bundle, RunError> {
        // Mode 0700: nobody else reaches the socket, fifos and root in it.
        let dir = tempfile::Builder::new()
            .prefix("casemate-run-")
            .tempdir()
            .step("make a directory in", std::env::temp_dir().display())?;
        let id = dir
            .path()
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let root = match &options.rootfs {
            Some(path) => {
                let path = fs::canonicalize(path).step("open --rootfs", path.display())?;
                if !path.is_dir() {
                    let path = path.display();
                    return Err(RunError::Refused(format!(
                        "open --rootfs {path}: not a directory"
                    )));
                }
                path
            }
            None => {
                let path = dir.path().join("root");
                rootfs::make(&path)?;
                path
            }
        };
        let bundle = Bundle {
            dir,
            id,
            root,
            writable: options.writable,
        };
        let spec = spec(options, &bundle.id);
        let config = bundle.path().join("config.json");
        fs::write(&config, spec.to_string()).step("write", config.display())?;
        for name in ["stdin", "stdout", "stderr"] {
            let path = bundle.fifo(name);
            rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from(0o600), 0)
                .step("make fifo", path.display())?;
        }
        Ok(bundle)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// One of the streams.
    pub fn fifo(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Where the shim's events go.
    pub fn events(&self) -> PathBuf {
        self.path().join("events")
    }

    /// The list that containerd's snapshotter would have given.
    pub fn mounts(&self) -> Vec<Mount> {
        vec![Mount {
            type_: "bind".to_owned(),
            source: self.root.display().to_string(),
            options: ["rbind", if self.writable { "rw" } else { "ro" }]
                .map(str::to_owned)
                .to_vec(),
            ..Mount::default()
        }]
    }

    /// Removes it all.
    pub fn remove(self) -> Result<(), RunError> {
        let path = self.path().display().to_string();
        self.dir.close().step("remove", path)
    }
}

/// The OCI specification (config.md, config-linux.md): what containerd writes
/// for a plain container.
pub fn spec(options: &Run, id: &str) -> Value {
    let mut env = vec![PATH.to_owned()];
    if options.terminal {
        let kind = std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned());
        env.push(format!("TERM={kind}"));
    }
    let tmpfs = |target: &str, source: &str, options: &[&str]| json!({"destination": target, "type": "tmpfs", "source": source, "options": options});
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": options.terminal,
            "user": {"uid": 0, "gid": 0},
            "args": options.command,
            "env": env,
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": !options.writable},
        "hostname": "casemate",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            tmpfs("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            tmpfs("/dev/shm", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            tmpfs("/run", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            // No directory in between: nothing but the container's own to remove.
            "cgroupsPath": format!("/{id}"),
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "mount"}, {"type": "network"}
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys",
                "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
                "/proc/sched_debug", "/sys/firmware", "/proc/scsi"
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
            ]
        }
    })
}

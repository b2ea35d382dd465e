//! Sources of binds: opened once, by the path that the specification has, and
//! then judged by where they really are. What is mounted later is what was
//! opened here, whatever becomes of the path.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use casemate_spec::config::HostPaths;
use casemate_spec::host_paths::{self, Lists, Mounts, Named, Source};
use casemate_spec::{MountKind, Tightened};
use casemate_sys::mount;
use rustix::fs::{CWD, FileType, Mode, OFlags};

use super::Step;
use crate::sandbox::SandboxError;

/// The parent of bundles below containerd's state directory begins so.
const BUNDLES: &str = "io.containerd.runtime";

/// Opened sources, by the number of their mount.
#[derive(Default)]
pub struct Sources(BTreeMap<usize, OwnedFd>);

impl Sources {
    /// That of mount number `mount`.
    pub fn take(&mut self, mount: usize) -> Result<OwnedFd, SandboxError> {
        self.0.remove(&mount).ok_or_else(|| {
            SandboxError::Failed(format!("mounts[{mount}].source wasn't opened; report this"))
        })
    }
}

/// What a message calls the source of a bind.
pub fn object(spec: &casemate_spec::MountSpec) -> String {
    format!("mount source {} (for {})", spec.source, spec.destination)
}

/// Opens the sources of all binds of `spec`, refuses those that the node doesn't
/// show, and makes those read-only that it shows so.
pub fn open(
    spec: &mut Tightened,
    config: &HostPaths,
    bundle: &Path,
) -> Result<Sources, SandboxError> {
    let mut opened = Sources::default();
    let mut others: Vec<Source> = Vec::new();
    let mut kubelet = None;
    let binds = spec.mounts.iter().enumerate();
    for (number, mount) in binds.filter(|(_, m)| m.kind == MountKind::Bind) {
        let object = object(mount);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&*mount.source, flags, Mode::empty()).step("open", &object)?;
        let link = rustix::fs::readlinkat(CWD, mount::own_link(&fd).as_str(), Vec::new())
            .step("find the path of", &object)?;
        let Some(path) = link.to_str().ok().filter(|path| path.starts_with('/')) else {
            return Err(SandboxError::Invalid(format!(
                "{object}: it is no path of this node: {}; mount something else",
                link.to_string_lossy().escape_debug()
            )));
        };
        let stat = rustix::fs::fstat(&fd).step("look at", &object)?;
        let source = Source {
            mount: number,
            path: path.to_owned(),
            socket: FileType::from_raw_mode(stat.st_mode) == FileType::Socket,
        };
        opened.0.insert(number, fd);
        let kubelet = kubelet.get_or_insert_with(|| Named {
            name: config.kubelet.clone(),
            path: resolve(&config.kubelet),
        });
        if host_paths::own(&source, &spec.owner, kubelet)?.is_none() {
            others.push(source);
        }
    }
    if others.is_empty() {
        return Ok(opened);
    }
    let text = fs::read("/proc/self/mountinfo").step("read", "/proc/self/mountinfo")?;
    let mounts = Mounts::parse(&String::from_utf8_lossy(&text));
    let state = daemon_state(bundle).and_then(Path::to_str);
    let lists = Lists::look_up(config, state.as_slice(), resolve);
    let verdict = host_paths::judge(&others, &spec.mounts, (config, &lists), &mounts)?;
    for note in host_paths::apply(&verdict, &mut spec.mounts) {
        log::warn!("{note}");
    }
    Ok(opened)
}

/// With all links resolved, as far as the path exists.
fn resolve(path: &str) -> String {
    match fs::canonicalize(path) {
        Ok(real) => real.to_string_lossy().into_owned(),
        Err(_) => path.to_owned(),
    }
}

/// The state directory of the daemon that made this bundle, where it is one of
/// containerd's: `STATE/io.containerd.runtime.v2.task/NAMESPACE/ID`.
fn daemon_state(bundle: &Path) -> Option<&Path> {
    let bundles = bundle.parent()?.parent()?;
    let name = bundles.file_name()?.to_str()?;
    name.starts_with(BUNDLES).then(|| bundles.parent())?
}

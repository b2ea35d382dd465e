//! What all tests of one run share: a scratch directory, a mark that every id
//! carries, the unpacked base image, and one private containerd.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::error::{Failure, Result, file};
use crate::generation::{Generation, Netns};
use crate::image::{catalog, layer};

/// Environment variable that names the runtime under test.
pub const RUNTIME_VARIABLE: &str = "CASEMATE_TEST_RUNTIME";
/// Environment variable that names the directory with our binaries.
pub const BINARIES_VARIABLE: &str = "CASEMATE_TEST_BIN_DIR";
/// The runtime under test when nothing else is said.
pub const RUNTIME: &str = "io.containerd.casemate.v2";

/// containerd namespace of tests through `ctr`.
pub const NAMESPACE: &str = "casemate-e2e";

/// containerd namespaces of the tests, which are names of cgroups too.
const NAMESPACES: [&str; 2] = [crate::bundle::NAMESPACE, NAMESPACE];

/// Parent of the cgroups of pods made through CRI.
pub const PODS: &str = "casemate-pods";

/// The shared part of a test run.
pub struct World {
    dir: TempDir,
    mark: String,
    runtime: String,
    next: AtomicU32,
    daemon: Mutex<Option<Arc<Daemon>>>,
    others: Mutex<BTreeMap<Generation, Arc<Node>>>,
    base: Mutex<Option<PathBuf>>,
}

/// A containerd of a certain generation with CRI on, and the network that it
/// takes for its node's.
pub struct Node {
    /// The daemon.
    pub daemon: Daemon,
    /// Where it, its shims and its bridge are.
    pub netns: Netns,
}

static WORLD: LazyLock<std::result::Result<World, String>> =
    LazyLock::new(|| World::make().map_err(|e| e.to_string()));

impl World {
    /// The world of this process; made at the first call.
    pub fn get() -> Result<&'static Self> {
        WORLD.as_ref().map_err(|e| Failure::Unexpected(e.clone()))
    }

    fn make() -> Result<Self> {
        // Socket paths end at 107 bytes (unix(7)): stay close to the root.
        let dir = tempfile::Builder::new()
            .prefix("cmt")
            .tempdir_in("/tmp")
            .map_err(file("make a directory in", Path::new("/tmp")))?;
        // Containers' root must be able to pass through.
        set_mode(dir.path(), 0o711)?;
        Ok(Self {
            dir,
            mark: format!("cmt{}", std::process::id()),
            runtime: std::env::var(RUNTIME_VARIABLE).unwrap_or_else(|_| RUNTIME.to_owned()),
            next: AtomicU32::new(0),
            daemon: Mutex::new(None),
            others: Mutex::default(),
            base: Mutex::new(None),
        })
    }

    /// The scratch directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The prefix of every container id of this run.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// The runtime under test.
    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// Whether the runtime under test is casemate, not a stock one.
    pub fn is_casemate(&self) -> bool {
        self.runtime == RUNTIME
    }

    /// A fresh container id that carries the run's mark and `name`.
    pub fn id(&self, name: &str) -> String {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{}-{name}-{n}", self.mark)
    }

    /// PATH with our binaries in front.
    pub fn path(&self) -> String {
        let system = std::env::var("PATH").unwrap_or_default();
        format!("{}:{system}:/usr/sbin:/sbin", binaries().display())
    }

    /// The shim binary that containerd would find for the runtime under test:
    /// the last two parts of the runtime's name, looked up in PATH.
    pub fn shim(&self) -> Result<PathBuf> {
        let mut parts = self.runtime.rsplit('.');
        let (version, name) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        let program = format!("containerd-shim-{name}-{version}");
        self.path()
            .split(':')
            .map(|dir| Path::new(dir).join(&program))
            .find(|path| path.exists())
            .ok_or_else(|| {
                Failure::Unexpected(format!(
                    "no {program} in {} or PATH; build it with cargo build --profile quick",
                    binaries().display()
                ))
            })
    }

    /// The base image, unpacked once; the lower directory of tasks made by hand.
    pub fn base(&self) -> Result<PathBuf> {
        let mut slot = lock(&self.base)?;
        if let Some(dir) = &*slot {
            return Ok(dir.clone());
        }
        let dir = self.dir().join("base");
        fs::create_dir_all(&dir).map_err(file("make", &dir))?;
        layer::unpack(&catalog::base_layer(Some(&probe()?))?, &dir)?;
        *slot = Some(dir.clone());
        Ok(dir)
    }

    /// The private containerd, started at the first call.
    pub fn daemon(&self) -> Result<Arc<Daemon>> {
        crate::results::touched(crate::generation::system());
        let mut slot = lock(&self.daemon)?;
        if let Some(daemon) = &*slot {
            return Ok(daemon.clone());
        }
        let daemon = Arc::new(Daemon::start(&self.dir().join("d"), &self.path())?);
        *slot = Some(daemon.clone());
        Ok(daemon)
    }

    /// A containerd of that generation with CRI on, with base and pause images;
    /// started at the first call. Its programs must be there.
    pub fn node(&self, generation: Generation) -> Result<Arc<Node>> {
        crate::results::touched(generation.version());
        let mut slot = lock(&self.others)?;
        if let Some(node) = slot.get(&generation) {
            return Ok(node.clone());
        }
        let netns = Netns::make(&format!("{}-{}", self.mark, generation.tag()))?;
        let dir = self.dir().join(format!("n{}", generation.tag()));
        let daemon = generation.start(&dir, &self.path(), &self.shim()?, &netns)?;
        let probe = probe()?;
        let base = catalog::base(Some(&probe))?;
        let pause = catalog::pause((!self.is_casemate()).then_some(probe.as_path()))?;
        daemon.ctr("k8s.io").import(&pause, self.dir())?;
        daemon.ctr("k8s.io").import(&base, self.dir())?;
        daemon.ctr(NAMESPACE).import(&base, self.dir())?;
        let node = Arc::new(Node { daemon, netns });
        slot.insert(generation, node.clone());
        Ok(node)
    }

    /// Stops the daemons and removes everything; returns what is left.
    pub fn close(&self) -> Vec<String> {
        if let Ok(mut slot) = self.others.lock() {
            for node in std::mem::take(&mut *slot).into_values() {
                node.daemon.stop();
            }
        }
        if let Ok(mut slot) = self.daemon.lock()
            && let Some(daemon) = slot.take()
        {
            daemon.stop();
        }
        let scratch = self.dir().display().to_string();
        let left = || {
            let mut left = crate::leaks::with_mark(&self.mark);
            left.extend(crate::leaks::mounts_with(&scratch));
            left
        };
        // A shim may need a moment to end after its last reply.
        let _ = crate::run::until("a clean host", std::time::Duration::from_secs(5), || {
            left().is_empty()
        });
        for namespace in [&NAMESPACES[..], &["k8s.io", PODS]].concat() {
            crate::leaks::remove_namespace_cgroups(namespace);
        }
        let left = left();
        let _ = fs::remove_dir_all(self.dir());
        left
    }
}

fn lock<T>(mutex: &Mutex<T>) -> Result<std::sync::MutexGuard<'_, T>> {
    mutex
        .lock()
        .map_err(|_| Failure::Unexpected("another test panicked while it made this".to_owned()))
}

/// Sets a file's mode.
pub fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(file("chmod", path))
}

/// The directory with our binaries: named by the environment, or the profile
/// directory that this program was built into.
pub fn binaries() -> PathBuf {
    if let Some(dir) = std::env::var_os(BINARIES_VARIABLE) {
        return PathBuf::from(dir);
    }
    let here = std::env::current_exe().unwrap_or_default();
    here.ancestors()
        .skip(1)
        .find(|dir| dir.file_name().is_some_and(|n| n != "deps"))
        .map(Path::to_path_buf)
        .unwrap_or_default()
}

/// The `probe` program of this crate, which runs inside containers.
pub fn probe() -> Result<PathBuf> {
    let here = std::env::current_exe().unwrap_or_default();
    [
        binaries(),
        here.with_file_name(""),
        here.with_file_name(".."),
    ]
    .iter()
    .map(|dir| dir.join("probe"))
    .find(|path| path.exists())
    .ok_or_else(|| Failure::Unexpected("no probe binary: cargo build -p casemate-tests".into()))
}

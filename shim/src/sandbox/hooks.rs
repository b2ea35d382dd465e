//! When a container's hooks run, and what they are told (config.md,
//! "POSIX-platform Hooks"; runtime.md, "Lifecycle" and "State").

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use casemate_spec::{ClockOffset, HookSpec, Tightened};
use casemate_sys::mount::{self, Change, attr, clone_tree};
use casemate_sys::process;
use rustix::fs::{CWD, Mode, OFlags};
use serde_json::json;
use tokio::sync::oneshot;

use super::forker::{Forker, Reply};
use super::profiles::Profiles;
use super::{ChildStdio, ContainerRequest, Exit, KILL, Sandbox, SandboxError, Spawned};
use crate::host::Step;
use crate::host::hooks::{self, Runner};

/// Descriptors of one message (`message::MAX_FDS`): /dev/null, and two a hook.
const MOST_INSIDE: usize = 15;

/// The container's state as hooks read it.
pub fn state(spec: &Tightened, id: &str, bundle: &Path, status: &str, pid: Option<u32>) -> Vec<u8> {
    let mut state = json!({
        "ociVersion": spec.oci_version,
        "id": id,
        "status": status,
        "bundle": bundle,
        "annotations": spec.annotations,
    });
    if let Some(pid) = pid {
        state["pid"] = json!(pid);
    }
    state.to_string().into_bytes()
}

/// Runs `list` on the host, in order, up to the first that fails.
pub async fn on_node(
    runner: Option<&Runner>,
    list: &[HookSpec],
    state: &[u8],
    bundle: &Path,
) -> Result<(), SandboxError> {
    for hook in list {
        one_on_node(runner, hook, state, bundle).await?;
    }
    Ok(())
}

async fn one_on_node(
    runner: Option<&Runner>,
    hook: &HookSpec,
    state: &[u8],
    bundle: &Path,
) -> Result<(), SandboxError> {
    let Some(runner) = runner else {
        // The rules let no hook pass that the configuration doesn't allow, and
        // that is read once.
        return Err(SandboxError::Failed(format!(
            "run {} ({}): there is no runner of hooks",
            hook.field, hook.path
        )));
    };
    runner.run(hook, state, bundle).await
}

/// Runs all of `list` on the host; what fails is a warning.
pub async fn on_node_or_warn(
    runner: Option<&Runner>,
    list: &[HookSpec],
    state: &[u8],
    (id, bundle): (&str, &Path),
) {
    for hook in list {
        if let Err(error) = one_on_node(runner, hook, state, bundle).await {
            log::warn!("container {id}: {error}");
        }
    }
}

/// What the assembling process needs for hooks of its own: /dev/null, then
/// program and standard input of each. A program is a read-only mount of that
/// one file: nobody inside can change it.
pub fn inside(list: &[HookSpec], state: &[u8]) -> Result<Vec<OwnedFd>, SandboxError> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    if list.len() > MOST_INSIDE {
        return Err(SandboxError::Invalid(format!(
            "hooks.createContainer: {} hooks; give at most {MOST_INSIDE}",
            list.len()
        )));
    }
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .step("open", "/dev/null")?;
    let mut fds = vec![null];
    for hook in list {
        let object = format!("{} ({})", hook.field, hook.path);
        let program = clone_tree(CWD, Path::new(&hook.path), false, true).step("open", &object)?;
        let change = Change {
            set: attr::RDONLY | attr::NOSUID | attr::NODEV,
            ..Change::default()
        };
        mount::set_attributes(&program, change).step("protect", &object)?;
        let stat = rustix::fs::fstat(program.as_fd()).step("look at", &object)?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(SandboxError::Invalid(format!("open {object}: not a file")));
        }
        fds.push(program);
        fds.push(hooks::input(state)?);
    }
    Ok(fds)
}

/// Sets the clocks of the time namespace that the children of `pid` will be
/// born in (time_namespaces(7)).
pub fn set_clocks(pid: u32, clocks: &[ClockOffset]) -> Result<(), SandboxError> {
    for ClockOffset {
        clock,
        seconds,
        nanoseconds,
    } in clocks
    {
        let line = format!("{clock} {seconds} {nanoseconds}\n");
        std::fs::write(format!("/proc/{pid}/timens_offsets"), &line).map_err(|e| {
            let hint = match e.raw_os_error() {
                Some(libc::ERANGE) => "; the clock would be below 0 or beyond 146 years",
                _ => "",
            };
            SandboxError::Invalid(format!(
                "set linux.timeOffsets.{clock} to {seconds} s, {nanoseconds} ns: {e}{hint}"
            ))
        })?;
    }
    Ok(())
}

/// Hooks of the host, then those inside, while `pid`, which is to be the
/// forker, waits with all of the container's namespaces and mounts.
pub async fn before_root(
    pod: &Sandbox,
    request: &ContainerRequest,
    spec: &Tightened,
    forker: &Forker,
    pid: u32,
) -> Result<Reply, SandboxError> {
    let told = |pid| state(spec, &request.id, &request.bundle, "creating", pid);
    let runner = pod.runner.as_deref();
    let list = &spec.hooks.before_init;
    on_node(runner, list, &told(Some(pid)), &request.bundle).await?;
    let list = &spec.hooks.create_container;
    let fds = inside(list, &told(None))?;
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let more = list.iter().map(|hook| u64::from(hook.timeout)).sum();
    forker.proceed(&fds, Duration::from_secs(more)).await
}

/// Standard descriptors of a hook inside.
pub fn stdio(state: &[u8]) -> Result<ChildStdio, SandboxError> {
    let null = || {
        rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .step("open", "/dev/null")
    };
    Ok(ChildStdio::Files {
        stdin: hooks::input(state)?,
        stdout: null()?,
        stderr: null()?,
    })
}

/// Hooks under way inside, by key: who waits for their exit.
#[derive(Default)]
pub struct Inside(Mutex<HashMap<u32, oneshot::Sender<u32>>>);

impl Inside {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<u32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The exit of `key`, a hook that is about to be born.
    pub fn expect(&self, key: u32) -> oneshot::Receiver<u32> {
        let (sender, exit) = oneshot::channel();
        self.waiting().insert(key, sender);
        exit
    }

    /// Whether `exit` is a hook's.
    pub fn took(&self, exit: &Exit) -> bool {
        let hook = self.waiting().remove(&exit.key);
        // Who gave up waiting doesn't mind.
        hook.map(|hook| hook.send(exit.status)).is_some()
    }

    /// No hook of this key was born.
    fn forget(&self, key: u32) {
        self.waiting().remove(&key);
    }

    /// The forker is gone.
    pub fn no_more(&self) {
        self.waiting().clear();
    }

    /// Waits for the end of `hook`, which is `key` and has been `spawned`.
    pub async fn ended(
        &self,
        hook: &HookSpec,
        key: u32,
        spawned: Result<Spawned, SandboxError>,
        exit: oneshot::Receiver<u32>,
    ) -> Result<(), SandboxError> {
        let object = format!("run {} ({})", hook.field, hook.path);
        let spawned = spawned.map_err(|error| {
            self.forget(key);
            error.within(&object)
        })?;
        let patience = Duration::from_secs(hook.timeout.into());
        let failed = match tokio::time::timeout(patience, exit).await {
            Ok(Ok(0)) => return Ok(()),
            Ok(Ok(status)) => format!("exit status {status}"),
            Ok(Err(_)) => "the container has ended".to_owned(),
            Err(_) => {
                // Its exit is still to come: the key stays known until then.
                let _ = process::signal(&spawned.pidfd, KILL);
                format!("not done within {} s and killed", hook.timeout)
            }
        };
        Err(SandboxError::Failed(format!("{object}: {failed}")))
    }
}

/// How long each of the last hooks may take when the shim is dead: the daemon
/// waits for `delete`, and not for long.
const LATE: u32 = 2;

/// The last hooks of a container whose shim is dead; what went wrong.
pub fn after_death(bundle: &Path, id: &str) -> Vec<String> {
    const NAME: &[u8] = b"\"poststop\"";
    let document = std::fs::read(bundle.join("config.json")).unwrap_or_default();
    if !document.windows(NAME.len()).any(|part| part == NAME) {
        return Vec::new();
    }
    let read = || {
        let config = super::read_config()?;
        // Which calls it may make is nobody's question any more.
        let profiles = Profiles::any(&config);
        let spec = super::read_spec(bundle, id, (&config, None, &profiles))?;
        Ok::<_, SandboxError>((config, spec))
    };
    let (config, spec) = match read() {
        Ok(read) => read,
        Err(error) => return vec![format!("container {id}: its last hooks: {error}")],
    };
    let state = state(&spec, id, bundle, "stopped", None);
    let each = spec.hooks.poststop.into_iter().filter_map(|mut hook| {
        hook.timeout = hook.timeout.min(LATE);
        let error = hooks::run_here(&config.hooks, &hook, &state, bundle).err()?;
        let HookSpec { field, path, .. } = hook;
        Some(format!("container {id}: run {field} ({path}): {error}"))
    });
    each.collect()
}

/// The pid of host process `pid` in its own pid namespace.
pub fn inner_pid(pid: u32) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("NSpid:"))?;
    line.split_ascii_whitespace().last()?.parse().ok()
}

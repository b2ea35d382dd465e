//! `delete`: undoes what the journal says, with the shim dead, wedged, or
//! alive and well beside us. Run after ordinary deletions too, and the daemon
//! waits for it: no runtime, a few system calls when there is nothing to do.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use casemate_cgroup::{Cgroup, Scope, systemd};
use containerd_shim_protos::api::{ConnectRequest, DeleteResponse};
use protobuf::{Message, MessageField};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process_group};

use super::flags::Flags;
use super::journal::{self, Entry, Journal};
use super::proc;
use super::registry;
use super::socket;
use super::spec::Spec;
use super::start;
use crate::events::timestamp;
use crate::host::ids;
use crate::host::scope::STOP_WITHIN;
use crate::sandbox;

/// In every other container's bundle, a symbolic link to the pod's bundle.
pub const POD_LINK: &str = "casemate.pod";

/// 128 + SIGKILL: what is reported of a process that nobody saw end.
const KILLED: u32 = 137;
// containerd waits 5 s for the whole command: the sum of these is less, whatever
// is wedged, and however many containers there are.
const PROBE_WITHIN: Duration = Duration::from_millis(800);
const KILL_WITHIN: Duration = Duration::from_millis(800);
/// For all cgroups together to become free of what was killed.
const FREE_WITHIN: Duration = Duration::from_secs(1);
/// For logging binaries to finish after the end of their input.
const LOGGERS_WITHIN: Duration = Duration::from_secs(1);

/// Runs the action; the answer goes to stdout, warnings to stderr.
pub fn run(flags: &Flags, program: &str) -> Result<(), String> {
    // By a name that says none, no pod was made.
    if let Ok(class) = start::class(program) {
        sandbox::set_class(class);
    }
    let bundle = if flags.bundle.is_empty() {
        // The working directory may have been removed under us already.
        std::env::current_dir().unwrap_or_default()
    } else {
        PathBuf::from(&flags.bundle)
    };
    let answer = clean(&bundle, &flags.id);
    remove_unanswered(flags, &bundle);
    if let Err(error) = ids::sweep(Path::new(ids::DIRECTORY)) {
        warn(&format!("remove lock files in {}: {error}", ids::DIRECTORY));
    }
    let answer = answer
        .write_to_bytes()
        .map_err(|error| format!("encode the answer: {error}"))?;
    io::stdout()
        .write_all(&answer)
        .map_err(|error| format!("print the answer: {error}"))
}

fn clean(bundle: &Path, id: &str) -> DeleteResponse {
    let own = bundle.join(journal::NAME);
    let (pod, is_pod) = if own.exists() {
        (bundle.to_path_buf(), true)
    } else {
        (bundle.join(POD_LINK), false)
    };
    let facts = Facts::gather(Journal::read(&pod.join(journal::NAME)));
    if is_pod {
        clean_pod(&pod, &facts);
    } else if let Some(container) = facts.containers.get(id)
        && !facts.removed.contains(id)
    {
        clean_containers(&[(id, container)]);
        unmount_rootfs(bundle);
    }
    if facts.registry.is_empty() {
        // The journal is lost, or of a release that had no registry; entries of
        // dead shims speak for themselves.
        if let Err(error) = registry::sweep(Path::new(registry::DIRECTORY)) {
            warn(&format!("sweep {}: {error}", registry::DIRECTORY));
        }
    }
    facts.answer(id)
}

/// The socket that `start` binds for this id before there is a journal: if it
/// was killed then, nobody answers there.
fn remove_unanswered(flags: &Flags, bundle: &Path) {
    if bundle.join(POD_LINK).symlink_metadata().is_ok() {
        return;
    }
    let spec = Spec::read(bundle).unwrap_or_default();
    let group = spec.group(&flags.id);
    let dir = Path::new(socket::DEFAULT_DIR);
    let path = socket::path(dir, &flags.address, &flags.namespace, group);
    if path.exists() {
        remove_socket(&path);
    }
}

/// The journal, by subject.
#[derive(Debug, Default)]
struct Facts {
    shim: Option<(u32, u64)>,
    agents: Vec<(u32, u64)>,
    sockets: Vec<PathBuf>,
    registry: Vec<PathBuf>,
    containers: BTreeMap<String, Container>,
    removed: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct Container {
    cgroups: Vec<PathBuf>,
    scope: Option<(String, String)>,
    loggers: Vec<(u32, u64)>,
    bundle: Option<PathBuf>,
    exit: Option<(u32, u64, u32)>,
    init: u32,
}

impl Facts {
    fn gather(entries: Vec<Entry>) -> Facts {
        let mut facts = Facts::default();
        for entry in entries {
            match entry {
                Entry::Shim { pid, start_time } => facts.shim = Some((pid, start_time)),
                Entry::Socket(path) => facts.sockets.push(path),
                Entry::Agent { pid, start_time } => facts.agents.push((pid, start_time)),
                Entry::Cgroup { container, dirs } => {
                    // A pod that could not be made may be made again.
                    facts.removed.remove(&container);
                    let known = &mut facts.containers.entry(container).or_default().cgroups;
                    known.extend(dirs);
                }
                Entry::Scope {
                    container,
                    slice,
                    unit,
                } => {
                    let known = facts.containers.entry(container).or_default();
                    known.scope = Some((slice, unit));
                }
                Entry::Container { id, bundle } => {
                    // The id may be used again after a removal: its old exit
                    // and cgroups are history. Loggers have an identity, and
                    // init's is older than the second entry of its container.
                    facts.removed.remove(&id);
                    let known = facts.containers.entry(id).or_default();
                    *known = Container {
                        bundle: Some(bundle),
                        loggers: std::mem::take(&mut known.loggers),
                        ..Container::default()
                    };
                }
                Entry::Exit {
                    container,
                    status,
                    at,
                    pid,
                } => {
                    facts.containers.entry(container).or_default().exit = Some((status, at, pid));
                }
                Entry::Init { container, pid } => {
                    facts.containers.entry(container).or_default().init = pid;
                }
                Entry::Logger {
                    container,
                    pid,
                    start_time,
                } => {
                    let known = &mut facts.containers.entry(container).or_default().loggers;
                    known.push((pid, start_time));
                }
                Entry::Registry(path) => facts.registry.push(path),
                Entry::Removed(id) => {
                    facts.removed.insert(id);
                }
            }
        }
        facts
    }

    /// Containers that may still have something on the host.
    fn left(&self) -> impl Iterator<Item = (&String, &Container)> {
        self.containers
            .iter()
            .filter(|(id, _)| !self.removed.contains(*id))
    }

    fn answer(&self, id: &str) -> DeleteResponse {
        let container = self.containers.get(id);
        let exit = container.and_then(|container| container.exit);
        let (status, at, pid) = match exit {
            Some((status, at, pid)) => (status, UNIX_EPOCH + Duration::from_nanos(at), pid),
            None => (KILLED, SystemTime::now(), container.map_or(0, |c| c.init)),
        };
        DeleteResponse {
            pid,
            exit_status: status,
            exited_at: MessageField::some(timestamp(at)),
            ..DeleteResponse::default()
        }
    }
}

/// What `start` leaves that fails after its server was up: nobody runs `delete`
/// then, containerd only removes the bundle. The server is dead.
pub fn undo(bundle: &Path) {
    let facts = Facts::gather(Journal::read(&bundle.join(journal::NAME)));
    clean_pod(bundle, &facts);
}

fn clean_pod(bundle: &Path, facts: &Facts) {
    if let Some(shim) = facts.shim.and_then(|(pid, start)| proc::open(pid, start)) {
        if answers(facts) {
            // The agent's own entry has no name.
            if facts.left().any(|(id, _)| !id.is_empty()) {
                return;
            }
            // On its way out, or never used: it goes cleanly.
            let _gone = casemate_sys::signal::pidfd_send_signal(shim.as_fd(), libc::SIGTERM);
            if proc::wait(&shim, PROBE_WITHIN) {
                return;
            }
        }
        end(&shim, "shim");
    }
    for (pid, start) in &facts.agents {
        if let Some(agent) = proc::open(*pid, *start) {
            end(&agent, "agent");
        }
    }
    let left: Vec<_> = facts.left().map(|(id, c)| (id.as_str(), c)).collect();
    let gone = clean_containers(&left);
    for container in facts.containers.values() {
        // A parent that one of them made is free only when all have gone.
        casemate_cgroup::remove_empty(&container.cgroups);
    }
    for (_, container) in &left {
        if let Some(bundle) = &container.bundle {
            unmount_rootfs(bundle);
        }
    }
    unmount_rootfs(bundle);
    for socket in &facts.sockets {
        remove_socket(socket);
    }
    let (pid, start) = facts.shim.unwrap_or_default();
    for path in &facts.registry {
        if let Err(error) = registry::remove(path, pid, start) {
            warn(&format!("remove {}: {error}", path.display()));
        }
    }
    if let Ok(journal) = Journal::open(bundle) {
        for id in gone {
            // If this can't be written, the next delete does the work again.
            let _again = journal.record(Entry::Removed(id.to_owned()));
        }
    }
}

/// Kills everything first, so that all die together; then takes away what they
/// were in. The ids of those of which nothing is left.
fn clean_containers<'a>(left: &[(&'a str, &Container)]) -> Vec<&'a str> {
    let cgroups: Vec<Cgroup> = left.iter().map(|(_, c)| Cgroup::open(&c.cgroups)).collect();
    for ((id, container), cgroup) in left.iter().zip(&cgroups) {
        if !container.cgroups.is_empty()
            && let Err(error) = cgroup.kill(libc::SIGKILL, &[])
        {
            warn(&format!("kill container {id}: {error}"));
        }
    }
    let until = Instant::now() + LOGGERS_WITHIN;
    for (_, container) in left {
        end_loggers(container, until);
    }
    let until = Instant::now() + FREE_WITHIN;
    let mut gone = Vec::new();
    for ((id, _), cgroup) in left.iter().zip(&cgroups) {
        match cgroup.remove(until.saturating_duration_since(Instant::now())) {
            Ok(()) => gone.push(*id),
            Err(error) => warn(&format!("remove the cgroup of container {id}: {error}")),
        }
    }
    for (_, container) in left {
        let scope = container.scope.as_ref();
        if let Some(Ok(scope)) = scope.map(|(slice, unit)| Scope::named(slice, unit))
            && let Err(error) = systemd::stop(&scope, STOP_WITHIN)
        {
            warn(&error.to_string());
        }
    }
    // The last hooks last: they may take their time.
    for (id, container) in left {
        if let Some(bundle) = &container.bundle {
            for problem in sandbox::after_death(bundle, id) {
                warn(&problem);
            }
        }
    }
    gone
}

fn end_loggers(container: &Container, until: Instant) {
    for (pid, start) in &container.loggers {
        let Some(logger) = proc::open(*pid, *start) else {
            continue;
        };
        // The container is dead: one that reads until the end goes by itself.
        if !proc::wait(&logger, until.saturating_duration_since(Instant::now())) {
            // Its children with it; it is the leader of its group.
            let group = i32::try_from(*pid).ok().and_then(Pid::from_raw);
            let _gone = group.map(|group| kill_process_group(group, Signal::KILL));
            end(&logger, "logging binary");
        }
    }
}

fn end(pidfd: &OwnedFd, what: &str) {
    if !proc::kill(pidfd, KILL_WITHIN) {
        warn(&format!(
            "{what} killed, but not gone after {KILL_WITHIN:?}"
        ));
    }
}

fn remove_socket(path: &Path) {
    if let Err(error) = socket::remove_stale(path) {
        warn(&format!("remove {}: {error}", path.display()));
    }
}

/// Nothing of ours is mounted there, but containerd expects it free.
fn unmount_rootfs(bundle: &Path) {
    let rootfs = bundle.join("rootfs");
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    // Stacked mounts come off one by one; EINVAL: none is left.
    for _ in 0..16 {
        if rustix::mount::unmount(&rootfs, flags).is_err() {
            return;
        }
    }
}

/// Whether the shim answers `Connect`, which takes no lock of its.
fn answers(facts: &Facts) -> bool {
    facts
        .sockets
        .last()
        .is_some_and(|socket| probe(socket).is_ok())
}

/// One ttrpc call: a ten-byte header (length, stream, type, flags), a request;
/// any well-formed response is a sign of life.
fn probe(socket: &Path) -> io::Result<()> {
    let request = ttrpc::Request {
        service: "containerd.task.v2.Task".to_owned(),
        method: "Connect".to_owned(),
        payload: ConnectRequest::default().write_to_bytes()?,
        ..ttrpc::Request::default()
    }
    .write_to_bytes()?;
    let length = u32::try_from(request.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(10 + request.len());
    frame.extend(length.to_be_bytes());
    frame.extend(1u32.to_be_bytes());
    frame.extend([1, 0]);
    frame.extend(request);

    let mut stream = super::socket::connect(socket, PROBE_WITHIN)?;
    stream.set_read_timeout(Some(PROBE_WITHIN))?;
    stream.set_write_timeout(Some(PROBE_WITHIN))?;
    stream.write_all(&frame)?;
    let mut header = [0; 10];
    stream.read_exact(&mut header)?;
    if header[8] == 2 {
        Ok(())
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn warn(text: &str) {
    // stderr may be closed; the work is done regardless.
    let _lost = writeln!(io::stderr(), "containerd-shim-casemate-v2: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(id: &str) -> Entry {
        Entry::Container {
            id: id.into(),
            bundle: "/b".into(),
        }
    }

    #[test]
    fn the_recorded_exit_is_answered_and_137_where_there_is_none() {
        let facts = Facts::gather(vec![
            container("a"),
            Entry::exit("a", 3, UNIX_EPOCH + Duration::from_secs(9), 77),
            Entry::Removed("a".into()),
            container("b"),
        ]);
        let a = facts.answer("a");
        assert_eq!((a.pid, a.exit_status, a.exited_at.seconds), (77, 3, 9));
        let b = facts.answer("b");
        assert_eq!((b.pid, b.exit_status), (0, 137));
        assert_eq!(facts.answer("never seen").exit_status, 137);
        let left: Vec<&String> = facts.left().map(|(id, _)| id).collect();
        assert_eq!(left, ["b"]);
    }

    #[test]
    fn an_id_used_again_starts_with_a_clean_sheet() {
        let facts = Facts::gather(vec![
            container("a"),
            Entry::exit("a", 3, UNIX_EPOCH, 77),
            Entry::Removed("a".into()),
            container("a"),
        ]);
        assert_eq!(facts.answer("a").exit_status, 137);
        assert_eq!(facts.left().count(), 1);
    }

    #[test]
    fn a_logger_is_known_though_its_container_is_entered_again_after_it() {
        let logger = Entry::Logger {
            container: "a".into(),
            pid: 5,
            start_time: 6,
        };
        let facts = Facts::gather(vec![container("a"), logger, container("a")]);
        assert_eq!(facts.containers["a"].loggers, [(5, 6)]);
    }

    #[test]
    fn a_bundle_that_has_gone_is_no_error() {
        let answer = clean(Path::new("/nonexistent/bundle"), "a");
        assert_eq!(answer.exit_status, 137);
    }
}

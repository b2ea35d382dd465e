//! Asking systemd for a scope, for its limits, and for its end.
//!
//! systemd is one writer of cgroups on its host, and a cgroup in its tree that
//! it doesn't know of is taken over or lost at its next move. So where it runs,
//! and a path asks for a scope, it makes the cgroup, with `Delegate=yes`, and
//! what it would write itself is told to it as properties. The rest (files that
//! it has no property for, and the exact values) goes through the file system as
//! always.
//!
//! The peer is systemd itself, at its private socket: no bus daemon is in
//! between that may be missing or slow. All calls block for a bounded time.

mod properties;
pub(crate) mod quota;
mod wire;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;

use self::properties::{Property, Value};
use self::wire::{Body, Bus, ERROR, Message, RETURN, SIGNAL};
use crate::error::CgroupError;
use crate::files;
use crate::scope::Scope;

/// Where systemd listens, for root alone.
const SOCKET: &str = "/run/systemd/private";
/// A directory that is there where systemd is process 1 (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";

/// A unit of the same name that is just going: how long to try again.
const GOING: Duration = Duration::from_millis(500);
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// Whether systemd is this host's process 1.
pub fn is_running() -> bool {
    rustix::fs::lstat(BOOTED).is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir())
}

/// Has systemd make the scope, with the calling process as its first, and
/// waits until the process is in it. The scope lasts until no process is left.
///
/// `r` is what the scope is limited by from the start.
pub fn start(
    scope: &Scope,
    r: &LinuxResources,
    v2: bool,
    patience: Duration,
) -> Result<(), CgroupError> {
    let error = |reason: String| failed("start", scope, reason);
    let mut wanted = vec![
        Property::new(
            "Description",
            Value::Text(format!("casemate {}", scope.unit())),
        ),
        Property::new("Slice", Value::Text(scope.slice().to_owned())),
        Property::new("PIDs", Value::Pids(vec![std::process::id()])),
        Property::new("Delegate", Value::Bool(true)),
        // As for every container: it ends when its manager ends it, not when
        // the host begins to stop.
        Property::new("DefaultDependencies", Value::Bool(false)),
        // Else a scope that failed stays, and its name is taken.
        Property::new("CollectMode", Value::Text("inactive-or-failed".to_owned())),
    ];
    let limits = properties::of(&quota::held(r, (None, None)), v2);
    if !limits.iter().any(|p| p.name == "TasksMax") {
        // systemd has a default; a container without a limit has none.
        wanted.push(Property::new("TasksMax", Value::Number(u64::MAX)));
    }
    wanted.extend(limits);
    let mut client = Client::connect(Path::new(SOCKET), patience).map_err(|e| error(text(&e)))?;
    let began = Instant::now();
    loop {
        let done = client.with_known(&wanted, |client, properties| {
            let mut body = Body::default();
            body.string(scope.unit());
            body.string("fail");
            properties::write(&mut body, properties);
            body.array(8, |_| {});
            client.call("StartTransientUnit", "ssa(sv)a(sa(sv))", &body)
        });
        match done {
            Ok(Ok(answer)) => {
                client.job(&answer, scope).map_err(error)?;
                break;
            }
            Ok(Err(refusal)) if is(&refusal, "UnitExists") && began.elapsed() < GOING => {
                let mut body = Body::default();
                body.string(scope.unit());
                // Only what is over can be reset.
                let _still_there = client.call("ResetFailedUnit", "s", &body);
                std::thread::sleep(TRY_AGAIN);
            }
            Ok(Err(refusal)) => return Err(error(refusal.reason())),
            Err(e) => return Err(error(text(&e))),
        }
    }
    let places = files::read(Path::new("/proc/self/cgroup")).map_err(|e| error(e.to_string()))?;
    let want = Path::new("/").join(scope.path());
    let is = places
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .any(|place| Path::new(place) == want);
    if is {
        Ok(())
    } else {
        Err(error(format!(
            "systemd reports it started, but the cgroup of its process is not {want:?}"
        )))
    }
}

/// Tells systemd of new limits, so that it keeps them, as [`crate::Cgroup::held`] has
/// them. It writes them once more; that is over when this returns.
pub fn set(
    scope: &Scope,
    r: &LinuxResources,
    v2: bool,
    patience: Duration,
) -> Result<(), CgroupError> {
    let error = |reason: String| failed("set limits of", scope, reason);
    let wanted = properties::of(r, v2);
    if wanted.is_empty() {
        return Ok(());
    }
    let mut client = Client::connect(Path::new(SOCKET), patience).map_err(|e| error(text(&e)))?;
    let answer = client
        .with_known(&wanted, |client, properties| {
            let mut body = Body::default();
            body.string(scope.unit());
            // For as long as the host runs; the unit lives no longer anyway.
            body.bool(true);
            properties::write(&mut body, properties);
            client.call("SetUnitProperties", "sba(sv)", &body)
        })
        .map_err(|e| error(text(&e)))?;
    answer.map_err(|refusal| error(refusal.reason()))?;
    // systemd answers first and writes files next, before it reads from us again.
    client.place(scope).map_err(|e| error(text(&e)))?;
    Ok(())
}

/// Has systemd forget the scope, which should have no process any more: one
/// that it has forgotten by itself, or never knew, is fine. A unit of the same
/// name in another place is somebody else's and left alone.
pub fn stop(scope: &Scope, patience: Duration) -> Result<(), CgroupError> {
    if !is_running() {
        return Ok(());
    }
    stop_at(Path::new(SOCKET), scope, patience)
}

fn stop_at(socket: &Path, scope: &Scope, patience: Duration) -> Result<(), CgroupError> {
    let error = |reason: String| failed("stop", scope, reason);
    let mut client = Client::connect(socket, patience).map_err(|e| error(text(&e)))?;
    let Some(place) = client.place(scope).map_err(|e| error(text(&e)))? else {
        return Ok(());
    };
    // Empty once its cgroup is gone.
    if !place.as_os_str().is_empty() && place != Path::new("/").join(scope.path()) {
        log::warn!("{}: at {place:?}, not ours: left alone", scope.unit());
        return Ok(());
    }
    let mut body = Body::default();
    body.string(scope.unit());
    body.string("replace");
    match client
        .call("StopUnit", "ss", &body)
        .map_err(|e| error(text(&e)))?
    {
        Ok(answer) => client.job(&answer, scope).map_err(error),
        Err(refusal) if is(&refusal, "NoSuchUnit") => Ok(()),
        Err(refusal) => Err(error(refusal.reason())),
    }
}

fn is(refusal: &Message, name: &str) -> bool {
    refusal.error.strip_prefix("org.freedesktop.systemd1.") == Some(name)
}

fn text(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut => "no answer in time".to_owned(),
        _ => error.to_string(),
    }
}

fn failed(step: &'static str, scope: &Scope, reason: String) -> CgroupError {
    CgroupError::Systemd {
        step,
        unit: scope.unit().to_owned(),
        slice: scope.slice().to_owned(),
        reason,
    }
}

/// An answer, or systemd's refusal.
type Answer = Result<Message, Message>;

/// A connection, and the jobs that ended while we waited for something else.
struct Client {
    bus: Bus,
    ended: Vec<(String, String)>,
}

impl Client {
    fn connect(socket: &Path, patience: Duration) -> io::Result<Client> {
        Ok(Client {
            bus: Bus::connect(socket, patience)?,
            ended: Vec::new(),
        })
    }

    /// Calls the manager and waits for the answer.
    fn call(&mut self, member: &str, signature: &str, body: &Body) -> io::Result<Answer> {
        self.call_at((MANAGER_PATH, MANAGER, member), signature, body)
    }

    fn call_at(
        &mut self,
        target: (&str, &str, &str),
        signature: &str,
        body: &Body,
    ) -> io::Result<Answer> {
        let serial = self.bus.send(target, signature, body)?;
        loop {
            let message = self.next()?;
            match message.kind {
                RETURN if message.reply_to == serial => return Ok(Ok(message)),
                ERROR if message.reply_to == serial => return Ok(Err(message)),
                _ => {}
            }
        }
    }

    /// The next message; ends of jobs are remembered.
    fn next(&mut self) -> io::Result<Message> {
        /// Jobs of the whole host pass by.
        const REMEMBERED: usize = 256;
        let message = self.bus.next()?;
        if message.kind == SIGNAL
            && message.member == "JobRemoved"
            && let Some(mut body) = message.body("uoss")
            && let (Some(_), Some(job), Some(_), Some(result)) =
                (body.u32(), body.string(), body.string(), body.string())
        {
            if self.ended.len() >= REMEMBERED {
                self.ended.remove(0);
            }
            self.ended.push((job.to_owned(), result.to_owned()));
        }
        Ok(message)
    }

    /// Waits for the job that `answer` names.
    fn job(&mut self, answer: &Message, scope: &Scope) -> Result<(), String> {
        let job = answer
            .body("o")
            .and_then(|mut body| body.string().map(str::to_owned))
            .ok_or("the answer names no job")?;
        loop {
            if let Some((_, result)) = self.ended.iter().find(|(name, _)| *name == job) {
                return match result.as_str() {
                    "done" => Ok(()),
                    other => Err(format!(
                        "its job ended as {other:?}: see journalctl -u {}",
                        scope.unit()
                    )),
                };
            }
            self.next().map_err(|e| text(&e))?;
        }
    }

    /// The cgroup of the scope as systemd knows it, `None` if it knows no such unit.
    fn place(&mut self, scope: &Scope) -> io::Result<Option<PathBuf>> {
        let mut body = Body::default();
        body.string(scope.unit());
        let unit = match self.call("GetUnit", "s", &body)? {
            Ok(answer) => answer
                .body("o")
                .and_then(|mut body| body.string().map(str::to_owned)),
            Err(_) => None,
        };
        let Some(unit) = unit else {
            return Ok(None);
        };
        let mut body = Body::default();
        body.string("org.freedesktop.systemd1.Scope");
        body.string("ControlGroup");
        let target = (unit.as_str(), "org.freedesktop.DBus.Properties", "Get");
        let place = match self.call_at(target, "ss", &body)? {
            Ok(answer) => answer.body("v").and_then(|mut body| {
                let signature = body.signature()?;
                (signature == "s").then_some(())?;
                body.string().map(PathBuf::from)
            }),
            Err(_) => None,
        };
        Ok(place)
    }

    /// Calls with all properties, and once more without the recent ones if this
    /// systemd doesn't know one of them.
    fn with_known(
        &mut self,
        properties: &[Property],
        mut call: impl FnMut(&mut Client, &[Property]) -> io::Result<Answer>,
    ) -> io::Result<Answer> {
        let answer = call(self, properties)?;
        match answer {
            Err(refusal)
                if refusal.error == "org.freedesktop.DBus.Error.PropertyReadOnly"
                    && properties.iter().any(|p| p.recent)
                    && self.bus.until() > Instant::now() =>
            {
                let old: Vec<Property> = properties.iter().filter(|p| !p.recent).cloned().collect();
                call(self, &old)
            }
            other => Ok(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A peer that says `words` to whoever connects, and then nothing more.
    fn peer(name: &str, words: &'static [u8]) -> PathBuf {
        use std::io::Write;
        let path = std::env::temp_dir().join(format!("casemate-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(words).unwrap();
            std::thread::sleep(Duration::from_secs(20));
        });
        path
    }

    fn try_to_stop(socket: &Path) -> (String, Duration) {
        let scope = Scope::parse("a.slice:b:c").unwrap().unwrap();
        let began = Instant::now();
        let error = stop_at(socket, &scope, Duration::from_millis(300)).unwrap_err();
        let _ = std::fs::remove_file(socket);
        (error.to_string(), began.elapsed())
    }

    #[test]
    fn a_systemd_that_does_not_answer_is_an_error_and_no_hang() {
        let slow = Duration::from_secs(5);
        for (name, words) in [("mute", &b""[..]), ("half", b"OK 0123\r\n")] {
            let (error, took) = try_to_stop(&peer(name, words));
            assert!(error.contains("no answer in time"), "{error}");
            assert!(took < slow, "{took:?}");
        }
    }

    #[test]
    fn a_peer_that_is_no_systemd_is_an_error() {
        for (name, words, part) in [
            ("refuses", &b"REJECTED\r\n"[..], "user id"),
            ("talks", &[b'x'; 400], "no D-Bus"),
            ("junk", b"OK 0\r\nGET / HTTP/1.1 and so on", "no D-Bus"),
            (
                "huge",
                b"OK 0\r\nl\x02\0\x01\xff\xff\xff\xff\x01\0\0\0\x08\0\0\0--------",
                "no D-Bus",
            ),
        ] {
            let (error, _) = try_to_stop(&peer(name, words));
            assert!(error.contains(part), "{name}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let (error, _) = try_to_stop(Path::new("/nonexistent/socket"));
        assert!(error.contains("b-c.scope"), "{error}");
    }
}

//! The proof: containerd has loaded the handler, and a container ran in a
//! sandbox, from containerd through the installed shim and back.

use std::path::Path;
use std::time::{Duration, Instant};

use casemate_spec::Class;
use serde_json::Value;
use tonic::{Code, Status};

use super::binaries;
use super::config;
use super::cri::{StatusRequest, StatusResponse};
use super::effective::{Handler, Handlers};
use super::grpc::{
    Any, Client, Container, Containers, CreateContainer, CreateTask, Empty, KillTask, Mount, Named,
    OfTask, Runtime, VersionResponse, WaitResponse, wrong,
};
use super::layout::Layout;
use super::pod;
use crate::Run;
use crate::bundle;
use crate::error::{RunError, one_line};
use crate::operator;
use crate::posture;

/// containerd's namespace of the proof.
const NAMESPACE: &str = "casemate-proof";
/// Begins the id of a container of it.
const ID: &str = "casemate-proof-";
/// Of the specification of a container (containerd's typeurl).
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
const SOON: Duration = Duration::from_secs(20);
/// How long a shim may outlive an installer that was killed: one that was started and
/// then asked for nothing goes after 30 s, or a second after its bundle.
const LINGERING: Duration = Duration::from_secs(40);
/// How long nothing must have been seen of a proof, once something was: CRI lists a pod
/// that it has failed to make after the shim has gone.
const QUIET: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(100);

/// What the running containerd says of a handler.
#[derive(Debug, PartialEq, Eq)]
pub enum Loaded {
    /// It doesn't answer at all.
    Down(String),
    /// It runs without CRI.
    NoCri(String),
    /// It has none of those names.
    No,
    /// It has these.
    Yes(Handlers),
}

/// Asks CRI for its configuration.
pub fn loaded(layout: &Layout) -> Loaded {
    let mut client = match Client::new(&layout.address, NAMESPACE) {
        Ok(client) => client,
        Err(error) => return Loaded::Down(error.to_string()),
    };
    let path = "/runtime.v1.RuntimeService/Status";
    let status: Result<StatusResponse, Status> =
        client.call(path, StatusRequest { verbose: true }, SOON);
    match status {
        Ok(status) => {
            let config = status.info.get("config").map_or("", String::as_str);
            let names = layout.handlers();
            let found: Handlers = names
                .into_iter()
                .filter_map(|name| Some((name.clone(), handler_in(config, &name)?)))
                .collect();
            match found.is_empty() {
                true => Loaded::No,
                false => Loaded::Yes(found),
            }
        }
        Err(status) if status.code() == Code::Unimplemented => {
            Loaded::NoCri(one_line(status.message()))
        }
        Err(status) => Loaded::Down(one_line(status.message())),
    }
}

/// The handler in CRI's own account of its configuration.
fn handler_in(config: &str, name: &str) -> Option<Handler> {
    let config: Value = serde_json::from_str(config).ok()?;
    let runtime = config.pointer("/containerd/runtimes")?.get(name)?;
    let text = |key: &str| {
        let value = runtime.get(key).and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    Some(Handler {
        kind: text("runtimeType"),
        path: text("runtimePath"),
        annotations: runtime
            .get("PodAnnotations")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
    })
}

/// Waits until containerd answers, and `enough` of what it says.
pub fn wait(
    layout: &Layout,
    limit: Duration,
    enough: impl Fn(&Loaded) -> bool,
) -> Result<(), Loaded> {
    let until = Instant::now() + limit;
    loop {
        let now = loaded(layout);
        if enough(&now) {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(now);
        }
        std::thread::sleep(POLL);
    }
}

/// Runs a container of that class on the shim in that directory, a version's or the link
/// to the newest: it looks at its own locks. Then another one, which is looked at from
/// outside, as `casemate posture` does.
///
/// `by_path`: containerd is told the shim's path, else its name, as its CRI does: then it
/// is found in the daemon's own PATH, or not. What was promised and can't be seen here.
pub fn container(
    layout: &Layout,
    version: &Path,
    class: Class,
    by_path: bool,
) -> Result<Vec<String>, RunError> {
    let mut client = Client::new(&layout.address, NAMESPACE)?;
    let answers: Result<VersionResponse, Status> = client.call(
        "/containerd.services.version.v1.Version/Version",
        Empty {},
        SOON,
    );
    answers.map_err(wrong("ask containerd for its version"))?;
    let id = format!("{ID}{}", std::process::id());
    let runtime = match by_path {
        true => binaries::shim(version, class).display().to_string(),
        false => config::kind(class),
    };
    let ran = run(&mut client, version, &runtime, &id, &[]).and_then(|()| ended(&mut client, &id));
    clean(&mut client, &id);
    let status = ran?;
    if status != 0 {
        return Err(RunError::Refused(format!(
            "prove: the container of the proof says: {}",
            verdict(status)
        )));
    }
    let id = format!("{id}-posture");
    let seen = run(&mut client, version, &runtime, &id, &["--wait"])
        .and_then(|()| posture::compared(&operator::find(&id)?, casemate_posture::Depth::Whole));
    clean(&mut client, &id);
    let (_, seen) = seen?;
    match seen.deviations.as_slice() {
        [] => Ok(seen.unseen),
        [first, more @ ..] => Err(RunError::Refused(format!(
            "prove: the container of the proof isn't held as promised: {first} (and {} more)",
            more.len()
        ))),
    }
}

/// Makes and starts it.
fn run(
    client: &mut Client,
    version: &Path,
    runtime: &str,
    id: &str,
    more: &[&str],
) -> Result<(), RunError> {
    let options = Run {
        rootfs: None,
        writable: false,
        terminal: false,
        command: ["/bin/casemate", "inside-proof"]
            .iter()
            .chain(more)
            .map(|word| (*word).to_owned())
            .collect(),
    };
    let container = Container {
        id: id.to_owned(),
        runtime: Some(Runtime {
            name: runtime.to_owned(),
        }),
        spec: Some(Any {
            type_url: SPEC.to_owned(),
            value: bundle::spec(&options, id).to_string().into_bytes(),
        }),
    };
    let request = CreateContainer {
        container: Some(container),
    };
    client
        .call::<_, Empty>(
            "/containerd.services.containers.v1.Containers/Create",
            request,
            SOON,
        )
        .map_err(wrong("prove: make a container"))?;
    let request = CreateTask {
        container_id: id.to_owned(),
        rootfs: vec![root(&binaries::proof_root(version))],
    };
    client
        .call::<_, Empty>("/containerd.services.tasks.v1.Tasks/Create", request, SOON)
        .map_err(|status| match status.message().contains("not installed") {
            true => RunError::Refused(format!(
                "prove: make a sandbox: {}; containerd 1.6 finds shims in its own PATH alone: \
                 --links names a directory of it",
                one_line(status.message())
            )),
            false => wrong("prove: make a sandbox")(status),
        })?;
    let of = OfTask {
        container_id: id.to_owned(),
    };
    client
        .call::<_, Empty>("/containerd.services.tasks.v1.Tasks/Start", of, SOON)
        .map(drop)
        .map_err(wrong("prove: start a container"))
}

fn ended(client: &mut Client, id: &str) -> Result<u32, RunError> {
    let of = OfTask {
        container_id: id.to_owned(),
    };
    client
        .call::<_, WaitResponse>("/containerd.services.tasks.v1.Tasks/Wait", of, SOON)
        .map(|answer| answer.exit_status)
        .map_err(wrong("prove: wait for a container"))
}

fn root(dir: &Path) -> Mount {
    Mount {
        kind: "bind".to_owned(),
        source: dir.display().to_string(),
        options: vec!["rbind".to_owned(), "ro".to_owned()],
        ..Mount::default()
    }
}

/// Takes away what the proof of a run that was cut short has left: a sandbox of it would
/// hold on to its programs.
pub fn tidy(layout: &Layout) {
    let began_pods = pod::tidy_logs();
    let Ok(mut client) = Client::new(&layout.address, NAMESPACE) else {
        return;
    };
    // One may still be on its way to a sandbox when its installer is gone.
    let until = Instant::now() + LINGERING;
    let mut seen = began_pods.then(Instant::now);
    loop {
        let now = Instant::now();
        match remains(layout, &mut client, now > until) {
            Remains::Nothing if seen.is_none_or(|seen| now > seen + QUIET) => return,
            Remains::Nothing => {}
            Remains::Unknown => return,
            Remains::Something => seen = Some(now),
        }
        if now > until {
            return;
        }
        std::thread::sleep(POLL);
    }
}

/// What a look for the proof's containers and pods has found.
enum Remains {
    Nothing,
    /// It is being ended.
    Something,
    /// containerd doesn't answer.
    Unknown,
}

/// Ends what there is of a proof. `anyhow`: whatever may be on its way.
fn remains(layout: &Layout, client: &mut Client, anyhow: bool) -> Remains {
    let shims = || binaries::sandboxes(&layout.prefix);
    let run = |part: &str| {
        shims().iter().any(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(part)
        })
    };
    let path = "/containerd.services.containers.v1.Containers/List";
    let Ok(left) = client.call::<_, Containers>(path, Empty {}, SOON) else {
        return Remains::Unknown;
    };
    for container in &left.containers {
        end(client, &container.id);
        // Its task may be on its way yet, and without the container nobody could end it.
        if anyhow || !run(&format!("{}\0", container.id)) {
            forget(client, &container.id);
        }
    }
    // Before CRI is asked: a pod whose shim has just come up is listed by then, or seen.
    let is_made = shims().into_iter().any(pod::may_be_of_proof);
    let no_pods = pod::tidy(client);
    match left.containers.is_empty() && no_pods && !is_made && !run(ID) {
        true => Remains::Nothing,
        false => Remains::Something,
    }
}

/// Takes everything away; each fails where there is nothing.
fn clean(client: &mut Client, id: &str) {
    end(client, id);
    forget(client, id);
}

/// Ends its task.
fn end(client: &mut Client, id: &str) {
    let of = OfTask {
        container_id: id.to_owned(),
    };
    let path = "/containerd.services.tasks.v1.Tasks/Delete";
    if client.call::<_, Empty>(path, of.clone(), SOON).is_err() {
        let kill = KillTask {
            container_id: id.to_owned(),
            signal: 9,
            all: true,
        };
        let killed =
            client.call::<_, Empty>("/containerd.services.tasks.v1.Tasks/Kill", kill, SOON);
        if killed.is_ok() {
            let wait = "/containerd.services.tasks.v1.Tasks/Wait";
            let _ended = client.call::<_, WaitResponse>(wait, of.clone(), SOON);
            let _gone = client.call::<_, Empty>(path, of, SOON);
        }
    }
}

/// Takes the container away.
fn forget(client: &mut Client, id: &str) {
    let named = |name: &str| Named {
        name: name.to_owned(),
    };
    let _gone = client.call::<_, Empty>(
        "/containerd.services.containers.v1.Containers/Delete",
        named(id),
        SOON,
    );
    // Refused while anything is in it.
    let _gone = client.call::<_, Empty>(
        "/containerd.services.namespaces.v1.Namespaces/Delete",
        named(NAMESPACE),
        SOON,
    );
}

const NO_USER_NAMESPACE: i32 = 3;
const NO_FILTER: i32 = 4;
const NO_NO_NEW_PRIVS: i32 = 5;
const TOO_CAPABLE: i32 = 6;
const UNREADABLE: i32 = 7;
/// Capabilities that no container has: SYS_MODULE, SYS_ADMIN, SYS_RAWIO, SYS_PTRACE.
const NEVER: u64 = 1 << 16 | 1 << 21 | 1 << 17 | 1 << 19;

fn verdict(status: u32) -> String {
    match i32::try_from(status).unwrap_or(-1) {
        NO_USER_NAMESPACE => "its root is the host's root".to_owned(),
        NO_FILTER => "it has no system-call filter".to_owned(),
        NO_NO_NEW_PRIVS => "no_new_privs isn't set".to_owned(),
        TOO_CAPABLE => "it has capabilities that no container should".to_owned(),
        UNREADABLE => "its /proc can't be read".to_owned(),
        other => format!("exit status {other}"),
    }
}

/// What runs in the container: a look at its own locks, told by the exit status.
pub fn inside(wait: bool) -> i32 {
    if wait {
        std::thread::sleep(SOON);
    }
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    look(&map, &status)
}

fn look(map: &str, status: &str) -> i32 {
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    };
    let mut ids = map.split_whitespace().skip(1);
    match (
        ids.next(),
        field("Seccomp"),
        field("NoNewPrivs"),
        field("CapBnd"),
    ) {
        (Some("0"), ..) => NO_USER_NAMESPACE,
        (_, Some("0" | "1"), ..) => NO_FILTER,
        (_, _, Some("0"), _) => NO_NO_NEW_PRIVS,
        (Some(_), Some(_), Some(_), Some(caps)) => match u64::from_str_radix(caps, 16) {
            Ok(caps) if caps & NEVER == 0 => 0,
            Ok(_) => TOO_CAPABLE,
            Err(_) => UNREADABLE,
        },
        _ => UNREADABLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tx\nCapBnd:\t00000000000004fb\nNoNewPrivs:\t1\nSeccomp:\t2\n";
    const MAP: &str = "         0  200000      65535\n";

    #[test]
    fn each_missing_lock_is_told() {
        assert_eq!(look(MAP, STATUS), 0);
        assert_eq!(look("0 0 4294967295\n", STATUS), NO_USER_NAMESPACE);
        let without = |from: &str, to: &str| look(MAP, &STATUS.replace(from, to));
        assert_eq!(without("Seccomp:\t2", "Seccomp:\t0"), NO_FILTER);
        assert_eq!(without("NoNewPrivs:\t1", "NoNewPrivs:\t0"), NO_NO_NEW_PRIVS);
        assert_eq!(without("00000000000004fb", "000001ffffffffff"), TOO_CAPABLE);
        assert_eq!(look(MAP, ""), UNREADABLE);
        assert_eq!(look("", STATUS), UNREADABLE);
    }

    #[test]
    fn the_handler_is_found_in_what_cri_says() {
        let config = r#"{"containerd":{"runtimes":{"casemate":{"runtimeType":"t",
            "runtimePath":"/p","PodAnnotations":["casemate.io/*"],"options":null}}}}"#;
        let handler = handler_in(config, "casemate").unwrap();
        assert_eq!((handler.kind.as_str(), handler.path.as_str()), ("t", "/p"));
        assert_eq!(handler.annotations, ["casemate.io/*"]);
        assert_eq!(handler_in(config, "runc"), None);
        assert_eq!(handler_in("", "runc"), None);
    }
}

//! `start`: makes the pod's shim, or finds it, and prints its address.
//!
//! containerd reads stdout and stderr as one answer until both are closed, so
//! nothing but the answer is ever printed and nothing long-lived inherits them.

use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use casemate_spec::Class;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::shim::oci::Options;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use rustix::pipe::PipeFlags;
use rustix::thread::CoreSchedulingScope;

use super::daemon;
use super::delete;
use super::flags::Flags;
use super::proc;
use super::socket::{self, Claim};
use super::spec::Spec;
use crate::error::one_line;

/// What the server writes to the readiness pipe when it is about to serve.
pub const READY: &[u8] = b"+";

/// Most that is read from stdin.
const STDIN_MAX: u64 = 10 << 20;
/// How long the server may take to say that it is ready.
const READY_WITHIN: Duration = Duration::from_secs(5);
/// For a killed server to leave the process table.
const GONE_WITHIN: Duration = Duration::from_secs(1);

/// Runs the action. The error is the one line that containerd shows.
pub fn run(flags: &Flags, program: &str) -> Result<(), String> {
    let class = class(program)?;
    let bundle =
        std::env::current_dir().map_err(|error| format!("read the working directory: {error}"))?;
    let stdin = Stdin::parse(&read_stdin()?, flags)?;
    let spec = read_spec(&bundle)?;
    let dir = stdin.socket_dir().unwrap_or(Path::new(socket::DEFAULT_DIR));
    let group = spec.group(&flags.id);
    let path = socket::path(dir, &flags.address, &flags.namespace, group);
    let address = socket::address(&path);

    let claim =
        socket::claim(&path).map_err(|error| format!("bind {}: {error}", path.display()))?;
    let finish = || -> Result<(), String> {
        socket::write_address(&bundle, &address)
            .map_err(|error| format!("write {}/address: {error}", bundle.display()))?;
        let answer = Answer::choose(&stdin, &spec, daemon::major()).encode(&address)?;
        let mut stdout = io::stdout();
        // It is no line: nobody would hear of it, nor of an error, before the end.
        stdout
            .write_all(&answer)
            .and_then(|()| stdout.flush())
            .map_err(|error| format!("print the address: {error}"))
    };
    match claim {
        Claim::Theirs => finish(),
        Claim::Ours(listener) => {
            let pod_id = spec.pod_id(&flags.id);
            // A shim of which nobody is told (a daemon that died meanwhile
            // reads no answer) would run for ever.
            let served = spawn(flags, class, &stdin, listener, &path, pod_id)
                .and_then(|mut server| finish().inspect_err(|_| end(&mut server)));
            if served.is_err() {
                delete::undo(&bundle);
                // Nothing to be done about a socket that can't be removed:
                // the next start replaces it.
                let _stale = fs::remove_file(&path);
            }
            served
        }
    }
}

/// By the name that this was run by, as links to it have one for each class.
pub fn class(program: &str) -> Result<Class, String> {
    let name = Path::new(program).file_name().unwrap_or_default();
    Class::of_program(&name.to_string_lossy()).map_err(|class| {
        format!(
            "{program}: there is no class {class:?}: name the runtime of its handler after \
             {}, {} or {}",
            Class::Node.program(),
            Class::Strict.program(),
            Class::Compat.program()
        )
    })
}

/// What the bundle says. One without `config.json` is of the sandbox API.
fn read_spec(bundle: &Path) -> Result<Spec, String> {
    let error = match Spec::read(bundle) {
        Ok(spec) => return Ok(spec),
        Err(error) => error,
    };
    if error.kind() != io::ErrorKind::NotFound {
        return Err(error.to_string());
    }
    match crate::sandbox::has_api() {
        Ok(true) => Ok(Spec::of_sandbox_api()),
        Ok(false) => Err(format!(
            "{error}; if containerd is to make pods by its sandbox API (sandboxer = \"shim\"), \
             set sandbox.api = true in config.toml"
        )),
        Err(config) => Err(format!("{error}; {config}")),
    }
}

/// What containerd wrote to stdin, by protocol.
#[derive(Debug)]
enum Stdin {
    /// containerd 2.3 and later.
    Bootstrap(Box<BootstrapParams>),
    /// Before: runtime options, or nothing.
    Legacy(Option<Any>),
}

impl Stdin {
    /// The two messages parse as each other; only the ids tell them apart.
    fn parse(bytes: &[u8], flags: &Flags) -> Result<Stdin, String> {
        if bytes.is_empty() {
            return Ok(Stdin::Legacy(None));
        }
        let any = Any::parse_from_bytes(bytes).ok();
        if let Ok(params) = BootstrapParams::parse_from_bytes(bytes) {
            if params.instance_id == flags.id && params.namespace == flags.namespace {
                return Ok(Stdin::Bootstrap(Box::new(params)));
            }
            // Only bootstrap parameters have fields past Any's two.
            let foreign = !params.containerd_ttrpc_address.is_empty()
                || !params.containerd_grpc_address.is_empty()
                || !params.containerd_version.is_empty()
                || !params.containerd_binary.is_empty();
            if foreign || any.is_none() {
                return Err(format!(
                    "bootstrap parameters on stdin are for {:?} in namespace {:?}, the flags say {:?} in {:?}",
                    params.instance_id, params.namespace, flags.id, flags.namespace
                ));
            }
        }
        match any {
            Some(any) => Ok(Stdin::Legacy(Some(any))),
            None => Err("stdin holds neither runtime options nor bootstrap parameters".to_owned()),
        }
    }

    fn socket_dir(&self) -> Option<&Path> {
        match self {
            Stdin::Bootstrap(params) => params
                .socket_dir
                .as_deref()
                .filter(|dir| !dir.is_empty())
                .map(Path::new),
            Stdin::Legacy(_) => None,
        }
    }

    /// The cgroup that runc's options want the shim in.
    fn shim_cgroup(&self) -> Option<String> {
        let options = match self {
            Stdin::Legacy(any) => any.as_ref(),
            Stdin::Bootstrap(params) => params
                .extensions
                .iter()
                .filter_map(|extension| extension.value.as_ref())
                .find(|any| is_runc_options(any)),
        };
        let options = options.filter(|any| is_runc_options(any))?;
        let options = Options::parse_from_bytes(&options.value).ok()?;
        Some(options.shim_cgroup).filter(|path| !path.is_empty())
    }

    fn wants_debug(&self) -> bool {
        matches!(self, Stdin::Bootstrap(params) if params.log_level.value() < 0)
    }

    fn events_address(&self) -> String {
        let given = match self {
            Stdin::Bootstrap(params) => params.containerd_ttrpc_address.as_str(),
            Stdin::Legacy(_) => "",
        };
        if given.is_empty() {
            std::env::var("TTRPC_ADDRESS").unwrap_or_default()
        } else {
            given.to_owned()
        }
    }
}

/// Whether this is `containerd.runc.v1.Options`.
pub fn is_runc_options(any: &Any) -> bool {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    name == "containerd.runc.v1.Options"
}

/// The three forms in which the address is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Protobuf,
    Json,
    Bare,
}

impl Answer {
    /// For a daemon of this major version, if that is known; otherwise the
    /// specification tells, as far as it can.
    fn choose(stdin: &Stdin, spec: &Spec, major: Option<u32>) -> Answer {
        match (stdin, major) {
            (Stdin::Bootstrap(_), _) => Answer::Protobuf,
            (Stdin::Legacy(_), Some(0..2)) => Answer::Bare,
            (Stdin::Legacy(_), Some(_)) => Answer::Json,
            (Stdin::Legacy(_), None) if spec.is_from_containerd_2() => Answer::Json,
            (Stdin::Legacy(_), None) => Answer::Bare,
        }
    }

    fn encode(self, address: &str) -> Result<Vec<u8>, String> {
        match self {
            Answer::Bare => Ok(address.as_bytes().to_vec()),
            Answer::Json => serde_json::to_vec(&serde_json::json!({
                "version": 3, "address": address, "protocol": "ttrpc"
            }))
            .map_err(|error| format!("encode the answer: {error}")),
            Answer::Protobuf => BootstrapResult {
                version: 3,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..BootstrapResult::default()
            }
            .write_to_bytes()
            .map_err(|error| format!("encode the answer: {error}")),
        }
    }
}

fn read_stdin() -> Result<Vec<u8>, String> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(Vec::new());
    }
    let mut bytes = Vec::new();
    match stdin.lock().take(STDIN_MAX + 1).read_to_end(&mut bytes) {
        // A closed descriptor is an empty one.
        Err(error) if error.raw_os_error() != Some(libc::EBADF) => {
            Err(format!("read stdin: {error}"))
        }
        _ if bytes.len() as u64 > STDIN_MAX => {
            Err(format!("stdin holds more than {STDIN_MAX} bytes"))
        }
        _ => Ok(bytes),
    }
}

/// Starts the server and waits until it is ready. Score, cgroup and core
/// cookie are set on this process, so that the server is born with them.
fn spawn(
    flags: &Flags,
    class: Class,
    stdin: &Stdin,
    listener: UnixListener,
    path: &Path,
    pod_id: &str,
) -> Result<std::process::Child, String> {
    prepare_self(stdin)?;
    // What our caller forgot to close must not live as long as the shim.
    casemate_sys::exec::close_from_on_exec(3)
        .map_err(|error| format!("close inherited descriptors: {error}"))?;
    let (ready, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(|error| format!("make the readiness pipe: {error}"))?;
    let binary = std::env::current_exe().map_err(|error| format!("find this program: {error}"))?;
    let mut command = Command::new(binary);
    command
        .arg("-namespace")
        .arg(&flags.namespace)
        .arg("-id")
        .arg(pod_id)
        .arg("-socket")
        .arg(path)
        .arg("-events")
        .arg(stdin.events_address())
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::from(write))
        .stderr(Stdio::null());
    if class != Class::Node {
        command.arg("-class").arg(class.name());
    }
    if flags.debug || stdin.wants_debug() {
        command.arg("-debug");
    }
    let mut server = command
        .arg("serve")
        .spawn()
        .map_err(|error| format!("run the shim's server: {error}"))?;
    // Our copies of its descriptors: EOF must come when it goes.
    drop(command);
    match await_ready(ready) {
        Ok(()) => Ok(server),
        Err(error) => {
            end(&mut server);
            Err(error)
        }
    }
}

fn end(server: &mut std::process::Child) {
    // It fails only if it has gone already.
    let _gone = server.kill();
    let until = Instant::now() + GONE_WITHIN;
    while matches!(server.try_wait(), Ok(None)) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn await_ready(ready: OwnedFd) -> Result<(), String> {
    match proc::poll_in(&ready, READY_WITHIN) {
        Ok(true) => {}
        Ok(false) => return Err(format!("the shim was not ready within {READY_WITHIN:?}")),
        Err(error) => return Err(format!("wait for the shim: {error}")),
    }
    let mut said = Vec::new();
    fs::File::from(ready)
        .take(4096)
        .read_to_end(&mut said)
        .map_err(|error| format!("read the shim's readiness: {error}"))?;
    match said.as_slice() {
        READY => Ok(()),
        [] => Err("the shim ended before it was ready: see the kernel log".to_owned()),
        text => Err(one_line(&String::from_utf8_lossy(text))),
    }
}

fn prepare_self(stdin: &Stdin) -> Result<(), String> {
    if std::env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty()) {
        rustix::thread::create_core_scheduling_cookie(
            rustix::process::getpid(),
            CoreSchedulingScope::ProcessGroup,
        )
        .map_err(|error| {
            format!("SCHED_CORE is set, but this kernel gives no core scheduling cookie: {error}")
        })?;
    }
    if let Some(cgroup) = stdin.shim_cgroup() {
        join_cgroup(&cgroup)?;
    }
    adjust_oom_score()
}

/// The parent's score and one more, so that the shim goes before the daemon.
fn adjust_oom_score() -> Result<(), String> {
    let Some(parent) = rustix::process::getppid() else {
        return Ok(());
    };
    let path = format!("/proc/{}/oom_score_adj", parent.as_raw_nonzero());
    let text = fs::read_to_string(&path).map_err(|error| format!("read {path}: {error}"))?;
    let score: i32 = text
        .trim()
        .parse()
        .map_err(|error| format!("parse {path} {text:?}: {error}"))?;
    fs::write(
        "/proc/self/oom_score_adj",
        (score + 1).min(1000).to_string(),
    )
    .map_err(|error| format!("write /proc/self/oom_score_adj: {error}"))
}

/// Moves this process into the cgroup of the runtime options, in every
/// hierarchy that has a controller, making it where it isn't there.
fn join_cgroup(path: &str) -> Result<(), String> {
    let relative = path.trim_start_matches('/');
    if relative.split('/').any(|part| part == "..") {
        return Err(format!("shim_cgroup {path:?} must not contain \"..\""));
    }
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies: Vec<PathBuf> = if root.join("cgroup.controllers").exists() {
        vec![root.to_path_buf()]
    } else {
        let entries =
            fs::read_dir(root).map_err(|error| format!("read {}: {error}", root.display()))?;
        entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .filter(|hierarchy| hierarchy.join("cgroup.procs").exists())
            .collect()
    };
    for hierarchy in hierarchies {
        let dir = hierarchy.join(relative);
        fs::create_dir_all(&dir)
            .and_then(|()| inherit_cpuset(&hierarchy, relative))
            .and_then(|()| fs::write(dir.join("cgroup.procs"), "0"))
            .map_err(|error| format!("join shim_cgroup {}: {error}", dir.display()))?;
    }
    Ok(())
}

/// A new v1 cpuset takes no process before it has cpus and memory nodes.
fn inherit_cpuset(hierarchy: &Path, relative: &str) -> io::Result<()> {
    let mut dir = hierarchy.to_path_buf();
    for part in relative.split('/').filter(|part| !part.is_empty()) {
        let parent = dir.clone();
        dir.push(part);
        for name in ["cpuset.cpus", "cpuset.mems"] {
            let file = dir.join(name);
            let is_v1 = hierarchy.join("cgroup.clone_children").exists();
            if is_v1 && file.exists() && fs::read_to_string(&file)?.trim().is_empty() {
                fs::write(&file, fs::read(parent.join(name))?)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags {
            id: "i".into(),
            namespace: "n".into(),
            ..Flags::default()
        }
    }

    fn params(id: &str) -> Vec<u8> {
        BootstrapParams {
            instance_id: id.into(),
            namespace: "n".into(),
            containerd_version: "v2.3.4".into(),
            socket_dir: Some("/s".into()),
            ..BootstrapParams::default()
        }
        .write_to_bytes()
        .unwrap()
    }

    fn options(value: Vec<u8>) -> Vec<u8> {
        Any {
            type_url: "containerd.runc.v1.Options".into(),
            value,
            ..Any::default()
        }
        .write_to_bytes()
        .unwrap()
    }

    #[test]
    fn bootstrap_parameters_are_ours_only_with_our_id_and_namespace() {
        let ours = Stdin::parse(&params("i"), &flags()).unwrap();
        assert!(matches!(ours, Stdin::Bootstrap(_)));
        assert_eq!(ours.socket_dir(), Some(Path::new("/s")));
        let error = Stdin::parse(&params("other"), &flags()).unwrap_err();
        assert!(error.contains("other"), "{error}");
    }

    #[test]
    fn runtime_options_are_legacy_also_when_empty() {
        let cgroup = Options {
            shim_cgroup: "/pods".into(),
            ..Options::default()
        };
        let given = options(cgroup.write_to_bytes().unwrap());
        let legacy = Stdin::parse(&given, &flags()).unwrap();
        assert!(matches!(legacy, Stdin::Legacy(Some(_))));
        assert_eq!(legacy.shim_cgroup().as_deref(), Some("/pods"));
        let empty = Stdin::parse(&options(Vec::new()), &flags()).unwrap();
        assert!(matches!(empty, Stdin::Legacy(Some(_))));
        assert_eq!(empty.shim_cgroup(), None);
        let none = Stdin::parse(&[], &flags()).unwrap();
        assert!(matches!(none, Stdin::Legacy(None)));
        assert!(Stdin::parse(&[0xff; 9], &flags()).is_err());
    }

    #[test]
    fn each_daemon_gets_the_answer_that_it_parses() {
        let spec = |version: &str| -> Spec {
            serde_json::from_str(&format!(r#"{{"ociVersion":"{version}"}}"#)).unwrap()
        };
        let legacy = Stdin::Legacy(None);
        let choose =
            |stdin: &Stdin, version: &str, major| Answer::choose(stdin, &spec(version), major);
        assert_eq!(choose(&legacy, "1.2.0", None), Answer::Json);
        assert_eq!(choose(&legacy, "1.1.0", None), Answer::Bare);
        assert_eq!(choose(&legacy, "1.0.2-dev", None), Answer::Bare);
        // 1.7 built with newer libraries, and 2.x with a foreign specification.
        assert_eq!(choose(&legacy, "1.2.1", Some(1)), Answer::Bare);
        assert_eq!(choose(&legacy, "1.0.2", Some(2)), Answer::Json);
        let bootstrap = Stdin::parse(&params("i"), &flags()).unwrap();
        assert_eq!(choose(&bootstrap, "1.3.0", None), Answer::Protobuf);

        assert_eq!(Answer::Bare.encode("unix:///a").unwrap(), b"unix:///a");
        let json: serde_json::Value =
            serde_json::from_slice(&Answer::Json.encode("unix:///a").unwrap()).unwrap();
        assert_eq!(json["version"], 3);
        assert_eq!(json["address"], "unix:///a");
        assert_eq!(json["protocol"], "ttrpc");
        let bytes = Answer::Protobuf.encode("unix:///a").unwrap();
        let result = BootstrapResult::parse_from_bytes(&bytes).unwrap();
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    }
}

//! The server: descriptor 0 is the listening socket, descriptor 1 tells
//! `start` that we are ready, or in one line why we are not.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use casemate_spec::Class;
use futures::{Stream, StreamExt};
use rustix::fs::{Mode, OFlags};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use super::flags::Flags;
use super::journal::{Entry, Journal};
use super::proc;
use super::registry;
use super::spec::{CONFIG, Spec};
use super::start::READY;
use crate::error::one_line;
use crate::events::{Events, socket_path};
use crate::host::descriptors;
use crate::pod::Pod;
use crate::pod::life::Life;
use crate::sandbox::{self, Origin};
use crate::service;

/// How long events may still be handed over before the shim ends.
const DRAIN: Duration = Duration::from_secs(5);
/// containerd asks for a container as soon as `start` has answered, and for the
/// shim's end after the last one. A shim without any by then is one that nobody
/// knows of: its `start` or its daemon was killed. (1.6 connects to what its
/// predecessor left, and no more.)
const WANTED_WITHIN: Duration = Duration::from_secs(30);
/// For the reply to Shutdown to leave: the one thread runs all that is ready,
/// the connection's writer among it, before it looks at timers.
const LAST_REPLY: Duration = Duration::from_millis(1);
/// For containerd to look at the answer to ShutdownSandbox: if the connection has ended
/// by then, its client (ttrpc's `dispatch`) takes either for what came, at random, and
/// the pod's removal fails. Of Shutdown it takes both.
const LAST_ANSWER: Duration = Duration::from_millis(50);

/// Serves until the last container is gone and Shutdown was asked for.
pub fn run(flags: &Flags) -> Result<(), String> {
    let mut ready = duplicate(io::stdout().as_fd()).map(File::from)?;
    let prepared = prepare(flags);
    let told = match &prepared {
        Ok(_) => ready.write_all(READY),
        Err(error) => ready.write_all(one_line(error).as_bytes()),
    };
    drop(ready);
    let prepared = prepared?;
    if let Err(error) = told {
        // Nobody knows of this shim, or ever will.
        remove_socket(&prepared.socket);
        remove_entry(&prepared.registry);
        return Err(format!("tell start that the shim is ready: {error}"));
    }

    let registry = prepared.registry.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|error| format!("make the event loop: {error}"))?;
    let socket = prepared.socket.clone();
    let served = runtime.block_on(serve(prepared));
    if let Err(error) = &served {
        log::error!("{error}");
    }
    remove_socket(&socket);
    remove_entry(&registry);
    served
}

fn remove_entry(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("remove {}: {error}", path.display());
    }
}

fn remove_socket(socket: &Path) {
    if let Err(error) = std::fs::remove_file(socket) {
        log::warn!("remove {}: {error}", socket.display());
    }
}

struct Prepared {
    listener: StdListener,
    socket: PathBuf,
    registry: PathBuf,
    bundle: PathBuf,
    journal: Arc<Journal>,
    events: PathBuf,
    namespace: String,
    pod_id: String,
}

/// Everything that can fail before anybody connects.
fn prepare(flags: &Flags) -> Result<Prepared, String> {
    let listener = duplicate(io::stdin().as_fd()).map(StdListener::from)?;
    let class = Class::of(&flags.class)
        .ok_or_else(|| format!("-class {:?}: there is no such class", flags.class))?;
    sandbox::set_class(class);
    leave_start_behind()?;
    let bundle =
        std::env::current_dir().map_err(|error| format!("read the working directory: {error}"))?;
    crate::log::init(&bundle, flags.debug);
    if let Err(error) = descriptors::raise_limit() {
        log::warn!("raise the limit of open files: {error}: left as it is");
    }
    let events = socket_path(&flags.events)?;
    let journal = Journal::open(&bundle)
        .map_err(|error| format!("open the journal in {}: {error}", bundle.display()))?;
    let pid = std::process::id();
    let start_time =
        proc::start_time(pid).ok_or_else(|| "read our own start time from /proc".to_owned())?;
    let socket = PathBuf::from(&flags.socket);
    let registry = registry::path(&flags.id, &socket);
    for entry in [
        Entry::Shim { pid, start_time },
        Entry::Socket(socket.clone()),
        Entry::Registry(registry.clone()),
    ] {
        journal
            .record(entry)
            .map_err(|error| format!("write the journal in {}: {error}", bundle.display()))?;
    }
    let entry = registry::Pod {
        namespace: flags.namespace.clone(),
        pod: flags.id.clone(),
        kubernetes: Spec::read(&bundle).ok().and_then(|spec| spec.kubernetes()),
        bundle: bundle.clone(),
        shim: pid,
        start_time,
        socket: socket.clone(),
        since: crate::log::rfc3339(SystemTime::now()),
    };
    // A pod that no operator finds by name is a pod nevertheless.
    if let Err(error) = entry.write(&registry) {
        log::warn!("write {}: {error}", registry.display());
    }
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|error| format!("become the subreaper: {error}"))?;
    listener
        .set_nonblocking(true)
        .map_err(|error| format!("prepare the listening socket: {error}"))?;
    Ok(Prepared {
        listener,
        socket,
        registry,
        bundle,
        journal: Arc::new(journal),
        events,
        namespace: flags.namespace.clone(),
        pod_id: flags.id.clone(),
    })
}

/// A session of our own, and none of the descriptors of `start`.
fn leave_start_behind() -> Result<(), String> {
    rustix::process::setsid().map_err(|error| format!("make a session: {error}"))?;
    let null = null().map_err(|error| format!("open /dev/null: {error}"))?;
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .and_then(|()| rustix::stdio::dup2_stderr(&null))
        .map_err(|error| format!("point standard descriptors to /dev/null: {error}"))
}

fn duplicate(fd: std::os::fd::BorrowedFd<'_>) -> Result<std::os::fd::OwnedFd, String> {
    fd.try_clone_to_owned().map_err(|error| {
        format!("take over an inherited descriptor (serve is run by start only): {error}")
    })
}

async fn serve(prepared: Prepared) -> Result<(), String> {
    let events = Events::new(&prepared.namespace);
    let has_spec = prepared.bundle.join(CONFIG).exists();
    let pod = Pod::new(
        prepared.pod_id.clone(),
        prepared.bundle,
        events.clone(),
        prepared.journal,
    );
    // Before anything is accepted: the agent starts while containerd connects.
    // Without a specification CreateSandbox says how, later.
    if has_spec && let Err(error) = pod.make_sandbox(Origin::Bundle) {
        log::error!("pod {}: {error}", prepared.pod_id);
        // Told at every Create.
        pod.give_up(error);
    }

    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| format!("watch SIGTERM: {error}"))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(|error| format!("watch SIGINT: {error}"))?;
    let listener = UnixListener::from_std(prepared.listener)
        .map_err(|error| format!("watch the listening socket: {error}"))?;
    // ttrpc panics at its end when this stream can end.
    let connections = connections(listener).chain(futures::stream::pending());
    let mut server = Server::new()
        .register_service(service::services(pod.clone(), sandbox::has_api()))
        .add_listener(Listener::new(connections));
    server
        .start()
        .await
        .map_err(|error| format!("serve ttrpc: {error}"))?;
    tokio::spawn(events.clone().run(prepared.events));
    log::debug!("pod {}: serving", prepared.pod_id);

    tokio::select! {
        () = pod.may_leave() => {}
        () = pod.unused_for(WANTED_WITHIN) => {
            log::warn!("pod {}: nobody wants a container: leaving", prepared.pod_id);
        }
        _ = terminate.recv() => pod.end_all().await,
        _ = interrupt.recv() => pod.end_all().await,
    }
    tokio::time::sleep(LAST_REPLY).await;
    pod.stop_sandbox().await;
    events.drain(DRAIN).await;
    if pod.life() != Life::Awaited {
        tokio::time::sleep(LAST_ANSWER).await;
    }
    log::debug!("pod {}: done", prepared.pod_id);
    Ok(())
}

/// Accepted connections of our own user; anybody else is hung up on.
fn connections(listener: UnixListener) -> impl Stream<Item = io::Result<UnixStream>> + Send {
    // Given up for a moment where none is left: who connects is then hung up on,
    // and doesn't wait for an answer that nobody will give.
    let spare = null().ok();
    futures::stream::unfold((listener, spare), |(listener, mut spare)| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) if is_same_user(&stream) => {
                    return Some((Ok(stream), (listener, spare)));
                }
                Ok(_) => log::warn!("connection of another user refused"),
                Err(error) if spare.take().is_some() => {
                    log::error!("accept: {error}: hung up");
                    drop(listener.accept().await);
                    spare = null().ok();
                }
                Err(error) => {
                    log::error!("accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    spare = null().ok();
                }
            }
        }
    })
}

fn null() -> rustix::io::Result<std::os::fd::OwnedFd> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

fn is_same_user(stream: &UnixStream) -> bool {
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == rustix::process::geteuid().as_raw())
}

//! Create, Start, Exec, Delete, Shutdown.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    ExecProcessRequest, ShutdownRequest, StartRequest, StartResponse,
};
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskIO};
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::topics;
use protobuf::{Message, MessageField};

use super::exec_record;
use crate::bootstrap::delete::POD_LINK;
use crate::bootstrap::journal::Entry;
use crate::bootstrap::spec::Spec;
use crate::bootstrap::start::is_runc_options;
use crate::error::ShimError;
use crate::events::timestamp;
use crate::host::descriptors::{Need, Room};
use crate::io::{Owner, Paths, Source, Streams};
use crate::pod::process::{Exited, Process};
use crate::pod::state::Phase;
use crate::pod::task::{KILLED, Kind, Task};
use crate::pod::{Pod, Reservation};
use crate::sandbox::{ContainerRequest, RootfsMount, Sandbox};

/// How long Delete waits for output that somebody holds or doesn't read.
const DRAIN: Duration = Duration::from_secs(10);
/// How long Delete waits for a parked init that it has killed.
const KILLED_WITHIN: Duration = Duration::from_millis(600);
/// How long exits of containers may take that end with the pause.
const PAUSE_LAST: Duration = Duration::from_millis(300);

/// Makes a container with its init parked before exec.
pub async fn create(
    pod: Arc<Pod>,
    request: CreateTaskRequest,
) -> Result<CreateTaskResponse, ShimError> {
    if !request.checkpoint.is_empty() {
        return Err(ShimError::Unimplemented(format!(
            "create container {:?} from checkpoint {:?}: restoring is not supported",
            request.id, request.checkpoint
        )));
    }
    let reservation = pod.reserve(&request.id)?;
    let bundle = PathBuf::from(&request.bundle);
    let spec = Spec::read(&bundle).map_err(|error| {
        ShimError::InvalidArgument(format!("create container {:?}: {error}", request.id))
    })?;
    // Before the work: a pod that can't be is refused at once.
    let sandbox = pod.sandbox()?;
    let _room = Room::keep(Need::Container).map_err(|error| {
        ShimError::Unknown(format!("create container {:?}: {error}", request.id))
    })?;
    write_down(&pod, &request.id, &bundle)?;
    let paths = paths(&request);

    let made = if spec.is_pause() {
        pause(&sandbox, &spec, &request.id, paths).await
    } else {
        make(&pod, &sandbox, &request, &bundle, paths).await
    };
    let made = match made {
        Ok((kind, init)) => match pod.unwanted(&request.id) {
            Some(why) => {
                if let Kind::Real(container) = kind {
                    container.destroy().await;
                }
                let text = format!("create container {:?}: {why}", request.id);
                Err(ShimError::Unavailable(text))
            }
            None => Ok((kind, init)),
        },
        Err(error) => Err(error),
    };
    let (kind, init) = match made {
        Ok(made) => made,
        Err(error) => {
            if !sandbox.is_left_behind(&request.id)
                && let Err(error) = pod.journal.record(Entry::Removed(request.id.clone()))
            {
                log::warn!(
                    "container {}: write its removal to the journal: {error}",
                    request.id
                );
            }
            return Err(error);
        }
    };
    let pid = init.facts().pid;
    let task = Arc::new(Task::new(
        &request.id,
        bundle,
        kind,
        init,
        spec.has_private_pids(),
        &pod,
    ));
    created(&pod, reservation, task, request, pid);
    Ok(CreateTaskResponse {
        pid,
        ..CreateTaskResponse::default()
    })
}

/// Enters a made container; its first event precedes any exit.
fn created(
    pod: &Arc<Pod>,
    reservation: Reservation,
    task: Arc<Task>,
    request: CreateTaskRequest,
    pid: u32,
) {
    reservation.enter(task.clone());
    pod.events.push(
        topics::TASK_CREATE_EVENT_TOPIC,
        &TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..TaskIO::default()
            }),
            pid,
            ..TaskCreate::default()
        },
    );
    match task.container() {
        Some(_) => {
            tokio::spawn(task.clone().reap());
            task.watch_end(&task.init);
        }
        None => drop(tokio::spawn(follow_pause(pod.clone(), task.clone()))),
    }
    if pod.sandbox().is_err() {
        // Lost while it was made: nobody else will end it.
        tokio::spawn(async move { task.abandon_within(Duration::from_millis(300)).await });
    }
}

/// The pause may be killed from outside (by the host's OOM killer, say). Those
/// who share its pid namespace end with it, and first.
async fn follow_pause(pod: Arc<Pod>, task: Arc<Task>) {
    if let Ok(sandbox) = pod.sandbox() {
        sandbox.pause_ended().await;
        drop(sandbox);
        tokio::time::sleep(PAUSE_LAST).await;
        task.end_pause(KILLED);
    }
}

/// What `delete` must know, on disk before the first effect.
fn write_down(pod: &Pod, id: &str, bundle: &Path) -> Result<(), ShimError> {
    let failed = |what: &str, error: std::io::Error| {
        ShimError::Unknown(format!("create container {id:?}: {what}: {error}"))
    };
    if bundle != pod.bundle {
        let link = bundle.join(POD_LINK);
        match std::os::unix::fs::symlink(&pod.bundle, &link) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(failed(&format!("link {}", link.display()), error));
            }
            _ => {}
        }
    }
    pod.journal
        .record(Entry::Container {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
        })
        .map_err(|error| failed("write the journal", error))
}

/// Of CRI's sandbox container nothing but namespaces is wanted: the pod's pause
/// has them all.
async fn pause(
    sandbox: &Sandbox,
    spec: &Spec,
    id: &str,
    paths: Paths,
) -> Result<(Kind, Process), ShimError> {
    if !spec.has_private_pids() {
        return Err(ShimError::InvalidArgument(format!(
            "create container {id:?}: linux.namespaces[type=pid] has a path; a pod's sandbox \
             container gets a new pid namespace, for others to join"
        )));
    }
    let pid = sandbox.pause().await?;
    Ok((Kind::Pause, Process::pause(paths, pid)))
}

async fn make(
    pod: &Pod,
    sandbox: &Sandbox,
    request: &CreateTaskRequest,
    bundle: &Path,
    paths: Paths,
) -> Result<(Kind, Process), ShimError> {
    let owner = owner(request);
    let source = Source {
        container: &request.id,
        id: &request.id,
        namespace: pod.events.namespace(),
        journal: &pod.journal,
    };
    let (stdio, streams) = Streams::open(&paths, source, owner, false).await?;
    let (container, mut spawned) = sandbox
        .create(ContainerRequest {
            id: request.id.clone(),
            bundle: bundle.to_owned(),
            rootfs: request.rootfs.iter().map(rootfs_mount).collect(),
            stdio,
        })
        .await?;
    let master = spawned.pty.take();
    if let Err(error) = streams.attach(master) {
        container.destroy().await;
        return Err(error);
    }
    let init = Process::init(paths, owner, spawned, Arc::new(streams));
    Ok((Kind::Real(container), init))
}

fn paths(request: &CreateTaskRequest) -> Paths {
    Paths {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    }
}

fn rootfs_mount(mount: &containerd_shim_protos::types::mount::Mount) -> RootfsMount {
    RootfsMount {
        fstype: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

/// `io_uid` and `io_gid` of runc's options; other options say nothing of it.
fn owner(request: &CreateTaskRequest) -> Option<Owner> {
    let any = request
        .options
        .as_ref()
        .filter(|any| is_runc_options(any))?;
    let options = Options::parse_from_bytes(&any.value).ok()?;
    (options.io_uid != 0 || options.io_gid != 0).then_some(Owner {
        uid: options.io_uid,
        gid: options.io_gid,
    })
}

/// Starts init, or an exec.
pub async fn start(pod: Arc<Pod>, request: StartRequest) -> Result<StartResponse, ShimError> {
    let task = pod.task(&request.id)?;
    let pid = if request.exec_id.is_empty() {
        let _turn = task.turn.lock().await;
        task.start_init().await?
    } else {
        start_exec(&pod, &task, &request.exec_id).await?
    };
    Ok(StartResponse {
        pid,
        ..StartResponse::default()
    })
}

async fn start_exec(pod: &Pod, task: &Arc<Task>, exec_id: &str) -> Result<u32, ShimError> {
    let process = task.process(exec_id)?;
    let _room = Room::keep(Need::Exec)
        .map_err(|error| ShimError::Unknown(format!("start exec {exec_id:?}: {error}")))?;
    task.claim_exec(&process)?;
    let stdin_closed = process.facts().stdin_closed;
    let source = Source {
        container: &task.id,
        id: exec_id,
        namespace: pod.events.namespace(),
        journal: &pod.journal,
    };
    let opened = Streams::open(&process.paths, source, process.owner, stdin_closed);
    let (stdio, streams) = match opened.await {
        Ok(opened) => opened,
        Err(error) => {
            task.exec_failed(&process);
            return Err(error);
        }
    };
    let streams = Arc::new(streams);
    let pid = task.start_exec(&process, stdio, streams).await?;
    exec_record::keep(pod, task, &process);
    Ok(pid)
}

/// Registers an exec.
pub async fn exec(pod: Arc<Pod>, request: ExecProcessRequest) -> Result<Empty, ShimError> {
    let task = pod.task(&request.id)?;
    if request.exec_id.is_empty() {
        return Err(ShimError::InvalidArgument(format!(
            "exec in container {:?}: exec_id is empty",
            request.id
        )));
    }
    if task.container().is_none() {
        return Err(ShimError::FailedPrecondition(format!(
            "exec {:?}: nothing runs in the sandbox container {:?}",
            request.exec_id, request.id
        )));
    }
    let spec = request.spec.into_option().map(|any| any.value);
    let spec = spec.filter(|spec| !spec.is_empty()).ok_or_else(|| {
        ShimError::InvalidArgument(format!("exec {:?}: spec is empty", request.exec_id))
    })?;
    let paths = Paths {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
    };
    let process = Process::exec(&request.exec_id, paths, spec, task.init.owner);
    task.add_exec(process)?;
    pod.events.push(
        topics::TASK_EXEC_ADDED_EVENT_TOPIC,
        &TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..TaskExecAdded::default()
        },
    );
    Ok(Empty::new())
}

/// Removes what has stopped, or was never started. One whose Create is under way is
/// waited for, or undone by it: containerd deletes what it has given up, and in a pod
/// with other containers nobody else would.
pub async fn delete(pod: Arc<Pod>, request: DeleteRequest) -> Result<DeleteResponse, ShimError> {
    if !request.exec_id.is_empty() {
        let task = pod.task_soon(&request.id).await?;
        return delete_exec(&task, &request.exec_id).await;
    }
    let task = pod.task_to_delete(&request.id).await?;
    // Before the turn: a Start that waits for its answer has it.
    refuse_running(&task)?;
    let _turn = task.turn.lock().await;
    // Another Delete may have had its turn before.
    pod.task(&request.id)?;
    refuse_running(&task)?;
    if task.init.facts().phase == Phase::Created {
        end_parked(&task).await;
    }
    // First the container: whoever of it still holds the output goes with it.
    if let Some(container) = task.container() {
        container.destroy().await;
    }
    let mut streams: Vec<_> = task.execs().iter().filter_map(|p| p.streams()).collect();
    streams.extend(task.init.streams());
    futures::future::join_all(streams.iter().map(|streams| streams.drain(DRAIN))).await;
    let pid = task.init.facts().pid;
    let exited = task.init.exited().unwrap_or_else(|| Exited::now(KILLED));
    pod.events.push(
        topics::TASK_DELETE_EVENT_TOPIC,
        &TaskDelete {
            container_id: task.id.clone(),
            pid,
            exit_status: exited.status,
            exited_at: MessageField::some(timestamp(exited.at)),
            ..TaskDelete::default()
        },
    );
    pod.remove(&task);
    Ok(answer(pid, exited))
}

fn refuse_running(task: &Task) -> Result<(), ShimError> {
    let phase = task.init.facts().phase;
    match phase {
        Phase::Stopped | Phase::Created => Ok(()),
        Phase::Added | Phase::Opening | Phase::Starting | Phase::Running => {
            Err(ShimError::FailedPrecondition(format!(
                "delete container {:?}: cannot delete a {} process",
                task.id,
                phase.name()
            )))
        }
    }
}

/// A parked init is killed; its exit is awaited so that events keep their order.
async fn end_parked(task: &Arc<Task>) {
    match task.container() {
        None => task.end_pause(KILLED),
        Some(_) => {
            // It may have gone by itself this moment.
            let _gone = task.init.signal(libc::SIGKILL);
            task.insist();
            let ended = tokio::time::timeout(KILLED_WITHIN, task.init.wait());
            if ended.await.is_err() {
                task.abandon();
            }
        }
    }
}

async fn delete_exec(task: &Task, exec_id: &str) -> Result<DeleteResponse, ShimError> {
    let process = task.process(exec_id)?;
    let (phase, pid) = {
        let mut facts = process.facts();
        let phase = facts.phase;
        if phase == Phase::Added {
            // No Start may find it any more.
            facts.phase = Phase::Stopped;
        }
        (phase, facts.pid)
    };
    if phase == Phase::Added {
        process.finish(Exited::now(0));
    }
    if matches!(phase, Phase::Opening | Phase::Starting | Phase::Running) {
        return Err(ShimError::FailedPrecondition(format!(
            "delete exec {exec_id:?} of container {:?}: cannot delete a running process",
            task.id
        )));
    }
    if let Some(streams) = process.streams() {
        streams.drain(DRAIN).await;
    }
    let exited = process.exited().unwrap_or_else(|| Exited::now(0));
    task.remove_exec(exec_id);
    Ok(answer(pid, exited))
}

fn answer(pid: u32, exited: Exited) -> DeleteResponse {
    DeleteResponse {
        pid,
        exit_status: exited.status,
        exited_at: MessageField::some(timestamp(exited.at)),
        ..DeleteResponse::default()
    }
}

/// Ends the shim, now or after its last container.
pub fn shutdown(pod: &Pod, request: &ShutdownRequest) {
    log::debug!("shutdown asked for by {}", request.id);
    pod.shutdown();
}

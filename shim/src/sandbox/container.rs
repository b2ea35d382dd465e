//! A container: prepared on the host, assembled by the agent, driven through
//! its forker.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use casemate_cgroup::{Attach, Cgroup};
use casemate_protocol::plan::ProcessPlan;
use casemate_protocol::{Channel, INIT_KEY, ToAgent, ToForker, seal_plan};
use casemate_spec::{Config, HookSpec, Tightened};
use casemate_sys::{message, process};
use rustix::fs::{Mode, OFlags};

use super::filters::Filters;
use super::forker::{Forker, Reply, out_of_turn};
use super::inherited::{process_plan, set_oom_score};
use super::learner::Learner;
use super::leftovers::Leftovers;
use super::pipes::give_pipe;
use super::{
    ChildStdio, ContainerRequest, Exit, KILL, Sandbox, SandboxError, Spawned, cgroup_error,
    read_spec, record,
};
use super::{hooks, mounts, namespaces, place, users, verify};
use crate::bootstrap::journal::{Entry, Journal};
use crate::host::Step;
use crate::host::hooks::Runner;
use crate::host::scope::Holder;
use crate::host::sources::{self, Sources};
use crate::host::staging::Staging;
use crate::plan;

/// When a start is over and its code won't be needed for a while.
const SETTLED: Duration = Duration::from_millis(200);

/// How long the kernel may take to empty a cgroup whose processes were killed.
/// What is busy for longer is left to the end of the pod, and to `delete`.
const EMPTY_WITHIN: Duration = Duration::from_millis(600);

/// One container of the pod.
pub struct Container {
    pub(super) id: String,
    pub(super) spec: Tightened,
    pub(super) config: Config,
    pub(super) filters: Filters,
    forker: Forker,
    pub(super) forker_pid: u32,
    forker_pidfd: OwnedFd,
    init: OwnedFd,
    pub(super) cgroup: Cgroup,
    staging: Arc<Staging>,
    directory: String,
    journal: Arc<Journal>,
    next_key: AtomicU32,
    /// Host id of the container's root.
    pub(super) container_root: u32,
    bundle: PathBuf,
    /// Host pid of init.
    pub(super) init_pid: u32,
    runner: Option<Arc<Runner>>,
    hooks: hooks::Inside,
    /// The last hooks have had their turn.
    stopped: AtomicBool,
    /// Nothing of it is left on the host.
    gone: AtomicBool,
    leftovers: Arc<Leftovers>,
    /// Writes its calls down, where it is learned from.
    learner: Option<Learner>,
}

/// Undoes what a failed create has made.
struct Undo<'a> {
    cgroup: &'a Cgroup,
    staging: &'a Staging,
    directory: &'a str,
}

impl Undo<'_> {
    async fn run(&self) -> bool {
        clean(self.cgroup, self.staging, self.directory).await
    }
}

/// True if nothing is left.
async fn clean(cgroup: &Cgroup, staging: &Staging, directory: &str) -> bool {
    if cgroup.pids().map_or(true, |pids| !pids.is_empty())
        && let Err(e) = cgroup.kill(KILL, &[])
    {
        log::warn!("kill what is left of a container: {e}");
    }
    if let Err(e) = staging.remove(directory) {
        log::warn!("detach mounts of a container: {e}");
    }
    place::remove(cgroup, EMPTY_WITHIN).await
}

pub(super) async fn create(
    pod: &Sandbox,
    request: ContainerRequest,
) -> Result<(Arc<Container>, Spawned), SandboxError> {
    let mut spec = read_spec(&request.bundle, &request.id, pod.under())?;
    let profile = pod.profiles.get(&spec.effective.profile_name)?;
    let joined = namespaces::check(
        &spec.namespaces,
        pod.agent.pid,
        pod.network.namespace(),
        || pod.pid_namespaces(),
    )?;
    users::check(spec.users.as_ref(), pod.users.as_ref(), &pod.userns)?;
    let filters = Filters::of(&spec, profile, pod.broker.is_some())?;
    let sources = sources::open(&mut spec, &pod.config.host_paths, &request.bundle)?;
    let directory = {
        let mut next = pod.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next += 1;
        next.to_string()
    };
    // The journal has the container and its bundle by now.
    let begun = place::begin(
        &pod.hierarchy,
        &pod.journal,
        &request.id,
        &spec.cgroups_path,
        spec.resources.as_ref(),
    )?;
    let (cgroup, holder) = begun.finish().await?;
    let undo = Undo {
        cgroup: &cgroup,
        staging: &pod.staging,
        directory: &directory,
    };
    let place = (&*directory, joined.as_ref(), sources);
    let launched = launch(pod, &request, &spec, &filters, &cgroup, holder, place).await;
    let launched = launched.and_then(|(forker, forker_pid, forker_pidfd, spawned, learner)| {
        let init = spawned.pidfd.try_clone().step("copy", "pidfd")?;
        let entry = Entry::Init {
            container: request.id.clone(),
            pid: spawned.pid,
        };
        record(&pod.journal, entry)?;
        Ok((forker, forker_pid, forker_pidfd, spawned, init, learner))
    });
    match launched {
        Ok((forker, forker_pid, forker_pidfd, spawned, init, learner)) => {
            let container = Container {
                id: request.id,
                spec,
                config: pod.config.clone(),
                filters,
                forker,
                forker_pid,
                forker_pidfd,
                init,
                cgroup,
                staging: pod.staging.clone(),
                directory,
                journal: pod.journal.clone(),
                next_key: AtomicU32::new(INIT_KEY + 1),
                container_root: pod.range.container_root(),
                bundle: request.bundle,
                init_pid: spawned.pid,
                runner: pod.runner.clone(),
                hooks: hooks::Inside::default(),
                stopped: AtomicBool::new(false),
                gone: AtomicBool::new(false),
                leftovers: pod.leftovers.clone(),
                learner,
            };
            Ok((Arc::new(container), spawned))
        }
        Err(e) => {
            let gone = undo.run().await;
            let (id, bundle) = (request.id.as_str(), request.bundle.as_path());
            let state = hooks::state(&spec, id, bundle, "stopped", None);
            let runner = pod.runner.as_deref();
            hooks::on_node_or_warn(runner, &spec.hooks.poststop, &state, (id, bundle)).await;
            pod.leftovers.note(&request.id, &cgroup, !gone);
            if gone {
                let _ = record(&pod.journal, Entry::Removed(request.id.clone()));
            }
            Err(e)
        }
    }
}

type Launched = (Forker, u32, OwnedFd, Spawned, Option<Learner>);

async fn launch(
    pod: &Sandbox,
    request: &ContainerRequest,
    spec: &Tightened,
    filters: &Filters,
    cgroup: &Cgroup,
    holder: Option<Holder>,
    (directory, joined, sources): (&str, Option<&OwnedFd>, Sources),
) -> Result<Launched, SandboxError> {
    if let Some(resources) = &spec.resources {
        for warning in cgroup
            .apply(resources)
            .map_err(|e| SandboxError::Invalid(e.to_string()))?
        {
            log::warn!("container {}: {warning}", request.id);
        }
    }
    let mut plan = mounts::stage(pod, request, spec, cgroup, (directory, sources))?;
    plan.joins_pids = joined.is_some();
    plan.shares_network = pod.network.namespace().is_none();
    pod.ports.lock(&mut plan);
    filters.fill(&mut plan);
    let sealed = seal_plan(&plan)
        .map_err(|e| SandboxError::Invalid(format!("mounts, masked and read-only paths: {e}")))?;
    let (ours, theirs) = message::pair().step("make", "socket pair")?;
    let forker = Forker::new(Channel::new(ours)).step("watch", "the container's channel")?;
    let files = match cgroup.attach().map_err(cgroup_error)? {
        Attach::V1(files) => files,
        // CLONE_INTO_CGROUP asks for the right to write in a common ancestor,
        // which the agent must not have.
        Attach::V2(dir) => vec![
            rustix::fs::openat(
                &dir,
                "cgroup.procs",
                OFlags::WRONLY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .step("open", "cgroup.procs")?,
        ],
    };
    let mut reply = forker
        .ready(|| {
            let mut fds = vec![theirs.as_fd(), sealed.as_fd(), pod.userns.as_fd()];
            fds.extend(files.iter().map(AsFd::as_fd));
            fds.extend(joined.map(AsFd::as_fd));
            let sent = pod.agent.channel.send_now(&ToAgent::Launch, &fds);
            // Ours must not outlive the forker's, or its end is never seen.
            drop(theirs);
            sent.map_err(|e| SandboxError::Unavailable(format!("ask the agent: {e}")))
        })
        .await?;
    if let Some(clocks) = &spec.clocks {
        let pid = verify::child(&reply.waiting()?, pod.agent.pid)?.ok_or_else(ended)?;
        hooks::set_clocks(pid, clocks)?;
        reply = forker.proceed(&[], Duration::ZERO).await?;
    }
    if spec.hooks.wait_before_root() {
        let pid = verify::child(&reply.waiting()?, pod.agent.pid)?.ok_or_else(ended)?;
        reply = hooks::before_root(pod, request, spec, &forker, pid).await?;
    }
    // Its place in the cgroup is the forker's now.
    drop(holder);
    let Reply::Ready(forker_pidfd, mut others) = reply else {
        return Err(out_of_turn());
    };
    // Init, where it exists already, and a listener of each who has a filter that asks.
    let asks = pod.broker.is_some() || spec.effective.learn;
    let early = match (others.len(), asks) {
        (0, false) | (1, true) => None,
        (1, false) | (3, true) => Some(others.remove(0)),
        _ => return Err(out_of_turn()),
    };
    let mut learner = None;
    if spec.effective.learn {
        let made = Learner::start(pod, &request.id, spec, (&plan.filter, others)).await?;
        learner = Some(made);
    } else if let Some(broker) = &pod.broker {
        let profile = (&filters.profile, &*filters.written);
        broker.take(&request.id, profile, others)?;
    }
    let forker_pid = verify::child(&forker_pidfd, pod.agent.pid)?.ok_or_else(ended)?;
    // Init inherits from the forker, unless it is there already.
    let early = match &early {
        Some(early) => Some(verify::child(early, forker_pid)?.ok_or_else(ended)?),
        None => None,
    };
    let parents: Vec<u32> = std::iter::once(forker_pid).chain(early).collect();
    for pid in &parents {
        let score = spec.process.oom_score_adj.unwrap_or(0);
        set_oom_score(*pid, score, &pod.config)?;
    }
    let process = process_plan(&spec.process, &filters.own, &parents)?;
    let spawned = spawn(
        (&forker, forker_pid, None),
        INIT_KEY,
        true,
        &process,
        &request.stdio,
        pod.range.container_root(),
    )
    .await?;
    verify::init(
        spawned.pid,
        pod.range.container_root(),
        (&spec.process, &process),
        cgroup,
    )?;
    if let Some(namespace) = joined {
        verify::pids(&spawned.pidfd, namespace)?;
    }
    Ok((forker, forker_pid, forker_pidfd, spawned, learner))
}

fn ended() -> SandboxError {
    SandboxError::Unavailable("the process has ended before its start".into())
}

async fn spawn(
    (forker, forker_pid, forker_pidfd): (&Forker, u32, Option<&OwnedFd>),
    key: u32,
    parked: bool,
    plan: &ProcessPlan,
    stdio: &ChildStdio,
    container_root: u32,
) -> Result<Spawned, SandboxError> {
    let owner = (plan.uid, plan.gid);
    let sealed = seal_plan(plan).map_err(|e| {
        SandboxError::Invalid(format!(
            "process.args and process.env: {e}; the kernel takes 6 MiB at most (execve(2))"
        ))
    })?;
    let mut fds: Vec<BorrowedFd<'_>> = vec![sealed.as_fd()];
    if let ChildStdio::Files {
        stdin,
        stdout,
        stderr,
    } = stdio
    {
        if plan.terminal.is_some() {
            return Err(SandboxError::Invalid(
                "process.terminal is true, but the request has no terminal".into(),
            ));
        }
        for (pipe, name) in [(stdin, "stdin"), (stdout, "stdout"), (stderr, "stderr")] {
            give_pipe(pipe, container_root, owner).step("give to the process its", name)?;
            fds.push(pipe.as_fd());
        }
    } else if plan.terminal.is_none() {
        return Err(SandboxError::Invalid(
            "the request has a terminal, but process.terminal is false".into(),
        ));
    }
    match forker
        .request(key, &ToForker::Spawn { key, parked }, &fds)
        .await?
    {
        Reply::Spawned(pidfd, pty) => {
            // A short-lived exec may be gone by now: its pid is then told as 0.
            let checked = verify::child(&pidfd, forker_pid).and_then(|pid| {
                let pty = pty.filter(|_| plan.terminal.is_some());
                match &pty {
                    Some(master) => verify::terminal(master).map(|()| (pid, pty)),
                    None => Ok((pid, None)),
                }
            });
            let (pid, pty) = checked.inspect_err(|error| {
                log::error!("{error}; it is ended");
                if let Some(forker) = forker_pidfd {
                    let _ = process::signal(forker, KILL);
                }
            })?;
            let pid = match pid {
                Some(pid) => pid,
                None if !parked => 0,
                None => return Err(ended()),
            };
            Ok(Spawned {
                key,
                pid,
                pidfd,
                pty,
            })
        }
        _ => Err(out_of_turn()),
    }
}

impl Container {
    /// Lets the parked init exec. An error names the binary and the reason;
    /// the process is then gone and its exit is *not* reported separately.
    pub async fn go(&self) -> Result<(), SandboxError> {
        if let Err(error) = self.start_hooks().await {
            let _ = process::signal(&self.init, KILL);
            return Err(error);
        }
        match self
            .forker
            .request(INIT_KEY, &ToForker::Go { key: INIT_KEY }, &[])
            .await?
        {
            Reply::Started => {
                verify::labels(
                    (self.init_pid, &self.init),
                    self.forker_pid,
                    &self.spec.process,
                )
                .inspect_err(|_| self.cut_off())?;
                // Not on the way to the answer: later, when nothing is going on.
                tokio::spawn(async {
                    tokio::time::sleep(SETTLED).await;
                    casemate_sys::memory::release_startup();
                });
            }
            _ => return Err(out_of_turn()),
        }
        let hooks = &self.spec.hooks.poststart;
        self.hooks_on_node(hooks, "running", Some(self.init_pid))
            .await;
        Ok(())
    }

    async fn hooks_on_node(&self, list: &[HookSpec], status: &str, pid: Option<u32>) {
        if !list.is_empty() {
            let state = hooks::state(&self.spec, &self.id, &self.bundle, status, pid);
            let what = (self.id.as_str(), self.bundle.as_path());
            hooks::on_node_or_warn(self.runner.as_deref(), list, &state, what).await;
        }
    }

    /// Hooks of the container's own, before init executes.
    async fn start_hooks(&self) -> Result<(), SandboxError> {
        let list = &self.spec.hooks.start_container;
        if list.is_empty() {
            return Ok(());
        }
        let pid = hooks::inner_pid(self.init_pid);
        let state = hooks::state(&self.spec, &self.id, &self.bundle, "created", pid);
        let init = process_plan(&self.spec.process, &self.filters.own, &[self.forker_pid])?;
        for hook in list {
            let key = self.next_key.fetch_add(1, Ordering::Relaxed);
            let exit = self.hooks.expect(key);
            let plan = plan::start_hook(hook, &init);
            let stdio = hooks::stdio(&state)?;
            let forker = (&self.forker, self.forker_pid, Some(&self.forker_pidfd));
            let spawned = spawn(forker, key, false, &plan, &stdio, self.container_root);
            self.hooks.ended(hook, key, spawned.await, exit).await?;
        }
        Ok(())
    }

    /// Runs one more process (OCI `Process` JSON, as in Exec requests).
    pub async fn exec(
        &self,
        process_json: &[u8],
        terminal: bool,
        stdio: ChildStdio,
    ) -> Result<Spawned, SandboxError> {
        let invalid = |e: String| SandboxError::Invalid(e);
        let loaded =
            casemate_spec::load_process(process_json).map_err(|e| invalid(e.to_string()))?;
        let spec = casemate_spec::tighten_process(loaded, &self.spec, &self.config, terminal)?;
        for warning in &spec.warnings {
            log::warn!("exec in container {}: {warning}", self.id);
        }
        let mut plan = process_plan(&spec, &self.filters.own, &[self.forker_pid])?;
        plan.cpus.clone_from(&spec.schedule.exec_cpus);
        plan.drop_bounding = self.spec.process.caps.bounding & !spec.caps.bounding;
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        let forker = (&self.forker, self.forker_pid, Some(&self.forker_pidfd));
        // It inherits the container's score; another one is set before it runs.
        let score = spec
            .oom_score_adj
            .filter(|score| Some(*score) != self.spec.process.oom_score_adj);
        let parked = score.is_some();
        let spawned = spawn(forker, key, parked, &plan, &stdio, self.container_root).await?;
        if let Some(score) = score {
            let set = set_oom_score(spawned.pid, score, &self.config);
            let gone = match set {
                Ok(()) => {
                    let go = ToForker::Go { key };
                    self.forker.request(key, &go, &[]).await.map(drop)
                }
                Err(error) => Err(error),
            };
            gone.inspect_err(|_| drop(process::signal(&spawned.pidfd, KILL)))?;
        }
        if spawned.pid != 0 {
            verify::labels((spawned.pid, &spawned.pidfd), self.forker_pid, &spec)
                .inspect_err(|_| self.cut_off())?;
        }
        Ok(spawned)
    }

    /// What it was made of, and by which configuration.
    pub fn policy(&self) -> (&Tightened, &Config) {
        (&self.spec, &self.config)
    }

    /// The next exit; `None` when the forker is gone and no more will come
    /// (processes not reported by then have died with it: status 137).
    pub async fn next_exit(&self) -> Option<Exit> {
        loop {
            let Some(exit) = self.forker.next_exit().await else {
                self.hooks.no_more();
                return None;
            };
            if !self.hooks.took(&exit) {
                return Some(exit);
            }
        }
    }

    /// Who writes its calls down, while anybody may make one.
    pub(super) fn learner(&self) -> Option<&Learner> {
        self.learner.as_ref().filter(|learner| learner.lives())
    }

    /// The container's cgroup: pids, freeze, stats, update.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        Some(&self.cgroup)
    }

    /// Host pid of the forker, which sits in the container's cgroup and is
    /// no process of the container.
    pub fn forker_pid(&self) -> u32 {
        self.forker_pid
    }

    /// The pid namespace that it lives in, while init does.
    pub(super) fn pid_namespace(&self) -> Option<OwnedFd> {
        super::pause::pid_namespace(&self.init).ok()
    }

    /// Signals every process of the container.
    pub fn kill_all(&self, signal: i32) -> Result<(), SandboxError> {
        if signal == KILL {
            // The kernel kills the rest of the pid namespace with its init.
            let _ = process::signal(&self.init, KILL);
        }
        self.cgroup
            .kill(signal, &[self.forker_pid])
            .map_err(cgroup_error)
    }

    /// Ends the container with its forker, whatever state that is in: the
    /// channel closes, and no exit comes after the last one that was sent.
    pub fn cut_off(&self) {
        let _ = process::signal(&self.init, KILL);
        let _ = process::signal(&self.forker_pidfd, KILL);
        if let Err(e) = self.cgroup.kill(KILL, &[]) {
            log::warn!("container {}: kill what is left: {e}", self.id);
        }
    }

    /// Kills what is left, removes cgroup and mounts. Bounded (1 s, and what the
    /// last hooks may take), never waits for agent or forker to answer, may be
    /// called twice. A cgroup that the kernel hasn't let go of is left for
    /// the end of the pod.
    pub async fn destroy(&self) {
        let _ = process::signal(&self.init, KILL);
        let _ = process::signal(&self.forker_pidfd, KILL);
        let gone = clean(&self.cgroup, &self.staging, &self.directory).await;
        if !self.stopped.swap(true, Ordering::Relaxed) {
            let hooks = &self.spec.hooks.poststop;
            self.hooks_on_node(hooks, "stopped", None).await;
        }
        if !self.gone.swap(gone, Ordering::Relaxed) {
            self.leftovers.note(&self.id, &self.cgroup, !gone);
            if gone {
                let _ = record(&self.journal, Entry::Removed(self.id.clone()));
            }
        }
    }
}

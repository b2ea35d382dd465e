//! The sandbox of one pod as the rest of the shim sees it: effects only, no
//! containerd types. Everything here returns file descriptors, host pids and
//! typed errors; the service layer owns records, events and RPC rules.

mod broker;
mod config;
mod container;
mod explain;
mod facts;
mod filters;
mod forker;
mod hooks;
mod inherited;
mod kernel;
mod learner;
mod leftovers;
mod mounts;
mod namespaces;
mod pause;
mod pipes;
mod place;
mod profiles;
mod promise;
mod reading;
mod shared;
mod users;
mod verify;
mod watch;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use casemate_cgroup::{Cgroup, Hierarchy, Stats};
use casemate_spec::{Annotations, Config, Kind};
use rustix::event::PollFlags;
use tokio::io::Interest;

use crate::bootstrap::journal::{Entry, Journal};
use crate::bootstrap::proc;
use crate::host::agent::{self, Agent};
use crate::host::guard::{Guard, PortLocks};
use crate::host::hooks::Runner;
use crate::host::ids::{DIRECTORY, IdRange};
use crate::host::network::Network;
use crate::host::staging::Staging;
use crate::host::{Step, userns};
use crate::plan;
use crate::record::Records;
use crate::record::learned::Learned;
use broker::Broker;
use config::read_config;
pub use config::{has_api, set_class};
use leftovers::Leftovers;
use profiles::Profiles;
use reading::{read_spec, tightened};

pub use container::Container;
pub use hooks::after_death;
use pause::Pause;
pub use place::keep_limits;
pub use shared::Files;
use shared::Shared;

/// What went wrong while an effect was made: step, object, reason, way out.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The request itself can't be carried out (bad field, missing binary…).
    #[error("{0}")]
    Invalid(String),
    /// The policy refuses it.
    #[error("{text}")]
    Refused {
        /// Id of the rule.
        rule: &'static str,
        /// What, where, and the way out.
        text: String,
    },
    /// The process, container or pod isn't there (any more).
    #[error("{0}")]
    NotFound(String),
    /// The agent or forker is gone or doesn't answer.
    #[error("{0}")]
    Unavailable(String),
    /// Anything else: the host or kernel refused a step.
    #[error("{0}")]
    Failed(String),
}

impl SandboxError {
    /// The same, as a part of a larger step.
    fn within(self, step: &str) -> SandboxError {
        let inside = |text: String| format!("{step}: {text}");
        match self {
            SandboxError::Invalid(text) => SandboxError::Invalid(inside(text)),
            SandboxError::Refused { rule, text } => SandboxError::Refused {
                rule,
                text: inside(text),
            },
            SandboxError::NotFound(text) => SandboxError::NotFound(inside(text)),
            SandboxError::Unavailable(text) => SandboxError::Unavailable(inside(text)),
            SandboxError::Failed(text) => SandboxError::Failed(inside(text)),
        }
    }
}

impl From<casemate_spec::Refusal> for SandboxError {
    fn from(refusal: casemate_spec::Refusal) -> SandboxError {
        SandboxError::Refused {
            rule: refusal.rule,
            text: refusal.to_string(),
        }
    }
}

/// What the pod is made from, before its first container.
pub struct PodRequest {
    /// Pod id: the sandbox id, or the container's own id without CRI.
    pub pod_id: String,
    /// Bundle of the pod (where the journal lives).
    pub bundle: PathBuf,
    /// What the pod is made by.
    pub origin: Origin,
    /// Where to what happens in it is written.
    pub records: Records,
}

/// What says how a pod is made.
pub enum Origin {
    /// `config.json` in its bundle: that of CRI's sandbox container, or of the
    /// only container.
    Bundle,
    /// The sandbox API: a document of the same form, and the files that
    /// containerd leaves to whoever makes the sandbox.
    Given {
        /// An OCI configuration.
        document: Vec<u8>,
        /// Shown to every container.
        files: Files,
        /// The cgroup above that of the document is this pod's alone.
        has_parent: bool,
    },
}

/// One entry of containerd's rootfs mount list.
#[derive(Debug, Clone)]
pub struct RootfsMount {
    /// `overlay`, `bind`…
    pub fstype: String,
    /// Source path.
    pub source: String,
    /// Relative to the rootfs; empty for the rootfs itself.
    pub target: String,
    /// Mount options as containerd sends them.
    pub options: Vec<String>,
}

/// What a process gets as descriptors 0, 1, 2.
pub enum ChildStdio {
    /// Our ends of pipes or /dev/null, already opened by the shim.
    Files {
        /// Descriptor 0.
        stdin: OwnedFd,
        /// Descriptor 1.
        stdout: OwnedFd,
        /// Descriptor 2.
        stderr: OwnedFd,
    },
    /// A new pseudo terminal in the container's devpts; the master comes back.
    Terminal,
}

/// A container to be made, its init parked before exec.
pub struct ContainerRequest {
    /// Container id.
    pub id: String,
    /// Bundle directory (config.json is read from there).
    pub bundle: PathBuf,
    /// containerd's rootfs mounts; empty: `root.path` is used as it is.
    pub rootfs: Vec<RootfsMount>,
    /// Standard descriptors of init.
    pub stdio: ChildStdio,
}

/// A process that exists, as the host sees it.
pub struct Spawned {
    /// Names the process on the container's channel; init is 0.
    pub key: u32,
    /// Host pid.
    pub pid: u32,
    /// Refers to the process for certain, whatever becomes of its pid.
    pub pidfd: OwnedFd,
    /// Master of the terminal, if one was asked for.
    pub pty: Option<OwnedFd>,
}

/// One exit, in the order in which the container's forker reaped them.
#[derive(Debug, Clone, Copy)]
pub struct Exit {
    /// Which process.
    pub key: u32,
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// The pod: user namespaces, agent, staging mount. Dropping it ends the pod.
pub struct Sandbox {
    config: Config,
    hierarchy: Hierarchy,
    journal: Arc<Journal>,
    range: IdRange,
    /// Who chose the containers' ids, if it wasn't casemate.
    users: Option<users::Chosen>,
    network: Network,
    staging: Arc<Staging>,
    /// The containers' user namespace.
    userns: OwnedFd,
    agent: Agent,
    /// Answers refused calls, where the configuration has it so.
    broker: Option<Broker>,
    /// Where to what happens in the pod is written.
    records: Records,
    /// What is learned from its containers, where any is.
    learned: tokio::sync::OnceCell<Arc<Learned>>,
    /// What its containers' filters are.
    profiles: Profiles,
    cgroup: Cgroup,
    /// The cgroup above is the pod's alone.
    has_parent: bool,
    /// What the pod's own annotations say, where it has a sandbox container.
    asked: Option<Annotations>,
    landlock: bool,
    /// TCP's ports, locked by it.
    ports: PortLocks,
    /// Runs hooks on the host, where the configuration allows any.
    runner: Option<Arc<Runner>>,
    /// Files and memory that the pod's containers share, where they are ours to
    /// give.
    shared: Option<Shared>,
    /// Made for CRI's sandbox container, when that is created.
    pause: tokio::sync::OnceCell<Pause>,
    /// Its containers, as far as they still exist.
    members: Mutex<Vec<Weak<Container>>>,
    /// Names staging directories; ids of containers aren't file names we chose.
    next: Mutex<u32>,
    /// What containers couldn't take away.
    leftovers: Arc<Leftovers>,
}

/// For the agent to end after SIGKILL, and everything in the pod with it.
const AGENT_GONE_WITHIN: Duration = Duration::from_secs(2);
/// For the cgroups of a dead pod to become free.
const CGROUPS_FREE_WITHIN: Duration = Duration::from_secs(1);

impl Sandbox {
    /// Makes the pod: id range, namespaces, agent. Blocks for a few
    /// milliseconds; called once, before the first container.
    pub fn start(request: PodRequest) -> Result<Arc<Sandbox>, SandboxError> {
        let config = read_config()?;
        crate::log::set_level(config.log.level);
        let profiles = Profiles::new(&config);
        let (spec, files, has_parent) = match request.origin {
            Origin::Bundle => {
                let spec = read_spec(&request.bundle, &request.pod_id, (&config, None, &profiles))?;
                (spec, None, false)
            }
            Origin::Given {
                document,
                files,
                has_parent,
            } => {
                let spec = tightened(&document, &request.pod_id, (&config, None, &profiles))?;
                (spec, Some(files), has_parent)
            }
        };
        let journal = Journal::open(&request.bundle)
            .step("open the journal in", request.bundle.display().to_string())?;
        let landlock = kernel::landlock(&config)?;
        let runner = Runner::start(&config.hooks)?.map(Arc::new);
        let chosen = users::Chosen::of(spec.users.as_ref())?;
        let first = chosen.as_ref().map(users::Chosen::first);
        let range = IdRange::take(&config.ids, first, Path::new(DIRECTORY))?;
        let sysctls: Vec<(&str, &str)> = spec
            .sysctl
            .iter()
            .filter(|(name, _)| name.starts_with("net."))
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let guard = Guard::of(&spec, &config.network, files.as_ref())?;
        let (network, watch) = Network::prepare(
            &spec.namespaces.network,
            chosen.as_ref().and_then(users::Chosen::pinned),
            range.container_root(),
            &sysctls,
            &guard,
        )?;
        guard.tell(watch, &request.records);
        let staging = Staging::new()?;
        let shared = files
            .map(|files| Shared::make(&files, &staging, range.container_root()))
            .transpose()?;

        let hierarchy = Hierarchy::detect().map_err(cgroup_error)?;
        let path = place::agent_place(&spec.cgroups_path, spec.pod.kind, &request.pod_id);
        let begun = place::begin(&hierarchy, &journal, "", &path, None)?;
        let (cgroup, holder) = begun.finish_now()?;
        let shim = std::env::current_exe().step("find", "the shim's own binary")?;
        let binary = config.sandbox.agent_path(&shim);
        let records = request.records;
        let made = agent::start(&binary, &range, &network, &staging, &cgroup).and_then(|agent| {
            let entry = Entry::Agent {
                pid: agent.pid,
                start_time: proc::start_time(agent.pid).unwrap_or(0),
            };
            let pod = record(&journal, entry).and_then(|()| {
                let plan = plan::pod(&spec, &request.pod_id)?;
                agent::configure(&agent, &plan)?;
                let userns =
                    userns::make(&agent.pidfd).map_err(|e| agent::ended_early(&agent, e))?;
                agent::ready(&agent)?;
                let broker = config.broker.enabled;
                let broker = broker.then(|| Broker::new(&agent, records.clone()));
                Ok((userns, broker.transpose()?))
            });
            match pod {
                Ok((userns, broker)) => Ok((agent, userns, broker)),
                Err(e) => {
                    if end(&agent) {
                        range.give_back();
                    }
                    Err(e)
                }
            }
        });
        // The agent was born in there, or there is none.
        drop(holder);
        let (agent, userns, broker) = match made {
            Ok(made) => made,
            Err(e) => {
                if cgroup.remove(Duration::from_millis(200)).is_ok() {
                    let _ = record(&journal, Entry::Removed(String::new()));
                }
                return Err(e);
            }
        };
        Ok(Arc::new(Sandbox {
            config,
            hierarchy,
            journal: Arc::new(journal),
            range,
            users: chosen,
            network,
            staging: Arc::new(staging),
            userns,
            agent,
            broker,
            records,
            learned: tokio::sync::OnceCell::new(),
            profiles,
            cgroup,
            has_parent,
            asked: (spec.pod.kind == Kind::Sandbox).then_some(spec.asked),
            landlock,
            ports: guard.port_locks().clone(),
            runner,
            shared,
            pause: tokio::sync::OnceCell::new(),
            members: Mutex::default(),
            next: Mutex::new(0),
            leftovers: Arc::default(),
        }))
    }

    /// What documents of its containers are read under.
    fn under(&self) -> reading::Under<'_> {
        (&self.config, self.asked.as_ref(), &self.profiles)
    }

    /// Makes the pause, the pod's sandbox process, unless there is one; its
    /// host pid.
    pub async fn pause(&self) -> Result<u32, SandboxError> {
        let made = self.pause.get_or_try_init(|| Pause::make(self)).await?;
        Ok(made.pid())
    }

    /// Host pid of the pause, or of the agent where there is none.
    pub fn pid(&self) -> u32 {
        self.pause.get().map_or(self.agent.pid, Pause::pid)
    }

    /// Resolves when the pause has ended; at once if there is none.
    pub async fn pause_ended(&self) {
        if let Some(pause) = self.pause.get() {
            pause.ended().await;
        }
    }

    /// Ends the pod when its pause has ended.
    pub async fn end_with_pause(&self) {
        self.pause_ended().await;
        let _ = casemate_sys::process::signal(&self.agent.pidfd, KILL);
    }

    /// The pid namespaces that a new container may join: the pause's, and those
    /// of the containers.
    fn pid_namespaces(&self) -> Vec<OwnedFd> {
        let pauses = self.pause.get().map(Pause::namespace);
        let mut found: Vec<OwnedFd> = pauses
            .and_then(|n| n.try_clone().ok())
            .into_iter()
            .collect();
        let members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let alive = members.iter().filter_map(Weak::upgrade);
        found.extend(alive.filter_map(|container| container.pid_namespace()));
        found
    }

    /// The agent's own cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Numbers of the pod: of the cgroup around agent and containers where that
    /// is the pod's alone, else of the agent's own.
    pub fn stats(&self) -> Result<Stats, SandboxError> {
        if !self.has_parent {
            return self.cgroup.stats().map_err(cgroup_error);
        }
        let leaves = self.cgroup.leaf_dirs();
        let parents: Vec<PathBuf> = leaves
            .filter_map(Path::parent)
            .map(Path::to_owned)
            .collect();
        Cgroup::open(&parents).stats().map_err(cgroup_error)
    }

    /// Resolves when the agent has gone (the pod is lost, or was stopped).
    pub async fn lost(&self) {
        ended(&self.agent.pidfd).await;
    }

    /// Makes a container with its init parked before exec. On error nothing
    /// is left behind.
    pub async fn create(
        &self,
        request: ContainerRequest,
    ) -> Result<(Arc<Container>, Spawned), SandboxError> {
        let made = container::create(self, request).await?;
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.retain(|container| container.strong_count() > 0);
        members.push(Arc::downgrade(&made.0));
        Ok(made)
    }

    /// Kills the agent, and so everything of the pod. Requests that wait for
    /// something inside fail by that.
    pub async fn kill(&self) {
        let _ = casemate_sys::process::signal(&self.agent.pidfd, KILL);
        if tokio::time::timeout(AGENT_GONE_WITHIN, self.lost())
            .await
            .is_err()
        {
            log::error!("the agent is killed, but not gone after {AGENT_GONE_WITHIN:?}");
        }
        reap(&self.agent.pidfd);
        let _ = self.cgroup.kill(KILL, &[]);
    }

    /// Kills everything of the pod and removes what is left on the host.
    pub async fn stop(&self) {
        self.kill().await;
        self.end_learning().await;
        let until = tokio::time::Instant::now() + CGROUPS_FREE_WITHIN;
        for (id, dirs) in self.leftovers.take() {
            let left = until.saturating_duration_since(tokio::time::Instant::now());
            if place::remove(&Cgroup::open(&dirs), left).await {
                let _ = record(&self.journal, Entry::Removed(id));
            }
        }
        let left = until.saturating_duration_since(tokio::time::Instant::now());
        let agents = place::remove(&self.cgroup, left).await;
        casemate_cgroup::remove_empty(&self.leftovers.parents());
        if agents {
            let _ = record(&self.journal, Entry::Removed(String::new()));
        }
        if is_ready(&self.agent.pidfd) {
            self.range.give_back();
        }
    }

    /// Whether something of the container with this id couldn't be removed.
    pub fn is_left_behind(&self, id: &str) -> bool {
        self.leftovers.has(id)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if end(&self.agent) {
            self.range.give_back();
        }
    }
}

const KILL: i32 = 9;

/// Kills an agent that nobody will ask for anything any more.
/// True if it has gone.
fn end(agent: &Agent) -> bool {
    let gone = proc::kill(&agent.pidfd, AGENT_GONE_WITHIN);
    reap(&agent.pidfd);
    gone
}

/// Takes a dead child off the process table; another reaper may have been faster.
fn reap(pidfd: &OwnedFd) {
    let _ = casemate_sys::process::try_wait(pidfd);
}

/// Resolves when the process behind `pidfd` has ended.
async fn ended(pidfd: &OwnedFd) {
    let Ok(copy) = pidfd.try_clone() else {
        return;
    };
    let Ok(fd) = crate::io::watch(copy, Interest::READABLE) else {
        return;
    };
    loop {
        let Ok(mut guard) = fd.readable().await else {
            return;
        };
        if is_ready(fd.get_ref()) {
            return;
        }
        guard.clear_ready();
    }
}

fn is_ready(fd: impl AsFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(&fd, PollFlags::IN)];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0)
}

fn record(journal: &Journal, entry: Entry) -> Result<(), SandboxError> {
    journal.record(entry).step("write", "the pod's journal")
}

fn cgroup_error(error: casemate_cgroup::CgroupError) -> SandboxError {
    SandboxError::Failed(error.to_string())
}

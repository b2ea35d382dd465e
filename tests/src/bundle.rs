//! A task made by hand: bundle, rootfs mounts, fifos, a recorder of events, and
//! the shim started on it exactly as containerd does.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteResponse, Mount, WaitResponse,
};
use protobuf::well_known_types::any::Any;
use rustix::process::Signal;
use serde_json::Value;

use crate::error::{Failure, Result, file};
use crate::events::Recorder;
use crate::image::oci::sha256;
use crate::procs;
use crate::run::until;
use crate::shim::{Answer, Client, Invocation, SHORT};
use crate::spec;
use crate::stdio::{Reader, make_fifo};
use crate::world::World;

/// containerd namespace of all tasks made by hand.
pub const NAMESPACE: &str = "casemate-test";

/// One task of one shim; killed and cleaned up when dropped.
pub struct Task {
    /// Container id.
    pub id: String,
    /// `config.json`; written by [`Task::boot`].
    pub spec: Value,
    /// How the shim is called.
    pub shim: Invocation,
    /// Where the shim sends its events.
    pub events: Recorder,
    /// Files of the task beside the bundle: layers, fifos.
    pub side: PathBuf,
    /// The rootfs mount list.
    pub rootfs: Vec<Mount>,
    /// Options for Create.
    pub options: Option<Any>,
    /// Paths for Create: stdin, stdout, stderr.
    pub stdio: [String; 3],
    /// What the task wrote to standard output.
    pub stdout: Reader,
    /// What the task wrote to standard error.
    pub stderr: Reader,
    /// What the shim wrote to its log.
    pub log: Reader,
    /// [`Task::finish`] fails if the pod isn't as its shim promised. For tests that
    /// change it from outside: `false`.
    pub posture: bool,
    booted: Option<(Answer, Client, u32)>,
}

impl Task {
    /// A bundle with an overlay rootfs of the base image that runs `args`.
    pub fn new(name: &str, args: &[&str]) -> Result<Self> {
        let world = World::get()?;
        let id = world.id(name);
        let bundle = world.dir().join("b").join(&id);
        let side = world.dir().join("s").join(&id);
        for dir in [bundle.join("rootfs"), side.join("upper"), side.join("work")] {
            fs::create_dir_all(&dir).map_err(file("make", &dir))?;
        }
        let fifo = |name: &str| side.join(name);
        for path in [
            fifo("stdin"),
            fifo("stdout"),
            fifo("stderr"),
            bundle.join("log"),
        ] {
            make_fifo(&path)?;
        }
        let events = Recorder::listen(&world.dir().join(format!("{id}.e")))?;
        let overlay = Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![
                format!("lowerdir={}", world.base()?.display()),
                format!("upperdir={}", side.join("upper").display()),
                format!("workdir={}", side.join("work").display()),
                "index=off".to_owned(),
            ],
            ..Default::default()
        };
        let shown = |path: PathBuf| path.display().to_string();
        Ok(Self {
            spec: spec::default(args, "rootfs", NAMESPACE, &id),
            shim: Invocation {
                program: world.shim()?,
                namespace: NAMESPACE.to_owned(),
                id: id.clone(),
                bundle: bundle.clone(),
                grpc: world.dir().join("c.sock").display().to_string(),
                ttrpc: events.address().display().to_string(),
                stdin: Vec::new(),
                debug: false,
                env: Vec::new(),
                path: world.path(),
            },
            events,
            rootfs: vec![overlay],
            options: None,
            stdout: Reader::start(&fifo("stdout")),
            stderr: Reader::start(&fifo("stderr")),
            log: Reader::start(&bundle.join("log")),
            // No stdin: a shim that waits for a writer would be another test.
            stdio: [String::new(), shown(fifo("stdout")), shown(fifo("stderr"))],
            id,
            side,
            posture: true,
            booted: None,
        })
    }

    /// As [`Task::new`], with the shim started and the task created.
    pub fn created(name: &str, args: &[&str]) -> Result<Self> {
        let mut task = Self::new(name, args)?;
        task.boot()?;
        task.create()?;
        Ok(task)
    }

    /// As [`Task::created`], and started.
    pub fn running(name: &str, args: &[&str]) -> Result<Self> {
        let task = Self::created(name, args)?;
        task.rpc()?.start(&task.id)?;
        Ok(task)
    }

    /// A task that sleeps until it is killed.
    pub fn sleeping(name: &str) -> Result<Self> {
        Self::running(name, &["/bin/probe", "sleep"])
    }

    /// The bundle.
    pub fn bundle(&self) -> &Path {
        &self.shim.bundle
    }

    /// Writes `config.json`.
    pub fn write_spec(&self) -> Result<()> {
        let path = self.bundle().join("config.json");
        // A shim that is starting may be reading the one before.
        let new = self.bundle().join("config.json.new");
        fs::write(&new, self.spec.to_string()).map_err(file("write", &new))?;
        fs::rename(&new, &path).map_err(file("rename", &path))
    }

    /// Writes the spec, runs `start`, connects.
    pub fn boot(&mut self) -> Result<Answer> {
        self.write_spec()?;
        self.boot_as_it_is()
    }

    /// Runs `start` on the bundle as it is, connects.
    pub fn boot_as_it_is(&mut self) -> Result<Answer> {
        let answer = self.shim.start()?;
        self.adopt(&answer)?;
        Ok(answer)
    }

    /// Connects to the shim that a `start` elsewhere has answered of.
    pub fn adopt(&mut self, answer: &Answer) -> Result<()> {
        let client = Client::connect(&answer.address, answer.version)?;
        let pid = client.shim(&self.id)?.shim_pid;
        self.booted = Some((answer.clone(), client, pid));
        Ok(())
    }

    /// Uses the shim of `pod`, as containerd does for later containers.
    pub fn join(&mut self, pod: &Task) -> Result<()> {
        self.booted = Some(pod.need()?.clone());
        Ok(())
    }

    fn need(&self) -> Result<&(Answer, Client, u32)> {
        let why = || Failure::Unexpected("the shim of this task was not started".to_owned());
        self.booted.as_ref().ok_or_else(why)
    }

    /// The connection to the shim.
    pub fn rpc(&self) -> Result<&Client> {
        Ok(&self.need()?.1)
    }

    /// The shim's pid.
    pub fn shim_pid(&self) -> Result<u32> {
        Ok(self.need()?.2)
    }

    /// The answer that `start` gave.
    pub fn answer(&self) -> Result<&Answer> {
        Ok(&self.need()?.0)
    }

    /// The request that [`Task::create`] sends.
    pub fn create_request(&self) -> CreateTaskRequest {
        let [stdin, stdout, stderr] = self.stdio.clone();
        CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle().display().to_string(),
            rootfs: self.rootfs.clone(),
            stdin,
            stdout,
            stderr,
            options: self.options.clone().into(),
            ..Default::default()
        }
    }

    /// `Create`.
    pub fn create(&self) -> Result<CreateTaskResponse> {
        self.rpc()?.call("Create", &self.create_request(), SHORT)
    }

    /// `Start`, then `Wait`.
    pub fn start_and_wait(&self) -> Result<WaitResponse> {
        self.rpc()?.start(&self.id)?;
        self.rpc()?.wait(&self.id, Duration::from_secs(30))
    }

    /// Create, start, wait, delete; exit status and standard output.
    pub fn run_to_end(&mut self) -> Result<(DeleteResponse, String)> {
        self.boot()?;
        self.create()?;
        self.start_and_wait()?;
        let deleted = self.rpc()?.delete(&self.id)?;
        let out = if self.stdio[1].is_empty() {
            String::new()
        } else {
            self.stdout.text(SHORT)?
        };
        Ok((deleted, out))
    }

    /// The address that contract and containerd's own shims make of these names.
    pub fn expected_address(&self, group: &str) -> String {
        let text = format!("{}/{NAMESPACE}/{group}", self.shim.grpc);
        format!("unix:///run/containerd/s/{}", sha256(text.as_bytes()))
    }

    /// Waits until the shim has ended.
    pub fn wait_gone(&self, limit: Duration) -> Result<Duration> {
        let pid = self.shim_pid()?;
        until(&format!("shim {pid} to end"), limit, || {
            procs::identity(pid).is_none()
        })
    }

    /// Lets go of a task that has ended while its shim lives on: the files go,
    /// the shim stays.
    pub fn forget(mut self) {
        self.booted = None;
    }

    /// What is left of this task on the host, its own bundle aside.
    pub fn leaks(&self) -> Vec<String> {
        let mut left = crate::leaks::with_mark(&self.id);
        left.extend(
            self.answer()
                .ok()
                .map(Answer::socket)
                .filter(|socket| socket.exists())
                .map(|socket| format!("socket {}", socket.display())),
        );
        left
    }

    /// Fails if the pod isn't as its shim promised. Nothing is said of a runtime that
    /// promises nothing, of a shim that doesn't answer, and of a pod that has lost its
    /// agent.
    pub fn expect_posture(&self) -> Result<()> {
        if !self.posture || !World::get().is_ok_and(World::is_casemate) {
            return Ok(());
        }
        crate::operator::expect_as_promised(self.rpc()?)
    }

    /// Deletes and shuts down, then fails if anything is left after 5 s.
    pub fn finish(self) -> Result<()> {
        self.expect_posture()?;
        let rpc = self.rpc()?;
        let _ = rpc.kill(&self.id, 9, true);
        let _ = rpc.wait(&self.id, SHORT);
        let _ = rpc.delete(&self.id);
        let _ = rpc.shutdown(&self.id);
        self.wait_gone(Duration::from_secs(5))?;
        self.expect_clean(Duration::from_secs(5))
    }

    /// Fails if anything of the task is still there after `limit`.
    pub fn expect_clean(&self, limit: Duration) -> Result<()> {
        until("a clean host", limit, || self.leaks().is_empty())
            .map(|_| ())
            .map_err(|_| Failure::Unexpected(format!("left behind: {}", self.leaks().join("; "))))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some((answer, _, pid)) = &self.booted {
            let family = procs::family(*pid);
            procs::signal(*pid, Signal::KILL);
            let _ = until("shim", Duration::from_secs(3), || {
                procs::identity(*pid).is_none()
            });
            let _ = self.shim.delete();
            for member in family {
                if procs::alive(member) {
                    procs::signal(member.pid, Signal::KILL);
                }
            }
            let _ = fs::remove_file(answer.socket());
        }
        for line in crate::leaks::mounts_with(&self.id).iter().rev() {
            if let Some(target) = line.split(' ').nth(1) {
                let _ = rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH);
            }
        }
        // Deepest first, so that parents are empty when their turn comes.
        for cgroup in crate::leaks::cgroups_with(&self.id).iter().rev() {
            let _ = fs::remove_dir(cgroup);
        }
        let _ = fs::remove_dir_all(self.bundle());
        let _ = fs::remove_dir_all(&self.side);
    }
}

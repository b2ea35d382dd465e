//! A shim driven over ttrpc without containerd: what a pod's life costs, phase
//! by phase, and what it weighs meanwhile.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::error::{Failure, Result};
use casemate_tests::procs;
use casemate_tests::run::until;
use casemate_tests::shim::{Answer, Client, SHORT};
use rustix::process::Signal;
use serde_json::json;

use super::peer::Peer;
use super::samples::{Samples, Unit};
use super::{clock, memory};

/// What containerd calls creating and starting a task.
pub const CREATE_START: &str = "shim: Create + Start";
/// The same with the shim's own start, where ours makes the pod's sandbox.
pub const WHOLE: &str = "shim: start to running";
/// An exec in a pod that has been running for a while, runtimes taking turns.
pub const EXEC: &str = "shim: exec true in an old pod";
/// A pod alone on the host.
pub const ALONE: &str = "PSS of 1 idle container";
/// A pod among others.
pub const AMONG: &str = "PSS of each of N idle containers";
/// Row of a pod's processor time while it idles.
pub const IDLE: &str = "processor of each of N idle containers";

/// A pod whose shim we started.
pub struct Pod {
    task: Task,
    client: Client,
    shim: u32,
    started_in: f64,
    connected_in: f64,
}

impl Pod {
    /// Runs the shim's `start` and connects.
    pub fn start(peer: &Peer) -> Result<Self> {
        let task = peer.bundle(&["/bin/sleep", "3600"])?;
        task.write_spec()?;
        peer.within(|| {
            let (started_in, output) = clock::run(task.shim.command("start"), SHORT)?;
            let answer = Answer::parse(&output)?;
            let (connected_in, (client, shim)) = clock::time(|| {
                let client = Client::connect(&answer.address, answer.version)?;
                let shim = client.shim(&task.id)?.shim_pid;
                Ok((client, shim))
            })?;
            Ok(Self {
                task,
                client,
                shim,
                started_in,
                connected_in,
            })
        })
    }

    /// `Create` and `Start`; milliseconds of each.
    pub fn run(&self) -> Result<(f64, f64)> {
        let (create, _) = clock::time(|| {
            let request = self.task.create_request();
            let reply: containerd_shim_protos::api::CreateTaskResponse =
                self.client.call("Create", &request, SHORT)?;
            Ok(reply.pid)
        })?;
        let (start, _) = clock::time(|| self.client.start(&self.task.id))?;
        Ok((create, start))
    }

    /// `Exec`, `Start`, `Wait`, `Delete` of `/bin/true`; milliseconds up to the
    /// exit.
    fn exec(&self) -> Result<f64> {
        let (id, exec_id) = (self.task.id.clone(), "e1".to_owned());
        let mut process = self
            .task
            .spec
            .get("process")
            .cloned()
            .unwrap_or_else(|| json!({}));
        if let Some(object) = process.as_object_mut() {
            object.insert("args".to_owned(), json!(["/bin/true"]));
        }
        let exec = (id.as_str(), exec_id.as_str());
        let begun = Instant::now();
        self.client.exec(exec, &process, "", "")?;
        self.client.start_exec(exec)?;
        let ended = self.client.wait_exec(exec)?;
        let took = clock::milliseconds(begun);
        self.client.delete_exec(exec)?;
        if ended.exit_status != 0 {
            return Err(Failure::Unexpected(format!(
                "exec of /bin/true: exit status {}",
                ended.exit_status
            )));
        }
        Ok(took)
    }

    /// PSS in kB by process name.
    pub fn pss(&self) -> BTreeMap<String, u64> {
        memory::pss(&memory::pids(self.shim, &self.task.id))
    }

    /// Kill to shim's end; milliseconds of Kill + Wait, Delete, Shutdown.
    pub fn end(&self) -> Result<(f64, f64, f64)> {
        let id = self.task.id.as_str();
        let (kill, _) = clock::time(|| {
            self.client.kill(id, 9, false)?;
            self.client.wait(id, SHORT)
        })?;
        let (delete, _) = clock::time(|| self.client.delete(id))?;
        let begun = Instant::now();
        // The shim may be gone before the answer is written.
        let _ = self.client.shutdown(id);
        self.wait_gone()?;
        Ok((kill, delete, clock::milliseconds(begun)))
    }

    fn wait_gone(&self) -> Result<()> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        use rustix::process::{Pid, PidfdFlags, pidfd_open};
        let raw = i32::try_from(self.shim).ok().and_then(Pid::from_raw);
        let Some(Ok(fd)) = raw.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
            return Ok(());
        };
        let limit = Timespec::try_from(SHORT).unwrap_or_default();
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)) {
            Ok(n) if n > 0 => Ok(()),
            _ => Err(Failure::Timeout {
                what: format!("shim {} to end", self.shim),
                seconds: SHORT.as_secs(),
            }),
        }
    }
}

impl Drop for Pod {
    /// Whatever a failed phase left: the shim's processes first, then the shim's
    /// own clean-up. After [`Pod::end`] there is nothing to do.
    fn drop(&mut self) {
        if procs::identity(self.shim).is_none() {
            return;
        }
        let family = procs::family(self.shim);
        procs::signal(self.shim, Signal::KILL);
        let _ = until("shim", Duration::from_secs(3), || {
            procs::identity(self.shim).is_none()
        });
        let _ = self.task.shim.delete();
        for member in family {
            if procs::alive(member) {
                procs::signal(member.pid, Signal::KILL);
            }
        }
    }
}

/// One round: all phases of one pod.
pub fn round(peer: &Peer, samples: &mut Samples) -> Result<BTreeMap<String, u64>> {
    let pod = Pod::start(peer)?;
    // At once, as containerd does: work that a shim puts off until after its
    // first answer is work before the container runs all the same.
    let (create, start) = pod.run()?;
    // Long enough for the runtimes' start-up garbage to be given back.
    std::thread::sleep(Duration::from_millis(200));
    let pss = pod.pss();
    let exec = pod.exec()?;
    clock::gap();
    let (kill, delete, shutdown) = pod.end()?;
    let mut add = |row: &str, value| samples.add(row, Unit::Ms, peer.name, value);
    add("shim: start (binary)", pod.started_in);
    add("shim: connect and first answer", pod.connected_in);
    add("shim: Create", create);
    add("shim: Start", start);
    add(CREATE_START, create + start);
    add(WHOLE, pod.started_in + pod.connected_in + create + start);
    add("shim: exec true to its exit", exec);
    add("shim: Kill + Wait", kill);
    add("shim: Delete", delete);
    add("shim: Shutdown to its end", shutdown);
    samples.add(ALONE, Unit::Mib, peer.name, total(&pss));
    Ok(pss)
}

/// `n` execs in one pod of each runtime, one after the other's. Only the shim and
/// what is below it differ from turn to turn: the pods are there already.
pub fn execs(peers: &[Peer], n: usize, samples: &mut Samples) -> Result<()> {
    let mut pods = Vec::with_capacity(peers.len());
    for peer in peers {
        let pod = Pod::start(peer)?;
        pod.run()?;
        pods.push((peer.name, pod));
    }
    std::thread::sleep(Duration::from_secs(1));
    for turn in 0..n {
        for at in 0..pods.len() {
            let Some((name, pod)) = pods.get((turn + at) % pods.len()) else {
                continue;
            };
            clock::gap();
            samples.add(EXEC, Unit::Ms, name, pod.exec()?);
        }
    }
    for (_, pod) in &pods {
        pod.end()?;
    }
    Ok(())
}

/// `n` pods at once: PSS of each, and what it does while nobody asks for anything.
pub fn crowd(peer: &Peer, n: usize, samples: &mut Samples) -> Result<()> {
    let mut pods = Vec::with_capacity(n);
    for _ in 0..n {
        let pod = Pod::start(peer)?;
        pod.run()?;
        pods.push(pod);
        clock::gap();
    }
    std::thread::sleep(Duration::from_secs(2));
    for pod in &pods {
        samples.add(AMONG, Unit::Mib, peer.name, total(&pod.pss()));
    }
    let busy = |pods: &[Pod]| -> Vec<u64> {
        let of = |pod: &Pod| memory::busy(&memory::pids(pod.shim, &pod.task.id));
        pods.iter().map(of).collect()
    };
    let (begun, before) = (Instant::now(), busy(&pods));
    std::thread::sleep(Duration::from_secs(5));
    let after = busy(&pods);
    let over = begun.elapsed().as_nanos() as f64;
    for (before, after) in before.iter().zip(&after) {
        let share = after.saturating_sub(*before) as f64 / over;
        samples.add(IDLE, Unit::Milli, peer.name, share * 1000.0);
    }
    for pod in &pods {
        pod.end()?;
    }
    Ok(())
}

fn total(pss: &BTreeMap<String, u64>) -> f64 {
    pss.values().sum::<u64>() as f64 / 1024.0
}

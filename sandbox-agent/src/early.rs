//! Init, born before its container is assembled: what kernels need that can't
//! mount proc of a pid namespace without processes (`pidns=`, Linux 6.17).
//!
//! There only a process *inside* a pid namespace can mount its proc, and the
//! first one inside is its init for good. So that one is forked first, makes the
//! mount, and waits, by turns with the forker: it locks itself as the forker does
//! once the tree is complete, and becomes the container's init when that is
//! asked for. It never has a descriptor of the shim's.
//!
//! A pid namespace that is joined has an init already, so any process in it will
//! do, and one that ends at once is the simplest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use casemate_protocol::plan::{LaunchPlan, ProcessPlan};
use casemate_protocol::read_plan;
use casemate_sys::process::{self, Fork};
use casemate_sys::{exec, marked, message};

use crate::confine::Who;
use crate::error::{At, StepError};
use crate::launch;
use crate::spawn::{self, Prepared, Stdio};

/// The process that will be init.
pub struct EarlyInit {
    /// Its pid, as the forker sees it.
    pub pid: u32,
    /// The same, for certain.
    pub pidfd: OwnedFd,
    socket: OwnedFd,
}

const LOCK: u8 = b'L';
const BECOME: u8 = b'B';

impl EarlyInit {
    /// Forks it into the new pid namespace. `make_proc` runs in it and makes
    /// the detached mount that comes back.
    pub fn fork(
        plan: &LaunchPlan,
        namespace_b: &OwnedFd,
        make_proc: impl FnOnce() -> Result<OwnedFd, StepError>,
    ) -> Result<(EarlyInit, OwnedFd), StepError> {
        let (ours, theirs) = message::pair().at("make", "socket pair")?;
        match process::fork().map_err(spawn::exhausted)? {
            Fork::Child => {
                // Our copies of the forker's descriptors end here: the channel
                // to the shim above all.
                let error = exec::close_all_except(&[theirs.as_fd(), namespace_b.as_fd()])
                    .at("close", "inherited descriptors")
                    .and_then(|()| live(plan, namespace_b, &theirs, make_proc));
                if let Err(error) = error {
                    spawn::report(&theirs, &error);
                }
                process::exit_now(127)
            }
            Fork::Parent(pid, pidfd) => {
                drop(theirs);
                let proc = spawn::told(&ours)?
                    .flatten()
                    .ok_or_else(|| died("mount", "proc"))?;
                let early = EarlyInit {
                    pid,
                    pidfd,
                    socket: ours,
                };
                Ok((early, proc))
            }
        }
    }

    /// Has it locked. To be called after the change of root, which must have
    /// reached it too. The listener of its filter, where that asks one.
    pub fn lock(&self) -> Result<Option<OwnedFd>, StepError> {
        let mut packet = vec![LOCK];
        packet.extend(root_identity()?);
        message::send(&self.socket, &packet, &[]).at("lock", "the container's init")?;
        spawn::told(&self.socket)?.ok_or_else(|| died("lock", "the container's init"))
    }

    /// Makes it the init of `plan`, parked before exec. On error it is gone.
    pub fn become_init(
        self,
        plan: &OwnedFd,
        stdio: &Stdio,
    ) -> Result<(u32, OwnedFd, Prepared), StepError> {
        let mut fds = vec![plan.as_fd()];
        let mut packet = vec![BECOME];
        match stdio {
            Stdio::Files(files) => fds.extend(files.iter().map(AsFd::as_fd)),
            Stdio::Terminal(terminal) => {
                packet.extend(terminal.number.to_le_bytes());
                fds.extend(terminal.ends());
            }
            Stdio::NewTerminal => {
                return Err(StepError::invalid("spawn", "init", "its terminal is gone"));
            }
        }
        let said = message::send(&self.socket, &packet, &fds)
            .at("start process", "")
            .and_then(|()| spawn::told(&self.socket))
            .and_then(|said| said.ok_or_else(|| died("start process", "")));
        match said {
            Ok(master) => Ok((
                self.pid,
                self.pidfd,
                Prepared::new(spawn::Parked::waiting(self.socket), master),
            )),
            Err(error) => {
                drop(self.socket);
                let _ = process::signal(&self.pidfd, 9);
                let _ = process::wait(&self.pidfd);
                Err(error)
            }
        }
    }
}

/// Forks a process into a pid namespace that has its init already, has it make
/// the detached mount that comes back, and end. Whoever lives in there may see
/// it for that moment, and do nothing to it: it is the agent's.
pub fn visit(make_proc: impl FnOnce() -> Result<OwnedFd, StepError>) -> Result<OwnedFd, StepError> {
    let (ours, theirs) = message::pair().at("make", "socket pair")?;
    match process::fork().map_err(spawn::exhausted)? {
        Fork::Child => {
            let made = exec::close_all_except(&[theirs.as_fd()])
                .at("close", "inherited descriptors")
                .and_then(|()| make_proc())
                .and_then(|proc| spawn::prepared(&theirs, &[proc.as_fd()]));
            if let Err(error) = made {
                spawn::report(&theirs, &error);
            }
            process::exit_now(0)
        }
        Fork::Parent(_, pidfd) => {
            drop(theirs);
            let told = spawn::told(&ours);
            let _ = process::wait(&pidfd);
            told?.flatten().ok_or_else(|| StepError {
                invalid: false,
                ..StepError::invalid("mount", "proc", "the process that was to do it has died")
            })
        }
    }
}

fn died(step: &'static str, object: &str) -> StepError {
    StepError {
        invalid: false,
        ..StepError::invalid(step, object, "the process that was to be init has died")
    }
}

/// Device and inode of `/`: two processes with equal ones have one root.
fn root_identity() -> Result<[u8; 16], StepError> {
    let stat = rustix::fs::stat("/").at("look at", "/")?;
    let mut identity = [0; 16];
    identity[..8].copy_from_slice(&stat.st_dev.to_le_bytes());
    identity[8..].copy_from_slice(&stat.st_ino.to_le_bytes());
    Ok(identity)
}

/// The child's life up to exec. Returns only what went wrong.
fn live(
    plan: &LaunchPlan,
    namespace_b: &OwnedFd,
    socket: &OwnedFd,
    make_proc: impl FnOnce() -> Result<OwnedFd, StepError>,
) -> Result<(), StepError> {
    let proc = make_proc()?;
    spawn::prepared(socket, &[proc.as_fd()])?;
    drop(proc);

    let (packet, _) = next(socket)?;
    if packet.first() != Some(&LOCK) || packet[1..] != root_identity()? {
        return Err(StepError::invalid(
            "lock",
            "init",
            "its root is not the container's",
        ));
    }
    marked::change_directory("/").at("change to", "/")?;
    let listener = launch::enter_locked(plan, namespace_b, &Who::Forker)?.listener;
    let listeners: Vec<_> = listener.iter().map(AsFd::as_fd).collect();
    spawn::prepared(socket, &listeners)?;
    drop(listeners);
    // Whoever had it could answer for this container's calls.
    drop(listener);

    let (packet, mut fds) = next(socket)?;
    let (Some((&BECOME, number)), false) = (packet.split_first(), fds.is_empty()) else {
        return Err(StepError::invalid("spawn", "init", "no plan"));
    };
    let process: ProcessPlan = read_plan(fds.remove(0))
        .map_err(io::Error::other)
        .at("read", "process plan")?;
    let stdio = match <[u8; 4]>::try_from(number) {
        Ok(number) => Stdio::Terminal(spawn::Terminal::from_ends(fds, u32::from_le_bytes(number))?),
        Err(_) => Stdio::Files(fds),
    };
    Err(spawn::become_process(&process, stdio, socket))
}

/// The forker's next word. Without one there is no container any more.
fn next(socket: &OwnedFd) -> Result<(Vec<u8>, Vec<OwnedFd>), StepError> {
    let mut buffer = [0u8; 64];
    match message::receive(socket, &mut buffer, true).at("hear from", "the forker")? {
        Some((n, fds)) => Ok((buffer[..n].to_vec(), fds)),
        None => process::exit_now(0),
    }
}

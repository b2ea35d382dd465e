//! The forker of a container: sits in all its namespaces and its cgroup, locked
//! like its workload, and forks init and every exec from there. It lives in the
//! agent's pid namespace, so the container has no pid to aim at.
//!
//! It is bound by the container's filter as well. What that lets it call beyond the
//! workload it calls with a mark (`casemate_sys::marked`), which the last filter of
//! each process that it makes takes back.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use casemate_protocol::plan::ProcessPlan;
use casemate_protocol::{Channel, FromForker, INIT_KEY, ToForker, TransportError, clip, read_plan};
use casemate_sys::{marked, memory, process};

use crate::error::{At, StepError};
use crate::launch::Container;
use crate::spawn::{self, Parked, Stdio};

struct Forker {
    channel: Channel,
    container: Container,
    /// Running or parked children by pid: their key.
    children: BTreeMap<u32, u32>,
    /// Children that wait for Go, and what they are waited for by: a profile need
    /// not let the forker open that anew.
    parked: BTreeMap<u32, (Parked, OwnedFd)>,
}

/// Serves the container until the shim closes the channel.
pub fn run(channel: Channel, container: Container) -> ! {
    let mut forker = Forker {
        channel,
        container,
        children: BTreeMap::new(),
        parked: BTreeMap::new(),
    };
    let code = match forker.serve() {
        Ok(()) => 0,
        Err(error) => {
            let text = clip(&error.to_string());
            let _ = forker.channel.send(&FromForker::LaunchFailed { text }, &[]);
            1
        }
    };
    process::exit_now(code)
}

impl Forker {
    fn serve(&mut self) -> Result<(), StepError> {
        let me = self.container.me.take();
        let mut fds: Vec<&OwnedFd> = me.iter().collect();
        fds.extend(self.container.early.as_ref().map(|early| &early.pidfd));
        let listeners = std::mem::take(&mut self.container.listeners);
        fds.extend(&listeners);
        self.answer(&FromForker::Ready, &fds)?;
        drop(me);
        // No process of the container may come to have one.
        drop(listeners);
        loop {
            let [message, ended] =
                marked::wait_readable([self.channel.as_fd(), self.container.signals.as_fd()])
                    .at("poll", "")?;
            if ended {
                crate::pod::drain(&self.container.signals);
                self.reap()?;
            }
            if message {
                match self.channel.receive::<ToForker>(false) {
                    Ok(None) => return Ok(()),
                    Ok(Some((ToForker::Spawn { key, parked }, fds))) => {
                        self.spawn(key, parked, fds)?;
                    }
                    Ok(Some((ToForker::Go { key }, _))) => {
                        self.go(key)?;
                        memory::release_startup();
                    }
                    // Nothing waits any more.
                    Ok(Some((ToForker::Proceed, _))) => {}
                    Err(TransportError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(io::Error::other(e)).at("receive", ""),
                }
            }
        }
    }

    fn answer(&self, message: &FromForker, fds: &[&OwnedFd]) -> Result<(), StepError> {
        let fds: Vec<_> = fds.iter().map(|f| f.as_fd()).collect();
        self.channel
            .send(message, &fds)
            .map_err(io::Error::other)
            .at("answer", "shim")
    }

    fn reap(&mut self) -> Result<(), StepError> {
        while let Some(ended) = process::reap_any().at("reap", "")? {
            if let Some(key) = self.children.remove(&ended.pid) {
                self.parked.remove(&key);
                self.answer(
                    &FromForker::Exited {
                        key,
                        status: ended.status,
                    },
                    &[],
                )?;
            }
        }
        Ok(())
    }

    fn spawn(&mut self, key: u32, parked: bool, mut fds: Vec<OwnedFd>) -> Result<(), StepError> {
        let result = (|| {
            if fds.is_empty() {
                return Err(StepError::invalid("spawn", "", "no plan"));
            }
            let sealed = fds.remove(0);
            let copy = marked::copy(&sealed).at("copy", "process plan")?;
            let plan: ProcessPlan = read_plan(copy)
                .map_err(io::Error::other)
                .at("read", "process plan")?;
            let stdio = if plan.terminal.is_some() {
                match self.container.console.take() {
                    Some(terminal) if key == INIT_KEY => Stdio::Terminal(terminal),
                    other => {
                        self.container.console = other;
                        Stdio::NewTerminal
                    }
                }
            } else {
                Stdio::Files(fds)
            };
            let early = match key {
                INIT_KEY => self.container.early.take(),
                _ => None,
            };
            let (pid, pidfd, prepared) = match early {
                Some(early) => early.become_init(&sealed, &stdio)?,
                None => spawn::fork_process(&plan, stdio)?,
            };
            drop(sealed);
            if parked {
                return Ok((pid, pidfd, prepared));
            }
            let (parked, master) = (prepared.parked, prepared.master);
            parked.go(&pidfd)?;
            Ok((
                pid,
                pidfd,
                spawn::Prepared {
                    parked: Parked::gone(),
                    master,
                },
            ))
        })();
        match result {
            Ok((pid, pidfd, prepared)) => {
                self.children.insert(pid, key);
                if parked {
                    let copy = marked::copy(&pidfd).at("copy", "pidfd")?;
                    self.parked.insert(key, (prepared.parked, copy));
                }
                let mut fds = vec![&pidfd];
                fds.extend(prepared.master.as_ref());
                self.answer(&FromForker::Spawned { key }, &fds)
            }
            Err(error) => self.answer(
                &FromForker::SpawnFailed {
                    key,
                    text: clip(&error.to_string()),
                    invalid: error.invalid,
                },
                &[],
            ),
        }
    }

    fn go(&mut self, key: u32) -> Result<(), StepError> {
        let Some((parked, pidfd)) = self.parked.remove(&key) else {
            let text = "no process is waiting to start".to_owned();
            return self.answer(
                &FromForker::SpawnFailed {
                    key,
                    text,
                    invalid: true,
                },
                &[],
            );
        };
        let mut children = self.children.iter();
        let pid = children.find(|(_, k)| **k == key).map(|(pid, _)| *pid);
        match parked.go(&pidfd) {
            Ok(()) => self.answer(&FromForker::Started { key }, &[]),
            Err(error) => {
                // go() has reaped it: no exit is to be told.
                if let Some(pid) = pid {
                    self.children.remove(&pid);
                }
                self.answer(
                    &FromForker::SpawnFailed {
                        key,
                        text: clip(&error.to_string()),
                        invalid: error.invalid,
                    },
                    &[],
                )
            }
        }
    }
}

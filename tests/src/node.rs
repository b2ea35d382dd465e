//! Everything of one task that the host can see, as lines that can be compared:
//! processes, mounts, cgroups, sockets, locks.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::bundle::Task;
use crate::error::{Failure, Result, file};
use crate::run::until;
use crate::{World, leaks, procs};

/// Ids for tasks whose leaks are to be told from those of all others: below
/// the default pool.
const BASE: u32 = 0x5000_0000;
const SIZE: u32 = 0x2_0000;
static NEXT: AtomicU32 = AtomicU32::new(0);

/// What identifies the traces of one task.
#[derive(Debug, Clone)]
pub struct Traces {
    id: String,
    base: u32,
    socket: PathBuf,
}

/// A configuration with a range of host ids that nobody else has.
#[derive(Debug, Clone)]
pub struct Config {
    /// The first of them.
    pub base: u32,
    /// The file.
    pub text: String,
}

impl Config {
    /// Another one.
    pub fn next() -> Self {
        // Other runs of these tests may be going on: begin elsewhere than they.
        let place = (std::process::id() % 64 * 64 + NEXT.fetch_add(1, Ordering::Relaxed)) % 4096;
        let base = BASE + place * SIZE;
        let text = format!("[ids]\nbase = {base}\ncount = 1\nsize = {SIZE}\n");
        Self { base, text }
    }
}

impl Traces {
    /// Gives `task` a range of host ids and a parent cgroup of its own, so that
    /// nothing of it can be mistaken for somebody else's.
    pub fn of(task: &mut Task) -> Result<Self> {
        let Config { base, text } = Config::next();
        let config = World::get()?.dir().join(format!("{}.toml", task.id));
        fs::write(&config, text).map_err(file("write", &config))?;
        task.shim
            .env
            .push(("CASEMATE_CONFIG".to_owned(), config.display().to_string()));
        task.spec["linux"]["cgroupsPath"] = format!("/parent-{0}/{0}", task.id).into();
        let socket = task.expected_address(&task.id);
        Ok(Self {
            id: task.id.clone(),
            base,
            socket: socket.trim_start_matches("unix://").into(),
        })
    }

    /// Of a task of somebody else's making, whose shim has that configuration.
    pub fn of_other(id: &str, config: &Config, socket: PathBuf) -> Self {
        Self {
            id: id.to_owned(),
            base: config.base,
            socket,
        }
    }

    /// All of them, now.
    pub fn look(&self) -> BTreeSet<String> {
        let mut found: BTreeSet<String> = leaks::with_mark(&self.id)
            .into_iter()
            .filter(|line| !is_own(line))
            .collect();
        for pid in procs::all() {
            let uid = procs::status_field(pid, "Uid")
                .and_then(|uids| uids.split_whitespace().next()?.parse::<u32>().ok());
            if uid.is_some_and(|uid| (self.base..self.base + SIZE).contains(&uid)) {
                let state = procs::status_field(pid, "State").unwrap_or_default();
                let parent = procs::status_field(pid, "PPid").unwrap_or_default();
                let command = procs::command_line(pid);
                if state.starts_with('Z') && parent == "1" {
                    // Reaped when the machine's own init gets round to it.
                    continue;
                }
                found.insert(format!(
                    "process {pid} {command:?}, {state}, child of {parent}"
                ));
            }
        }
        if self.socket.exists() {
            found.insert(format!("socket {}", self.socket.display()));
        }
        for kind in ["shim", "agent"] {
            let lock = Path::new("/run/casemate/ids").join(format!("{}.{kind}", self.base));
            if lock.exists() {
                found.insert(format!("lock {}", lock.display()));
            }
        }
        found
    }

    /// Waits until the node is as it was.
    pub fn expect(&self, before: &BTreeSet<String>, limit: Duration) -> Result<()> {
        until("the node to be as before", limit, || self.look() == *before)
            .map(drop)
            .map_err(|_| {
                let now = self.look();
                let new: Vec<_> = now.difference(before).cloned().collect();
                let gone: Vec<_> = before.difference(&now).cloned().collect();
                Failure::Unexpected(format!(
                    "the node is not as before: new {new:?}, gone {gone:?}"
                ))
            })
    }
}

/// The shells of this test bed carry the id too.
fn is_own(line: &str) -> bool {
    line.starts_with("process") && line.contains("kill -STOP")
}

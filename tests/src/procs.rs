//! Processes, seen through /proc (proc(5)).

use std::collections::BTreeSet;
use std::fs;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// A process that can't be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    /// The pid.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`.
    pub start_time: u64,
}

fn stat(pid: u32) -> Option<(u32, char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // comm may hold spaces and brackets: count fields behind the last one.
    let rest = text.get(text.rfind(')')? + 2..)?;
    let fields: Vec<&str> = rest.split(' ').collect();
    Some((
        fields.get(1)?.parse().ok()?,
        fields.first()?.chars().next()?,
        fields.get(19)?.parse().ok()?,
    ))
}

/// The identity of a pid that exists and is not a zombie.
pub fn identity(pid: u32) -> Option<Identity> {
    let (_, state, start_time) = stat(pid)?;
    (state != 'Z' && state != 'X').then_some(Identity { pid, start_time })
}

/// Whether that very process still runs.
pub fn alive(who: Identity) -> bool {
    identity(who.pid) == Some(who)
}

/// All pids in this pid namespace.
pub fn all() -> Vec<u32> {
    fs::read_dir("/proc")
        .map(|dir| {
            dir.flatten()
                .filter_map(|e| e.file_name().to_str()?.parse().ok())
                .collect()
        })
        .unwrap_or_default()
}

/// `root` and all that descend from it, now.
pub fn family(root: u32) -> Vec<Identity> {
    let parents: Vec<(u32, u32)> = all()
        .into_iter()
        .filter_map(|pid| Some((pid, stat(pid)?.0)))
        .collect();
    let mut known = BTreeSet::from([root]);
    loop {
        let before = known.len();
        known.extend(
            parents
                .iter()
                .filter(|(_, parent)| known.contains(parent))
                .map(|(pid, _)| *pid)
                .collect::<Vec<_>>(),
        );
        if known.len() == before {
            return known.into_iter().filter_map(identity).collect();
        }
    }
}

/// The command line, arguments separated by spaces.
pub fn command_line(pid: u32) -> String {
    fs::read(format!("/proc/{pid}/cmdline"))
        .map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "))
        .unwrap_or_default()
}

/// Pids whose command line has `part` in it, ourselves left out.
pub fn with_command(part: &str) -> Vec<u32> {
    all()
        .into_iter()
        .filter(|pid| *pid != std::process::id() && command_line(*pid).contains(part))
        .collect()
}

/// A field of `/proc/PID/status`.
pub fn status_field(pid: u32, name: &str) -> Option<String> {
    field(
        &fs::read_to_string(format!("/proc/{pid}/status")).ok()?,
        name,
    )
}

/// A `Name:\tvalue` field of text in the form of `/proc/PID/status`.
pub fn field(text: &str, name: &str) -> Option<String> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(|value| value.trim().to_owned())
}

/// Sends a signal; a process that is gone is no error.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Kills a process group that the test bed made.
pub fn kill_group(leader: u32) {
    if let Some(pid) = i32::try_from(leader).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

/// The kernel's version, major and minor.
pub fn kernel() -> (u32, u32) {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

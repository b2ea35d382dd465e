//! What `/proc` says of a process (proc_pid_status(5) and its neighbours).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

/// `/proc/PID/status`, or that of a thread.
pub struct Status(BTreeMap<String, String>);

impl Status {
    pub fn of(pid: u32) -> Option<Self> {
        Self::at(&format!("/proc/{pid}/status"))
    }

    /// Of each thread.
    pub fn threads(pid: u32) -> Vec<(u32, Self)> {
        let entries = fs::read_dir(format!("/proc/{pid}/task"));
        entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok())
            .filter_map(|tid| Some((tid, Self::at(&format!("/proc/{pid}/task/{tid}/status"))?)))
            .collect()
    }

    fn at(path: &str) -> Option<Self> {
        let text = fs::read_to_string(path).ok()?;
        let lines = text.lines().filter_map(|l| l.split_once(':'));
        let all = lines.map(|(key, value)| (key.to_owned(), value.trim().to_owned()));
        Some(Self(all.collect()))
    }

    pub fn get(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }

    pub fn bits(&self, key: &str) -> u64 {
        u64::from_str_radix(self.get(key), 16).unwrap_or(u64::MAX)
    }

    pub fn ended(&self) -> bool {
        self.get("State").starts_with(['Z', 'X'])
    }
}

/// It lives, and isn't a zombie.
pub fn lives(pid: u32) -> bool {
    Status::of(pid).is_some_and(|status| !status.ended())
}

/// Inode of a namespace.
pub fn namespace(pid: u32, kind: &str) -> Option<u64> {
    Some(fs::metadata(format!("/proc/{pid}/ns/{kind}")).ok()?.ino())
}

/// Inode of the user namespace that owns a namespace.
pub fn owner(pid: u32, kind: &str) -> Option<u64> {
    let file = fs::File::open(format!("/proc/{pid}/ns/{kind}")).ok()?;
    let owner = casemate_sys::namespace::owner(file).ok()?;
    Some(rustix::fs::fstat(owner).ok()?.st_ino)
}

/// Who the kernel says owns the files below `/proc/PID`: the process, or who its
/// memory belongs to where it can't be dumped (proc(5)).
pub fn shown_owner(pid: u32) -> Option<u32> {
    Some(fs::metadata(format!("/proc/{pid}/environ")).ok()?.uid())
}

/// `uid_map` or `gid_map`, in single spaces, its lines joined by `; `.
pub fn map(pid: u32, file: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    let lines = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    Some(lines.collect::<Vec<_>>().join("; "))
}

/// The hard limit of core files' sizes.
pub fn core_limit(pid: u32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = text.lines().find(|l| l.starts_with("Max core file size"))?;
    let hard = line.split_whitespace().nth(5)?;
    Some(hard.to_owned())
}

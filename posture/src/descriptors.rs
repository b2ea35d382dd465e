//! Open files, of the runtime's processes and of containers.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use crate::Report;

/// `O_CLOEXEC` in `/proc/PID/fdinfo` (proc_pid_fdinfo(5)).
const CLOEXEC: u32 = 0o2_000_000;

/// A descriptor of another process.
pub struct Descriptor {
    pub number: u32,
    /// As `/proc/PID/fd` shows it: a path, or `kind:[inode]`.
    pub shown: String,
    flags: u32,
    mount: String,
    /// Type and device number of the file, where they can be told.
    kind: Option<fs::FileType>,
    device: u64,
}

impl Descriptor {
    /// All of a process.
    pub fn all(pid: u32) -> Vec<Self> {
        let entries = fs::read_dir(format!("/proc/{pid}/fd"));
        let numbers = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok());
        numbers.filter_map(|n| Self::of(pid, n)).collect()
    }

    fn of(pid: u32, number: u32) -> Option<Self> {
        let path = format!("/proc/{pid}/fd/{number}");
        let shown = fs::read_link(&path).ok()?.display().to_string();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
        let field = |name: &str| {
            let line = info.lines().find_map(|l| l.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        let meta = fs::metadata(&path).ok();
        Some(Self {
            number,
            shown,
            flags: u32::from_str_radix(&field("flags:"), 8).unwrap_or(0),
            mount: field("mnt_id:"),
            kind: meta.as_ref().map(fs::Metadata::file_type),
            device: meta.map_or(0, |m| m.rdev()),
        })
    }

    /// Closed by execve(2).
    fn closes(&self) -> bool {
        self.flags & CLOEXEC != 0
    }

    /// The null device, whatever it is called.
    pub fn is_null(&self) -> bool {
        self.is_char() && self.device == rustix::fs::makedev(1, 3)
    }

    fn is_char(&self) -> bool {
        self.kind.is_some_and(|k| k.is_char_device())
    }

    /// An end of a pseudo terminal (devices.txt: ptmx, and 136 to 143).
    fn is_terminal(&self) -> bool {
        let major = rustix::fs::major(self.device);
        self.is_char() && (self.device == rustix::fs::makedev(5, 2) || (136..=143).contains(&major))
    }

    fn is_fifo(&self) -> bool {
        self.kind.is_some_and(|k| k.is_fifo())
    }

    fn is_file_or_directory(&self) -> bool {
        self.kind.is_some_and(|k| k.is_file() || k.is_dir())
    }

    /// A message queue or memory, on a mount that only the kernel has.
    fn is_kernels_own(&self, pid: u32) -> bool {
        self.file_system(pid).is_some_and(|t| KERNELS.contains(&t))
    }

    fn file_system(&self, pid: u32) -> Option<u64> {
        let path = format!("/proc/{pid}/fd/{}", self.number);
        u64::try_from(rustix::fs::statfs(path).ok()?.f_type).ok()
    }

    /// Sockets, pipes, memory and their kin, which no path leads to.
    fn has_no_path(&self) -> bool {
        !self.shown.starts_with('/') || self.shown.starts_with("/memfd:")
    }
}

/// `NSFS_MAGIC`: of a namespace that is mounted somewhere.
const NAMESPACES: u64 = 0x6e73_6673;

/// `MQUEUE_MAGIC`, `SECRETMEM_MAGIC`, `HUGETLBFS_MAGIC` (statfs(2)).
const KERNELS: [u64; 3] = [0x1980_0202, 0x5345_434d, 0x9584_58f6];

/// Ids of the mounts in a process' namespace.
fn mounts(pid: u32) -> Option<BTreeSet<String>> {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
    let ids = table.lines().filter_map(|l| l.split(' ').next());
    Some(ids.map(str::to_owned).collect())
}

/// Of shim, agent, pause or forker: each is closed by an execve, but for the null
/// device as the standard ones; and what they have of files and directories is among
/// `files`, or, for the shim, on a mount of its own that nobody else sees.
pub fn runtime(report: &mut Report, who: &str, pid: u32, files: &[String]) {
    let seen = mounts(pid).unwrap_or_default();
    for one in Descriptor::all(pid) {
        let what = || format!("{who}: descriptor {}", one.number);
        let standard = one.number <= 2 && one.is_null();
        if !one.closes() && !standard {
            report.add(what(), "close-on-exec", format!("kept: {}", one.shown));
        }
        // Namespaces too: they give nothing without CAP_SYS_ADMIN over them.
        if one.has_no_path() || one.is_null() || one.is_terminal() || one.is_fifo() {
            continue;
        }
        let below = |file: &String| {
            let rest = one.shown.strip_prefix(file.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || file.ends_with('/'))
        };
        let detached = one.is_file_or_directory() && !seen.contains(&one.mount);
        if files.iter().any(below) || detached && who.starts_with("shim") {
            continue;
        }
        if one.file_system(pid) != Some(NAMESPACES) {
            report.add(what(), "no such file", &one.shown);
        }
    }
}

/// Of a process of a container: an open file or directory is on a mount that can be
/// seen in the container, where `see` sees all: the process itself may have changed
/// its root.
pub fn inside(report: &mut Report, who: &str, pid: u32, see: u32) {
    let Some(seen) = mounts(see) else {
        return;
    };
    for one in Descriptor::all(pid) {
        // Its streams came from outside: pipes, or null.
        if one.has_no_path() || one.is_null() || one.is_fifo() {
            continue;
        }
        if !seen.contains(&one.mount) && !one.is_kernels_own(pid) {
            let what = format!("{who}: descriptor {}", one.number);
            report.add(what, "of a mount of its own", &one.shown);
        }
    }
}

/// A copy of another process' descriptor.
pub fn copy(pid: u32, number: u32) -> Option<OwnedFd> {
    let pidfd = casemate_sys::process::open_pidfd(pid).ok()?;
    let number = i32::try_from(number).ok()?;
    rustix::process::pidfd_getfd(&pidfd, number, rustix::process::PidfdGetfdFlags::empty()).ok()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::{Report, runtime};

    /// A real process with descriptors that none of ours may have.
    #[test]
    fn what_nobody_promised_is_named() {
        let mut child = Command::new("sh")
            .args(["-c", "exec 7</etc 8</etc/passwd 9</dev/zero; read line"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let found = |files: &[&str]| {
            let files: Vec<String> = files.iter().map(|f| (*f).to_owned()).collect();
            let mut report = Report::default();
            runtime(&mut report, "it", child.id(), &files);
            // Who runs the test may have left it some more.
            let ours = ["0", "7", "8", "9"].map(|n| format!("it: descriptor {n}"));
            let all = report.0.deviations.into_iter();
            all.filter(|d| ours.contains(&d.what))
                .map(|d| format!("{} {}", d.what, d.promised))
                .collect::<Vec<_>>()
        };
        // The shell takes a moment to open them.
        let begun = Instant::now();
        while found(&[]).len() < 7 && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let kept = ["0", "7", "8", "9"].map(|n| format!("it: descriptor {n} close-on-exec"));
        let strange = ["7", "8", "9"].map(|n| format!("it: descriptor {n} no such file"));
        let mut all = found(&[]);
        all.sort();
        let mut wanted: Vec<_> = kept.iter().chain(&strange).cloned().collect();
        wanted.sort();
        assert_eq!(all, wanted);
        // What is promised is not: a directory with all below it, but nothing beside.
        let left = found(&["/etc", "/dev/zer"]);
        assert_eq!(left.iter().filter(|l| strange.contains(l)).count(), 1);
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}

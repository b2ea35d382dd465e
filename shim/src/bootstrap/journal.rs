//! What the shim has made on the host, written down before it is made.
//!
//! `<pod bundle>/casemate.journal` holds one JSON object a line. Each line is
//! one `write(2)` on an `O_APPEND` descriptor, so a shim that is killed leaves
//! at worst one torn last line. `delete` undoes exactly what stands here.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// File name of the journal in the pod's bundle.
pub const NAME: &str = "casemate.journal";

/// One fact; the order of the lines is the order of the effects.
///
/// The form on disk is read by later releases too: names stay, fields are
/// only added (with defaults), and unknown lines are skipped by [`Journal::read`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Entry {
    /// The server process of the pod.
    Shim {
        /// Host pid.
        pid: u32,
        /// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)): with the pid, an identity.
        start_time: u64,
    },
    /// The listening socket's path.
    Socket(PathBuf),
    /// Cgroup directories of one container, about to be made.
    Cgroup {
        /// Container id.
        container: String,
        /// One directory per hierarchy (one alone on cgroup v2).
        dirs: Vec<PathBuf>,
    },
    /// A scope of systemd's of one container, about to be asked for.
    Scope {
        /// Container id.
        container: String,
        /// The slice it is in.
        slice: String,
        /// Its name.
        unit: String,
    },
    /// The agent process of the pod.
    Agent {
        /// Host pid.
        pid: u32,
        /// As in [`Entry::Shim`].
        start_time: u64,
    },
    /// A container of the pod and its bundle.
    Container {
        /// Container id.
        id: String,
        /// Bundle directory.
        bundle: PathBuf,
    },
    /// A logging binary of a container runs.
    Logger {
        /// Container id.
        container: String,
        /// Host pid.
        pid: u32,
        /// As in [`Entry::Shim`].
        start_time: u64,
    },
    /// Init of a container exists, not yet started.
    Init {
        /// Container id.
        container: String,
        /// Host pid.
        pid: u32,
    },
    /// Init of a container has exited.
    Exit {
        /// Container id.
        container: String,
        /// Exit code, or 128 + signal.
        status: u32,
        /// Nanoseconds since the epoch.
        at: u64,
        /// Host pid it had.
        pid: u32,
    },
    /// Nothing of this container is left on the host.
    Removed(String),
    /// The pod's entry in the registry of living pods, about to be made.
    Registry(PathBuf),
}

impl Entry {
    /// An [`Entry::Exit`].
    pub fn exit(container: &str, status: u32, at: SystemTime, pid: u32) -> Entry {
        let at = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Entry::Exit {
            container: container.to_owned(),
            status,
            at: u64::try_from(at.as_nanos()).unwrap_or(u64::MAX),
            pid,
        }
    }
}

/// The journal of one pod, open for appending.
#[derive(Debug)]
pub struct Journal {
    file: File,
    /// The last line was cut short (a full disk): the next begins a new one.
    torn: AtomicBool,
}

impl Journal {
    /// Opens the journal in `bundle`, making it if it is not there.
    pub fn open(bundle: &Path) -> io::Result<Journal> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(bundle.join(NAME))?;
        let torn = AtomicBool::new(!ends_with_a_line(&bundle.join(NAME)));
        Ok(Journal { file, torn })
    }

    /// Appends one entry. Call it before the effect that it names.
    pub fn record(&self, entry: Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        if self.torn.load(Ordering::Relaxed) {
            line.insert(0, b'\n');
        }
        let written = (&self.file).write(&line)?;
        self.torn.store(written != line.len(), Ordering::Relaxed);
        if written != line.len() {
            return Err(io::Error::new(
                io::ErrorKind::WriteZero,
                format!("journal line of {} bytes cut after {written}", line.len()),
            ));
        }
        Ok(())
    }

    /// Reads every whole line of the journal at `path`; lines that don't
    /// parse (the torn last one, or a later release's) are skipped, and a
    /// journal that can't be read is empty.
    pub fn read(path: &Path) -> Vec<Entry> {
        let Ok(bytes) = std::fs::read(path) else {
            return Vec::new();
        };
        bytes
            .split(|byte| *byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect()
    }
}

/// Whether the file is empty, or its last byte ends a line.
fn ends_with_a_line(path: &Path) -> bool {
    let last = || -> io::Result<Option<u8>> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut byte = [0];
        if length == 0 {
            return Ok(None);
        }
        file.read_exact_at(&mut byte, length - 1)?;
        Ok(Some(byte[0]))
    };
    matches!(last(), Ok(None | Some(b'\n')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_entry() -> Vec<Entry> {
        vec![
            Entry::Shim {
                pid: 7,
                start_time: 99,
            },
            Entry::Socket("/run/x".into()),
            Entry::Cgroup {
                container: "a".into(),
                dirs: vec!["/sys/fs/cgroup/a".into()],
            },
            Entry::Agent {
                pid: 8,
                start_time: 100,
            },
            Entry::Container {
                id: "a".into(),
                bundle: "/b/a".into(),
            },
            Entry::Logger {
                container: "a".into(),
                pid: 9,
                start_time: 101,
            },
            Entry::exit("a", 137, UNIX_EPOCH + Duration::from_nanos(5), 12),
            Entry::Removed("a".into()),
            Entry::Scope {
                container: "a".into(),
                slice: "p.slice".into(),
                unit: "c-a.scope".into(),
            },
            Entry::Registry("/run/r".into()),
        ]
    }

    #[test]
    fn what_is_recorded_is_read_back_in_order_across_reopening() {
        let dir = scratch("order");
        for entry in every_entry() {
            Journal::open(&dir).unwrap().record(entry).unwrap();
        }
        assert_eq!(Journal::read(&dir.join(NAME)), every_entry());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_torn_last_line_loses_only_itself() {
        let dir = scratch("torn");
        let journal = Journal::open(&dir).unwrap();
        for entry in every_entry() {
            journal.record(entry).unwrap();
        }
        let path = dir.join(NAME);
        let whole = std::fs::read(&path).unwrap();
        let all = every_entry();
        for cut in (whole.len() - 10)..whole.len() - 1 {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(Journal::read(&path), all[..all.len() - 1]);
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_follows_a_torn_line_is_not_lost_with_it() {
        let dir = scratch("after-torn");
        std::fs::write(dir.join(NAME), b"{\"socket\":\"/a\"}\n{\"socket\":\"/b").unwrap();
        let journal = Journal::open(&dir).unwrap();
        journal.record(Entry::Removed("x".into())).unwrap();
        journal.record(Entry::Removed("y".into())).unwrap();
        let read = Journal::read(&dir.join(NAME));
        let want = [
            Entry::Socket("/a".into()),
            Entry::Removed("x".into()),
            Entry::Removed("y".into()),
        ];
        assert_eq!(read, want);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn the_form_on_disk_is_fixed() {
        let text: Vec<String> = every_entry()
            .iter()
            .map(|entry| serde_json::to_string(entry).unwrap())
            .collect();
        assert_eq!(
            text,
            [
                r#"{"shim":{"pid":7,"start_time":99}}"#,
                r#"{"socket":"/run/x"}"#,
                r#"{"cgroup":{"container":"a","dirs":["/sys/fs/cgroup/a"]}}"#,
                r#"{"agent":{"pid":8,"start_time":100}}"#,
                r#"{"container":{"id":"a","bundle":"/b/a"}}"#,
                r#"{"logger":{"container":"a","pid":9,"start_time":101}}"#,
                r#"{"exit":{"container":"a","status":137,"at":5,"pid":12}}"#,
                r#"{"removed":"a"}"#,
                r#"{"scope":{"container":"a","slice":"p.slice","unit":"c-a.scope"}}"#,
                r#"{"registry":"/run/r"}"#,
            ]
        );
    }

    #[test]
    fn no_journal_is_an_empty_journal() {
        assert!(Journal::read(Path::new("/nonexistent/journal")).is_empty());
    }

    fn scratch(name: &str) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("casemate-journal-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }
}

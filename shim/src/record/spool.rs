//! Policy refusals, where no shim survives to tell of them: a pod that is
//! refused ends with its shim. One file for the whole node, and the one before
//! it, each bounded; root's alone.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::Serialize;

/// Where refusals are kept.
pub const DIRECTORY: &str = "/run/casemate/refused";
/// The file that is written to; the one before it ends in `.1`.
const NAME: &str = "log.jsonl";
const BEFORE: &str = "log.jsonl.1";
/// The most bytes of a file.
const LARGEST: u64 = 128 * 1024;
/// The longest text of one refusal, in characters.
const TEXT: usize = 1024;
/// Who holds the file's lock writes one line.
const LOCKED_WITHIN: Duration = Duration::from_millis(50);

/// One refusal.
#[derive(Serialize)]
struct Line<'a> {
    at: String,
    namespace: &'a str,
    pod: &'a str,
    kind: &'static str,
    container: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<&'a str>,
    text: String,
}

/// Whose request was refused.
#[derive(Debug, Clone, Copy)]
pub struct Whose<'a> {
    /// containerd namespace.
    pub namespace: &'a str,
    /// Pod id.
    pub pod: &'a str,
    /// Container id; the pod's own where the pod itself is refused.
    pub container: &'a str,
}

/// Writes one refusal to the spool in `directory`.
///
/// # Errors
/// What the file system answers, or that another writer holds the file.
pub fn append(
    directory: &Path,
    whose: Whose<'_>,
    rule: Option<&str>,
    text: &str,
) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let line = Line {
        at: crate::log::rfc3339(SystemTime::now()),
        namespace: whose.namespace,
        pod: whose.pod,
        kind: "policy_refusal",
        container: whose.container,
        rule,
        text: text.chars().take(TEXT).collect(),
    };
    let mut line = serde_json::to_vec(&line)?;
    line.push(b'\n');
    let path = directory.join(NAME);
    let until = Instant::now() + LOCKED_WITHIN;
    loop {
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(&path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        if file.metadata()?.len() + line.len() as u64 <= LARGEST {
            return file.write_all(&line);
        }
        // Ours to move: others find the file renamed, and open the new one.
        fs::rename(&path, directory.join(BEFORE))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_spool_is_bounded_root_only_and_keeps_the_newest() {
        let dir = std::env::temp_dir().join(format!("casemate-spool-{}", std::process::id()));
        let whose = Whose {
            namespace: "ns",
            pod: "p",
            container: "c",
        };
        for n in 0..1000 {
            let text = format!("refusal {n} {}", "x".repeat(2000));
            append(&dir, whose, Some("R01"), &text).unwrap();
        }
        let files = [NAME, BEFORE].map(|name| dir.join(name));
        let mut last = String::new();
        for file in &files {
            let data = fs::metadata(file).unwrap();
            assert!(data.len() <= LARGEST, "{}", data.len());
            assert_eq!(data.permissions().mode() & 0o777, 0o600);
        }
        last.push_str(
            fs::read_to_string(&files[0])
                .unwrap()
                .lines()
                .last()
                .unwrap(),
        );
        assert!(last.contains("refusal 999 "), "{last}");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
        fs::remove_dir_all(dir).unwrap();
    }
}

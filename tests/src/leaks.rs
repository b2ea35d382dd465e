//! What a container left on the host: processes, mounts, cgroups, sockets,
//! state files. An empty list is the only good answer.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::error::{Failure, Result};
use crate::procs;
use crate::run::until;

/// Where containerd, shims and casemate keep state and cgroups.
const TREES: [&str; 3] = ["/run/containerd", "/run/casemate", "/sys/fs/cgroup"];

/// Everything on the host whose name has `mark` in it.
///
/// `mark` is a container id or the prefix all ids of a test run share, so that
/// other users of the machine are not mistaken for leaks.
pub fn with_mark(mark: &str) -> Vec<String> {
    let mut found: Vec<String> = procs::with_command(mark)
        .into_iter()
        .map(|pid| format!("process {pid} {}", procs::command_line(pid)))
        .collect();
    found.extend(mounts_with(mark).into_iter().map(|m| format!("mount {m}")));
    for tree in TREES {
        walk(Path::new(tree), 0, &mut |path| {
            if path
                .file_name()
                .is_some_and(|n| n.to_string_lossy().contains(mark))
            {
                found.push(format!("path {}", path.display()));
            }
        });
    }
    found
}

/// Fails if anything whose name has `mark` in it is still there after `limit`.
pub fn expect_none(mark: &str, limit: Duration) -> Result<()> {
    let mut left = Vec::new();
    until("a clean host", limit, || {
        left = with_mark(mark);
        left.is_empty()
    })
    .map(|_| ())
    .map_err(|_| Failure::Unexpected(format!("left behind: {}", left.join("; "))))
}

/// Lines of our mount table that mention `mark`.
pub fn mounts_with(mark: &str) -> Vec<String> {
    fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .filter(|line| line.contains(mark))
        .map(str::to_owned)
        .collect()
}

/// Cgroup directories whose name has `mark` in it.
pub fn cgroups_with(mark: &str) -> Vec<String> {
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), 0, &mut |path| {
        if path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().contains(mark))
        {
            found.push(path.display().to_string());
        }
    });
    found
}

/// Removes the empty cgroups that stand for a containerd namespace; runtimes
/// leave them, since a later container would make them again.
pub fn remove_namespace_cgroups(namespace: &str) {
    let Ok(hierarchies) = fs::read_dir("/sys/fs/cgroup") else {
        return;
    };
    let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(namespace));
    for hierarchy in hierarchies.flatten() {
        // With tasks or children in it the kernel refuses, as it should.
        let _ = fs::remove_dir(hierarchy.path().join(namespace));
    }
}

fn walk(dir: &Path, depth: usize, see: &mut dyn FnMut(&Path)) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        see(&path);
        // Containers' own trees are deep and none of our business.
        if depth < 6 && entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&path, depth + 1, see);
        }
    }
}

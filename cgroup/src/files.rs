//! Reading and writing of interface files, and their formats.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::error::CgroupError;

/// `CGROUP_SUPER_MAGIC`, `CGROUP2_SUPER_MAGIC` (linux/magic.h).
const CGROUP_MAGIC: u64 = 0x0027_e0eb;
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// Whether `path` is on a cgroup file system, and then whether of version 2.
pub(crate) fn on_cgroupfs(path: &Path) -> Option<bool> {
    // The type of f_type differs between architectures; the value doesn't.
    #[allow(clippy::unnecessary_cast)]
    match rustix::fs::statfs(path).ok()?.f_type as u64 & 0xffff_ffff {
        CGROUP_MAGIC => Some(false),
        CGROUP2_MAGIC => Some(true),
        _ => None,
    }
}

/// One write(2): the kernel takes a value only whole. `File` opens with
/// O_CLOEXEC; without O_CREAT a missing interface file is ENOENT.
pub(crate) fn write(path: &Path, value: &str) -> io::Result<()> {
    let mut file = File::options().write(true).open(path)?;
    let written = file.write(value.as_bytes())?;
    if written == value.len() {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::WriteZero,
            "the kernel took only a part of the value",
        ))
    }
}

/// The text of an interface file. Big ones (`memory.stat`) have some kilobytes;
/// `cgroup.procs` grows with the number of processes.
pub(crate) fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

/// A single number; `max` is `u64::MAX`. Missing or odd: `None`.
pub(crate) fn number(path: &Path) -> Option<u64> {
    parse_number(read(path).ok()?.trim())
}

/// A number or `max`.
pub(crate) fn parse_number(text: &str) -> Option<u64> {
    if text == "max" {
        return Some(u64::MAX);
    }
    text.parse().ok()
}

/// `key value` lines; others are left out.
pub(crate) fn lines(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|l| {
            let (key, value) = l.split_once(' ')?;
            Some((key.to_owned(), parse_number(value.trim())?))
        })
        .collect()
}

/// Like [`lines`], of a file that may be missing.
pub(crate) fn read_lines(path: &Path) -> HashMap<String, u64> {
    read(path).map(|t| lines(&t)).unwrap_or_default()
}

/// A line's value in a file of `key value` lines.
pub(crate) fn line(path: &Path, key: &str) -> io::Result<Option<u64>> {
    Ok(lines(&read(path)?).get(key).copied())
}

/// The directories directly below `dir`; none if `dir` is gone.
pub(crate) fn subdirs(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut dirs = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            dirs.push(entry.path());
        }
    }
    Ok(dirs)
}

/// Puts the process ids of `dir` and everything below it into `into`. Ids of
/// processes outside of the reader's pid namespace read as 0 and are left out.
pub(crate) fn collect_pids(dir: &Path, into: &mut Vec<u32>) -> Result<(), CgroupError> {
    let file = dir.join("cgroup.procs");
    match read(&file) {
        Ok(text) => into.extend(
            text.lines()
                .filter_map(|l| l.parse::<u32>().ok())
                .filter(|pid| *pid != 0),
        ),
        // Removed meanwhile: ENOENT at open(2), ENODEV at read(2).
        Err(e) if is_gone(&e) => return Ok(()),
        // A threaded cgroup of version 2 has no process list of its own; its
        // processes are in the list of the domain above.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(e) => return Err(CgroupError::io("list processes: read", file, e)),
    }
    for sub in
        subdirs(dir).map_err(|e| CgroupError::io("list processes: read directory", dir, e))?
    {
        collect_pids(&sub, into)?;
    }
    Ok(())
}

/// Whether the error says that the cgroup was removed.
pub(crate) fn is_gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_keyed_files_are_read_line_by_line() {
        let found =
            lines("low 0\nhigh 3\nmax max\nodd\nodder x\n\noom_kill 18446744073709551615\n");
        assert_eq!(found.get("high"), Some(&3));
        assert_eq!(found.get("max"), Some(&u64::MAX));
        assert_eq!(found.get("oom_kill"), Some(&u64::MAX));
        assert_eq!(found.len(), 4);
        assert!(lines("\u{0}\u{0} -1\n").is_empty());
    }

    #[test]
    fn only_cgroup_file_systems_are_taken_for_one() {
        assert_eq!(on_cgroupfs(Path::new("/proc")), None);
        assert_eq!(on_cgroupfs(Path::new("/nonexistent")), None);
    }
}

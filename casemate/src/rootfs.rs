//! The root file system of a run that names none: busybox and nothing else.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{RunError, Step};

/// Where distributions put it.
const BUSYBOX: [&str; 2] = ["/bin/busybox", "/usr/bin/busybox"];

/// Directories that mounts go on, and those that programs expect.
const DIRECTORIES: [(&str, u32); 9] = [
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr", 0o755),
];

const FILES: [(&str, &str); 3] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    ("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
];

/// Makes the root below `root`, which must not exist.
pub fn make(root: &Path) -> Result<(), RunError> {
    let busybox = find()?;
    DirBuilder::new()
        .mode(0o755)
        .create(root)
        .step("make", root.display())?;
    for (name, mode) in DIRECTORIES {
        let path = root.join(name);
        fs::create_dir(&path)
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
            .step("make", path.display())?;
    }
    for (name, text) in FILES {
        let path = root.join(name);
        fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o644)))
            .step("write", path.display())?;
    }
    let bin = root.join("bin");
    let copy = bin.join("busybox");
    fs::copy(busybox, &copy)
        .and_then(|_| fs::set_permissions(&copy, Permissions::from_mode(0o755)))
        .step("copy", busybox)?;
    for name in applets(busybox)? {
        let link = bin.join(&name);
        if name != "busybox" {
            symlink("busybox", &link).step("make", link.display())?;
        }
    }
    Ok(())
}

fn find() -> Result<&'static str, RunError> {
    const WAY_OUT: &str = "install busybox-static, or name a root with --rootfs DIR";
    let mut reason = "no /bin/busybox to make a root file system of".to_owned();
    for path in BUSYBOX {
        match fs::read(path) {
            Ok(bytes) if is_static(&bytes) => return Ok(path),
            Ok(_) => {
                reason = format!("{path} is not a static binary, so it can't run in a root alone");
            }
            Err(_) => {}
        }
    }
    Err(RunError::Refused(format!("{reason}: {WAY_OUT}")))
}

fn applets(busybox: &str) -> Result<Vec<String>, RunError> {
    let output = Command::new(busybox)
        .arg("--list")
        .stdin(Stdio::null())
        .output()
        .step("run --list of", busybox)?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|name| !name.is_empty() && !name.contains('/'))
        .map(str::to_owned)
        .collect())
}

/// Whether this is a 64-bit little-endian ELF file without an interpreter, see elf(5).
fn is_static(elf: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    let number = |at: usize, length: usize| -> Option<u64> {
        let bytes = elf.get(at..at.checked_add(length)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |n, byte| n << 8 | u64::from(*byte)),
        )
    };
    let position = |at: u64| usize::try_from(at).ok();
    let check = || -> Option<bool> {
        if elf.get(..6)? != b"\x7fELF\x02\x01" {
            return Some(false);
        }
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        for i in 0..count {
            let header = table.checked_add(i.checked_mul(size)?)?;
            if number(position(header)?, 4)? == PT_INTERP {
                return Some(false);
            }
        }
        Some(count > 0)
    };
    check().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(kinds: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0u8; 64 + 56 * kinds.len()];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = kinds.len() as u8;
        for (i, kind) in kinds.iter().enumerate() {
            bytes[64 + 56 * i..][..4].copy_from_slice(&kind.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_binary_with_an_interpreter_is_not_static() {
        assert!(is_static(&elf(&[1, 6])));
        assert!(!is_static(&elf(&[6, 3, 1])));
    }

    #[test]
    fn what_is_no_binary_is_not_static() {
        assert!(!is_static(b"#!/bin/sh\n"));
        assert!(!is_static(b""));
        assert!(!is_static(&elf(&[])));
        let whole = elf(&[1, 3]);
        for length in 0..whole.len() {
            // The interpreter's header may be cut off: never a panic, and
            // never a yes for half a table.
            assert!(!is_static(&whole[..length]));
        }
        let mut far = elf(&[1]);
        far[32..40].fill(0xff);
        assert!(!is_static(&far));
    }
}

//! Which line of containerd has called: read from the caller's own program, as
//! the specification's version doesn't tell. A distribution may build 1.7 with
//! newer libraries (Debian 13 does), and then it stamps what 2.x stamps.
//!
//! A Go program carries its main package's path in the section `.go.buildinfo`
//! (Go's debug/buildinfo): a header of 32 bytes, then, since Go 1.18, the
//! version of Go and a text with the path, each after its length as a varint.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// The most that is read of a table or of the section.
const TABLE_MAX: u64 = 1 << 20;
const INFO_MAX: u64 = 64 << 10;

/// What 1.x and 2.x have before the rest of their packages' paths.
const MODULE: &str = "github.com/containerd/containerd/";

/// The major version of the containerd that has started this process: `None`
/// when the parent is something else, or can't be read.
pub fn major() -> Option<u32> {
    let parent = rustix::process::getppid()?.as_raw_nonzero();
    let program = File::open(format!("/proc/{parent}/exe")).ok()?;
    major_of_path(&main_package(&build_info(&program)?)?)
}

fn major_of_path(path: &str) -> Option<u32> {
    let rest = path.strip_prefix(MODULE)?;
    match rest.strip_prefix('v').and_then(|r| r.split_once('/')) {
        Some((major, _)) if major.parse::<u32>().is_ok() => major.parse().ok(),
        _ => Some(1),
    }
}

/// The line `path` of the text.
fn main_package(info: &[u8]) -> Option<String> {
    const MAGIC: &[u8] = b"\xff Go buildinf:";
    const INLINE: u8 = 2;
    if !info.starts_with(MAGIC) || info.get(15)? & INLINE == 0 {
        return None;
    }
    let (_, rest) = string(info.get(32..)?)?;
    let (text, _) = string(rest)?;
    // The text is between two marks of 16 bytes.
    let text = text.get(16..)?;
    let lines = text.split(|byte| *byte == b'\n');
    let path = lines.into_iter().find_map(|l| l.strip_prefix(b"path\t"))?;
    String::from_utf8(path.to_vec()).ok()
}

/// A varint and that many bytes; and what follows.
fn string(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut length = 0u64;
    for (n, byte) in bytes.iter().enumerate().take(9) {
        length |= u64::from(byte & 0x7f) << (7 * n);
        if byte & 0x80 == 0 {
            let rest = bytes.get(n + 1..)?;
            return rest.split_at_checked(usize::try_from(length).ok()?);
        }
    }
    None
}

/// The section `.go.buildinfo` of a 64-bit little-endian ELF file (elf(5)).
fn build_info(program: &File) -> Option<Vec<u8>> {
    let header = read(program, 0, 64)?;
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count, names) = (
        number(&header, 40, 8)?,
        number(&header, 58, 2)?,
        number(&header, 60, 2)?,
        number(&header, 62, 2)?,
    );
    if size < 64 {
        return None;
    }
    let sections = read(program, table, size.checked_mul(count)?.min(TABLE_MAX))?;
    let section = |n: u64| -> Option<&[u8]> {
        let at = usize::try_from(n.checked_mul(size)?).ok()?;
        sections.get(at..at.checked_add(64)?)
    };
    let bounds = |entry: &[u8]| Some((number(entry, 24, 8)?, number(entry, 32, 8)?));
    let (at, length) = bounds(section(names)?)?;
    let names = read(program, at, length.min(TABLE_MAX))?;
    let wanted = b".go.buildinfo\0";
    let found = (0..count).filter_map(section).find(|entry| {
        number(entry, 0, 4)
            .and_then(|at| names.get(usize::try_from(at).ok()?..))
            .is_some_and(|name| name.starts_with(wanted))
    })?;
    let (at, length) = bounds(found)?;
    read(program, at, length.min(INFO_MAX))
}

fn read(file: &File, at: u64, length: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).ok()?];
    file.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

/// `width` bytes at `at` as a little-endian number.
fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let field = bytes.get(at..at + width)?;
    Some(
        field
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_path_has_the_major_version() {
        let of = |path: &str| major_of_path(&format!("{MODULE}{path}"));
        assert_eq!(of("cmd/containerd"), Some(1));
        assert_eq!(of("v2/cmd/containerd"), Some(2));
        assert_eq!(of("v3/cmd/containerd"), Some(3));
        assert_eq!(of("various/thing"), Some(1));
        assert_eq!(major_of_path("example.org/cmd/server"), None);
    }

    #[test]
    fn the_path_is_read_from_the_text() {
        let mut info = b"\xff Go buildinf:".to_vec();
        info.extend([8, 2]);
        info.resize(32, 0);
        info.extend([6]);
        info.extend(b"go1.24");
        let text = format!(
            "{}path\t{MODULE}cmd/containerd\nbuild\tx=y\n{}",
            "m".repeat(16),
            "e".repeat(16)
        );
        info.extend([text.len() as u8 | 0x80, (text.len() >> 7) as u8]);
        info.extend(text.as_bytes());
        let path = main_package(&info).unwrap();
        assert_eq!(path, format!("{MODULE}cmd/containerd"));
        // Cut anywhere, it is nothing, and never a panic.
        for end in 0..info.len() {
            assert_eq!(main_package(&info[..end]), None);
        }
        info[15] = 0;
        assert_eq!(main_package(&info), None);
    }

    #[test]
    fn a_program_that_is_no_go_program_has_none() {
        let ours = File::open("/proc/self/exe").unwrap();
        assert_eq!(build_info(&ours), None);
        assert_eq!(build_info(&File::open("/proc/self/status").unwrap()), None);
    }
}

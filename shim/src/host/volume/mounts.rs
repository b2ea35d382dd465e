//! What the host has mounted, from /proc/self/mountinfo (proc(5)).

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, PartialEq, Eq)]
struct Mounted {
    id: u64,
    point: PathBuf,
    /// It receives what is mounted on another one.
    receives: bool,
}

fn parse(text: &[u8]) -> Vec<Mounted> {
    text.split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
            let point = unescape(fields.nth(3)?);
            // Options, then optional fields up to a dash.
            let receives = fields
                .skip(1)
                .take_while(|field| *field != b"-")
                .any(|field| field.starts_with(b"shared:") || field.starts_with(b"master:"));
            Some(Mounted {
                id,
                point,
                receives,
            })
        })
        .collect()
}

/// Space, tab, line feed and backslash are written as `\` and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

fn all() -> io::Result<Vec<Mounted>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// Mount points below `path`, relative to it, parents first, each once.
pub fn below(path: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(below_of(all()?, path))
}

fn below_of(all: Vec<Mounted>, path: &Path) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = all
        .into_iter()
        .filter_map(|mounted| Some(mounted.point.strip_prefix(path).ok()?.to_owned()))
        .filter(|relative| !relative.as_os_str().is_empty())
        .collect();
    points.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    points.dedup();
    points
}

/// Whether what is mounted later on the mount that `fd` lies on can arrive in a
/// clone of it.
pub fn tells(fd: &OwnedFd) -> io::Result<bool> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let id = info
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))
        .and_then(|id| id.trim().parse::<u64>().ok())
        .ok_or_else(|| io::Error::other("no mnt_id in fdinfo"))?;
    Ok(all()?.iter().any(|m: &Mounted| m.id == id && m.receives))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        22 21 0:5 / /a/b rw - tmpfs tmpfs rw\n\
        23 21 0:6 / /a rw,relatime master:3 propagate_from:2 - tmpfs tmpfs rw\n\
        24 22 0:7 / /a/b/c\\040d\\134e rw unbindable - tmpfs tmpfs rw\n\
        25 22 0:7 / /a/b rw - tmpfs tmpfs rw\n\
        26 21 0:8 / /ab rw - tmpfs shared:9 rw\n\
        rubbish\n";

    #[test]
    fn mounts_below_a_directory_come_parents_first_and_unescaped() {
        let below = |path: &str| below_of(parse(TEXT), Path::new(path));
        assert_eq!(below("/a"), ["b", "b/c d\\e"].map(PathBuf::from));
        assert_eq!(below("/a/b"), [PathBuf::from("c d\\e")]);
        assert_eq!(below("/ab"), Vec::<PathBuf>::new());
    }

    #[test]
    fn only_optional_fields_tell_of_propagation() {
        let receives: Vec<bool> = parse(TEXT).iter().map(|m| m.receives).collect();
        assert_eq!(receives, [true, false, true, false, false, false]);
    }
}

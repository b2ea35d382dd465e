//! Which hierarchies are mounted, and where a cgroup path lies in each of them.

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD};

use crate::error::CgroupError;
use crate::scope::Scope;

/// The controllers of version 1 by the names that mountinfo's super options
/// use (cgroups(7)); other words there (`rw`, `xattr`, ...) are mount options.
const V1_CONTROLLERS: [&str; 15] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "debug",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
    "rdma",
];

/// What a mounted hierarchy is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Version 1 with controllers.
    V1,
    /// Version 1's `name=systemd`: no controller, but systemd and others find
    /// a process's unit by it.
    Named,
    /// Version 2.
    Unified,
}

/// One mounted hierarchy.
#[derive(Debug, Clone)]
pub(crate) struct Mount {
    /// Where.
    pub(crate) point: PathBuf,
    /// What for.
    pub(crate) kind: Kind,
    /// Version 1's controllers in it.
    pub(crate) controllers: Vec<String>,
    /// Not mounted read-only.
    writable: bool,
    /// The file system's device: two mounts of one hierarchy share it.
    device: String,
}

/// The mounted hierarchies of this host: version 1's (with or without the
/// unified one beside them) or the unified one alone.
#[derive(Debug, Clone)]
pub struct Hierarchy {
    mounts: Vec<Mount>,
}

impl Hierarchy {
    /// Reads `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
    ///
    /// A hierarchy with controllers of version 1 makes the host a version 1
    /// host; `name=systemd` and the unified mount are then joined as well if
    /// they can be written.
    pub fn detect() -> Result<Self, CgroupError> {
        let path = "/proc/self/mountinfo";
        let text = fs::read(path)
            .map_err(|e| CgroupError::io("find cgroup hierarchies: read", path, e))?;
        let mut mounts = parse(&text);
        // A mount may be hidden under a later one: believe only what a path reaches.
        mounts.retain(|m| crate::files::on_cgroupfs(&m.point) == Some(m.kind == Kind::Unified));
        Self::choose(mounts)
    }

    fn choose(mut mounts: Vec<Mount>) -> Result<Self, CgroupError> {
        if mounts.iter().any(|m| m.kind == Kind::V1) {
            mounts.retain(|m| m.kind == Kind::V1 || (m.writable && can_write(&m.point)));
        } else {
            mounts.retain(|m| m.kind == Kind::Unified);
        }
        if mounts.is_empty() {
            return Err(CgroupError::NoHierarchy);
        }
        Ok(Self { mounts })
    }

    /// The unified hierarchy alone, mounted at `point`: what a host without
    /// version 1 has, for tests on a hybrid one.
    #[cfg(test)]
    pub(crate) fn unified_only(point: &Path) -> Self {
        Self {
            mounts: vec![Mount {
                point: point.to_owned(),
                kind: Kind::Unified,
                controllers: Vec::new(),
                writable: true,
                device: String::new(),
            }],
        }
    }

    /// Where they are mounted.
    pub fn roots(&self) -> impl Iterator<Item = &Path> {
        self.mounts.iter().map(|mount| mount.point.as_path())
    }

    /// Whether the unified hierarchy is the only one in use.
    pub fn is_v2(&self) -> bool {
        self.mounts.iter().all(|m| m.kind == Kind::Unified)
    }

    /// Where the hierarchies are mounted.
    pub fn points(&self) -> impl Iterator<Item = &Path> {
        self.mounts.iter().map(|mount| mount.point.as_path())
    }

    /// What [`crate::Cgroup::create`] will make for `path` (a value of
    /// `linux.cgroupsPath`), parents first: the leaf in every hierarchy and the
    /// parents that aren't there yet. For a journal written before the effect.
    ///
    /// A leaf that exists already is an error here, so that a journal never
    /// names a cgroup of somebody else.
    pub fn dirs(&self, path: &str) -> Result<Vec<PathBuf>, CgroupError> {
        let relative = relative(path)?;
        let mut dirs = Vec::new();
        for mount in &self.mounts {
            let leaf = mount.point.join(&relative);
            if leaf.symlink_metadata().is_ok() {
                return Err(CgroupError::Exists { dir: leaf });
            }
            dirs.extend(missing_parents(&mount.point, &relative));
            dirs.push(leaf);
        }
        Ok(dirs)
    }

    /// The leaf of `path` in every hierarchy; that somebody else has one there
    /// is an error as in [`Hierarchy::dirs`].
    pub fn leaves(&self, path: &str) -> Result<Vec<PathBuf>, CgroupError> {
        let relative = relative(path)?;
        let leaves = self.mounts.iter().map(|m| m.point.join(&relative));
        leaves
            .map(|leaf| match leaf.symlink_metadata() {
                Ok(_) => Err(CgroupError::Exists { dir: leaf }),
                Err(_) => Ok(leaf),
            })
            .collect()
    }

    /// What [`crate::Cgroup::complete`] will make for `scope`, once systemd has
    /// made its part, besides the leaves.
    pub fn missing(&self, scope: &Scope) -> Vec<PathBuf> {
        let relative = scope.path();
        let mounts = self.mounts.iter();
        mounts
            .flat_map(|m| missing_parents(&m.point, &relative))
            .collect()
    }

    pub(crate) fn mounts(&self) -> &[Mount] {
        &self.mounts
    }

    /// The mount that `dir` lies strictly below.
    pub(crate) fn mount_of(&self, dir: &Path) -> Option<&Mount> {
        let plain = dir
            .components()
            .all(|c| !matches!(c, std::path::Component::ParentDir));
        self.mounts
            .iter()
            .filter(|m| plain && dir != m.point && dir.starts_with(&m.point))
            .max_by_key(|m| m.point.as_os_str().len())
    }
}

/// The directories between `point` and the leaf that don't exist, outermost first.
pub(crate) fn missing_parents(point: &Path, relative: &Path) -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = relative
        .ancestors()
        .skip(1)
        .filter(|a| !a.as_os_str().is_empty())
        .map(|a| point.join(a))
        .take_while(|d| d.symlink_metadata().is_err())
        .collect();
    dirs.reverse();
    dirs
}

/// Checks a `linux.cgroupsPath` and makes it relative to a hierarchy's root
/// (OCI runtime-spec, config-linux.md, "Cgroups Path"). One in systemd's form
/// lies where systemd would put its scope.
pub(crate) fn relative(path: &str) -> Result<PathBuf, CgroupError> {
    let refuse = |reason| CgroupError::Path {
        path: path.to_owned(),
        reason,
    };
    if let Some(scope) = Scope::parse(path)? {
        return Ok(scope.path());
    }
    if path.contains('\0') {
        return Err(refuse("holds a NUL byte"));
    }
    if path.contains('\n') {
        return Err(refuse("holds a line feed"));
    }
    let mut out = PathBuf::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(refuse("holds a `..` component")),
            // Directories and interface files share one name space.
            p if p.starts_with("cgroup.") => {
                return Err(refuse("holds a component that starts with `cgroup.`"));
            }
            p if p.len() > 255 => return Err(refuse("holds a component of over 255 bytes")),
            p => out.push(p),
        }
    }
    if out.as_os_str().is_empty() {
        return Err(refuse("names the root cgroup"));
    }
    if out.as_os_str().len() > 2048 {
        return Err(refuse("is longer than 2048 bytes"));
    }
    Ok(out)
}

fn can_write(point: &Path) -> bool {
    rustix::fs::accessat(CWD, point, Access::WRITE_OK, AtFlags::empty()).is_ok()
}

/// Takes the cgroup mounts out of a mountinfo text; one per hierarchy, and
/// only such as show a hierarchy from its root.
fn parse(text: &[u8]) -> Vec<Mount> {
    let mut mounts: Vec<Mount> = Vec::new();
    for line in text.split(|b| *b == b'\n') {
        let Some(mount) = parse_line(line) else {
            continue;
        };
        if !mounts.iter().any(|m| m.device == mount.device) {
            mounts.push(mount);
        }
    }
    mounts
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|b| *b == b' ');
    let device = String::from_utf8(words.nth(2)?.to_vec()).ok()?;
    let root = words.next()?;
    let point = PathBuf::from(std::ffi::OsString::from_vec(unescape(words.next()?)));
    let options = words.next()?;
    // Optional fields, ended by a single hyphen.
    words.by_ref().find(|w| *w == b"-")?;
    let kind = words.next()?;
    let super_options = std::str::from_utf8(words.nth(1)?).ok()?;
    if root != b"/" {
        return None;
    }
    let read_only = |o: &str| o.split(',').any(|w| w == "ro");
    let writable = !read_only(std::str::from_utf8(options).ok()?) && !read_only(super_options);
    let mut controllers = Vec::new();
    let kind = match kind {
        b"cgroup2" => Kind::Unified,
        b"cgroup" => {
            controllers.extend(
                super_options
                    .split(',')
                    .filter(|w| V1_CONTROLLERS.contains(w))
                    .map(str::to_owned),
            );
            if !controllers.is_empty() {
                Kind::V1
            } else if super_options.split(',').any(|w| w == "name=systemd") {
                Kind::Named
            } else {
                return None;
            }
        }
        _ => return None,
    };
    Some(Mount {
        point,
        kind,
        controllers,
        writable,
        device,
    })
}

/// Space, tab, line feed and backslash are octal in mountinfo.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|d| {
            let d = std::str::from_utf8(d).ok()?;
            u8::from_str_radix(d, 8).ok()
        });
        match (first, octal) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
43 31 0:36 / /mnt/pids rw,relatime - cgroup cgroup rw,pids
44 31 0:55 /docker/x /mnt/part rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
45 31 0:39 / /sys/fs/cgroup/own ro,relatime - cgroup cgroup rw,name=own
41 31 0:38 / /sys/fs/cgroup/a\\040b rw,relatime - cgroup2 cgroup2 rw
garbage
";

    #[test]
    fn mountinfo_gives_each_hierarchy_once_and_only_from_its_root() {
        let found: Vec<(String, Kind, String)> = parse(HYBRID.as_bytes())
            .into_iter()
            .map(|m| {
                (
                    m.point.to_string_lossy().into_owned(),
                    m.kind,
                    m.controllers.join(","),
                )
            })
            .collect();
        let want = [
            ("/sys/fs/cgroup/cpu,cpuacct", Kind::V1, "cpu,cpuacct"),
            ("/sys/fs/cgroup/pids", Kind::V1, "pids"),
            ("/sys/fs/cgroup/systemd", Kind::Named, ""),
            ("/sys/fs/cgroup/a b", Kind::Unified, ""),
        ];
        assert_eq!(
            found,
            want.map(|(p, k, c)| (p.to_owned(), k, c.to_owned()))
                .to_vec()
        );
    }

    #[test]
    fn only_the_unified_mount_makes_a_version_2_host() {
        let line = b"25 23 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        let host = Hierarchy::choose(parse(line)).unwrap();
        assert!(host.is_v2());
        assert!(!Hierarchy::choose(parse(HYBRID.as_bytes())).unwrap().is_v2());
        assert!(matches!(
            Hierarchy::choose(parse(b"1 2 0:3 / / rw - ext4 /dev/vda rw\n")),
            Err(CgroupError::NoHierarchy)
        ));
    }

    #[test]
    fn paths_stay_below_the_root() {
        assert_eq!(relative("/default/abc").unwrap(), Path::new("default/abc"));
        assert_eq!(relative("a//./b/").unwrap(), Path::new("a/b"));
        for bad in [
            "",
            "/",
            ".",
            "/a/../b",
            "..",
            "a\0b",
            "a\nb",
            "/a/cgroup.procs",
        ] {
            assert!(
                matches!(relative(bad), Err(CgroupError::Path { .. })),
                "{bad:?}"
            );
        }
        assert!(relative(&"x".repeat(300)).is_err());
        // A colon alone isn't systemd's form.
        assert!(relative("/k8s/cri-containerd:abc").is_ok());
        assert_eq!(
            relative("kubepods-pod1.slice:cri-containerd:abc").unwrap(),
            Path::new("kubepods.slice/kubepods-pod1.slice/cri-containerd-abc.scope")
        );
    }

    #[test]
    fn a_directory_belongs_to_the_innermost_mount_and_never_is_one() {
        let host = Hierarchy {
            mounts: parse(HYBRID.as_bytes()),
        };
        let of = |d: &str| {
            host.mount_of(Path::new(d))
                .map(|m| m.point.to_string_lossy().into_owned())
        };
        assert_eq!(
            of("/sys/fs/cgroup/pids/a"),
            Some("/sys/fs/cgroup/pids".into())
        );
        assert_eq!(of("/sys/fs/cgroup/pids"), None);
        assert_eq!(of("/sys/fs/cgroup/pids/../cpu"), None);
        assert_eq!(of("/etc"), None);
    }
}

//! A leaf in every hierarchy: made, found again, and handed to a new process.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxResources;
use rustix::fs::{CWD, Mode, OFlags};

use crate::error::CgroupError;
use crate::files;
use crate::hierarchy::{self, Hierarchy, Kind, Mount};
use crate::limits::Limits;
use crate::scope::Scope;
use crate::systemd;

/// The controllers of version 2 that limits and numbers here come from.
const V2_CONTROLLERS: [&str; 7] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids", "rdma"];

/// How a new process gets into the cgroup.
#[derive(Debug)]
pub enum Attach {
    /// The `tasks` file of each hierarchy (of the unified one beside them
    /// `cgroup.procs`), O_WRONLY|O_CLOEXEC: the single-threaded child writes `0`
    /// to each and closes them before anything else runs in it; they carry the
    /// opener's authority (cgroups(7)).
    V1(Vec<OwnedFd>),
    /// The directory, for `clone3(CLONE_INTO_CGROUP)` (clone(2)).
    V2(OwnedFd),
}

/// A container's (or the agent's) place in the hierarchies.
#[derive(Debug)]
pub struct Cgroup {
    /// Everything that was made: parents before their leaf, hierarchy by hierarchy.
    made: Vec<PathBuf>,
    /// The leaf of each hierarchy.
    pub(crate) leaves: Vec<Leaf>,
    /// Why controllers of version 2 couldn't be enabled on the way down; told
    /// only when a limit needs one of them.
    pub(crate) not_enabled: Vec<String>,
    /// The scope of systemd's that this is.
    scope: Option<Scope>,
    /// What was set last, by us.
    pub(crate) limits: Limits,
}

/// The cgroup in one hierarchy.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) dir: PathBuf,
    pub(crate) kind: Kind,
    pub(crate) controllers: Vec<String>,
}

impl Leaf {
    fn new(dir: PathBuf, mount: &Mount) -> Self {
        Self {
            dir,
            kind: mount.kind,
            controllers: mount.controllers.clone(),
        }
    }
}

impl Cgroup {
    /// Makes the leaf for `path` (a value of `linux.cgroupsPath`) and the
    /// parents it needs in every hierarchy. On version 1 the chain inherits
    /// `cpuset.cpus` and `cpuset.mems`, without which nothing can be attached;
    /// on version 2 the controllers are enabled all the way down, and one that
    /// can't be is an error only of the limit that needs it.
    ///
    /// On an error everything made so far is removed again.
    pub fn create(h: &Hierarchy, path: &str) -> Result<Cgroup, CgroupError> {
        let relative = hierarchy::relative(path)?;
        let mut cgroup = Cgroup {
            made: Vec::new(),
            leaves: Vec::new(),
            not_enabled: Vec::new(),
            scope: None,
            limits: Limits::default(),
        };
        cgroup.create_all(h, &relative)?;
        Ok(cgroup)
    }

    /// Makes what systemd didn't make of a scope that it has just started: on
    /// version 1 it has no part in some hierarchies, and controllers that it
    /// doesn't know are enabled here. The rest is as in [`Cgroup::create`].
    pub fn complete(h: &Hierarchy, scope: &Scope) -> Result<Cgroup, CgroupError> {
        let mut cgroup = Cgroup {
            made: Vec::new(),
            leaves: Vec::new(),
            not_enabled: Vec::new(),
            scope: Some(scope.clone()),
            limits: Limits::default(),
        };
        cgroup.create_all(h, &scope.path())?;
        Ok(cgroup)
    }

    fn create_all(&mut self, h: &Hierarchy, relative: &Path) -> Result<(), CgroupError> {
        for mount in h.mounts() {
            if let Err(error) = self.create_in(mount, relative) {
                // Nothing can be in there yet, so one try is enough.
                if let Err(e) = self.remove(std::time::Duration::ZERO) {
                    log::warn!("take back a half-made cgroup: {e}");
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn create_in(&mut self, mount: &Mount, relative: &Path) -> Result<(), CgroupError> {
        let leaf = mount.point.join(relative);
        // Somebody else's clean-up may take an empty parent away between our
        // look and our mkdir(2), hence more than one try.
        for attempt in 1.. {
            let parents = hierarchy::missing_parents(&mount.point, relative);
            for dir in parents.iter().chain([&leaf]) {
                match fs::create_dir(dir) {
                    Ok(()) => {
                        if !self.made.contains(dir) {
                            self.made.push(dir.clone());
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                        if *dir == leaf && self.scope.is_some() {
                            // Ours since systemd made it for us.
                            self.made.push(leaf.clone());
                        } else if *dir == leaf {
                            return Err(CgroupError::Exists { dir: dir.clone() });
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::NotFound && attempt < 10 => break,
                    Err(e) => return Err(CgroupError::io("create cgroup: mkdir", dir, e)),
                }
            }
            if leaf.is_dir() {
                break;
            }
        }
        self.leaves.push(Leaf::new(leaf.clone(), mount));
        match mount.kind {
            Kind::V1 if mount.controllers.iter().any(|c| c == "cpuset") => {
                inherit_cpuset(&mount.point, &leaf)
            }
            Kind::Unified => {
                self.enable_controllers(&mount.point, relative);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Writes `cgroup.subtree_control` from the root down to the leaf's parent
    /// (kernel: Documentation/admin-guide/cgroup-v2.rst, "Controlling Controllers").
    fn enable_controllers(&mut self, point: &Path, relative: &Path) {
        let mut dir = point.to_owned();
        for part in relative.components() {
            let words = |name: &str| -> Vec<String> {
                files::read(&dir.join(name))
                    .unwrap_or_default()
                    .split_whitespace()
                    .map(str::to_owned)
                    .collect()
            };
            let on = words("cgroup.subtree_control");
            let wanted: Vec<String> = words("cgroup.controllers")
                .into_iter()
                .filter(|c| V2_CONTROLLERS.contains(&c.as_str()) && !on.contains(c))
                .map(|c| format!("+{c}"))
                .collect();
            let file = dir.join("cgroup.subtree_control");
            // All at once first; one that is refused must not take the others along.
            if !wanted.is_empty() && files::write(&file, &wanted.join(" ")).is_err() {
                for one in &wanted {
                    if let Err(e) = files::write(&file, one) {
                        self.not_enabled
                            .push(format!("write {one:?} to {file:?}: {e}"));
                    }
                }
            }
            dir.push(part);
        }
    }

    /// The cgroup that an earlier process made, from its journal: `dirs` as
    /// [`Hierarchy::dirs`] or [`Cgroup::dirs`] gave them. Directories that
    /// aren't below a mounted hierarchy are left alone, missing ones are fine.
    pub fn open(dirs: &[PathBuf]) -> Cgroup {
        let mut cgroup = Cgroup {
            made: Vec::new(),
            leaves: Vec::new(),
            not_enabled: Vec::new(),
            scope: None,
            limits: Limits::default(),
        };
        let hierarchy = match Hierarchy::detect() {
            Ok(hierarchy) => hierarchy,
            Err(e) => {
                log::warn!("open cgroup {dirs:?}: {e}");
                return cgroup;
            }
        };
        for dir in dirs {
            let Some(mount) = hierarchy.mount_of(dir) else {
                log::warn!("open cgroup {dir:?}: not below a mounted hierarchy: left alone");
                continue;
            };
            cgroup.made.push(dir.clone());
            // A parent is a part of another listed path; a leaf is not.
            if !dirs.iter().any(|d| d != dir && d.starts_with(dir)) {
                cgroup.leaves.push(Leaf::new(dir.clone(), mount));
            }
        }
        cgroup
    }

    /// What a new process needs to get in.
    pub fn attach(&self) -> Result<Attach, CgroupError> {
        if self.is_v2() {
            let leaf = self.first()?;
            return Ok(Attach::V2(open_dir(&leaf.dir)?));
        }
        // systemd sees by the unified hierarchy beside version 1's whether a scope
        // is still in use. For other cgroups it isn't worth its price.
        let unified_too = self.scope.is_some();
        let mut leaves: Vec<&Leaf> = self
            .leaves
            .iter()
            .filter(|l| unified_too || l.kind != Kind::Unified)
            .collect();
        // The freezer first: what is in any other leaf can then be stopped.
        leaves.sort_by_key(|l| !l.controllers.iter().any(|c| c == "freezer"));
        let mut tasks = Vec::with_capacity(leaves.len());
        for leaf in leaves {
            let file = leaf.dir.join(match leaf.kind {
                Kind::Unified => "cgroup.procs",
                _ => "tasks",
            });
            let fd = rustix::fs::openat(
                CWD,
                &file,
                OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
                Mode::empty(),
            )
            .map_err(|e| CgroupError::io("attach to cgroup: open", file, e.into()))?;
            tasks.push(fd);
        }
        Ok(Attach::V1(tasks))
    }

    /// On a version 1 host with the unified hierarchy beside it: the leaf
    /// there, for `clone3(CLONE_INTO_CGROUP)` besides the `tasks` files, which
    /// the unified hierarchy hasn't got. Optional: limits, numbers and
    /// [`Cgroup::kill`] work without.
    pub fn unified_dir(&self) -> Result<Option<OwnedFd>, CgroupError> {
        self.unified()
            .filter(|_| !self.is_v2())
            .map(|l| open_dir(&l.dir))
            .transpose()
    }

    /// The process ids in the leaf and below it, of all hierarchies together,
    /// sorted. A process that is still attaching is in some of them only.
    pub fn pids(&self) -> Result<Vec<u32>, CgroupError> {
        let mut pids = Vec::new();
        for leaf in &self.leaves {
            files::collect_pids(&leaf.dir, &mut pids)?;
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// What [`Cgroup::create`] made, parents first.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.made
    }

    /// The scope that this is, if systemd made it.
    pub fn scope(&self) -> Option<&Scope> {
        self.scope.as_ref()
    }

    /// `r` as this cgroup can hold it: in a scope, CPU time is rounded up to whole percents
    /// of a CPU, since systemd keeps no others; elsewhere it is `r`.
    pub fn held<'a>(&self, r: &'a LinuxResources) -> Cow<'a, LinuxResources> {
        match self.scope {
            None => Cow::Borrowed(r),
            Some(_) => systemd::quota::held(r, self.bandwidth_now()),
        }
    }

    fn bandwidth_now(&self) -> systemd::quota::Now {
        if self.is_v2() {
            let file = self.unified().map(|leaf| leaf.dir.join("cpu.max"));
            let text = file
                .and_then(|file| files::read(&file).ok())
                .unwrap_or_default();
            let mut words = text.split_whitespace().map(|word| word.parse().ok());
            return (words.next().flatten(), words.next().flatten());
        }
        // -1 for no limit is no number here.
        let number = |file: &str| files::number(&self.v1("cpu")?.join(file));
        (number("cpu.cfs_quota_us"), number("cpu.cfs_period_us"))
    }

    /// The limits that were set last: files, and what was written to them. Of those
    /// with a line for each device only version 1's `devices.list`, as it must then
    /// be; [`crate::DEVICE_PROGRAM`] stands for version 2's.
    pub fn limits(&self) -> BTreeMap<PathBuf, String> {
        self.limits.all()
    }

    /// The directory in each hierarchy.
    pub fn leaf_dirs(&self) -> impl Iterator<Item = &Path> {
        self.leaves.iter().map(|l| l.dir.as_path())
    }

    /// Whether only the unified hierarchy is in use.
    pub fn is_v2(&self) -> bool {
        self.leaves.iter().all(|l| l.kind == Kind::Unified)
    }

    /// The leaf in the unified hierarchy.
    pub(crate) fn unified(&self) -> Option<&Leaf> {
        self.leaves.iter().find(|l| l.kind == Kind::Unified)
    }

    /// The directory of a controller of version 1.
    pub(crate) fn v1(&self, controller: &str) -> Option<&Path> {
        self.leaves
            .iter()
            .find(|l| l.controllers.iter().any(|c| c == controller))
            .map(|l| l.dir.as_path())
    }

    pub(crate) fn first(&self) -> Result<&Leaf, CgroupError> {
        self.leaves.first().ok_or(CgroupError::NoHierarchy)
    }
}

fn open_dir(dir: &Path) -> Result<OwnedFd, CgroupError> {
    rustix::fs::openat(
        CWD,
        dir,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )
    .map_err(|e| CgroupError::io("attach to cgroup: open", dir, e.into()))
}

/// Copies `cpuset.cpus` and `cpuset.mems` down the chain where they are empty
/// (kernel: Documentation/admin-guide/cgroup-v1/cpusets.rst).
fn inherit_cpuset(point: &Path, leaf: &Path) -> Result<(), CgroupError> {
    let step = "create cgroup: inherit";
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let mut value = String::new();
        let mut chain: Vec<&Path> = leaf
            .ancestors()
            .take_while(|d| d.starts_with(point))
            .collect();
        chain.reverse();
        for dir in chain {
            let file = dir.join(name);
            let own = files::read(&file).map_err(|e| CgroupError::io(step, &file, e))?;
            if own.trim().is_empty() {
                files::write(&file, value.trim()).map_err(|e| CgroupError::io(step, &file, e))?;
            } else {
                value = own;
            }
        }
    }
    Ok(())
}

//! Volumes: binds of host files and directories, opened by the shim, ids mapped,
//! flags set, handed on as detached mounts. What can't be mapped is decided by
//! [`table`].

mod copy;
mod mounts;
mod table;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use casemate_spec::config::WithoutIdmap;
use casemate_spec::{IdMap, MountSpec, PropagationKind};
use casemate_sys::mount::{self, Change, NewFs, attr, clone_tree, propagation};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::Step;
use super::staging::Staging;
use crate::plan::{attributes, cleared_attributes};
use crate::sandbox::SandboxError;
use table::{Class, Fate, Row};

/// A bind, detached.
pub struct Volume {
    /// The mount itself, with all below it where they could be treated alike.
    pub top: OwnedFd,
    /// Mounts to attach below it, parents first, where they could not.
    pub below: Vec<(PathBuf, OwnedFd)>,
    /// It is a directory.
    pub directory: bool,
}

/// Whose containers it is for, and what is to become of what can't be mapped.
pub struct Terms<'a> {
    /// Maps the ids.
    pub userns: &'a OwnedFd,
    /// Host id of the containers' root.
    pub root_id: u32,
    /// The node's choice.
    pub policy: WithoutIdmap,
    /// Where mounts can be held.
    pub staging: &'a Staging,
}

/// What a mount becomes.
enum Shown {
    As(OwnedFd),
    /// Nothing of it; a directory is covered.
    Hidden,
}

struct Opening<'a> {
    spec: &'a MountSpec,
    terms: &'a Terms<'a>,
    /// Takes it away from, or makes it follow, the mount that it was cloned from.
    propagation: u64,
    object: String,
}

/// Makes the bind that `spec` describes, of its source.
pub fn open(spec: &MountSpec, source: &OwnedFd, terms: &Terms<'_>) -> Result<Volume, SandboxError> {
    let object = super::sources::object(spec);
    let receives = spec.receives();
    if receives && !mounts::tells(source).step("look at", &object)? {
        return Err(SandboxError::Invalid(format!(
            "{object}: {} asks for mounts that are made later, and the host's mount there is \
             private; share it (mount --make-rshared), or use mountPropagation None",
            match spec.flags.propagation.map(|p| p.kind) {
                Some(PropagationKind::Slave) => "slave propagation",
                _ => "its propagation",
            }
        )));
    }
    let opening = Opening {
        spec,
        terms,
        propagation: if receives {
            propagation::SLAVE
        } else {
            propagation::PRIVATE
        },
        object,
    };
    opening.open(source)
}

impl Opening<'_> {
    fn open(&self, source: &OwnedFd) -> Result<Volume, SandboxError> {
        let stat = rustix::fs::fstat(source).step("look at", &self.object)?;
        let directory = FileType::from_raw_mode(stat.st_mode).is_dir();
        let whole = directory && self.spec.flags.rbind;
        self.refuse_kernels_own(source)?;
        let tree = self.clone(source, whole)?;
        // All alike, if all can be mapped; else one by one.
        match self.map(&tree, whole) {
            Ok(()) => {
                self.set_flags(&tree, true, whole)?;
                return Ok(Volume {
                    top: tree,
                    below: Vec::new(),
                    directory,
                });
            }
            Err(e) if cant_map(&e) => {}
            Err(e) => return Err(e).step("map ids of", &self.object),
        }
        let alone = if whole {
            self.clone(source, false)?
        } else {
            tree
        };
        let Shown::As(top) = self.show(alone, "")? else {
            return Err(self.refusal(table::of(magic(source)?), ""));
        };
        let below = if whole {
            self.below(source)?
        } else {
            Vec::new()
        };
        Ok(Volume {
            top,
            below,
            directory,
        })
    }

    fn refuse_kernels_own(&self, source: &OwnedFd) -> Result<(), SandboxError> {
        let row = table::of(magic(source)?);
        if row.class == Class::Kernel {
            return Err(self.refusal(row, ""));
        }
        Ok(())
    }

    fn clone(&self, source: &OwnedFd, whole: bool) -> Result<OwnedFd, SandboxError> {
        let tree = clone_tree(source, Path::new(""), whole, true).step("open", &self.object)?;
        // First of all: a clone of a shared mount is its peer, and what is done to
        // one of them is done to the other.
        let change = Change {
            propagation: self.propagation,
            recursive: whole,
            ..Change::default()
        };
        mount::set_attributes(&tree, change).step("cut off", &self.object)?;
        Ok(tree)
    }

    fn map(&self, tree: &OwnedFd, recursive: bool) -> std::io::Result<()> {
        let change = Change {
            userns: Some(self.terms.userns.as_fd()),
            recursive,
            ..Change::default()
        };
        mount::set_attributes(tree, change)
    }

    /// What was asked for: of the mount itself (`top`), and of all of them.
    fn set_flags(&self, tree: &OwnedFd, top: bool, recursive: bool) -> Result<(), SandboxError> {
        let flags = &self.spec.flags;
        let own = (&flags.attrs, false, top);
        let all = (&flags.recursive, recursive, true);
        for (attrs, recursive, wanted) in [own, all] {
            let (set, clear) = (attributes(attrs), cleared_attributes(attrs));
            if wanted && (set | clear) != 0 {
                let change = Change {
                    set,
                    clear,
                    recursive,
                    ..Change::default()
                };
                mount::set_attributes(tree, change).step("set flags of", &self.object)?;
            }
        }
        Ok(())
    }

    /// One mount: the volume itself (`place` empty) or one below it.
    fn show(&self, tree: OwnedFd, place: &str) -> Result<Shown, SandboxError> {
        let row = table::of(magic(&tree)?);
        let top = place.is_empty();
        if row.class == Class::Kernel {
            log::warn!("{}: {} at {place} is left out", self.object, row.name);
            return Ok(Shown::Hidden);
        }
        self.set_flags(&tree, top, false)?;
        match self.map(&tree, false) {
            Ok(()) => return Ok(Shown::As(tree)),
            Err(e) if cant_map(&e) => {}
            Err(e) => return Err(e).step("map ids of", &self.object),
        }
        let demanded = match self.spec.flags.idmap {
            Some(IdMap::Mount) => top,
            Some(IdMap::Recursive) => true,
            None => false,
        };
        let read_only = mount::is_read_only(&tree).step("look at", &self.object)?;
        let fate = table::fate(row.class, read_only, self.terms.policy);
        match fate {
            _ if demanded => Err(self.refusal(row, place)),
            Fate::Copy if copy::is_closed(&tree).step("look into", &self.object)? => {
                self.copy(&tree, row, place).map(Shown::As)
            }
            Fate::PassThrough | Fate::Copy => {
                log::warn!(
                    "{}: ids of {}{place} can't be mapped; its files are nobody's inside",
                    self.object,
                    row.name
                );
                Ok(Shown::As(tree))
            }
            // Somewhere below a volume that is otherwise good: only read.
            Fate::Refuse if !top && self.terms.policy != WithoutIdmap::Refuse => {
                let change = Change {
                    set: attr::RDONLY,
                    ..Change::default()
                };
                mount::set_attributes(&tree, change).step("set flags of", &self.object)?;
                log::warn!(
                    "{}: ids of {} at {place} can't be mapped; it is read-only, and its files \
                     are nobody's inside",
                    self.object,
                    row.name
                );
                Ok(Shown::As(tree))
            }
            Fate::Refuse => Err(self.refusal(row, place)),
        }
    }

    fn copy(&self, tree: &OwnedFd, row: &Row, place: &str) -> Result<OwnedFd, SandboxError> {
        let change = Change {
            set: attr::NODEV,
            ..Change::default()
        };
        mount::set_attributes(tree, change).step("set flags of", &self.object)?;
        let copy = copy::make(tree, self.terms.root_id, self.terms.staging).map_err(|e| {
            SandboxError::Failed(format!(
                "{}: ids of {}{place} can't be mapped on this kernel, some of its files aren't \
                 for others to read, and it can't be copied: {e}; use a newer kernel, or set \
                 other modes (defaultMode)",
                self.object, row.name
            ))
        })?;
        self.set_flags(&copy, place.is_empty(), false)?;
        let change = Change {
            set: attr::RDONLY,
            ..Change::default()
        };
        mount::set_attributes(&copy, change).step("set flags of", &self.object)?;
        log::warn!(
            "{}: ids of {}{place} can't be mapped; the pod gets a copy, which won't change",
            self.object,
            row.name
        );
        Ok(copy)
    }

    /// All mounts below, each by itself.
    fn below(&self, source: &OwnedFd) -> Result<Vec<(PathBuf, OwnedFd)>, SandboxError> {
        let link = mount::own_link(source);
        let path = rustix::fs::readlinkat(CWD, link.as_str(), Vec::new())
            .step("find the path of", &self.object)?;
        let path = PathBuf::from(path.to_string_lossy().into_owned());
        let mut shown: Vec<(PathBuf, OwnedFd)> = Vec::new();
        let mut covered: Vec<PathBuf> = Vec::new();
        for place in mounts::below(&path).step("list mounts below", &self.object)? {
            if covered.iter().any(|c| place.starts_with(c)) {
                continue;
            }
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let there = match rustix::fs::open(path.join(&place), flags, Mode::empty()) {
                Ok(there) => there,
                // Gone meanwhile, or below something that covers it.
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                Err(e) => return Err(e).step("open mounts below", &self.object),
            };
            let stat = rustix::fs::fstat(&there).step("look at", &self.object)?;
            let at = format!("/{}", place.display());
            match self.show(self.clone(&there, false)?, &at)? {
                Shown::As(tree) => shown.push((place, tree)),
                Shown::Hidden => {
                    if FileType::from_raw_mode(stat.st_mode).is_dir() {
                        let empty = empty().step("cover mounts below", &self.object)?;
                        shown.push((place.clone(), empty));
                    }
                    covered.push(place);
                }
            }
        }
        Ok(shown)
    }

    fn refusal(&self, row: &Row, place: &str) -> SandboxError {
        let name = match row.since {
            "" => row.name.to_owned(),
            since => format!("{} (mapped since Linux {since})", row.name),
        };
        let object = &self.object;
        SandboxError::Failed(match row.class {
            Class::Kernel => format!(
                "{object}: {name}{place} shows the host's kernel; mount only the files that are \
                 needed"
            ),
            _ if self.spec.flags.idmap.is_some() => format!(
                "map ids of {object}: {name}{place} has no id-mapped mounts on this kernel, and \
                 its mapping was asked for (mounts[].uidMappings); put it on a file system that \
                 has them (docs/volumes.md), or remove hostUsers: false"
            ),
            _ => format!(
                "map ids of {object}: {name}{place} has no id-mapped mounts on this kernel, so \
                 what the pod writes would have ids that no other pod has; put it on a file \
                 system that has them (docs/volumes.md), mount it read-only, or set \
                 volumes.without_idmap = \"pass-through\" in config.toml"
            ),
        })
    }
}

/// What the kernel says where a mount can't be mapped: its file system can't
/// (EINVAL), or it is mapped already (EPERM).
fn cant_map(error: &std::io::Error) -> bool {
    [Errno::INVAL, Errno::PERM]
        .iter()
        .any(|e| error.raw_os_error() == Some(e.raw_os_error()))
}

fn magic(fd: &OwnedFd) -> Result<u64, SandboxError> {
    let statfs = rustix::fs::fstatfs(fd).step("look at", "a volume's file system")?;
    Ok(statfs.f_type as u64 & 0xffff_ffff)
}

fn empty() -> std::io::Result<OwnedFd> {
    let fs = NewFs::open("tmpfs")?;
    fs.string("nr_inodes", "2")?;
    fs.string("mode", "0555")?;
    fs.mount(attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC)
}

//! Mounts of the specification, with their options typed (mount(8), mount(2)
//! and the OCI specification's config.md, "Linux mount options").

use oci_spec::runtime::Mount;

use crate::error::{Refusal, one_line};
use crate::paths::{plain_absolute, within};
use crate::rules::{
    MOUNT_DESTINATION, MOUNT_IDMAP, MOUNT_OPTION, MOUNT_PROPAGATION, MOUNT_SOURCE, MOUNT_TYPE, Rule,
};
use crate::users::{self, PodUsers};

/// Filesystems a specification may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountKind {
    /// The container's own proc.
    Proc,
    /// Of the pod's network namespace, always read-only.
    Sysfs,
    /// Memory.
    Tmpfs,
    /// The container's own pseudo-terminals.
    Devpts,
    /// POSIX message queues of the pod's ipc namespace.
    Mqueue,
    /// A file or directory of the host.
    Bind,
    /// The container's cgroup, whichever version the node has.
    Cgroup,
}

/// When reads update access times, see mount(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Atime {
    /// `relatime`.
    Relative,
    /// `noatime`.
    Never,
    /// `strictatime`.
    Strict,
}

/// Attributes of one mount, as in mount_setattr(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MountAttrs {
    /// `ro`.
    pub ro: bool,
    /// `nosuid`.
    pub nosuid: bool,
    /// `nodev`.
    pub nodev: bool,
    /// `noexec`.
    pub noexec: bool,
    /// `nosymfollow`.
    pub nosymfollow: bool,
    /// `nodiratime`.
    pub nodiratime: bool,
    /// One of `noatime`, `relatime`, `strictatime`; unset keeps what is.
    pub atime: Option<Atime>,
}

/// How mounts and unmounts travel, see mount_namespaces(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PropagationKind {
    /// No travel.
    Private,
    /// From the host into the container only.
    Slave,
    /// Both ways.
    Shared,
    /// No travel, and can't be bound.
    Unbindable,
}

/// An id mapping that was asked for. It is the pod's own, which every bind is
/// given anyway, but then what can't be mapped is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdMap {
    /// `uidMappings`, or `idmap`: of the mount itself.
    Mount,
    /// `ridmap`: of all mounts below too.
    Recursive,
}

/// A propagation option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Propagation {
    /// Which.
    pub kind: PropagationKind,
    /// `r…`: for all mounts below too.
    pub recursive: bool,
}

/// Options of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MountFlags {
    /// For the mount itself.
    pub attrs: MountAttrs,
    /// For the mount and everything below (`rro`, `rnosuid`…).
    pub recursive: MountAttrs,
    /// `rbind`: with the mounts below.
    pub rbind: bool,
    /// Propagation, when asked for.
    pub propagation: Option<Propagation>,
    /// Ids must be mapped.
    pub idmap: Option<IdMap>,
    /// `sync` of the filesystem.
    pub sync: bool,
    /// `dirsync` of the filesystem.
    pub dirsync: bool,
    /// `lazytime` of the filesystem.
    pub lazytime: bool,
    /// Options of the filesystem: (`size`, `64m`), or a key alone.
    pub data: Vec<(String, Option<String>)>,
}

/// One mount, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountSpec {
    /// Absolute path in the container, without `.`, `..` or doubled slashes.
    pub destination: String,
    /// What to mount.
    pub kind: MountKind,
    /// For a bind: absolute path on the host. Otherwise a label.
    pub source: String,
    /// How.
    pub flags: MountFlags,
}

impl MountSpec {
    /// Makes it, and all below it, read-only; true if it wasn't.
    pub fn make_read_only(&mut self) -> bool {
        let flags = &mut self.flags;
        let was = flags.attrs.ro && (!flags.rbind || flags.recursive.ro);
        let written = flags.attrs.ro;
        flags.attrs.ro = true;
        flags.recursive.ro |= flags.rbind;
        !(was || written)
    }

    /// What is mounted below its source later is to arrive in the container.
    #[must_use]
    pub fn receives(&self) -> bool {
        self.flags
            .propagation
            .is_some_and(|p| p.kind == PropagationKind::Slave)
    }
}

/// Files of proc that lxcfs and its like may cover: read-only statistics.
const PROC_FILES: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
];

/// What [`check`] made stricter than it was written: a note for each.
pub(crate) type Notes = Vec<String>;

/// Checks one mount of the specification; `index` is for messages.
pub(crate) fn check(
    mount: &Mount,
    index: usize,
    nosuid: bool,
    users: Option<&PodUsers>,
) -> Result<(MountSpec, Notes), Refusal> {
    let written = mount.destination().to_string_lossy().into_owned();
    let no = |rule: &'static Rule, part: &str, detail: String| -> Result<_, Refusal> {
        Err(Refusal::new(
            rule,
            format!("mounts[{index}].{part}"),
            detail,
        ))
    };
    let destination = match plain_absolute(&written) {
        Ok(d) if d == "/" => {
            return no(
                &MOUNT_DESTINATION,
                "destination",
                "/ is the root itself".into(),
            );
        }
        Ok(d) => d,
        Err(why) => {
            return no(
                &MOUNT_DESTINATION,
                "destination",
                format!("{} is {why}", shown(&written)),
            );
        }
    };
    let options = mount.options().as_deref().unwrap_or_default();
    let typ = mount.typ().as_deref().unwrap_or_default();
    let kind = if options.iter().any(|o| o == "bind" || o == "rbind") {
        MountKind::Bind
    } else {
        match typ {
            "proc" => MountKind::Proc,
            "sysfs" => MountKind::Sysfs,
            "tmpfs" => MountKind::Tmpfs,
            "devpts" => MountKind::Devpts,
            "mqueue" => MountKind::Mqueue,
            "bind" | "rbind" => MountKind::Bind,
            "cgroup" | "cgroup2" => MountKind::Cgroup,
            other => {
                return no(
                    &MOUNT_TYPE,
                    "type",
                    format!("{} on {destination}", shown(other)),
                );
            }
        }
    };
    let mapped = mapping(mount, index, kind, &destination, users)?;
    if let Err(why) = check_place(&destination, kind) {
        return no(
            &MOUNT_DESTINATION,
            "destination",
            format!("{destination} {why}"),
        );
    }

    let source = mount
        .source()
        .as_ref()
        .map(|s| s.to_string_lossy().into_owned())
        .unwrap_or_default();
    let source = if kind == MountKind::Bind {
        match check_source(&source) {
            Ok(source) => source,
            Err(why) => {
                return no(
                    &MOUNT_SOURCE,
                    "source",
                    format!("{} on {destination} {why}", shown(&source)),
                );
            }
        }
    } else {
        one_line(&source)
    };

    let mut flags = MountFlags {
        rbind: typ == "rbind",
        idmap: mapped.then_some(IdMap::Mount),
        ..MountFlags::default()
    };
    for option in options {
        if let Err((rule, why)) = flags.add(option, kind) {
            return no(
                rule,
                "options",
                format!("{} on {destination}{why}", shown(option)),
            );
        }
    }
    let notes = flags.harden(kind, nosuid, &destination, options);
    Ok((
        MountSpec {
            destination,
            kind,
            source,
            flags,
        },
        notes,
    ))
}

/// Whether a mapping is written; it must be the pod's own.
fn mapping(
    mount: &Mount,
    index: usize,
    kind: MountKind,
    destination: &str,
    users: Option<&PodUsers>,
) -> Result<bool, Refusal> {
    let uids = mount.uid_mappings().as_deref().unwrap_or_default();
    let gids = mount.gid_mappings().as_deref().unwrap_or_default();
    if uids.is_empty() && gids.is_empty() {
        return Ok(false);
    }
    for (part, mappings) in [("uidMappings", uids), ("gidMappings", gids)] {
        let field = format!("mounts[{index}].{part}");
        let no = |why: String| {
            let detail = format!("{destination} {why}");
            Err(Refusal::new(&MOUNT_IDMAP, &field, detail))
        };
        if kind != MountKind::Bind {
            return no("is no bind".into());
        }
        let first = users::first_id(mappings, &field, &MOUNT_IDMAP)?;
        match users {
            None => return no("has one, and the pod has none".into()),
            Some(pod) if pod.first != first => {
                return no(format!("from host id {first}, the pod from {}", pod.first));
            }
            Some(_) => {}
        }
    }
    Ok(true)
}

fn shown(text: &str) -> String {
    if text.is_empty() {
        "\"\"".to_owned()
    } else {
        one_line(text)
    }
}

/// Masks and read-only paths hold at `/proc` and `/sys` only, so nothing
/// else may be there and these filesystems may be nowhere else.
fn check_place(destination: &str, kind: MountKind) -> Result<(), &'static str> {
    match (kind, destination) {
        (MountKind::Proc, "/proc") | (MountKind::Sysfs, "/sys") => Ok(()),
        (MountKind::Proc, _) => Err("can't be a proc: only /proc can"),
        (MountKind::Sysfs, _) => Err("can't be a sysfs: only /sys can"),
        (_, "/proc") => Err("can only be a proc"),
        (MountKind::Bind, d) if PROC_FILES.contains(&d) => Ok(()),
        (_, d) if within(d, "/proc") => Err("is under /proc"),
        _ => Ok(()),
    }
}

/// The host's proc and sysfs, which a bind of `/` would include, show what
/// the sandbox is there to hide.
fn check_source(source: &str) -> Result<String, &'static str> {
    let source = plain_absolute(source).map_err(|why| match why {
        "not absolute" => "is not absolute",
        why => why,
    })?;
    if source == "/" {
        Err("is the whole host")
    } else if within(&source, "/proc") || within(&source, "/sys") {
        Err("shows the host's kernel")
    } else {
        Ok(source)
    }
}

type Unwanted = (&'static Rule, &'static str);

impl MountFlags {
    fn add(&mut self, option: &str, kind: MountKind) -> Result<(), Unwanted> {
        use PropagationKind::{Private, Shared, Slave, Unbindable};
        match option {
            // What a mount is without options.
            "defaults" | "async" | "nolazytime" | "loud" | "silent" | "nomand" => {}
            "bind" => self.rbind = false,
            "rbind" => self.rbind = true,
            "sync" => self.sync = true,
            "dirsync" => self.dirsync = true,
            "lazytime" => self.lazytime = true,
            "private" => self.propagate(Private, false)?,
            "rprivate" => self.propagate(Private, true)?,
            "slave" => self.propagate(Slave, false)?,
            "rslave" => self.propagate(Slave, true)?,
            "shared" => self.propagate(Shared, false)?,
            "rshared" => self.propagate(Shared, true)?,
            "unbindable" => self.propagate(Unbindable, false)?,
            "runbindable" => self.propagate(Unbindable, true)?,
            "idmap" | "ridmap" if kind != MountKind::Bind => {
                return Err((&MOUNT_IDMAP, ", which is no bind"));
            }
            "idmap" => self.idmap = Some(IdMap::Mount),
            "ridmap" => self.idmap = Some(IdMap::Recursive),
            _ if self.attrs.add(option) => {}
            // `rw` and `relatime` also start with an r, so plain names first.
            _ if option
                .strip_prefix('r')
                .is_some_and(|o| self.recursive.add(o)) => {}
            _ => self.data.push(data(option, kind)?),
        }
        Ok(())
    }

    fn propagate(&mut self, kind: PropagationKind, recursive: bool) -> Result<(), Unwanted> {
        if kind == PropagationKind::Shared {
            return Err((&MOUNT_PROPAGATION, ""));
        }
        self.propagation = Some(Propagation { kind, recursive });
        Ok(())
    }

    /// Adds what the sandbox demands of every mount of a kind.
    fn harden(
        &mut self,
        kind: MountKind,
        nosuid: bool,
        destination: &str,
        written: &[String],
    ) -> Notes {
        let mut notes = Notes::new();
        let mut force = |flag: &mut bool, name: &str, opposite: &str| {
            // Adding an option that was merely left out is not worth a line.
            if !*flag
                && written
                    .iter()
                    .any(|o| o == opposite || o.strip_prefix('r') == Some(opposite))
            {
                notes.push(format!("{destination}: {name} in place of {opposite}"));
            }
            *flag = true;
        };
        let attrs = &mut self.attrs;
        if kind == MountKind::Bind {
            // A volume's device files and set-uid programs come from somebody
            // the node doesn't know.
            force(&mut attrs.nodev, "nodev", "dev");
            if nosuid {
                force(&mut attrs.nosuid, "nosuid", "suid");
            }
            if self.rbind {
                self.recursive.nodev = true;
                self.recursive.nosuid |= nosuid;
            }
        } else if kind != MountKind::Tmpfs {
            force(&mut attrs.nosuid, "nosuid", "suid");
            force(&mut attrs.noexec, "noexec", "exec");
            if kind != MountKind::Devpts {
                force(&mut attrs.nodev, "nodev", "dev");
            }
        }
        if matches!(kind, MountKind::Sysfs | MountKind::Cgroup) {
            force(&mut attrs.ro, "ro", "rw");
        }
        notes
    }
}

impl MountAttrs {
    /// Whether `option` is one of these; the last one wins, as in mount(8).
    fn add(&mut self, option: &str) -> bool {
        match option {
            "ro" => self.ro = true,
            "rw" => self.ro = false,
            "nosuid" => self.nosuid = true,
            "suid" => self.nosuid = false,
            "nodev" => self.nodev = true,
            "dev" => self.nodev = false,
            "noexec" => self.noexec = true,
            "exec" => self.noexec = false,
            "nosymfollow" => self.nosymfollow = true,
            "symfollow" => self.nosymfollow = false,
            "nodiratime" => self.nodiratime = true,
            "diratime" => self.nodiratime = false,
            "noatime" => self.atime = Some(Atime::Never),
            "strictatime" => self.atime = Some(Atime::Strict),
            "relatime" | "atime" | "nostrictatime" => self.atime = Some(Atime::Relative),
            "norelatime" => self.atime = None,
            _ => return false,
        }
        true
    }
}

/// An option of the filesystem itself.
fn data(option: &str, kind: MountKind) -> Result<(String, Option<String>), Unwanted> {
    const UNKNOWN: Unwanted = (&MOUNT_OPTION, " is not known for this type of mount");
    const VALUE: Unwanted = (&MOUNT_OPTION, " has a value that makes no sense");
    let (key, value) = match option.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (option, None),
    };
    let id = |v: &str| v.parse::<u32>().is_ok_and(|id| id < 65536);
    let mode = |v: &str| u32::from_str_radix(v, 8).is_ok_and(|m| m <= 0o7777);
    let number = |v: &str| v.parse::<u64>().is_ok();
    // memparse() of the kernel, plus a share of the memory.
    let size = |v: &str| {
        v.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G', '%'])
            .unwrap_or(v)
            .parse::<u64>()
            .is_ok()
    };
    let good = match (kind, key, value) {
        (MountKind::Tmpfs | MountKind::Devpts, "mode", Some(v)) => mode(v),
        (MountKind::Tmpfs | MountKind::Devpts, "uid" | "gid", Some(v)) => id(v),
        (MountKind::Tmpfs, "size" | "nr_blocks" | "nr_inodes", Some(v)) => size(v),
        (MountKind::Tmpfs, "noswap" | "inode32" | "inode64", None) => true,
        (MountKind::Devpts, "newinstance", None) => true,
        (MountKind::Devpts, "ptmxmode", Some(v)) => mode(v),
        (MountKind::Devpts, "max", Some(v)) => number(v),
        (MountKind::Proc, "hidepid", Some(v)) => [
            "0",
            "1",
            "2",
            "4",
            "off",
            "noaccess",
            "invisible",
            "ptraceable",
        ]
        .contains(&v),
        (MountKind::Proc, "subset", Some(v)) => v == "pid",
        (MountKind::Proc, "gid", Some(v)) => id(v),
        _ => return Err(UNKNOWN),
    };
    if good {
        Ok((key.to_owned(), value.map(str::to_owned)))
    } else {
        Err(VALUE)
    }
}

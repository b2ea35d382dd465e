//! Mounts and namespaces (T07–T10).

use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};

use casemate_sys::mount::{self, Change, attr, clone_tree};
use casemate_sys::namespace::{self, kind};
use casemate_sys::{attempt, process};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::ids::{fixture, scratch};
use crate::{Arg, Check, Done, No, gained, only_if};

/// An option that no file system has: what is asked is whether the parser of
/// options is reached (mount(2) checks the right to mount before it).
const NO_OPTION: &str = "casemate-probe-no-such-option=1";

fn types() -> Vec<String> {
    let text = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let mut names: Vec<String> = text
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}

fn path_fd(path: &str) -> Result<OwnedFd, No> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

pub fn made_dir(name: &str) -> Result<String, No> {
    let path = scratch(name);
    fs::create_dir(&path)?;
    Ok(path)
}

fn mount_type(fstype: &str) -> Done {
    let at = made_dir("mnt")?;
    let option = std::ffi::CString::new(NO_OPTION).unwrap_or_default();
    let done = rustix::mount::mount(
        "none",
        &at,
        fstype,
        MountFlags::empty(),
        Some(option.as_c_str()),
    );
    let _ = rustix::mount::unmount(&at, UnmountFlags::DETACH);
    let _ = fs::remove_dir(&at);
    gained(done)
}

/// From the lock's side it makes no difference how the mount then fails.
const BEHIND_MOUNT: &[Errno] = &[
    Errno::INVAL,
    Errno::NOTBLK,
    Errno::NOENT,
    Errno::NXIO,
    Errno::BUSY,
    Errno::NOSPC,
    Errno::OPNOTSUPP,
    Errno::FAULT,
    Errno::NOTDIR,
];

fn write_below(path: &str) -> Done {
    let file = format!("{path}/written-by-a-probe");
    fs::write(&file, "x")?;
    let _ = fs::remove_file(&file);
    Ok(String::new())
}

fn clear(path: &str, bit: u64) -> Done {
    let change = Change {
        clear: bit,
        ..Change::default()
    };
    gained(mount::set_attributes(path_fd(path)?, change))
}

fn clear_on_clone(path: &str) -> Done {
    let clone = clone_tree(CWD, path.as_ref(), true, false)?;
    let change = Change {
        clear: attr::RDONLY,
        recursive: true,
        ..Change::default()
    };
    gained(mount::set_attributes(&clone, change))
}

/// Through an attached bind, which has flags of its own.
fn bind_and_write(path: &str) -> Done {
    let at = made_dir("bind")?;
    let done = rustix::mount::mount_bind(path, &at)
        .and_then(|()| rustix::mount::mount_remount(&at, MountFlags::BIND, c""))
        .map_err(No::from)
        .and_then(|()| write_below(&at));
    let _ = rustix::mount::unmount(&at, UnmountFlags::DETACH);
    let _ = fs::remove_dir(&at);
    done
}

/// Opens a file that was opened for reading once more, for writing.
fn reopen(path: &str) -> Done {
    let file = fs::File::open(format!("{path}/file"))?;
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut file = fs::OpenOptions::new().append(true).open(again)?;
    Ok(file.write_all(b"x").map(|()| String::new())?)
}

fn unshared_then(path: &str, act: impl FnOnce(&str) -> Done) -> Done {
    namespace::unshare(kind::MOUNT)?;
    act(path)
}

fn clone_with(flags: u64) -> Done {
    let (pid, _) = attempt::raw("clone", &[Arg::Int(flags as usize | 17)])?;
    if pid == 0 {
        process::exit_now(0);
    }
    Ok(String::new())
}

/// A user namespace with a map of its own and a mount in it: what rootless
/// builders do.
fn nested() -> Done {
    namespace::unshare(kind::USER | kind::MOUNT)?;
    Ok(String::new())
}

/// Leaves a root by a descriptor of what is above it.
fn chroot_escape() -> Done {
    if crate::CONTROL.load(std::sync::atomic::Ordering::Relaxed) {
        // The host's root has nothing above it.
        rustix::process::chroot(crate::ids::SCRATCH)?;
        rustix::process::chdir("/")?;
        fs::create_dir(crate::ids::SCRATCH)?;
    }
    let top = path_fd("/")?;
    let inside = made_dir("root")?;
    rustix::process::chroot(&inside)?;
    rustix::process::fchdir(&top)?;
    for _ in 0..64 {
        rustix::process::chdir("..")?;
    }
    rustix::process::chroot(".")?;
    // Only what was not below the old root is an escape.
    let now = rustix::fs::stat("/")?;
    let before = rustix::fs::fstat(&top)?;
    only_if(
        (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino),
        "",
    )
}

const NAMESPACES: [(&str, u64); 8] = [
    ("user", kind::USER),
    ("mnt", kind::MOUNT),
    ("pid", kind::PID),
    ("net", kind::NET),
    ("ipc", kind::IPC),
    ("uts", kind::UTS),
    ("cgroup", kind::CGROUP),
    ("time", kind::TIME),
];

fn namespaces(all: &mut Vec<Check>) {
    for (name, kind) in NAMESPACES {
        let means = format!("a new {name} namespace, and all that can be reached in one");
        all.push(Check::new(
            &format!("T07.unshare-{name}"),
            &means,
            move || gained(namespace::unshare(kind)),
        ));
        if name != "time" {
            all.push(Check::new(
                &format!("T07.clone-{name}"),
                &means,
                move || clone_with(kind),
            ));
        }
        let means = format!("joins a {name} namespace by its file");
        all.push(
            Check::new(&format!("T07.setns-{name}"), &means, move || {
                let file = fs::File::open(format!("/proc/self/ns/{name}"))?;
                gained(namespace::enter(&file, kind))
            })
            // Of the own user namespace, and with threads: behind the lock.
            .entered(&[Errno::INVAL]),
        );
    }
    all.extend([
        Check::call(
            "T07.clone3",
            "clone3, whose flags no filter can see",
            "clone3",
            &[Arg::Null, Arg::Int(64)],
        )
        .entered(&[Errno::FAULT, Errno::INVAL]),
        Check::new(
            "T07.nested",
            "a container of its own, as rootless builders make",
            nested,
        ),
        Check::new("T07.chroot-escape", "files above its root", chroot_escape),
    ]);
}

fn types_of_file_systems(all: &mut Vec<Check>) {
    for fstype in types() {
        let name = fstype.clone();
        all.push(
            Check::new(
                &format!("T08.mount-{fstype}"),
                "mount(2) reaches the parser of this file system",
                move || mount_type(&name),
            )
            .entered(BEHIND_MOUNT)
            .absent(&[Errno::NODEV, Errno::NOSYS]),
        );
        let name = fstype.clone();
        all.push(
            Check::new(
                &format!("T08.fsopen-{fstype}"),
                "a context of this file system (fsopen(2))",
                move || gained(mount::NewFs::open(&name)),
            )
            .entered(&[Errno::INVAL, Errno::BUSY]),
        );
    }
}

fn paths(all: &mut Vec<Check>) {
    for (name, path) in [
        ("root", "/".to_owned()),
        ("volume", fixture("vol")),
        ("proc", "/proc".to_owned()),
        ("sys", "/sys".to_owned()),
        ("proc-sys", "/proc/sys".to_owned()),
    ] {
        for (flag, bit) in [
            ("rdonly", attr::RDONLY),
            ("nosuid", attr::NOSUID),
            ("nodev", attr::NODEV),
            ("noexec", attr::NOEXEC),
        ] {
            let path = path.clone();
            all.push(
                Check::new(
                    &format!("T09.clear-{flag}-{name}"),
                    "that flag of a mount is cleared",
                    move || clear(&path, bit),
                )
                // Not a mount point of its own, as /proc/sys on the host.
                .absent(&[Errno::INVAL, Errno::NOSYS]),
            );
        }
        let at = path.clone();
        all.push(
            Check::new(
                &format!("T09.remount-{name}"),
                "a mount is made writable",
                move || {
                    let again = rustix::mount::mount_remount(&at, MountFlags::BIND, c"");
                    gained(again)
                },
            )
            .absent(&[Errno::INVAL, Errno::NOSYS]),
        );
        let at = path.clone();
        all.push(
            Check::new(
                &format!("T09.umount-{name}"),
                "a mount is taken away from over what it hides",
                move || gained(rustix::mount::unmount(&at, UnmountFlags::DETACH)),
            )
            .absent(&[Errno::NOSYS]),
        );
        let at = path.clone();
        all.push(Check::new(
            &format!("T09.clone-{name}"),
            "a writable clone of a read-only tree",
            move || clear_on_clone(&at),
        ));
        all.push(Check::new(
            &format!("T09.unshared-{name}"),
            "flags of its copy in a mount namespace of one's own are cleared",
            move || unshared_then(&path, |path| clear(path, attr::RDONLY)),
        ));
    }
    for (name, path) in [("volume", "vol"), ("below", "vol/below")] {
        let path = fixture(path);
        let topic = if name == "below" { "T10" } else { "T09" };
        let mut add = |what: &str, means: &str, act: fn(&str) -> Done| {
            let path = path.clone();
            all.push(Check::new(
                &format!("{topic}.{what}-{name}"),
                means,
                move || act(&path),
            ));
        };
        add("write", "a file on a read-only volume", write_below);
        add("reopen", "writes through /proc/self/fd", reopen);
        add("bind", "writes through a bind mount of it", bind_and_write);
        add(
            "clear-then-write",
            "writes once the flag is cleared",
            |path| {
                clear(path, attr::RDONLY)?;
                write_below(path)
            },
        );
    }
}

fn calls(all: &mut Vec<Check>) {
    all.extend([
        Check::new("T08.tmpfs", "a mounted tmpfs", || {
            let at = made_dir("tmpfs")?;
            let done = rustix::mount::mount("tmpfs", &at, "tmpfs", MountFlags::empty(), None);
            let _ = rustix::mount::unmount(&at, UnmountFlags::DETACH);
            gained(done)
        }),
        Check::new("T08.proc", "a proc without masks", || {
            let at = made_dir("proc")?;
            let done = rustix::mount::mount("proc", &at, "proc", MountFlags::empty(), None);
            let _ = rustix::mount::unmount(&at, UnmountFlags::DETACH);
            gained(done)
        }),
        Check::new("T08.bind", "a tree shown at another place", || {
            let at = made_dir("at")?;
            let done = rustix::mount::mount_bind_recursive("/", &at);
            let _ = rustix::mount::unmount(&at, UnmountFlags::DETACH);
            gained(done)
        }),
        Check::new("T08.propagation", "mounts shared with others", || {
            gained(rustix::mount::mount_change(
                "/",
                MountPropagationFlags::SHARED,
            ))
        }),
        Check::new("T08.open_tree", "a detached clone of its root", || {
            gained(clone_tree(CWD, "/".as_ref(), true, false))
        }),
        Check::new("T08.pivot_root", "another root", || {
            gained(rustix::process::pivot_root("/", "/"))
        })
        .entered(&[Errno::INVAL, Errno::BUSY]),
        Check::call("T08.umount2", "umount2 reaches the kernel", "umount2", &[])
            .entered(&[Errno::FAULT]),
        Check::call(
            "T08.move_mount",
            "move_mount reaches the kernel",
            "move_mount",
            &[
                Arg::Int(usize::MAX),
                Arg::Null,
                Arg::Int(usize::MAX),
                Arg::Null,
                Arg::Int(0),
            ],
        )
        .entered(&[Errno::FAULT, Errno::BADF]),
        Check::call(
            "T08.mount_setattr",
            "mount_setattr reaches the kernel",
            "mount_setattr",
            &[
                Arg::Int(usize::MAX),
                Arg::Null,
                Arg::Int(0),
                Arg::Null,
                Arg::Int(32),
            ],
        )
        .entered(&[Errno::FAULT, Errno::BADF]),
        Check::call(
            "T08.fspick",
            "a context of a mounted file system",
            "fspick",
            &[Arg::Int(-100isize as usize), Arg::Bytes(b"/"), Arg::Int(0)],
        ),
        Check::call(
            "T08.fsconfig",
            "fsconfig reaches the kernel",
            "fsconfig",
            &[
                Arg::Int(usize::MAX),
                Arg::Int(0),
                Arg::Bytes(b"x"),
                Arg::Null,
                Arg::Int(0),
            ],
        )
        .entered(&[Errno::BADF, Errno::INVAL]),
        Check::call(
            "T08.fsmount",
            "fsmount reaches the kernel",
            "fsmount",
            &[Arg::Int(usize::MAX)],
        )
        .entered(&[Errno::BADF]),
        Check::call(
            "T08.statmount",
            "facts about mounts by number",
            "statmount",
            &[Arg::Null, Arg::Null, Arg::Int(0), Arg::Int(0)],
        )
        .entered(&[Errno::FAULT, Errno::INVAL]),
        Check::call(
            "T08.listmount",
            "mounts by number",
            "listmount",
            &[Arg::Null, Arg::Null, Arg::Int(0), Arg::Int(0)],
        )
        .entered(&[Errno::FAULT, Errno::INVAL]),
        Check::call(
            "T08.open_by_handle_at",
            "files by number, past all directories",
            "open_by_handle_at",
            &[
                Arg::Int(-100isize as usize),
                Arg::Bytes(&[0; 8]),
                Arg::Int(0),
            ],
        )
        .entered(&[Errno::INVAL, Errno::STALE, Errno::BADF]),
        Check::call(
            "T08.name_to_handle_at",
            "the number of a file",
            "name_to_handle_at",
            &[
                Arg::Int(-100isize as usize),
                Arg::Bytes(b"/"),
                Arg::Bytes(&[128, 0, 0, 0]),
                Arg::Bytes(&[0; 8]),
                Arg::Int(0),
            ],
        )
        .entered(&[Errno::OPNOTSUPP, Errno::OVERFLOW]),
    ]);
}

/// The checks of this file.
pub fn checks() -> Vec<Check> {
    let mut all = Vec::new();
    namespaces(&mut all);
    types_of_file_systems(&mut all);
    paths(&mut all);
    calls(&mut all);
    all
}

//! Attempts against the sandbox. Each writes one line, `name answer`, where the
//! answer is `ok`, the name of an error, or how the process ended.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use casemate_sys::attempt;
use casemate_sys::mount::{self, Change, NewFs, attr, clone_tree};
use casemate_sys::namespace::{self, kind};
use casemate_sys::process::{self, Fork};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};

/// CLONE_NEWTIME, which the runtime itself never uses.
const TIME: u64 = 0x80;

fn name_of(error: &io::Error) -> String {
    let Some(number) = error.raw_os_error() else {
        return error.to_string().replace(' ', "_");
    };
    number_name(number)
}

fn number_name(number: i32) -> String {
    match number {
        1 => "EPERM",
        2 => "ENOENT",
        3 => "ESRCH",
        9 => "EBADF",
        11 => "EAGAIN",
        13 => "EACCES",
        14 => "EFAULT",
        16 => "EBUSY",
        17 => "EEXIST",
        19 => "ENODEV",
        20 => "ENOTDIR",
        22 => "EINVAL",
        25 => "ENOTTY",
        28 => "ENOSPC",
        30 => "EROFS",
        38 => "ENOSYS",
        93 => "EPROTONOSUPPORT",
        97 => "EAFNOSUPPORT",
        111 => "ECONNREFUSED",
        159 => "SIGSYS",
        other => return format!("E{other}"),
    }
    .to_owned()
}

fn say<T>(what: &str, result: io::Result<T>) {
    match result {
        Ok(_) => println!("{what} ok"),
        Err(error) => println!("{what} {}", name_of(&error)),
    }
}

/// Runs `try_it` in a process of its own, since it may change the process.
fn apart(what: &str, try_it: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    match process::fork()? {
        Fork::Child => process::exit_now(match try_it() {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(127),
        }),
        Fork::Parent(_, pidfd) => {
            let ended = process::wait(&pidfd)?;
            match i32::try_from(ended.status) {
                Ok(0) | Err(_) => println!("{what} ok"),
                Ok(number) => println!("{what} {}", number_name(number)),
            }
            Ok(())
        }
    }
}

fn path_fd(path: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Clears flags of the mounts on `paths`.
pub fn flags(paths: &[&str]) -> io::Result<()> {
    for path in paths {
        for (name, bit) in [
            ("rdonly", attr::RDONLY),
            ("nosuid", attr::NOSUID),
            ("nodev", attr::NODEV),
        ] {
            let change = Change {
                clear: bit,
                ..Change::default()
            };
            let cleared = path_fd(path).and_then(|fd| mount::set_attributes(&fd, change));
            say(&format!("clear-{name} {path}"), cleared);
        }
    }
    Ok(())
}

/// As [`flags`], on clones of the mounts.
pub fn clone_flags(paths: &[&str]) -> io::Result<()> {
    for path in paths {
        let clone = match clone_tree(CWD, Path::new(path), false, false) {
            Ok(clone) => clone,
            Err(error) => {
                println!("clone {path} {}", name_of(&error));
                continue;
            }
        };
        for (name, bit) in [
            ("rdonly", attr::RDONLY),
            ("nosuid", attr::NOSUID),
            ("nodev", attr::NODEV),
        ] {
            let change = Change {
                clear: bit,
                ..Change::default()
            };
            say(
                &format!("clone-clear-{name} {path}"),
                mount::set_attributes(&clone, change),
            );
        }
    }
    Ok(())
}

/// Flags that the mounts on `paths` have, by statvfs(3).
pub fn show(paths: &[&str]) -> io::Result<()> {
    for path in paths {
        let has = rustix::fs::statvfs(*path)?.f_flag;
        println!("{path} {has:?}");
    }
    Ok(())
}

/// Unmounts `paths`.
pub fn unmount(paths: &[&str]) -> io::Result<()> {
    for path in paths {
        for (name, flags) in [
            ("umount", UnmountFlags::empty()),
            ("umount-lazy", UnmountFlags::DETACH),
        ] {
            say(
                &format!("{name} {path}"),
                rustix::mount::unmount(*path, flags).map_err(io::Error::from),
            );
        }
        let remounted = rustix::mount::mount_remount(*path, MountFlags::BIND, c"");
        say(
            &format!("remount {path}"),
            remounted.map_err(io::Error::from),
        );
    }
    Ok(())
}

/// Makes what would let a workload build a tree of its own.
pub fn make() -> io::Result<()> {
    for fstype in [
        "tmpfs", "proc", "sysfs", "overlay", "cgroup2", "mqueue", "devpts",
    ] {
        say(&format!("fsopen {fstype}"), NewFs::open(fstype));
    }
    say("open_tree /", clone_tree(CWD, Path::new("/"), false, false));
    say(
        "open_tree-recursive /",
        clone_tree(CWD, Path::new("/"), true, false),
    );
    say(
        "mount tmpfs",
        rustix::mount::mount("tmpfs", "/tmp", "tmpfs", MountFlags::empty(), None)
            .map_err(io::Error::from),
    );
    say(
        "bind /",
        rustix::mount::mount_bind("/", "/tmp").map_err(io::Error::from),
    );
    say(
        "make-shared /",
        rustix::mount::mount_change("/", rustix::mount::MountPropagationFlags::SHARED)
            .map_err(io::Error::from),
    );
    say(
        "pivot_root",
        rustix::process::pivot_root("/", "/").map_err(io::Error::from),
    );
    say("sethostname", namespace::set_hostname("changed"));
    say(
        "mknod null",
        rustix::fs::mknodat(
            CWD,
            "/tmp/null",
            FileType::CharacterDevice,
            Mode::from(0o666),
            rustix::fs::makedev(1, 3),
        )
        .map_err(io::Error::from),
    );
    for file in [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/shmmax",
        "/proc/sys/user/max_user_namespaces",
        "/proc/sysrq-trigger",
        "/sys/kernel/uevent_helper",
    ] {
        say(
            &format!("open {file}"),
            fs::OpenOptions::new().write(true).open(file),
        );
    }
    Ok(())
}

/// Asks for each kind of namespace.
pub fn namespaces() -> io::Result<()> {
    for (name, kind) in [
        ("user", kind::USER),
        ("mnt", kind::MOUNT),
        ("pid", kind::PID),
        ("net", kind::NET),
        ("ipc", kind::IPC),
        ("uts", kind::UTS),
        ("cgroup", kind::CGROUP),
        ("time", TIME),
    ] {
        apart(&format!("unshare {name}"), || namespace::unshare(kind))?;
    }
    Ok(())
}

/// System calls that a filter refuses.
pub fn calls() -> io::Result<()> {
    // Not by our own fork, which has a mark that no workload may use.
    for name in attempt::names().chain([GATE]) {
        let mut one = Command::new("/proc/self/exe");
        let status = one.args(["call", name]).status()?;
        match (status.code(), status.signal()) {
            (Some(0), _) => println!("{name} ok"),
            (Some(number), _) => println!("{name} {}", number_name(number)),
            (None, signal) => println!("{name} {}", number_name(128 + signal.unwrap_or(0))),
        }
    }
    Ok(())
}

/// getpid by the gate of 32-bit programs.
const GATE: &str = "i386-getpid";

/// One of them, in the process that was made for it; the number of its error.
pub fn call(name: &str) -> u8 {
    let number = match name {
        GATE => match attempt::legacy_gate() {
            pid if pid > 0 => 0,
            error => -error,
        },
        _ => match attempt::call(name) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(127).into(),
        },
    };
    u8::try_from(number).unwrap_or(127)
}

/// Reaches for processes.
pub fn processes(pids: &[&str]) -> io::Result<()> {
    for text in pids {
        let pid: u32 = text.parse().map_err(io::Error::other)?;
        let handle = process::open_pidfd(pid);
        say(
            &format!("signal {pid}"),
            handle.and_then(|fd| process::signal(&fd, 0)),
        );
        for file in ["mem", "environ", "maps"] {
            say(
                &format!("{file} {pid}"),
                fs::File::open(format!("/proc/{pid}/{file}")).and_then(|mut f| {
                    // environ and maps open for all, and refuse at the first byte.
                    io::Read::read(&mut f, &mut [0])
                        .or_else(|e| if file == "mem" { Ok(0) } else { Err(e) })
                }),
            );
        }
        for link in ["root", "exe", "cwd", "ns/mnt"] {
            say(
                &format!("{link} {pid}"),
                fs::read_link(format!("/proc/{pid}/{link}")),
            );
        }
        say(
            &format!("fd {pid}"),
            fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count),
        );
    }
    Ok(())
}

/// Pids below `limit` that answer to signal 0.
pub fn reach(limit: u32) -> io::Result<()> {
    let mut found = Vec::new();
    for pid in 1..limit {
        if process::open_pidfd(pid).is_ok_and(|fd| process::signal(&fd, 0).is_ok()) {
            found.push(pid.to_string());
        }
    }
    println!("reached {}", found.join(" "));
    println!("self {}", process::own_pid());
    Ok(())
}

fn abstract_address(name: &str) -> io::Result<rustix::net::SocketAddrUnix> {
    Ok(rustix::net::SocketAddrUnix::new_abstract_name(
        name.as_bytes(),
    )?)
}

fn stream() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Listens on an abstract unix socket for a minute, or until killed.
pub fn listen(name: &str) -> io::Result<()> {
    let socket = stream()?;
    rustix::net::bind(&socket, &abstract_address(name)?)?;
    rustix::net::listen(&socket, 8)?;
    println!("listening");
    std::thread::sleep(std::time::Duration::from_secs(60));
    Ok(())
}

/// Connects to an abstract unix socket, once it is there.
pub fn connect(name: &str) -> io::Result<()> {
    let mut last = Ok(());
    for _ in 0..400 {
        last = rustix::net::connect(stream()?.as_fd(), &abstract_address(name)?)
            .map_err(io::Error::from);
        if !last
            .as_ref()
            .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
        {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(25));
    }
    say("connect", last);
    Ok(())
}

/// An ioctl on a character device: TCGETS, which the null device answers with
/// ENOTTY.
pub fn drive(path: &str) -> io::Result<()> {
    let file = fs::File::open(path)?;
    say(
        &format!("tcgets {path}"),
        rustix::termios::tcgetattr(&file).map_err(io::Error::from),
    );
    Ok(())
}

//! Devices and terminals (T20, T21).

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use casemate_sys::attempt;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::ids::{SMUGGLED, fixture, scratch};
use crate::{Arg, Check, Done, gained, only_if};

const DEVICES: [(&str, char, u32, u32); 22] = [
    ("mem", 'c', 1, 1),
    ("port", 'c', 1, 4),
    ("kmsg", 'c', 1, 11),
    ("tty0", 'c', 4, 0),
    ("ttyS0", 'c', 4, 64),
    ("console", 'c', 5, 1),
    ("loop-control", 'c', 10, 237),
    ("fuse", 'c', 10, 229),
    ("tun", 'c', 10, 200),
    ("kvm", 'c', 10, 232),
    ("vhost-net", 'c', 10, 238),
    ("vhost-vsock", 'c', 10, 241),
    ("vsock", 'c', 10, 121),
    ("uinput", 'c', 10, 223),
    ("btrfs-control", 'c', 10, 234),
    ("userfaultfd", 'c', 10, 126),
    ("cpu0-msr", 'c', 202, 0),
    ("dri", 'c', 226, 0),
    ("sda", 'b', 8, 0),
    ("vda", 'b', 253, 0),
    ("loop0", 'b', 7, 0),
    ("nvme0n1", 'b', 259, 0),
];

/// Nodes that every container may have.
const USUAL: [&str; 9] = [
    "null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts",
];

fn make(name: &str, kind: char, major: u32, minor: u32) -> Result<String, Errno> {
    let path = scratch(name);
    let kind = match kind {
        'b' => FileType::BlockDevice,
        _ => FileType::CharacterDevice,
    };
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(CWD, path.as_str(), kind, Mode::from(0o600), device)?;
    Ok(path)
}

/// Opening a disk or /dev/mem for reading does nothing to it.
fn open_node(path: &str) -> Done {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    gained(rustix::fs::open(path, flags, Mode::empty()))
}

fn unusual() -> Done {
    let mut found = Vec::new();
    for entry in fs::read_dir("/dev")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let kind = entry.file_type()?;
        let device = kind.is_char_device() || kind.is_block_device();
        if device && !USUAL.contains(&name.as_str()) {
            found.push(name);
        }
    }
    only_if(!found.is_empty(), found.join(" "))
}

/// The host's device nodes, whose mode and owner root could change for all: the
/// inode of a devtmpfs.
fn hosts_nodes() -> Done {
    let meta = fs::metadata("/dev/null")?;
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let wanted = format!(
        "{}:{}",
        rustix::fs::major(meta.dev()),
        rustix::fs::minor(meta.dev())
    );
    let shown = text.lines().any(|line| {
        let mut fields = line.split(' ');
        fields.nth(2) == Some(wanted.as_str()) && line.contains(" - devtmpfs ")
    });
    only_if(shown, "/dev/null is the host's own node")
}

/// A new terminal: master and slave.
fn terminal() -> Result<(OwnedFd, OwnedFd), Errno> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty())?;
    Ok((master, slave))
}

fn on_terminal(request: usize, bytes: &'static [u8]) -> Done {
    let (_master, slave) = terminal()?;
    let fd = Arg::Int(slave.as_raw_fd() as usize);
    gained(attempt::raw(
        "ioctl",
        &[fd, Arg::Int(request), Arg::Bytes(bytes)],
    ))
}

/// An ioctl on what is no terminal: ENOTTY says that it got to the kernel.
fn on_file(request: usize) -> Done {
    let file = fs::File::open("/proc/self/stat")?;
    let fd = Arg::Int(file.as_raw_fd() as usize);
    gained(attempt::raw(
        "ioctl",
        &[fd, Arg::Int(request), Arg::Bytes(&[0; 64])],
    ))
}

/// The checks of this file.
pub fn checks() -> Vec<Check> {
    const GONE: &[Errno] = &[Errno::NXIO, Errno::NODEV, Errno::NOSYS];
    let mut all = Vec::new();
    for (name, kind, major, minor) in DEVICES {
        all.push(Check::new(
            &format!("T20.mknod-{name}"),
            "a node of this device",
            move || {
                let made = make(name, kind, major, minor);
                if let Ok(path) = &made {
                    let _ = fs::remove_file(path);
                }
                gained(made)
            },
        ));
        // The control would open the host's: a machine of one's own is at stake
        // with /dev/kvm, and whoever has it open may keep others from it.
        if name == "kvm" {
            continue;
        }
        all.push(
            Check::new(
                &format!("T20.open-{name}"),
                "the device is opened by a node made for it",
                move || {
                    let path = make(name, kind, major, minor)?;
                    let opened = open_node(&path);
                    let _ = fs::remove_file(&path);
                    opened
                },
            )
            // Busy, or in no state: the driver said so.
            .entered(&[Errno::BUSY, Errno::IO, Errno::INVAL])
            .absent(GONE),
        );
    }
    for (name, ..) in SMUGGLED {
        all.push(
            Check::new(
                &format!("T20.smuggled-{name}"),
                "a device node that came with the image is opened",
                move || open_node(&format!("{}/{name}", fixture("smuggled"))),
            )
            .absent(GONE),
        );
    }
    all.extend([
        Check::new(
            "T20.unusual",
            "a device beside the usual ones is in /dev",
            unusual,
        ),
        Check::new(
            "T20.hosts-nodes",
            "device nodes are the host's own",
            hosts_nodes,
        ),
        Check::new("T21.sti", "types into a terminal (TIOCSTI)", || {
            on_terminal(0x5412, b"x")
        }),
        Check::new(
            "T21.set-discipline",
            "another line discipline (TIOCSETD)",
            || on_terminal(0x5423, &[0; 4]),
        ),
        Check::new("T21.hangup", "hangs a terminal up (TIOCVHANGUP)", || {
            on_terminal(0x5437, &[0; 4])
        }),
        Check::new("T21.console", "takes over the console (TIOCCONS)", || {
            on_file(0x541d)
        })
        .entered(&[Errno::NOTTY]),
        Check::new(
            "T21.linux",
            "copies what is on a screen (TIOCLINUX)",
            || on_file(0x541c),
        )
        .entered(&[Errno::NOTTY]),
        Check::new("T21.sti-file", "TIOCSTI reaches the kernel", || {
            on_file(0x5412)
        })
        .entered(&[Errno::NOTTY]),
        // The kernel looks at 32 bits of the request.
        Check::new(
            "T21.sti-high",
            "TIOCSTI with more bits than a filter looks at",
            || on_file(1 << 32 | 0x5412),
        )
        .entered(&[Errno::NOTTY]),
        Check::new(
            "T21.linux-high",
            "TIOCLINUX with more bits than a filter looks at",
            || on_file(1 << 32 | 0x541c),
        )
        .entered(&[Errno::NOTTY]),
    ]);
    all
}

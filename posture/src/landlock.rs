//! Whether a container is in a Landlock domain (landlock(7)).
//!
//! The kernel shows nobody's domain. But it remembers with each file of a device what
//! its opener might do with it, and asks that of whoever uses the descriptor, for
//! ioctls since ABI 5 (Linux 6.10). The forker opens the null device that masks some
//! path of its container, once it is locked: so a copy of *that* descriptor refuses
//! ioctls with EACCES if, and only if, its opener was in a domain that refuses them
//! outside of `/dev`; without one it is ENOTTY. All processes of the container are
//! the forker's children, and a domain can't be left.

use rustix::io::Errno;

use crate::Report;
use crate::descriptors::{Descriptor, copy};
use crate::promise::Container;

/// The first ABI with rights about ioctls of devices.
const IOCTLS: u32 = 5;

/// `witness`: some masked path of the container is a device, so the forker has one.
pub fn check(report: &mut Report, container: &Container, witness: bool) {
    if !container.landlock {
        return;
    }
    let what = format!("container {}: Landlock domain", container.id);
    let abi = casemate_sys::landlock::abi();
    if abi < IOCTLS {
        report.unseen(format!(
            "{what}: kernels show it from ABI {IOCTLS} on, this is {abi}"
        ));
        return;
    }
    if !witness {
        report.unseen(format!(
            "{what}: no masked path is a file, by which it could be seen"
        ));
        return;
    }
    let held = Descriptor::all(container.forker)
        .iter()
        .filter(|d| d.is_null())
        .filter_map(|d| copy(container.forker, d.number))
        .any(|fd| refuses(&fd));
    let lives = crate::status::lives(container.forker);
    if !held && lives {
        report.add(what, "in force", "no descriptor of the forker's shows it");
    }
}

/// The null device has no ioctls at all: so this one changes nothing.
fn refuses(fd: &std::os::fd::OwnedFd) -> bool {
    rustix::io::ioctl_fionread(fd).err() == Some(Errno::ACCESS)
}

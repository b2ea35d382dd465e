//! Namespaces: entering, leaving, asking (namespaces(7), setns(2), ioctl_nsfs(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Kinds of namespaces, as the `CLONE_NEW*` bits of clone(2).
pub mod kind {
    /// Mounts.
    pub const MOUNT: u64 = libc::CLONE_NEWNS as u64;
    /// cgroup root.
    pub const CGROUP: u64 = libc::CLONE_NEWCGROUP as u64;
    /// Host and domain name.
    pub const UTS: u64 = libc::CLONE_NEWUTS as u64;
    /// System V IPC, POSIX queues.
    pub const IPC: u64 = libc::CLONE_NEWIPC as u64;
    /// Ids and capabilities.
    pub const USER: u64 = libc::CLONE_NEWUSER as u64;
    /// Process ids.
    pub const PID: u64 = libc::CLONE_NEWPID as u64;
    /// Network.
    pub const NET: u64 = libc::CLONE_NEWNET as u64;
    /// Offsets of the clocks (time_namespaces(7)).
    pub const TIME: u64 = 0x80;
}

/// Enters the namespace behind `fd`, which must be of `kind` (setns(2)).
pub fn enter(fd: impl AsFd, kind: u64) -> io::Result<()> {
    // SAFETY: setns takes two integers and touches no memory of ours.
    let r = unsafe { libc::setns(fd.as_fd().as_raw_fd(), kind as libc::c_int) };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Leaves the namespaces of `kinds` for new ones (unshare(2)).
pub fn unshare(kinds: u64) -> io::Result<()> {
    // SAFETY: unshare takes an integer; CLONE_FILES and CLONE_FS, which could
    // surprise other code of this process, are never among `kind`s.
    let r = unsafe { libc::unshare(kinds as libc::c_int) };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `PIDFD_GET_PID_FOR_CHILDREN_NAMESPACE` (linux/pidfd.h, since 6.11): the pid
/// namespace that the next children of the process will live in, even while it
/// has no process yet.
const PIDFD_GET_PID_FOR_CHILDREN_NAMESPACE: libc::c_ulong = 0xFF06;

/// The pid namespace of the future children of the process behind `pidfd`.
pub fn pid_for_children(pidfd: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: this ioctl takes no argument and returns a new descriptor.
    let r = unsafe {
        libc::ioctl(
            pidfd.as_fd().as_raw_fd(),
            PIDFD_GET_PID_FOR_CHILDREN_NAMESPACE,
            0,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(r) })
}

/// `NS_GET_USERNS` (ioctl_nsfs(2)).
const NS_GET_USERNS: libc::c_ulong = 0xb701;

/// The user namespace that owns the namespace behind `fd`.
pub fn owner(fd: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: this ioctl takes no argument and returns a new descriptor.
    let r = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), NS_GET_USERNS, 0) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(r) })
}

/// Brings the loopback device of the current network namespace up (netdevice(7)).
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    // SAFETY: the kernel reads the name and writes the flags of this live struct.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the previous call filled the flags member of the union.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: as above; the kernel only reads here.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the host name of the current UTS namespace.
pub fn set_hostname(name: &str) -> io::Result<()> {
    Ok(rustix::system::sethostname(name.as_bytes())?)
}

/// Sets the NIS domain name of the current UTS namespace.
pub fn set_domainname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe the bytes of `name`, which outlives the call.
    let r = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A new, empty, anonymous session keyring for this process (keyctl(2)).
pub fn join_new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring; no memory is read.
    let r = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0) };
    if r >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

//! Landlock (landlock(7)): rule sets by descriptor. The kernel's ABI number
//! tells which rights and scopes exist.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// File system rights (`LANDLOCK_ACCESS_FS_*`).
pub mod fs {
    /// Open a character or block device for ioctl (ABI 5).
    pub const IOCTL_DEV: u64 = 1 << 15;
    /// Make a character device.
    pub const MAKE_CHAR: u64 = 1 << 6;
    /// Execute a file.
    pub const EXECUTE: u64 = 1 << 0;
    /// Open a file for reading.
    pub const READ_FILE: u64 = 1 << 2;
    /// Truncate a file (ABI 3).
    pub const TRUNCATE: u64 = 1 << 14;
    /// Make a block device.
    pub const MAKE_BLOCK: u64 = 1 << 11;
}

/// Network rights (`LANDLOCK_ACCESS_NET_*`, ABI 4).
pub mod net {
    /// Bind a TCP socket to a port.
    pub const BIND_TCP: u64 = 1;
    /// Connect a TCP socket to a port.
    pub const CONNECT_TCP: u64 = 2;
    /// The ABI that has them.
    pub const SINCE: u32 = 4;
}

/// Scopes (`LANDLOCK_SCOPE_*`, ABI 6).
pub mod scope {
    /// No connection to abstract sockets made outside the domain.
    pub const ABSTRACT_UNIX_SOCKET: u64 = 1;
    /// No signals to processes outside the domain.
    pub const SIGNAL: u64 = 2;
}

#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent_fd: i32,
}

#[repr(C)]
struct NetPort {
    allowed_access: u64,
    port: u64,
}

/// What a rule set denies but for its rules.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Handled {
    /// File system rights.
    pub fs: u64,
    /// Network rights.
    pub net: u64,
    /// Scopes.
    pub scoped: u64,
}

/// The kernel's Landlock ABI; 0 when there is none.
pub fn abi() -> u32 {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: a null attribute of size 0 with this flag asks for the version.
    let r = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(r).unwrap_or(0)
}

/// All file system rights that `abi` knows.
pub fn all_fs_rights(abi: u32) -> u64 {
    match abi {
        0 => 0,
        1 => (1 << 13) - 1,
        2 => (1 << 14) - 1,
        3 | 4 => (1 << 15) - 1,
        _ => (1 << 16) - 1,
    }
}

/// A rule set being filled.
pub struct Ruleset(OwnedFd);

impl Ruleset {
    /// A rule set that handles these rights and scopes (unknown to `abi` ones
    /// are left out, as landlock(7) asks callers to do).
    pub fn new(abi: u32, handled: Handled) -> io::Result<Ruleset> {
        let attr = RulesetAttr {
            handled_access_fs: handled.fs & all_fs_rights(abi),
            handled_access_net: if abi >= net::SINCE { handled.net } else { 0 },
            scoped: if abi >= 6 { handled.scoped } else { 0 },
        };
        let size: usize = match abi {
            0..=3 => 8,
            4 | 5 => 16,
            _ => 24,
        };
        // SAFETY: the struct lives through the call and is at least `size` long.
        let r = unsafe {
            libc::syscall(
                libc::SYS_landlock_create_ruleset,
                &raw const attr,
                size,
                0u32,
            )
        };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor from the kernel, owned by nobody else.
        Ok(Ruleset(unsafe { OwnedFd::from_raw_fd(r as i32) }))
    }

    /// Grants `rights` on everything beneath `dir`.
    pub fn allow_beneath(&self, dir: impl AsFd, rights: u64) -> io::Result<()> {
        const LANDLOCK_RULE_PATH_BENEATH: u32 = 1;
        let attr = PathBeneath {
            allowed_access: rights,
            parent_fd: dir.as_fd().as_raw_fd(),
        };
        // SAFETY: the struct of this rule type lives through the call.
        let r = unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                self.0.as_raw_fd(),
                LANDLOCK_RULE_PATH_BENEATH,
                &raw const attr,
                0u32,
            )
        };
        if r == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Grants network `rights` for a port. 0 is, for binding, a port of the
    /// kernel's choice.
    pub fn allow_port(&self, port: u16, rights: u64) -> io::Result<()> {
        const LANDLOCK_RULE_NET_PORT: u32 = 2;
        let attr = NetPort {
            allowed_access: rights,
            port: port.into(),
        };
        // SAFETY: the struct of this rule type lives through the call.
        let r = unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                self.0.as_raw_fd(),
                LANDLOCK_RULE_NET_PORT,
                &raw const attr,
                0u32,
            )
        };
        if r == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Puts the calling thread and its future children under these rules.
    /// Needs no_new_privs, or CAP_SYS_ADMIN in its user namespace.
    pub fn restrict_self(self) -> io::Result<()> {
        // SAFETY: integers only.
        let r =
            unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.0.as_raw_fd(), 0u32) };
        if r == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

//! User, group and capability identity of the calling thread (credentials(7),
//! capabilities(7)). Raw system calls: glibc's wrappers would signal all
//! threads, and our processes have one. With the mark, where a container's forker or
//! its children make them.

use std::io;

use crate::marked;

fn check(r: libc::c_long) -> io::Result<()> {
    if r == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn ids(real: u32, effective: u32, saved: u32) -> [u64; 5] {
    [real.into(), effective.into(), saved.into(), 0, 0]
}

/// prctl(2) with integers.
fn set(option: libc::c_int, second: u64, third: u64) -> io::Result<()> {
    let arguments = [option.cast_unsigned().into(), second, third, 0, 0];
    // SAFETY: the options that are set here take integers only.
    unsafe { marked::call(libc::SYS_prctl, arguments) }.map(drop)
}

/// Sets real, effective and saved user id.
pub fn set_uid(uid: u32) -> io::Result<()> {
    // SAFETY: integers only.
    unsafe { marked::call(libc::SYS_setresuid, ids(uid, uid, uid)) }.map(drop)
}

/// Sets real, effective and saved group id.
pub fn set_gid(gid: u32) -> io::Result<()> {
    // SAFETY: integers only.
    unsafe { marked::call(libc::SYS_setresgid, ids(gid, gid, gid)) }.map(drop)
}

/// Sets the supplementary groups.
pub fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: length and pointer describe `groups`, which the kernel only reads.
    unsafe {
        marked::call(
            libc::SYS_setgroups,
            [groups.len() as u64, groups.as_ptr() as u64, 0, 0, 0],
        )
    }
    .map(drop)
}

/// Sets the ids that the kernel uses for files, and checks that it did: the
/// call itself has no error return (setfsuid(2)).
pub fn set_fs_ids(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: integers only; -1 asks for the current value.
    let now = unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsuid, uid);
        (
            libc::syscall(libc::SYS_setfsuid, u32::MAX) as u32,
            libc::syscall(libc::SYS_setfsgid, u32::MAX) as u32,
        )
    };
    if now == (uid, gid) {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }
}

/// Runs `act` with these effective ids, which files and terminals made by it then
/// belong to, and goes back to root: for a process all of whose ids are 0, and which
/// may not be allowed setfsuid(2). Effective capabilities go and come back with them.
///
/// # Errors
/// What the kernel answers to either change.
pub fn as_effective<T>(uid: u32, gid: u32, act: impl FnOnce() -> T) -> io::Result<T> {
    const KEEP: u32 = u32::MAX;
    let set = |number, id| {
        // SAFETY: integers only.
        unsafe { marked::call(number, ids(KEEP, id, KEEP)) }.map(drop)
    };
    // The group first, while the capability is there.
    set(libc::SYS_setresgid, gid)?;
    let changed = set(libc::SYS_setresuid, uid);
    let result = changed.map(|()| act());
    // Real and saved ids are still 0.
    set(libc::SYS_setresuid, 0)?;
    set(libc::SYS_setresgid, 0)?;
    result
}

/// Securebits (capabilities(7)).
pub mod securebits {
    /// Changes of uid don't touch capabilities.
    pub const NO_SETUID_FIXUP: u32 = 1 << 2;
    /// uid 0 gives no capabilities at execve.
    pub const NOROOT: u32 = 1 << 0;
}

/// The securebits of this thread.
pub fn get_securebits() -> io::Result<u32> {
    // SAFETY: integers only.
    let r = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    if r >= 0 {
        Ok(r as u32)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets the securebits of this thread.
pub fn set_securebits(bits: u32) -> io::Result<()> {
    // SAFETY: integers only.
    check(libc::c_long::from(unsafe {
        libc::prctl(libc::PR_SET_SECUREBITS, libc::c_ulong::from(bits), 0, 0, 0)
    }))
}

/// Keep permitted capabilities over the next change of uid (prctl(2)).
pub fn keep_capabilities(keep: bool) -> io::Result<()> {
    set(libc::PR_SET_KEEPCAPS, keep.into(), 0)
}

/// The three sets of capset(2), a bit per capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CapSets {
    /// In force.
    pub effective: u64,
    /// May be put in force.
    pub permitted: u64,
    /// Survive execve together with file capabilities.
    pub inheritable: u64,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}
const CAP_VERSION_3: u32 = 0x2008_0522;

/// Sets the capability sets of this thread.
pub fn set_caps(sets: CapSets) -> io::Result<()> {
    let header = CapHeader {
        version: CAP_VERSION_3,
        pid: 0,
    };
    let low = |v: u64| v as u32;
    let high = |v: u64| (v >> 32) as u32;
    let data: [u32; 6] = [
        low(sets.effective),
        low(sets.permitted),
        low(sets.inheritable),
        high(sets.effective),
        high(sets.permitted),
        high(sets.inheritable),
    ];
    // SAFETY: version 3 reads a header and two data structs of three u32 each.
    unsafe {
        marked::call(
            libc::SYS_capset,
            [&raw const header as u64, data.as_ptr() as u64, 0, 0, 0],
        )
    }
    .map(drop)
}

/// The capability sets of this thread.
pub fn get_caps() -> io::Result<CapSets> {
    let header = CapHeader {
        version: CAP_VERSION_3,
        pid: 0,
    };
    let mut data = [0u32; 6];
    // SAFETY: version 3 writes two data structs of three u32 each.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) })?;
    let join = |l: u32, h: u32| u64::from(l) | (u64::from(h) << 32);
    Ok(CapSets {
        effective: join(data[0], data[3]),
        permitted: join(data[1], data[4]),
        inheritable: join(data[2], data[5]),
    })
}

/// Drops every capability outside `keep` from the bounding set.
pub fn limit_bounding(keep: u64) -> io::Result<()> {
    for cap in 0..64u64 {
        if keep & (1 << cap) != 0 {
            continue;
        }
        match set(libc::PR_CAPBSET_DROP, cap, 0) {
            // Past the kernel's last capability.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            other => other?,
        }
    }
    Ok(())
}

/// Drops the capabilities `caps` from the bounding set; those that aren't in it
/// want CAP_SETPCAP all the same.
pub fn drop_bounding(caps: u64) -> io::Result<()> {
    for cap in (0..64u64).filter(|c| caps & (1 << c) != 0) {
        set(libc::PR_CAPBSET_DROP, cap, 0)?;
    }
    Ok(())
}

/// Makes the ambient set exactly `caps` (each must be permitted and inheritable).
pub fn set_ambient(caps: u64) -> io::Result<()> {
    const CLEAR_ALL: u64 = 4;
    const RAISE: u64 = 2;
    set(libc::PR_CAP_AMBIENT, CLEAR_ALL, 0)?;
    for cap in (0..64u64).filter(|c| caps & (1 << c) != 0) {
        set(libc::PR_CAP_AMBIENT, RAISE, cap)?;
    }
    Ok(())
}

/// No execve of this process or its children gains privileges any more.
pub fn set_no_new_privs() -> io::Result<()> {
    set(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
}

/// Whether other processes may look into this one (`PR_SET_DUMPABLE`).
pub fn set_dumpable(yes: bool) -> io::Result<()> {
    // SAFETY: integers only.
    check(libc::c_long::from(unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, libc::c_ulong::from(yes), 0, 0, 0)
    }))
}

//! Device programs of cgroup v2 (bpf(2); kernel:
//! Documentation/admin-guide/cgroup-v2.rst, "Device controller"): load, attach,
//! list, detach. The program itself is the caller's; the kernel's verifier
//! checks it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// `struct bpf_insn` (linux/bpf.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u8,
    /// Destination in the low four bits, source in the high ones.
    pub registers: u8,
    /// Jump distance or memory offset.
    pub offset: i16,
    /// Constant.
    pub immediate: i32,
}

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const PROG_QUERY: libc::c_int = 16;

const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const CGROUP_DEVICE: u32 = 6;
/// Several programs may be attached and all must allow: the mode in which one
/// can be exchanged without a moment without any.
const F_ALLOW_MULTI: u32 = 2;

/// The kernel takes any prefix of its `union bpf_attr` and reads the rest as 0.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct GetFd {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    // The kernel writes back up to here and further fields are optional.
    padding: u32,
}

/// # Safety
///
/// Every pointer inside `attr` must be valid for what `command` does with it.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live, fully initialised C struct of the size given;
    // the pointers inside are the caller's promise.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(r)
}

fn number(fd: impl AsFd) -> u32 {
    // A BorrowedFd is never negative.
    fd.as_fd().as_raw_fd() as u32
}

/// Loads a program of type `BPF_PROG_TYPE_CGROUP_DEVICE`. The fd is CLOEXEC.
pub fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    let license = c"";
    let mut attr = Load {
        prog_type: PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected_attach_type: CGROUP_DEVICE,
        ..Load::default()
    };
    attr.prog_name[..12].copy_from_slice(b"casemate_dev");
    // SAFETY: the kernel reads `insn_cnt` instructions and a C string, both of
    // which live through the call.
    let fd = unsafe { bpf(PROG_LOAD, &mut attr)? };
    // SAFETY: the kernel made a new descriptor that nobody else owns; bpf(2)
    // sets close-on-exec on it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Attaches a device program to a cgroup v2 directory, besides those that are there.
pub fn attach_device_program(cgroup: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attr = Attach {
        target_fd: number(cgroup),
        attach_bpf_fd: number(program),
        attach_type: CGROUP_DEVICE,
        attach_flags: F_ALLOW_MULTI,
    };
    // SAFETY: no pointers inside.
    unsafe { bpf(PROG_ATTACH, &mut attr) }.map(drop)
}

/// The ids of the device programs attached to this very cgroup.
pub fn device_programs(cgroup: impl AsFd) -> io::Result<Vec<u32>> {
    // The kernel allows 64 per cgroup (BPF_CGROUP_MAX_PROGS).
    let mut ids = [0u32; 64];
    let mut attr = Query {
        target_fd: number(cgroup),
        attach_type: CGROUP_DEVICE,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: 64,
        ..Query::default()
    };
    // SAFETY: the kernel writes at most `prog_cnt` ids to the array, which
    // lives through the call.
    unsafe { bpf(PROG_QUERY, &mut attr) }?;
    let count = usize::try_from(attr.prog_cnt).unwrap_or(0).min(ids.len());
    Ok(ids.into_iter().take(count).collect())
}

/// Detaches the device program with this id. One that is gone is fine.
pub fn detach_device_program(cgroup: impl AsFd, id: u32) -> io::Result<()> {
    let mut attr = GetFd {
        id,
        ..GetFd::default()
    };
    // SAFETY: no pointers inside.
    let fd = match unsafe { bpf(PROG_GET_FD_BY_ID, &mut attr) } {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
        other => other?,
    };
    // SAFETY: as in `load_device_program`.
    let program = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
    let mut attr = Attach {
        target_fd: number(cgroup),
        attach_bpf_fd: number(&program),
        attach_type: CGROUP_DEVICE,
        attach_flags: 0,
    };
    // SAFETY: no pointers inside.
    match unsafe { bpf(PROG_DETACH, &mut attr) } {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map(drop),
    }
}

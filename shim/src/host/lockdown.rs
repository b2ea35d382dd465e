//! The shim's own locks, once the pod is up: what it will never need again goes.

use std::sync::atomic::{AtomicU64, Ordering};

use casemate_cgroup::{Attach, Cgroup};
use casemate_sys::ident::{self, CapSets};
use casemate_sys::{bpf, seccomp};

use super::Step;
use crate::sandbox::SandboxError;

/// What later containers still need of the host (capabilities(7)):
/// CHOWN 0, DAC_OVERRIDE 1, DAC_READ_SEARCH 2, FOWNER 3, FSETID 4 (files of
/// layers, /dev, pipes), KILL 5, SETGID 6, SETUID 7, SETPCAP 8 (the mounter's
/// identity), SYS_CHROOT 18, SYS_PTRACE 19, SYS_ADMIN 21 (mounts, namespaces),
/// SYS_RESOURCE 24 (limits, OOM scores), MKNOD 27, SETFCAP 31 (mounter).
/// Gone are NET_ADMIN, NET_RAW, SYS_MODULE, SYS_RAWIO, SYS_BOOT, SYS_TIME,
/// LINUX_IMMUTABLE, MAC_*, SYSLOG, BPF, PERFMON and the rest.
const KEPT: [u32; 15] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 18, 19, 21, 24, 27, 31];

/// CAP_NET_ADMIN, which kernels before 6.6 want beside CAP_SYS_ADMIN for the
/// device program of a cgroup. What else it is good for is the host's network,
/// where the shim has no business: it stays only where it is needed.
const NET_ADMIN: u32 = 12;

/// Whether the device programs of `cgroup` are out of reach without
/// CAP_NET_ADMIN. Asked of the kernel, by a try.
fn devices_need_net_admin(cgroup: &Cgroup) -> Result<bool, SandboxError> {
    let attach = cgroup.attach();
    let Attach::V2(directory) = attach.map_err(|e| SandboxError::Failed(e.to_string()))? else {
        return Ok(false);
    };
    let before = ident::get_caps().step("read", "the shim's capabilities")?;
    ident::set_caps(CapSets {
        effective: before.effective & !(1 << NET_ADMIN),
        ..before
    })
    .step("try without", "CAP_NET_ADMIN")?;
    let refused = bpf::device_programs(&directory).is_err();
    ident::set_caps(before).step("restore", "the shim's capabilities")?;
    Ok(refused)
}

static KEEPS: AtomicU64 = AtomicU64::new(0);

/// What the shim keeps, once it is locked.
pub fn kept() -> u64 {
    KEEPS.load(Ordering::Relaxed)
}

/// Drops capabilities, forbids new privileges, installs the shim's filter.
///
/// `cgroup` is one like those that later containers get.
pub fn lock(cgroup: &Cgroup) -> Result<(), SandboxError> {
    let mut keep = KEPT.iter().fold(0u64, |set, cap| set | 1 << cap);
    if devices_need_net_admin(cgroup)? {
        keep |= 1 << NET_ADMIN;
    }
    ident::limit_bounding(keep).step("limit", "the shim's bounding set")?;
    let now = ident::get_caps().step("read", "the shim's capabilities")?;
    let permitted = now.permitted & keep;
    KEEPS.store(permitted, Ordering::Relaxed);
    ident::set_caps(CapSets {
        effective: permitted,
        permitted,
        inheritable: 0,
    })
    .step("drop", "the shim's capabilities")?;
    ident::set_no_new_privs().step("set no_new_privs of", "the shim")?;
    ident::set_dumpable(false).step("set dumpable of", "the shim")?;
    let filter = seccomp_profiles::shipped_program("shim")
        .ok_or_else(|| SandboxError::Failed("profile \"shim\" isn't in this binary".into()))?;
    seccomp::install_filter(filter, 0).step("install the filter of", "the shim")?;
    Ok(())
}

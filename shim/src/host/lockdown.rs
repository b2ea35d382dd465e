//! The shim's own locks, once the pod is up: what it will never need again goes.

use casemate_sys::ident::{self, CapSets};
use casemate_sys::seccomp;

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

/// Drops capabilities, forbids new privileges, installs the shim's filter.
pub fn lock() -> Result<(), SandboxError> {
    let keep = KEPT.iter().fold(0u64, |set, cap| set | 1 << cap);
    ident::limit_bounding(keep).step("limit", "the shim's bounding set")?;
    let now = ident::get_caps().step("read", "the shim's capabilities")?;
    let permitted = now.permitted & keep;
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

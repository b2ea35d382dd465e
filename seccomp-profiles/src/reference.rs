//! What a profile means, written the plainest way: the yardstick for the compiler.
//!
//! Nothing here shares code with the compiler beyond the profile model itself.

use crate::action::Action;
use crate::interp::SeccompData;
use crate::profile::Profile;
use crate::table;

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const X86_64: u32 = 0xc000_003e;
/// `__X32_SYSCALL_BIT` (asm/unistd.h); the kernel takes any number from here up for x32.
const X32: u32 = 0x4000_0000;

/// The verdict of `profile` on one call.
#[must_use]
pub fn decide(profile: &Profile, data: &SeccompData) -> Action {
    if data.arch != X86_64 {
        return Action::KillProcess;
    }
    if data.nr >= X32 {
        return profile.x32;
    }
    let Some(name) = table::name(data.nr) else {
        return profile.unknown;
    };
    for group in &profile.groups {
        for rule in &group.rules {
            let named = rule.syscalls.iter().any(|syscall| syscall == name);
            let holds = || {
                rule.alternatives()
                    .iter()
                    .any(|list| list.iter().all(|condition| condition.holds(&data.args)))
            };
            if named && holds() {
                return group.action;
            }
        }
    }
    profile.default
}

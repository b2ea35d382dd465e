//! What a profile means, written the plainest way: the yardstick for the compiler.
//!
//! Nothing here shares code with the compiler beyond the profile model itself.

use crate::action::Action;
use crate::interp::SeccompData;
use crate::profile::{ArgSet, Condition, Profile, Rule};
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
        if group.rules.iter().any(|rule| matches(rule, name, data)) {
            return group.action;
        }
    }
    profile.default
}

/// The index in [`crate::explain::rules`] of what decides the call.
#[must_use]
pub fn rule(profile: &Profile, data: &SeccompData) -> usize {
    let rules: Vec<&Rule> = profile.groups.iter().flat_map(|g| &g.rules).collect();
    let end = rules.len() + profile.left_out.len();
    if data.arch != X86_64 {
        return end + 3;
    }
    if data.nr >= X32 {
        return end + 2;
    }
    let Some(name) = table::name(data.nr) else {
        return end + 1;
    };
    if let Some(at) = rules.iter().position(|rule| matches(rule, name, data)) {
        return at;
    }
    let mut left_out = profile.left_out.iter();
    let named = left_out.position(|l| l.syscalls.iter().any(|call| call == name));
    named.map_or(end, |at| rules.len() + at)
}

fn matches(rule: &Rule, name: &str, data: &SeccompData) -> bool {
    let any_value = |arg: &ArgSet| {
        arg.values.iter().any(|&value| {
            let condition = Condition {
                index: arg.index,
                op: arg.op,
                value,
                width: arg.width,
            };
            condition.holds(&data.args)
        })
    };
    rule.syscalls.iter().any(|syscall| syscall == name) && rule.args.iter().all(any_value)
}

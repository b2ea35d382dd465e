//! Calls that sit on every boundary of a profile.

// Each test file uses its own part of this module.
#![allow(dead_code)]

use std::collections::BTreeSet;

use seccomp_profiles::interp::{self, SeccompData};
use seccomp_profiles::profile::{Condition, Op};
use seccomp_profiles::{Action, Explainer, Observed, Profile, Program, RuleInfo, reference, table};

pub const X32: u32 = 0x4000_0000;
/// How many combinations of arguments of one call of a shipped profile are
/// tried; more than any of them has.
const LIMIT: usize = 100_000;
const GARBAGE: u64 = 0xdead_beef_0000_0000;
/// AUDIT_ARCH_I386, AUDIT_ARCH_AARCH64, AUDIT_ARCH_RISCV64 and none.
pub const FOREIGN: [u32; 4] = [0x4000_0003, 0xc000_00b7, 0xc000_00f3, 0];

/// Argument values around what `conditions` compare with, with and without
/// garbage in the high word, in all combinations or, if they are
/// more than `limit`, that many random ones.
pub fn arguments<'a>(
    conditions: impl Iterator<Item = &'a Condition>,
    limit: usize,
) -> Vec<[u64; 6]> {
    let mut values: [BTreeSet<u64>; 6] = Default::default();
    for condition in conditions {
        let v = condition.value;
        let set = &mut values[usize::from(condition.index)];
        set.extend([0, u64::MAX, v, v.wrapping_sub(1), v.wrapping_add(1)]);
        set.extend([
            v | 1 << 32,
            v | GARBAGE,
            v.wrapping_add(1) | GARBAGE,
            v ^ 1 << 63,
        ]);
        if let Op::MaskedEq(mask) = condition.op {
            let lowest = mask & mask.wrapping_neg();
            set.extend([v | !mask, v ^ mask, v ^ lowest, (v ^ lowest) | !mask]);
        }
    }
    let values: Vec<Vec<u64>> = values
        .into_iter()
        .map(|set| {
            if set.is_empty() {
                vec![0x7777_7777_7777_7777]
            } else {
                set.into_iter().collect()
            }
        })
        .collect();
    let count = values
        .iter()
        .fold(1, |n: usize, set| n.saturating_mul(set.len()));
    let mut mixed = 0x9e37_79b9_7f4a_7c15u64;
    (0..count.min(limit))
        .map(|at| {
            let mut rest = at;
            std::array::from_fn(|index| {
                let set = &values[index];
                let pick = if count <= limit {
                    let pick = rest % set.len();
                    rest /= set.len();
                    pick
                } else {
                    mixed = mixed
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    usize::try_from(mixed >> 33).unwrap() % set.len()
                };
                set[pick]
            })
        })
        .collect()
}

/// Every condition that `profile` has on the call `name`.
pub fn conditions(profile: &Profile, name: &str) -> Vec<Condition> {
    profile
        .groups
        .iter()
        .flat_map(|group| &group.rules)
        .filter(|rule| rule.syscalls.iter().any(|syscall| syscall == name))
        .flat_map(|rule| rule.alternatives().concat())
        .collect()
}

/// Calls of number `nr` that exercise all that `profile` says about it.
pub fn calls_of(profile: &Profile, nr: u32) -> Vec<SeccompData> {
    let calls = some_calls_of(profile, nr, LIMIT);
    assert!(calls.len() < LIMIT, "not all combinations are tried");
    calls
}

/// As [`calls_of`], at most `limit` of them.
pub fn some_calls_of(profile: &Profile, nr: u32, limit: usize) -> Vec<SeccompData> {
    let conditions = table::name(nr).map_or_else(Vec::new, |name| conditions(profile, name));
    arguments(conditions.iter(), limit)
        .into_iter()
        .map(|args| SeccompData::x86_64(nr, args))
        .collect()
}

/// All numbers 0 to 1023, the x32 border, and foreign architectures.
pub fn calls(profile: &Profile) -> Vec<SeccompData> {
    let numbers = (0..1024).chain([X32 - 1, X32, X32 + 1, X32 + 59, 0x7fff_ffff, u32::MAX]);
    let mut calls: Vec<SeccompData> = numbers.flat_map(|nr| calls_of(profile, nr)).collect();
    for arch in FOREIGN {
        for nr in [0, 1, 39, 59, 435, 471, X32, u32::MAX] {
            calls.push(SeccompData {
                arch,
                ..SeccompData::x86_64(nr, [1; 6])
            });
        }
    }
    calls
}

/// Number of a call.
pub fn nr(name: &str) -> u32 {
    table::number(name).unwrap()
}

/// What a small web server does.
pub fn server() -> Observed {
    let mut seen = Observed::default();
    for name in [
        "accept4",
        "bind",
        "listen",
        "epoll_create1",
        "epoll_ctl",
        "epoll_wait",
        "writev",
        "sendfile",
        "setuid",
    ] {
        assert!(seen.add(nr(name), &[3; 6]), "{name}");
        assert!(!seen.add(nr(name), &[4; 6]), "{name} twice");
    }
    let high = 7 << 32;
    seen.add(nr("socket"), &[2 | high, 0o2_000_001, 6, 9, 9, 9]);
    seen.add(nr("setsockopt"), &[3, 1, 2, 77, 4, 0]);
    seen.add(nr("setsockopt"), &[3, 6, 1, 77, 4, 0]);
    seen.add(nr("setsockopt"), &[4, 6, 9, 77, 4, 0]);
    seen.add(nr("ioctl"), &[3, 0x5421, 77, 0, 0, 0]);
    seen.add(nr("clone"), &[0x3d_0f00, 1, 2, 3, 4, 5]);
    seen
}

pub fn verdict(program: &Program, data: &SeccompData) -> Action {
    Action::from_ret(interp::run(program, data))
}

/// What the listener's form of a profile answers where `rule` decides.
pub fn notified(rule: &RuleInfo) -> Action {
    match rule.action {
        Action::Errno(_) if !rule.quiet => Action::Notify,
        action => action,
    }
}

/// Whether `explainer` names the rule that decides, and only where it refuses.
pub fn explained(
    profile: &Profile,
    explainer: &Explainer,
    data: &SeccompData,
) -> Result<(), proptest::test_runner::TestCaseError> {
    let rule = &explainer.rules()[reference::rule(profile, data)];
    proptest::prop_assert_eq!(rule.action, reference::decide(profile, data), "{:x?}", data);
    let runs = matches!(rule.action, Action::Allow | Action::Log);
    let want = (!runs).then_some(rule);
    proptest::prop_assert_eq!(explainer.explain(data), want, "{:x?}", data);
    Ok(())
}

//! CPU time as systemd keeps it. It writes a unit's quota to a file in whole percents
//! of a CPU, and `cpu.max` from what it reads there, at the latest at
//! `systemctl daemon-reload` (systemd.resource-control(5), CPUQuota=; in its source
//! `bus_cgroup_set_property` and `cgroup_apply_unified_cpu_quota`). So a scope gets
//! what that makes of its quota, from the start and in every file: rounded up, never
//! less than was asked for. A period without a quota is its default.

use std::borrow::Cow;

use oci_spec::runtime::LinuxResources;

use crate::apply::bandwidth;

/// The period of a quota that comes without one, systemd's as well as the kernel's.
const PERIOD: u64 = 100_000;
/// The kernel's bounds; what is outside of them is left for it to refuse.
const LEAST: u64 = 1000;
const LONGEST: u64 = 1_000_000;

/// Quota and period of a cgroup, `None` where there is no limit or no such file.
pub(crate) type Now = (Option<u64>, Option<u64>);

/// A quota in percents of a CPU, rounded up.
pub(super) fn percents(quota: u64, period: u64) -> Option<u64> {
    let whole = (u128::from(quota) * 100).div_ceil(u128::from(period.max(1)));
    u64::try_from(whole).ok()
}

/// The quota that systemd makes of that, if the kernel takes it.
fn held_quota(quota: u64, period: u64) -> Option<u64> {
    if quota < LEAST || !(LEAST..=LONGEST).contains(&period) {
        return None;
    }
    let held = u128::from(percents(quota, period)?) * u128::from(period) / 100;
    u64::try_from(held).ok()
}

/// `r` as a scope of systemd's can hold it, where `now` is in force: for systemd and
/// for the files alike.
pub(crate) fn held(r: &LinuxResources, now: Now) -> Cow<'_, LinuxResources> {
    let mut out = Cow::Borrowed(r);
    if let Some(cpu) = r.cpu()
        && let (quota, period) = bandwidth(cpu)
        && (quota.is_some() || period.is_some())
    {
        // systemd keeps a share, so one that isn't named changes with the period.
        let quota = quota.or_else(|| now.0.and_then(|q| i64::try_from(q).ok()));
        let period = match quota {
            Some(0..) => period.or(now.1).unwrap_or(PERIOD),
            _ => PERIOD,
        };
        let rounded = quota.map(|asked| {
            let held = u64::try_from(asked)
                .ok()
                .and_then(|q| held_quota(q, period));
            held.and_then(|q| i64::try_from(q).ok()).unwrap_or(asked)
        });
        let mut cpu = cpu.clone();
        cpu.set_quota(rounded).set_period(Some(period));
        out.to_mut().set_cpu(Some(cpu));
    }
    if let Some(text) = r.unified().as_ref().and_then(|u| u.get("cpu.max"))
        && let Some(held) = held_text(text, now)
        && let Some(unified) = out.to_mut().unified_mut()
    {
        unified.insert("cpu.max".to_owned(), held);
    }
    out
}

/// The same for the text of `cpu.max`: a quota, or one and its period.
fn held_text(text: &str, now: Now) -> Option<String> {
    let mut words = text.split_whitespace();
    let first = words.next()?;
    if first == "max" {
        return Some(format!("max {PERIOD}"));
    }
    let quota = first.parse().ok()?;
    let period = match words.next() {
        Some(word) => word.parse().ok()?,
        None => now.1.unwrap_or(PERIOD),
    };
    let whole = words.next().is_none();
    whole.then(|| held_quota(quota, period).map(|quota| format!("{quota} {period}")))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::resources;

    fn quota(quota: i64, period: u64, now: Now) -> (Option<i64>, Option<u64>) {
        let r = resources(&format!(
            r#"{{"cpu":{{"quota":{quota},"period":{period}}}}}"#
        ));
        let held = held(&r, now);
        let cpu = held.cpu().as_ref().unwrap();
        (cpu.quota(), cpu.period())
    }

    #[test]
    fn a_quota_is_rounded_up_to_whole_percents() {
        for (asked, period, held) in [
            (12_345, 50_000, 12_500),
            (12_500, 50_000, 12_500),
            (100_001, 100_000, 101_000),
            (50_000, 100_000, 50_000),
            (1000, 100_000, 1000),
            // Not a microsecond less, where the share itself can't be written.
            (10_000, 999_999, 19_999),
            (6172, 12_345, 6172),
            (6173, 12_345, 6295),
            // The kernel's to refuse.
            (999, 100_000, 999),
            (5000, 999, 5000),
            (5000, 1_000_001, 5000),
            (i64::MAX, 100_000, i64::MAX),
        ] {
            let now = (None, None);
            assert_eq!(quota(asked, period, now), (Some(held), Some(period)));
        }
    }

    #[test]
    fn what_is_held_is_held_again() {
        for period in [
            1000, 1001, 12_345, 33_333, 99_999, 100_000, 999_999, 1_000_000,
        ] {
            for asked in (1000..2 * period + 1000).step_by(97) {
                let once = held_quota(asked, period).unwrap();
                assert!(once >= asked, "{asked} of {period}: {once}");
                // As systemd computes it of microseconds for a second.
                let percents = percents(asked, period).unwrap();
                assert_eq!(percents * 10_000 * period / 1_000_000, once);
                assert_eq!(held_quota(once, period), Some(once), "{asked} of {period}");
            }
        }
    }

    #[test]
    fn half_of_a_bandwidth_is_completed_by_what_is_in_force() {
        let now = (Some(20_000), Some(50_000));
        assert_eq!(quota(12_345, 0, now), (Some(12_500), Some(50_000)));
        assert_eq!(quota(0, 30_000, now), (Some(20_100), Some(30_000)));
        let none = (None, None);
        assert_eq!(quota(12_345, 0, none), (Some(13_000), Some(100_000)));
        assert_eq!(quota(0, 30_000, none), (None, Some(PERIOD)));
        assert_eq!(quota(-1, 50_000, now), (Some(-1), Some(PERIOD)));
        let other = resources(r#"{"cpu":{"shares":2},"pids":{"limit":5}}"#);
        assert!(matches!(held(&other, now), Cow::Borrowed(_)));
    }

    #[test]
    fn the_file_by_name_is_rounded_too() {
        for (text, want) in [
            ("12345 50000", "12500 50000"),
            ("12345", "12400 40000"),
            ("max 50000", "max 100000"),
            ("max", "max 100000"),
            ("1 2 3", "1 2 3"),
            ("", ""),
        ] {
            let r = resources(&format!(r#"{{"unified":{{"cpu.max":"{text}"}}}}"#));
            let held = held(&r, (None, Some(40_000)));
            assert_eq!(held.unified().as_ref().unwrap()["cpu.max"], want, "{text}");
        }
    }
}

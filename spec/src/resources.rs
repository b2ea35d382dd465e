//! Limits and devices of a specification.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use crate::coverage::How;
use crate::devices::{self, DEFAULT_DEVICES, DeviceSpec};
use crate::error::{Refusal, one_line};
use crate::journal::Journal;
use crate::rules::{DEVICE, RESOURCES};
use crate::tightenings;

/// Major number of the pseudo-terminals of devpts.
const PTS: i64 = 136;

/// `/dev/net/tun`, which some versions of containerd allow to everybody.
const TUN: (i64, i64) = (10, 200);

/// Whether a rule opens every device, as `privileged: true` does.
pub(crate) fn allows_all_devices(resources: &LinuxResources) -> bool {
    resources.devices().iter().flatten().any(opens_all)
}

fn any(number: Option<i64>) -> bool {
    number.is_none_or(|n| n < 0)
}

fn only_mknod(rule: &LinuxDeviceCgroup) -> bool {
    rule.access()
        .as_deref()
        .is_some_and(|a| !a.is_empty() && !a.contains(['r', 'w']))
}

fn opens_all(rule: &LinuxDeviceCgroup) -> bool {
    let typ = rule.typ().unwrap_or(LinuxDeviceType::A);
    rule.allow()
        && any(rule.major())
        && any(rule.minor())
        && !only_mknod(rule)
        && typ != LinuxDeviceType::P
}

fn within_default(rule: &LinuxDeviceCgroup) -> bool {
    let character = matches!(rule.typ(), Some(LinuxDeviceType::C | LinuxDeviceType::U));
    let (major, minor) = (rule.major(), rule.minor());
    character
        && (major == Some(PTS)
            || DEFAULT_DEVICES
                .iter()
                .any(|(_, a, b)| (major, minor) == (Some(*a), Some(*b))))
}

fn rule(
    allow: bool,
    typ: LinuxDeviceType,
    major: Option<i64>,
    minor: Option<i64>,
) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow)
        .set_typ(Some(typ))
        .set_major(major)
        .set_minor(minor)
        .set_access(Some("rwm".to_owned()));
    rule
}

/// Checks the limits of an update. Rules about devices are left out: containerd
/// sends those of the specification along, and what was made of them at the start
/// stays.
///
/// # Errors
/// The first rule that refuses a value.
pub fn tighten_update(mut resources: LinuxResources) -> Result<LinuxResources, Refusal> {
    resources.set_devices(None);
    check_values(&resources)?;
    Ok(resources)
}

/// Limits, with the rules about devices cut to the default ones and `given`.
pub(crate) fn check(
    mut resources: LinuxResources,
    given: &[DeviceSpec],
    journal: &mut Journal,
) -> Result<LinuxResources, Refusal> {
    if allows_all_devices(&resources) {
        return Err(Refusal::new(
            &DEVICE,
            "linux.resources.devices",
            "all devices",
        ));
    }
    if resources.devices().is_none() {
        resources.set_devices(Some(Vec::new()));
    }
    if let Some(rules) = resources.devices_mut() {
        let (mut quiet, mut loud) = (0, Vec::new());
        rules.retain(|rule| {
            if !rule.allow() || within_default(rule) || devices::is_about(rule, given) {
                return true;
            }
            let numbers = (rule.major().unwrap_or(-1), rule.minor().unwrap_or(-1));
            if only_mknod(rule) || numbers == TUN {
                quiet += 1;
            } else {
                let typ = rule.typ().unwrap_or(LinuxDeviceType::A);
                loud.push(format!("{} {}:{}", typ.as_str(), numbers.0, numbers.1));
            }
            false
        });
        if rules.is_empty() {
            // Nothing said about devices is not all of them.
            rules.push(rule(false, LinuxDeviceType::A, None, None));
        }
        // Every container has these, whatever the rules say ("Default Devices").
        for (_, major, minor) in DEFAULT_DEVICES {
            rules.push(rule(true, LinuxDeviceType::C, Some(major), Some(minor)));
        }
        rules.push(rule(true, LinuxDeviceType::C, Some(PTS), None));
        const FIELD: &str = "linux.resources.devices[].allow";
        if !loud.is_empty() {
            loud.truncate(8);
            journal.tighten(
                tightenings::DEVICE_RULES,
                &format!(
                    "no such device in the sandbox, dropped: {}",
                    loud.join(", ")
                ),
            );
        } else if quiet > 0 {
            journal.mark(
                FIELD,
                How::Stricter,
                "rules to make nodes of any device, and tun's, dropped",
            );
        }
    }
    check_values(&resources)?;
    Ok(resources)
}

fn check_values(resources: &LinuxResources) -> Result<(), Refusal> {
    let no = |field: &str, detail: String| {
        Err(Refusal::new(
            &RESOURCES,
            format!("linux.resources.{field}"),
            detail,
        ))
    };
    if resources
        .memory()
        .as_ref()
        .is_some_and(|m| m.disable_oom_killer() == Some(true))
    {
        return no(
            "memory.disableOOMKiller",
            "true would hang the container instead of ending it".into(),
        );
    }
    if let Some(cpu) = resources.cpu() {
        // Written to cpuset.cpus and cpuset.mems: lists of numbers and ranges.
        for (field, list) in [("cpu.cpus", cpu.cpus()), ("cpu.mems", cpu.mems())] {
            let list = list.as_deref().unwrap_or_default();
            if !list
                .bytes()
                .all(|b| b.is_ascii_digit() || matches!(b, b',' | b'-' | b' ' | b'\n'))
            {
                return no(
                    field,
                    format!("{} is not a list of numbers", one_line(list)),
                );
            }
        }
    }
    for (i, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        // Part of a file name: hugetlb.<pageSize>.max.
        let size = limit.page_size();
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return no(
                &format!("hugepageLimits[{i}].pageSize"),
                format!("\"{}\" is not a size such as 2MB", one_line(size)),
            );
        }
    }
    for (key, value) in resources.unified().iter().flatten() {
        // A file name in the cgroup. Those of cgroup core steer the hierarchy.
        let name = key
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !name
            || !key.contains('.')
            || key.starts_with('.')
            || key.starts_with("cgroup.")
            || value.contains('\0')
        {
            return no(
                "unified",
                format!("{} is not a controller's file", one_line(key)),
            );
        }
    }
    Ok(())
}

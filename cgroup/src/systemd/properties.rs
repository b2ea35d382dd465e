//! Limits as properties of a unit (systemd.resource-control(5);
//! org.freedesktop.systemd1(5), "Scope Unit Objects").
//!
//! systemd writes the files of a unit's cgroup whenever it sees fit, at the
//! latest at `systemctl daemon-reload`. Limits that it doesn't know it would then
//! put back to the defaults. Only files that it never writes (hugetlb, rdma,
//! throttles of devices that it wasn't told of) are left out here.

use oci_spec::runtime::LinuxResources;

use super::quota::percents;
use super::wire::Body;
use crate::apply::bandwidth;
use crate::convert::{cpu_weight, io_weight};
use crate::devices;
use crate::files;

/// How systemd writes "no limit".
const INFINITY: u64 = u64::MAX;
/// The highest CPU or memory node that a list may name; the kernel has fewer.
const LIST_MAX: usize = 8191;

/// A property's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Bool(bool),
    Number(u64),
    Text(String),
    /// A bit mask, lowest byte first.
    Mask(Vec<u8>),
    Pids(Vec<u32>),
    Pairs(Vec<(String, String)>),
}

/// One property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Property {
    pub(super) name: &'static str,
    pub(super) value: Value,
    /// Newer than the oldest systemd that one may meet: sent again without if
    /// it isn't known.
    pub(super) recent: bool,
}

impl Property {
    pub(super) fn new(name: &'static str, value: Value) -> Property {
        Property {
            name,
            value,
            recent: false,
        }
    }
}

/// Writes an array of (name, variant).
pub(super) fn write(body: &mut Body, properties: &[Property]) {
    body.array(8, |body| {
        for property in properties {
            body.align(8);
            body.string(property.name);
            match &property.value {
                Value::Bool(value) => {
                    body.signature("b");
                    body.bool(*value);
                }
                Value::Number(value) => {
                    body.signature("t");
                    body.u64(*value);
                }
                Value::Text(value) => {
                    body.signature("s");
                    body.string(value);
                }
                Value::Mask(value) => {
                    body.signature("ay");
                    body.bytes(value);
                }
                Value::Pids(pids) => {
                    body.signature("au");
                    body.array(4, |body| pids.iter().for_each(|pid| body.u32(*pid)));
                }
                Value::Pairs(pairs) => {
                    body.signature("a(ss)");
                    body.array(8, |body| {
                        for (left, right) in pairs {
                            body.align(8);
                            body.string(left);
                            body.string(right);
                        }
                    });
                }
            }
        }
    });
}

/// What is collected; a later word for the same property replaces the first.
#[derive(Debug, Default)]
struct Collected(Vec<Property>);

impl Collected {
    fn put(&mut self, name: &'static str, value: Value, recent: bool) {
        self.0.retain(|p| p.name != name);
        self.0.push(Property {
            name,
            value,
            recent,
        });
    }

    fn number(&mut self, name: &'static str, value: u64) {
        self.put(name, Value::Number(value), false);
    }

    /// An OCI limit: 0 is not given, below is none.
    fn limit(&mut self, name: &'static str, value: Option<i64>) {
        if let Some(value) = value.filter(|v| *v != 0) {
            self.number(name, u64::try_from(value).unwrap_or(INFINITY));
        }
    }

    fn mask(&mut self, name: &'static str, list: &str) {
        match mask(list) {
            Some(mask) => self.put(name, Value::Mask(mask), false),
            // The kernel says what is wrong with it, and the limit isn't set.
            None => log::debug!("{name}: {list:?} is no list of numbers"),
        }
    }

    /// What comes here is in whole percents already, but for what the kernel refuses.
    fn quota(&mut self, quota: i64, period: Option<u64>) {
        let period = period.unwrap_or(100_000);
        let per_second = u64::try_from(quota)
            .ok()
            .and_then(|q| percents(q, period)?.checked_mul(10_000))
            .unwrap_or(INFINITY);
        self.number("CPUQuotaPerSecUSec", per_second);
    }
}

/// The properties that say what `r` says, for a host with this version of cgroups.
pub(super) fn of(r: &LinuxResources, v2: bool) -> Vec<Property> {
    let mut out = Collected::default();
    if let Some(pids) = r.pids() {
        out.limit("TasksMax", Some(pids.limit()));
    }
    if let Some(memory) = r.memory() {
        out.limit("MemoryMax", memory.limit());
        let swap = memory.swap().filter(|s| *s != 0);
        match (swap, memory.limit().filter(|l| *l > 0)) {
            (Some(swap), _) if swap < 0 => out.number("MemorySwapMax", INFINITY),
            // Together in the OCI, apart in systemd. Without the limit, see
            // `Cgroup::apply`, which reads it back; here it is unknown.
            (Some(swap), Some(limit)) if v2 => {
                out.number("MemorySwapMax", u64::try_from(swap - limit).unwrap_or(0));
            }
            _ => {}
        }
        if v2 {
            out.limit("MemoryLow", memory.reservation());
        }
    }
    if let Some(cpu) = r.cpu() {
        if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
            if v2 {
                out.number("CPUWeight", cpu_weight(shares));
            } else {
                out.number("CPUShares", shares);
            }
        }
        if cpu.idle() == Some(1) {
            out.put("CPUWeight", Value::Number(0), true);
        }
        let (quota, period) = bandwidth(cpu);
        if let Some(period) = period {
            out.number("CPUQuotaPeriodUSec", period);
        }
        if let Some(quota) = quota {
            out.quota(quota, period);
        }
        if v2 {
            for (name, list) in [
                ("AllowedCPUs", cpu.cpus()),
                ("AllowedMemoryNodes", cpu.mems()),
            ] {
                if let Some(list) = list.as_deref().filter(|l| !l.is_empty()) {
                    out.mask(name, list);
                }
            }
        }
    }
    if let Some(weight) = r.block_io().as_ref().and_then(|io| io.weight())
        && weight != 0
    {
        if v2 {
            out.number("IOWeight", io_weight(weight));
        } else {
            out.number("BlockIOWeight", weight.into());
        }
    }
    if v2 {
        for (key, value) in r.unified().iter().flatten() {
            unified(&mut out, key, value.trim());
        }
    } else if let Some(rules) = r.devices().as_ref().filter(|d| !d.is_empty()) {
        // On version 2 our own program stays where it is, and systemd's would
        // only stand beside it; on version 1 there is one list for both.
        if let Some(pairs) = device_pairs(rules) {
            let policy = Value::Text("strict".to_owned());
            out.put("DevicePolicy", policy, false);
            out.put("DeviceAllow", Value::Pairs(pairs), false);
        }
    }
    out.0
}

/// A file of version 2 by name, with one value.
fn unified(out: &mut Collected, key: &str, value: &str) {
    let name = match key {
        "memory.min" => "MemoryMin",
        "memory.low" => "MemoryLow",
        "memory.high" => "MemoryHigh",
        "memory.max" => "MemoryMax",
        "memory.swap.max" => "MemorySwapMax",
        "pids.max" => "TasksMax",
        "cpu.weight" => "CPUWeight",
        "io.weight" => "IOWeight",
        "memory.zswap.max" => {
            if let Some(number) = files::parse_number(value) {
                out.put("MemoryZSwapMax", Value::Number(number), true);
            }
            return;
        }
        "memory.oom.group" if value == "1" => {
            out.put("OOMPolicy", Value::Text("kill".to_owned()), true);
            return;
        }
        "cpuset.cpus" => return out.mask("AllowedCPUs", value),
        "cpuset.mems" => return out.mask("AllowedMemoryNodes", value),
        "cpu.max" => {
            let mut words = value.split_whitespace();
            let quota = words.next().and_then(|w| match w {
                "max" => Some(-1),
                w => w.parse().ok(),
            });
            let period = words.next().and_then(|w| w.parse().ok()).filter(|p| *p > 0);
            if let Some(period) = period {
                out.number("CPUQuotaPeriodUSec", period);
            }
            if let Some(quota) = quota {
                out.quota(quota, period);
            }
            return;
        }
        // systemd doesn't write the others.
        _ => return,
    };
    let number = value.strip_prefix("default ").unwrap_or(value);
    if let Some(number) = files::parse_number(number) {
        out.number(name, number);
    }
}

/// `0-3,7` as a mask.
fn mask(list: &str) -> Option<Vec<u8>> {
    let mut mask = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().ok()?;
        let last: usize = last.trim().parse().ok()?;
        if first > last || last > LIST_MAX {
            return None;
        }
        for number in first..=last {
            if mask.len() <= number / 8 {
                mask.resize(number / 8 + 1, 0);
            }
            if let Some(byte) = mask.get_mut(number / 8) {
                *byte |= 1 << (number % 8);
            }
        }
    }
    Some(mask)
}

/// What is allowed in the end, in systemd's words; `None` if all is.
fn device_pairs(rules: &[oci_spec::runtime::LinuxDeviceCgroup]) -> Option<Vec<(String, String)>> {
    let allowed = devices::allowed(&devices::parse(rules).ok()?)?;
    let drivers = files::read("/proc/devices".as_ref()).unwrap_or_default();
    let mut pairs = Vec::new();
    for device in allowed {
        let kind = if device.block { "block" } else { "char" };
        let name = match (device.major, device.minor) {
            (None, _) => format!("{kind}-*"),
            (Some(major), Some(minor)) => format!("/dev/{kind}/{major}:{minor}"),
            (Some(major), None) => match driver(&drivers, device.block, major) {
                Some(driver) => format!("{kind}-{driver}"),
                None => {
                    log::warn!(
                        "devices: {kind} {major}:* has no name in /proc/devices, so systemd can't be told of it: it is allowed until systemctl daemon-reload"
                    );
                    continue;
                }
            },
        };
        pairs.push((name, device.access));
    }
    Some(pairs)
}

/// The driver's name for a major number (proc_devices(5)).
fn driver(text: &str, block: bool, major: u32) -> Option<String> {
    let mut in_block = false;
    for line in text.lines() {
        match line.trim() {
            "Character devices:" => in_block = false,
            "Block devices:" => in_block = true,
            entry if in_block == block => {
                let (number, name) = entry.split_once(' ').unwrap_or((entry, ""));
                if number.parse() == Ok(major) && !name.is_empty() {
                    return Some(name.trim().to_owned());
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::resources;

    fn get(list: &[Property], name: &str) -> Option<Value> {
        list.iter()
            .find(|p| p.name == name)
            .map(|p| p.value.clone())
    }

    #[test]
    fn limits_become_properties_of_version_2() {
        let list = of(
            &resources(
                r#"{"memory":{"limit":1000,"swap":1500,"reservation":500},
                "cpu":{"shares":1024,"quota":12345,"period":50000,"cpus":"0-2,9"},
                "pids":{"limit":-1},"blockIO":{"weight":1000},
                "unified":{"memory.high":"900","cpu.idle":"0","memory.oom.group":"1"}}"#,
            ),
            true,
        );
        for (name, want) in [
            ("MemoryMax", 1000),
            ("MemorySwapMax", 500),
            ("MemoryLow", 500),
            ("MemoryHigh", 900),
            ("CPUWeight", 100),
            // 24.69 %, rounded up to whole percents.
            ("CPUQuotaPerSecUSec", 250_000),
            ("CPUQuotaPeriodUSec", 50_000),
            ("TasksMax", INFINITY),
            ("IOWeight", 10_000),
        ] {
            assert_eq!(get(&list, name), Some(Value::Number(want)), "{name}");
        }
        let cpus = get(&list, "AllowedCPUs");
        assert_eq!(cpus, Some(Value::Mask(vec![0b111, 0b10])));
        assert!(list.iter().any(|p| p.name == "OOMPolicy" && p.recent));
        assert_eq!(list.len(), 11);
    }

    #[test]
    fn nothing_named_is_nothing_said() {
        assert!(of(&LinuxResources::default(), true).is_empty());
        let zeros = resources(r#"{"memory":{"limit":0},"cpu":{"shares":0,"quota":0}}"#);
        assert!(of(&zeros, true).is_empty());
        assert!(of(&zeros, false).is_empty());
    }

    #[test]
    fn a_file_named_exactly_has_the_last_word() {
        let list = of(
            &resources(
                r#"{"memory":{"limit":1000},"unified":{"memory.max":"2000","cpu.max":"max 100000","io.weight":"default 7"}}"#,
            ),
            true,
        );
        assert_eq!(get(&list, "MemoryMax"), Some(Value::Number(2000)));
        assert_eq!(
            get(&list, "CPUQuotaPerSecUSec"),
            Some(Value::Number(INFINITY))
        );
        assert_eq!(get(&list, "IOWeight"), Some(Value::Number(7)));
    }

    #[test]
    fn lists_are_bounded() {
        assert_eq!(mask("8"), Some(vec![0, 1]));
        for bad in ["", "a", "3-1", "0-100000000", "-1"] {
            assert_eq!(mask(bad), None, "{bad}");
        }
    }

    #[test]
    fn device_rules_of_version_1_are_named_as_systemd_names_them() {
        let list = of(
            &crate::tests::rules(
                r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"c","major":1,"minor":3,"access":"rw"},
                {"allow":true,"type":"c","major":5,"minor":1,"access":"rwm"},
                {"allow":false,"type":"c","major":5,"minor":1,"access":"rwm"}]"#,
            ),
            false,
        );
        assert_eq!(
            get(&list, "DeviceAllow"),
            Some(Value::Pairs(vec![("/dev/char/1:3".into(), "rw".into())]))
        );
        assert_eq!(
            get(&list, "DevicePolicy"),
            Some(Value::Text("strict".into()))
        );
        let drivers = "Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  8 sd\n";
        assert_eq!(driver(drivers, false, 136).as_deref(), Some("pts"));
        assert_eq!(driver(drivers, true, 8).as_deref(), Some("sd"));
        assert_eq!(driver(drivers, true, 1), None);
    }
}

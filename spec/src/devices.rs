//! Devices of a container: the default ones, and those that the node's
//! configuration lets out of its hands.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use crate::config::POD_IDS;
use crate::error::{Refusal, one_line};
use crate::paths::plain_absolute;
use crate::rules::{DEVICE, ID};

/// A device of the node that containers may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeDevice {
    /// A block device; else a character device.
    pub block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// A node below the container's /dev, beside the default ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Below /dev, without a leading /.
    pub path: String,
    /// What it opens.
    pub device: NodeDevice,
    /// Permission bits.
    pub mode: u32,
    /// Owner, as the container counts.
    pub uid: u32,
    /// Group, as the container counts.
    pub gid: u32,
}

/// Devices every container has (config-linux.md, "Default Devices").
pub(crate) const DEFAULT_DEVICES: [(&str, i64, i64); 8] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
    ("/dev/console", 5, 1),
    ("/dev/ptmx", 5, 2),
];

/// What the sandbox itself puts into /dev; nothing else may take its place.
const TAKEN: [&str; 9] = [
    "pts", "shm", "mqueue", "fd", "stdin", "stdout", "stderr", "core", "log",
];

fn is_default(device: &LinuxDevice) -> bool {
    let path = device.path().to_string_lossy();
    matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U)
        && DEFAULT_DEVICES.contains(&(&*path, device.major(), device.minor()))
}

/// The nodes that a container gets beside the default ones. `allowed` are the
/// node's devices at the paths of `devices.allow`: numbers decide, as a path
/// in a specification is just a name.
pub(crate) fn check(
    devices: &[LinuxDevice],
    allowed: &[NodeDevice],
) -> Result<Vec<DeviceSpec>, Refusal> {
    let mut specs: Vec<DeviceSpec> = Vec::new();
    for (i, device) in devices.iter().enumerate() {
        if is_default(device) {
            continue;
        }
        let written = device.path().to_string_lossy();
        let no = |why: &str| {
            let detail = format!(
                "{} ({} {}:{}){why}",
                one_line(&written),
                device.typ().as_str(),
                device.major(),
                device.minor()
            );
            Err(Refusal::new(&DEVICE, format!("linux.devices[{i}]"), detail))
        };
        let asked = match (
            device.typ(),
            u32::try_from(device.major()),
            u32::try_from(device.minor()),
        ) {
            (
                typ @ (LinuxDeviceType::B | LinuxDeviceType::C | LinuxDeviceType::U),
                Ok(major),
                Ok(minor),
            ) => NodeDevice {
                block: typ == LinuxDeviceType::B,
                major,
                minor,
            },
            _ => return no(" is not a device"),
        };
        if !allowed.contains(&asked) {
            return no("");
        }
        let Some(path) = plain_absolute(&written)
            .ok()
            .and_then(|p| p.strip_prefix("/dev/").map(str::to_owned))
        else {
            return no(" is not below /dev");
        };
        let first = path.split('/').next().unwrap_or_default();
        let default = DEFAULT_DEVICES
            .iter()
            .any(|(d, ..)| d.strip_prefix("/dev/") == Some(first));
        if TAKEN.contains(&first) || default {
            return no(" would take the place of something of the sandbox");
        }
        if specs.iter().any(|s| s.path == path) {
            return no(" is there twice");
        }
        let id = |field: &str, id: Option<u32>| match id.unwrap_or(0) {
            id if id < POD_IDS => Ok(id),
            id => Err(Refusal::new(
                &ID,
                format!("linux.devices[{i}].{field}"),
                id.to_string(),
            )),
        };
        specs.push(DeviceSpec {
            path,
            device: asked,
            mode: device.file_mode().unwrap_or(0o666) & 0o777,
            uid: id("uid", device.uid())?,
            gid: id("gid", device.gid())?,
        });
    }
    Ok(specs)
}

/// Whether `rule` is about exactly one of `devices`.
pub(crate) fn is_about(rule: &LinuxDeviceCgroup, devices: &[DeviceSpec]) -> bool {
    let block = match rule.typ() {
        Some(LinuxDeviceType::B) => true,
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => false,
        _ => return false,
    };
    devices.iter().map(|d| &d.device).any(|d| {
        d.block == block
            && rule.major() == Some(i64::from(d.major))
            && rule.minor() == Some(i64::from(d.minor))
    })
}

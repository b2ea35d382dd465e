//! Setting limits: what both versions share.

use std::fmt::Display;
use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxResources, LinuxThrottleDevice};

use crate::cgroup::Cgroup;
use crate::error::CgroupError;
use crate::files;

impl Cgroup {
    /// Writes a limit, and remembers it; an error names the field and what was asked.
    pub(crate) fn set_in(
        &self,
        dir: &Path,
        file: &str,
        text: &str,
        field: &str,
        asked: impl Display,
    ) -> Result<(), CgroupError> {
        let path = dir.join(file);
        files::write(&path, text).map_err(|e| refused(&path, text, field, asked, &e))?;
        self.limits.note(path, text);
        Ok(())
    }

    /// Sets the limits that `r` names (`linux.resources`; OCI runtime-spec,
    /// config-linux.md, "Control groups") and leaves the others as they are, so
    /// it serves create and update. A numeric 0 counts as "not named" where 0
    /// makes no sense, as callers send it for fields that they don't know.
    ///
    /// What this host can't do is an error that names the field; a field
    /// without effect on any current kernel is a warning.
    pub fn apply(&self, r: &LinuxResources) -> Result<Vec<String>, CgroupError> {
        let mut warnings = Vec::new();
        let held = self.held(r);
        let r = &*held;
        if let Some(memory) = r.memory() {
            #[allow(deprecated)] // To say that they do nothing.
            for (name, value) in [
                ("kernel", memory.kernel()),
                ("kernelTCP", memory.kernel_tcp()),
            ] {
                if let Some(value) = value.filter(|v| *v > 0) {
                    warnings.push(format!(
                        "linux.resources.memory.{name} = {value}: has no effect: kernel memory counts towards memory.limit"
                    ));
                }
            }
            if memory.use_hierarchy() == Some(false) {
                warnings.push(
                    "linux.resources.memory.useHierarchy = false: has no effect: Linux 5.11 and later always account hierarchically".to_owned(),
                );
            }
            check_swap(
                memory.limit().filter(|v| *v != 0),
                memory.swap().filter(|v| *v != 0),
            )?;
        }
        if let Some(cpu) = r.cpu() {
            check_cpu(cpu)?;
        }
        for limit in r.hugepage_limits().iter().flatten() {
            check_page_size(limit.page_size())?;
        }
        if self.is_v2() {
            self.apply_v2(r, &mut warnings)?;
        } else {
            self.apply_v1(r, &mut warnings)?;
        }
        Ok(warnings)
    }
}

fn check_swap(limit: Option<i64>, swap: Option<i64>) -> Result<(), CgroupError> {
    match (limit, swap) {
        (Some(limit), Some(swap)) if swap >= 0 && (limit < 0 || limit > swap) => {
            Err(CgroupError::limit(
                "memory.swap",
                swap,
                format!("it is memory and swap together, and memory.limit is {limit}"),
                "give at least memory.limit, or -1 for no limit",
            ))
        }
        _ => Ok(()),
    }
}

fn check_cpu(cpu: &LinuxCpu) -> Result<(), CgroupError> {
    if let Some(shares) = cpu.shares().filter(|s| *s != 0)
        && !(2..=262_144).contains(&shares)
    {
        return Err(CgroupError::limit(
            "cpu.shares",
            shares,
            "out of the kernel's range",
            "give 2 to 262144",
        ));
    }
    if let Some(idle) = cpu.idle()
        && !(0..=1).contains(&idle)
    {
        return Err(CgroupError::limit(
            "cpu.idle",
            idle,
            "neither 0 nor 1",
            "give 1 for SCHED_IDLE, else 0",
        ));
    }
    Ok(())
}

/// A page size becomes a part of a file name.
fn check_page_size(size: &str) -> Result<(), CgroupError> {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_uppercase());
    let unit = size.get(digits.len()..).unwrap_or_default();
    let good = !digits.is_empty()
        && digits.bytes().all(|b| b.is_ascii_digit())
        && matches!(unit, "KB" | "MB" | "GB");
    if good {
        return Ok(());
    }
    Err(CgroupError::limit(
        "hugepageLimits.pageSize",
        format!("{size:?}"),
        "not a size",
        "give one such as 2MB or 1GB",
    ))
}

pub(crate) fn refused(
    path: &Path,
    text: &str,
    field: &str,
    asked: impl Display,
    e: &io::Error,
) -> CgroupError {
    let way_out = match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV) if path.parent().is_some_and(|d| !d.exists()) => {
            return CgroupError::Gone {
                step: "set a limit",
                dir: path.parent().unwrap_or(path).to_owned(),
            };
        }
        Some(libc::ENOENT) => "this kernel has no such file: leave the field out",
        Some(libc::EBUSY) => "the cgroup uses more than that now: give a higher limit",
        Some(libc::EINVAL | libc::ERANGE) => {
            "the kernel doesn't take the value: keep within its range and the parent cgroup's limits"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "the parent cgroup doesn't have it, or the shim lacks the privilege: keep within the parent's set"
        }
        Some(libc::ENOSPC) => "none would be left: keep within the parent cgroup's set",
        Some(libc::EOPNOTSUPP) => "this kernel is built without it: leave the field out",
        _ => "see the kernel's cgroup documentation for the file",
    };
    CgroupError::limit(
        field,
        asked,
        format!("write {text:?} to {path:?}: {e}"),
        way_out,
    )
}

/// Whether the host has any swap space (proc_swaps(5): a title, then one line each).
pub(crate) fn host_has_swap() -> bool {
    files::read(Path::new("/proc/swaps")).map_or(true, |t| t.lines().count() > 1)
}

/// The period and quota of `cpu`, 0 meaning not named.
pub(crate) fn bandwidth(cpu: &LinuxCpu) -> (Option<i64>, Option<u64>) {
    (
        cpu.quota().filter(|q| *q != 0),
        cpu.period().filter(|p| *p != 0),
    )
}

/// A throttled device: field, version 1's file, version 2's key in `io.max`.
pub(crate) type Throttle<'a> = (
    &'static str,
    &'static str,
    &'static str,
    &'a LinuxThrottleDevice,
);

pub(crate) fn throttles(io: &LinuxBlockIo) -> Vec<Throttle<'_>> {
    [
        (
            "blockIO.throttleReadBpsDevice",
            "blkio.throttle.read_bps_device",
            "rbps",
            io.throttle_read_bps_device(),
        ),
        (
            "blockIO.throttleWriteBpsDevice",
            "blkio.throttle.write_bps_device",
            "wbps",
            io.throttle_write_bps_device(),
        ),
        (
            "blockIO.throttleReadIOPSDevice",
            "blkio.throttle.read_iops_device",
            "riops",
            io.throttle_read_iops_device(),
        ),
        (
            "blockIO.throttleWriteIOPSDevice",
            "blkio.throttle.write_iops_device",
            "wiops",
            io.throttle_write_iops_device(),
        ),
    ]
    .into_iter()
    .flat_map(|(field, file, key, devices)| {
        devices
            .iter()
            .flatten()
            .map(move |device| (field, file, key, device))
    })
    .collect()
}

/// The weights in `io`, and those that no kernel knows any more.
pub(crate) fn check_weights(io: &LinuxBlockIo) -> Result<(), CgroupError> {
    let gone = |field: &str, value: u16| {
        CgroupError::limit(
            field,
            value,
            "Linux 5.0 and later have no leaf weights",
            "leave the field out",
        )
    };
    if let Some(leaf) = io.leaf_weight().filter(|w| *w != 0) {
        return Err(gone("blockIO.leafWeight", leaf));
    }
    let range = |field: &str, weight: Option<u16>| match weight.filter(|w| *w != 0) {
        Some(w) if !(10..=1000).contains(&w) => Err(CgroupError::limit(
            field,
            w,
            "out of the OCI's range",
            "give 10 to 1000",
        )),
        _ => Ok(()),
    };
    range("blockIO.weight", io.weight())?;
    for device in io.weight_device().iter().flatten() {
        if let Some(leaf) = device.leaf_weight().filter(|w| *w != 0) {
            return Err(gone("blockIO.weightDevice.leafWeight", leaf));
        }
        range("blockIO.weightDevice.weight", device.weight())?;
    }
    Ok(())
}

/// The `rdma.max` lines, the same in both versions.
pub(crate) fn rdma_lines(r: &LinuxResources) -> Vec<String> {
    let limit = |n: Option<u32>| n.map_or("max".to_owned(), |n| n.to_string());
    r.rdma()
        .iter()
        .flatten()
        .map(|(device, rdma)| {
            format!(
                "{device} hca_handle={} hca_object={}",
                limit(rdma.hca_handles()),
                limit(rdma.hca_objects())
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_size_is_never_a_path() {
        for good in ["64KB", "2MB", "1GB"] {
            assert!(check_page_size(good).is_ok(), "{good}");
        }
        for bad in ["", "MB", "2", "2mb", "2MB/../x", "2 MB", "-2MB", "2MBGB"] {
            assert!(check_page_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn swap_counts_memory_too() {
        assert!(check_swap(Some(100), Some(100)).is_ok());
        assert!(check_swap(Some(100), Some(-1)).is_ok());
        assert!(check_swap(None, Some(5)).is_ok());
        assert!(check_swap(Some(-1), Some(5)).is_err());
        let error = check_swap(Some(100), Some(50)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "linux.resources.memory.swap = 50: it is memory and swap together, and memory.limit is 100: give at least memory.limit, or -1 for no limit"
        );
    }
}

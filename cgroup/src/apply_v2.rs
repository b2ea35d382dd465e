//! Limits in the unified hierarchy's files (kernel:
//! Documentation/admin-guide/cgroup-v2.rst).

use std::fmt::Display;

use casemate_sys::bpf;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxDeviceCgroup, LinuxMemory, LinuxResources};
use rustix::fs::{CWD, Mode, OFlags};

use crate::apply::{bandwidth, check_weights, host_has_swap, rdma_lines, throttles};
use crate::apply_v1::weight_file;
use crate::cgroup::Cgroup;
use crate::convert::{cpu_weight, io_weight, or_max};
use crate::devices;
use crate::error::CgroupError;
use crate::files;

impl Cgroup {
    pub(crate) fn apply_v2(
        &self,
        r: &LinuxResources,
        warnings: &mut Vec<String>,
    ) -> Result<(), CgroupError> {
        for (key, value) in r.unified().iter().flatten() {
            check_unified(key, value)?;
        }
        if let Some(network) = r.network() {
            let class = network.class_id().filter(|c| *c != 0);
            if class.is_some() || network.priorities().iter().flatten().next().is_some() {
                return Err(CgroupError::limit(
                    "network",
                    class.map_or("priorities".to_owned(), |c| format!("classID {c}")),
                    "cgroup v2 has no net_cls and net_prio controllers",
                    "leave the field out and match the cgroup in the packet filter",
                ));
            }
        }
        if let Some(rules) = r.devices().as_ref().filter(|d| !d.is_empty()) {
            self.devices_v2(rules)?;
        }
        if let Some(pids) = r.pids()
            && pids.limit() != 0
        {
            let limit = pids.limit();
            self.put("pids.max", &or_max(limit), "pids.limit", limit)?;
        }
        if let Some(memory) = r.memory() {
            self.memory_v2(memory, warnings)?;
        }
        if let Some(cpu) = r.cpu() {
            self.cpu_v2(cpu)?;
        }
        if let Some(io) = r.block_io() {
            self.io_v2(io)?;
        }
        for huge in r.hugepage_limits().iter().flatten() {
            let field = format!("hugepageLimits.{}", huge.page_size());
            let text = or_max(huge.limit());
            let file = format!("hugetlb.{}.max", huge.page_size());
            self.put(&file, &text, &field, huge.limit())?;
            // As in version 1.
            let file = format!("hugetlb.{}.rsvd.max", huge.page_size());
            if self.first()?.dir.join(&file).exists() {
                self.put(&file, &text, &field, huge.limit())?;
            }
        }
        for line in rdma_lines(r) {
            self.put("rdma.max", &line, "rdma", format!("{line:?}"))?;
        }
        // Last: they say more exactly what the others say roughly.
        for (key, value) in r.unified().iter().flatten() {
            let field = format!("unified.{key}");
            for line in value.lines() {
                self.put(key, line, &field, format!("{value:?}"))?;
            }
        }
        Ok(())
    }

    /// Writes to a file of the leaf. A missing file is told by its controller.
    fn put(
        &self,
        file: &str,
        text: &str,
        field: &str,
        asked: impl Display,
    ) -> Result<(), CgroupError> {
        let dir = &self.first()?.dir;
        if dir.exists() && !dir.join(file).exists() {
            let controller = file.split('.').next().unwrap_or(file);
            let enabled = files::read(&dir.join("cgroup.controllers"))
                .is_ok_and(|t| t.split_whitespace().any(|c| c == controller));
            if !enabled {
                let mut reason =
                    format!("the {controller} controller is not enabled in cgroup {dir:?}");
                let about = format!("+{controller}");
                if let Some(why) = self.not_enabled.iter().find(|w| w.contains(&about)) {
                    reason = format!("{reason} ({why})");
                }
                return Err(CgroupError::limit(
                    field,
                    asked,
                    reason,
                    format!(
                        "make it available to cgroup v2 and enable it in every parent's cgroup.subtree_control (a parent with processes of its own can't; a controller mounted as cgroup v1 isn't in v2): see cgroup.controllers for `{controller}`"
                    ),
                ));
            }
        }
        self.set_in(dir, file, text, field, asked)
    }

    fn devices_v2(&self, rules: &[LinuxDeviceCgroup]) -> Result<(), CgroupError> {
        let dir = &self.first()?.dir;
        let program = devices::program(&devices::parse(rules)?);
        let error = |step: &str, e: std::io::Error| {
            CgroupError::limit(
                "devices",
                format!("{} rules", rules.len()),
                format!("{step} the device program for cgroup {dir:?}: {e}"),
                "the kernel needs CONFIG_CGROUP_BPF (Linux 4.15) and the shim CAP_BPF and CAP_NET_ADMIN or CAP_SYS_ADMIN",
            )
        };
        let cgroup = rustix::fs::openat(
            CWD,
            dir,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
        )
        .map_err(|e| CgroupError::io("set device rules: open", dir, e.into()))?;
        let old = bpf::device_programs(&cgroup).map_err(|e| error("list", e))?;
        let new = bpf::load_device_program(&program).map_err(|e| error("load", e))?;
        bpf::attach_device_program(&cgroup, &new).map_err(|e| error("attach", e))?;
        let both = bpf::device_programs(&cgroup).map_err(|e| error("list", e))?;
        let attached = both.into_iter().find(|id| !old.contains(id));
        self.limits.note_program(dir, attached);
        // Until here both must allow, so an update never opens a gap.
        for id in old {
            bpf::detach_device_program(&cgroup, id).map_err(|e| error("replace", e))?;
        }
        Ok(())
    }

    fn memory_v2(
        &self,
        memory: &LinuxMemory,
        warnings: &mut Vec<String>,
    ) -> Result<(), CgroupError> {
        let dir = &self.first()?.dir;
        let limit = memory.limit().filter(|v| *v != 0);
        if memory.disable_oom_killer() == Some(true) {
            return Err(CgroupError::limit(
                "memory.disableOOMKiller",
                true,
                "cgroup v2 can't turn the OOM killer off",
                "leave the field out and give a higher memory.limit",
            ));
        }
        if let Some(swappiness) = memory.swappiness() {
            warnings.push(format!(
                "linux.resources.memory.swappiness = {swappiness}: has no effect: cgroup v2 has no such file"
            ));
        }
        if let Some(limit) = limit {
            if memory.check_before_update() == Some(true)
                && let Some(now) = files::number(&dir.join("memory.current"))
                && u64::try_from(limit).is_ok_and(|l| l < now)
            {
                return Err(CgroupError::limit(
                    "memory.limit",
                    limit,
                    format!("the cgroup uses {now} now and checkBeforeUpdate is set"),
                    "give a higher limit or leave checkBeforeUpdate out",
                ));
            }
            self.put("memory.max", &or_max(limit), "memory.limit", limit)?;
        }
        if let Some(swap) = memory.swap().filter(|v| *v != 0) {
            let only = if swap < 0 {
                "max".to_owned()
            } else {
                // The OCI counts memory and swap together.
                let memory_max = match limit {
                    Some(limit) => u64::try_from(limit).ok(),
                    None => files::number(&dir.join("memory.max")).filter(|m| *m != u64::MAX),
                };
                memory_max
                    .and_then(|m| u64::try_from(swap).ok()?.checked_sub(m))
                    .map(|only| only.to_string())
                    .ok_or_else(|| {
                        CgroupError::limit(
                            "memory.swap",
                            swap,
                            "it is memory and swap together, and memory.limit is not given or is higher",
                            "give memory.limit too",
                        )
                    })?
            };
            if only == "0" && !dir.join("memory.swap.max").exists() && !host_has_swap() {
                warnings.push(format!(
                    "linux.resources.memory.swap = {swap}: the kernel has no memory.swap.max; the host has no swap, so memory.limit is enough"
                ));
            } else {
                self.put("memory.swap.max", &only, "memory.swap", swap)?;
            }
        } else if limit.is_some_and(|l| l < 0) && dir.join("memory.swap.max").exists() {
            self.put("memory.swap.max", "max", "memory.limit", -1)?;
        }
        if let Some(low) = memory.reservation().filter(|v| *v != 0) {
            self.put("memory.low", &or_max(low), "memory.reservation", low)?;
        }
        Ok(())
    }

    fn cpu_v2(&self, cpu: &LinuxCpu) -> Result<(), CgroupError> {
        let dir = &self.first()?.dir;
        for (field, value) in [
            ("cpu.realtimeRuntime", cpu.realtime_runtime()),
            (
                "cpu.realtimePeriod",
                cpu.realtime_period().map(|p| p as i64),
            ),
        ] {
            if let Some(value) = value.filter(|v| *v != 0) {
                return Err(CgroupError::limit(
                    field,
                    value,
                    "cgroup v2 has no realtime bandwidth",
                    "leave the field out",
                ));
            }
        }
        if cpu.idle() == Some(0) && dir.join("cpu.idle").exists() {
            self.put("cpu.idle", "0", "cpu.idle", 0)?;
        }
        // An idle cgroup has a fixed weight and refuses another.
        if let Some(shares) = cpu.shares().filter(|s| *s != 0 && cpu.idle() != Some(1)) {
            let text = cpu_weight(shares).to_string();
            self.put("cpu.weight", &text, "cpu.shares", shares)?;
        }
        if cpu.idle() == Some(1) {
            self.put("cpu.idle", "1", "cpu.idle", 1)?;
        }
        let burst_file = "cpu.max.burst";
        if let Some(burst) = cpu.burst()
            && (burst != 0 || dir.join(burst_file).exists())
        {
            // It may not exceed the quota at any moment.
            self.put(burst_file, "0", "cpu.burst", burst)?;
        }
        let (quota, period) = bandwidth(cpu);
        if quota.is_some() || period.is_some() {
            let quota_text = match quota {
                Some(quota) => or_max(quota),
                None => files::read(&dir.join("cpu.max"))
                    .ok()
                    .and_then(|t| t.split_whitespace().next().map(str::to_owned))
                    .unwrap_or_else(|| "max".to_owned()),
            };
            // One number alone keeps the period.
            let text = match period {
                Some(period) => format!("{quota_text} {period}"),
                None => quota_text,
            };
            let (field, asked) = match (quota, period) {
                (None, Some(period)) => ("cpu.period", period.to_string()),
                _ => ("cpu.quota", format!("{text:?}")),
            };
            self.put("cpu.max", &text, field, asked)?;
        }
        if let Some(burst) = cpu.burst().filter(|b| *b != 0) {
            self.put(burst_file, &burst.to_string(), "cpu.burst", burst)?;
        }
        for (file, field, list) in [
            ("cpuset.cpus", "cpu.cpus", cpu.cpus()),
            ("cpuset.mems", "cpu.mems", cpu.mems()),
        ] {
            if let Some(list) = list.as_deref().filter(|l| !l.is_empty()) {
                self.put(file, list, field, format!("{list:?}"))?;
            }
        }
        Ok(())
    }

    fn io_v2(&self, io: &LinuxBlockIo) -> Result<(), CgroupError> {
        check_weights(io)?;
        let dir = &self.first()?.dir;
        let names = ["io.bfq.weight", "io.weight"];
        // BFQ has the OCI's scale, io.weight its own.
        let scaled = |file: &str, weight: u16| {
            if file == "io.weight" {
                io_weight(weight)
            } else {
                weight.into()
            }
        };
        if let Some(weight) = io.weight().filter(|w| *w != 0) {
            let field = "blockIO.weight";
            let file = weight_file(dir, &names, field, weight)?;
            let text = format!("default {}", scaled(file, weight));
            self.put(file, &text, field, weight)?;
        }
        for device in io.weight_device().iter().flatten() {
            let Some(weight) = device.weight().filter(|w| *w != 0) else {
                continue;
            };
            let field = "blockIO.weightDevice";
            let number = format!("{}:{}", device.major(), device.minor());
            let file = weight_file(dir, &names, field, format!("{number} {weight}"))?;
            let text = format!("{number} {}", scaled(file, weight));
            self.put(file, &text, field, format!("{number} {weight}"))?;
        }
        for (field, _, key, device) in throttles(io) {
            // As in version 1, 0 lifts the limit.
            let rate = match device.rate() {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            let text = format!("{}:{} {key}={rate}", device.major(), device.minor());
            self.put("io.max", &text, field, &text)?;
        }
        Ok(())
    }
}

/// A key is a file name in the leaf; `cgroup.*` would move processes or
/// reshape the hierarchy rather than limit anything.
fn check_unified(key: &str, value: &str) -> Result<(), CgroupError> {
    let reason = if key.contains(['/', '\0']) || !key.contains('.') || key.starts_with('.') {
        "not the name of a controller's file"
    } else if key.starts_with("cgroup.") {
        "a file of the cgroup core, not of a controller"
    } else if value.len() > 4096 {
        "over 4096 bytes"
    } else {
        return Ok(());
    };
    Err(CgroupError::limit(
        &format!("unified.{key:?}"),
        format!("{:?}", value.get(..64).unwrap_or(value)),
        reason,
        "use keys such as memory.high",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unified_keys_are_controllers_files() {
        assert!(check_unified("memory.high", "1").is_ok());
        for bad in [
            "cgroup.procs",
            "cgroup.kill",
            "../x.y",
            "a/b.c",
            "",
            ".",
            "..",
            "tasks",
        ] {
            assert!(check_unified(bad, "1").is_err(), "{bad}");
        }
        assert!(check_unified("memory.high", &"é".repeat(4096)).is_err());
    }
}

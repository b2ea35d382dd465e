//! Limits in version 1's files (kernel: Documentation/admin-guide/cgroup-v1/).

use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use crate::apply::{bandwidth, check_weights, host_has_swap, rdma_lines, throttles};
use crate::cgroup::Cgroup;
use crate::devices;
use crate::error::CgroupError;
use crate::files;

impl Cgroup {
    pub(crate) fn apply_v1(
        &self,
        r: &LinuxResources,
        warnings: &mut Vec<String>,
    ) -> Result<(), CgroupError> {
        if let Some((key, value)) = r.unified().iter().flatten().next() {
            return Err(CgroupError::limit(
                &format!("unified.{key}"),
                format!("{value:?}"),
                "this host runs cgroup v1, which has no such file",
                "leave linux.resources.unified out or boot the host with cgroup v2 only",
            ));
        }
        if let Some(rules) = r.devices().as_ref().filter(|d| !d.is_empty()) {
            let field = "devices";
            let asked = format!("{} rules", rules.len());
            let dir = self.controller("devices", field, &asked)?;
            let rules = devices::parse(rules)?;
            for write in devices::v1_writes(&rules)? {
                let asked = format!("\"{}\"", write.text);
                self.set_in(dir, write.file, &write.text, field, asked)?;
            }
            self.limits.note_devices(dir, devices::v1_list(&rules)?);
        }
        if let Some(pids) = r.pids()
            && pids.limit() != 0
        {
            let limit = pids.limit();
            let dir = self.controller("pids", "pids.limit", limit)?;
            let text = crate::convert::or_max(limit);
            self.set_in(dir, "pids.max", &text, "pids.limit", limit)?;
        }
        if let Some(memory) = r.memory() {
            self.memory_v1(memory, warnings)?;
        }
        if let Some(cpu) = r.cpu() {
            self.cpu_v1(cpu)?;
            self.cpuset_v1(cpu)?;
        }
        if let Some(io) = r.block_io() {
            self.blkio_v1(io)?;
        }
        for huge in r.hugepage_limits().iter().flatten() {
            let field = format!("hugepageLimits.{}", huge.page_size());
            let dir = self.controller("hugetlb", &field, huge.limit())?;
            let text = huge.limit().max(-1).to_string();
            let file = format!("hugetlb.{}.limit_in_bytes", huge.page_size());
            self.set_in(dir, &file, &text, &field, huge.limit())?;
            // Reservations as well (Linux 5.7): else a mmap(2) beyond the limit
            // succeeds and the touch is a SIGBUS.
            let file = format!("hugetlb.{}.rsvd.limit_in_bytes", huge.page_size());
            if dir.join(&file).exists() {
                self.set_in(dir, &file, &text, &field, huge.limit())?;
            }
        }
        if let Some(network) = r.network() {
            if let Some(class) = network.class_id().filter(|c| *c != 0) {
                let dir = self.controller("net_cls", "network.classID", class)?;
                let text = class.to_string();
                self.set_in(dir, "net_cls.classid", &text, "network.classID", class)?;
            }
            for priority in network.priorities().iter().flatten() {
                let text = format!("{} {}", priority.name(), priority.priority());
                let field = "network.priorities";
                let dir = self.controller("net_prio", field, format!("{text:?}"))?;
                self.set_in(dir, "net_prio.ifpriomap", &text, field, format!("{text:?}"))?;
            }
        }
        for line in rdma_lines(r) {
            let asked = format!("{line:?}");
            let dir = self.controller("rdma", "rdma", &asked)?;
            self.set_in(dir, "rdma.max", &line, "rdma", asked)?;
        }
        Ok(())
    }

    fn controller(
        &self,
        name: &str,
        field: &str,
        asked: impl ToString,
    ) -> Result<&Path, CgroupError> {
        self.v1(name).ok_or_else(|| {
            CgroupError::limit(
                field,
                asked,
                format!("the {name} controller of cgroup v1 is not mounted"),
                format!("mount it at /sys/fs/cgroup/{name} or leave the field out"),
            )
        })
    }

    fn memory_v1(
        &self,
        memory: &LinuxMemory,
        warnings: &mut Vec<String>,
    ) -> Result<(), CgroupError> {
        const LIMIT: &str = "memory.limit_in_bytes";
        const SWAP: &str = "memory.memsw.limit_in_bytes";
        let controller = |field, asked: i64| self.controller("memory", field, asked);
        let set_limit = |limit: i64| {
            let dir = controller("memory.limit", limit)?;
            self.set_in(
                dir,
                LIMIT,
                &limit.max(-1).to_string(),
                "memory.limit",
                limit,
            )
        };
        let set_swap = |swap: i64| {
            let dir = controller("memory.swap", swap)?;
            self.set_in(dir, SWAP, &swap.max(-1).to_string(), "memory.swap", swap)
        };
        let limit = memory.limit().filter(|v| *v != 0);
        let mut swap = memory.swap().filter(|v| *v != 0);
        if let Some(asked) = limit.or(swap) {
            let dir = controller("memory.limit", asked)?;
            if dir.join(SWAP).exists() {
                // Without a memory limit a limit on both makes no sense, and
                // the kernel wouldn't lift the first above the second.
                if limit.is_some_and(|l| l < 0) && swap.is_none() {
                    swap = Some(-1);
                }
            } else if let Some(asked) = swap {
                self.no_swap_files(asked, warnings)?;
                swap = None;
            }
            match (limit, swap) {
                (Some(limit), Some(swap)) => {
                    // At every moment the limit on both is the higher one.
                    let now = files::number(&dir.join(LIMIT)).unwrap_or(u64::MAX);
                    let raise_both_first = u64::try_from(swap).map_or(true, |s| now <= s);
                    if raise_both_first {
                        set_swap(swap)?;
                        set_limit(limit)?;
                    } else {
                        set_limit(limit)?;
                        set_swap(swap)?;
                    }
                }
                (Some(limit), None) => set_limit(limit)?,
                (None, Some(swap)) => set_swap(swap)?,
                (None, None) => {}
            }
        }
        if let Some(low) = memory.reservation().filter(|v| *v != 0) {
            let field = "memory.reservation";
            let text = low.max(-1).to_string();
            self.set_in(
                controller(field, low)?,
                "memory.soft_limit_in_bytes",
                &text,
                field,
                low,
            )?;
        }
        if let Some(swappiness) = memory.swappiness() {
            let field = "memory.swappiness";
            let dir = self.controller("memory", field, swappiness)?;
            let text = swappiness.to_string();
            self.set_in(dir, "memory.swappiness", &text, field, swappiness)?;
        }
        if memory.disable_oom_killer() == Some(true) {
            let field = "memory.disableOOMKiller";
            let dir = self.controller("memory", field, true)?;
            self.set_in(dir, "memory.oom_control", "1", field, true)?;
        }
        Ok(())
    }

    /// Swap accounting is off. Without swap space nothing is lost by that.
    fn no_swap_files(&self, asked: i64, warnings: &mut Vec<String>) -> Result<(), CgroupError> {
        if asked < 0 {
            return Ok(());
        }
        let reason = "the kernel doesn't account swap (swapaccount=0)";
        if host_has_swap() {
            return Err(CgroupError::limit(
                "memory.swap",
                asked,
                reason,
                "boot with swapaccount=1 or turn swap off",
            ));
        }
        warnings.push(format!(
            "linux.resources.memory.swap = {asked}: {reason}; the host has no swap, so memory.limit is enough"
        ));
        Ok(())
    }

    fn cpu_v1(&self, cpu: &LinuxCpu) -> Result<(), CgroupError> {
        let set = |file: &str, field: &str, value: i128| {
            let dir = self.controller("cpu", field, value)?;
            self.set_in(dir, file, &value.to_string(), field, value)
        };
        if cpu.idle() == Some(0) && self.v1("cpu").is_some_and(|d| d.join("cpu.idle").exists()) {
            set("cpu.idle", "cpu.idle", 0)?;
        }
        // An idle cgroup has a fixed weight and refuses another.
        if let Some(shares) = cpu.shares().filter(|s| *s != 0 && cpu.idle() != Some(1)) {
            set("cpu.shares", "cpu.shares", shares.into())?;
        }
        if cpu.idle() == Some(1) {
            set("cpu.idle", "cpu.idle", 1)?;
        }
        let (quota, period) = bandwidth(cpu);
        if let Some(burst) = cpu.burst()
            && (burst != 0 || self.v1("cpu").is_some_and(|d| d.join(BURST).exists()))
        {
            // It may not exceed the quota at any moment.
            set(BURST, "cpu.burst", 0)?;
        }
        const BURST: &str = "cpu.cfs_burst_us";
        let set_quota = |q: i64| set("cpu.cfs_quota_us", "cpu.quota", q.max(-1).into());
        let set_period = |p: u64| set("cpu.cfs_period_us", "cpu.period", p.into());
        match (quota, period) {
            // Which of the two may come first depends on what is set now: the
            // share of the parent may not be exceeded in between.
            (Some(quota), Some(period)) => {
                if set_period(period).is_ok() {
                    set_quota(quota)?;
                } else {
                    set_quota(quota)?;
                    set_period(period)?;
                }
            }
            (Some(quota), None) => set_quota(quota)?,
            (None, Some(period)) => set_period(period)?,
            (None, None) => {}
        }
        if let Some(burst) = cpu.burst().filter(|b| *b != 0) {
            set(BURST, "cpu.burst", burst.into())?;
        }
        if let Some(period) = cpu.realtime_period().filter(|p| *p != 0) {
            set("cpu.rt_period_us", "cpu.realtimePeriod", period.into())?;
        }
        if let Some(runtime) = cpu.realtime_runtime().filter(|p| *p != 0) {
            set("cpu.rt_runtime_us", "cpu.realtimeRuntime", runtime.into())?;
        }
        Ok(())
    }

    fn cpuset_v1(&self, cpu: &LinuxCpu) -> Result<(), CgroupError> {
        for (file, field, list) in [
            ("cpuset.cpus", "cpu.cpus", cpu.cpus()),
            ("cpuset.mems", "cpu.mems", cpu.mems()),
        ] {
            if let Some(list) = list.as_deref().filter(|l| !l.is_empty()) {
                let asked = format!("{list:?}");
                self.set_in(
                    self.controller("cpuset", field, &asked)?,
                    file,
                    list,
                    field,
                    asked,
                )?;
            }
        }
        Ok(())
    }

    fn blkio_v1(&self, io: &LinuxBlockIo) -> Result<(), CgroupError> {
        check_weights(io)?;
        if let Some(weight) = io.weight().filter(|w| *w != 0) {
            let field = "blockIO.weight";
            let dir = self.controller("blkio", field, weight)?;
            let file = weight_file(dir, &["blkio.bfq.weight", "blkio.weight"], field, weight)?;
            self.set_in(dir, file, &weight.to_string(), field, weight)?;
        }
        for device in io.weight_device().iter().flatten() {
            let Some(weight) = device.weight().filter(|w| *w != 0) else {
                continue;
            };
            let field = "blockIO.weightDevice";
            let text = format!("{}:{} {weight}", device.major(), device.minor());
            let dir = self.controller("blkio", field, &text)?;
            let names = ["blkio.bfq.weight_device", "blkio.weight_device"];
            self.set_in(
                dir,
                weight_file(dir, &names, field, &text)?,
                &text,
                field,
                &text,
            )?;
        }
        for (field, file, _, device) in throttles(io) {
            let text = format!("{}:{} {}", device.major(), device.minor(), device.rate());
            self.set_in(
                self.controller("blkio", field, &text)?,
                file,
                &text,
                field,
                &text,
            )?;
        }
        Ok(())
    }
}

/// The first of the files that this kernel has: it depends on the I/O scheduler.
pub(crate) fn weight_file<'a>(
    dir: &Path,
    names: &[&'a str],
    field: &str,
    asked: impl ToString,
) -> Result<&'a str, CgroupError> {
    names
        .iter()
        .find(|n| dir.join(n).exists())
        .copied()
        .ok_or_else(|| {
            CgroupError::limit(
                field,
                asked,
                format!("none of {} is in {dir:?}", names.join(", ")),
                "load the bfq I/O scheduler or leave the field out",
            )
        })
}

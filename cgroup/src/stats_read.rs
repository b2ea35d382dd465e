//! Reading the numbers.

use std::fs;
use std::path::Path;

use crate::cgroup::Cgroup;
use crate::error::CgroupError;
use crate::files::{self, number, read, read_lines};
use crate::stats::*;

impl Cgroup {
    /// The numbers of the leaf with everything below it. An error only when
    /// the cgroup is gone ([`CgroupError::is_gone`]); what this kernel doesn't
    /// count is 0.
    pub fn stats(&self) -> Result<Stats, CgroupError> {
        if self.is_v2() {
            let dir = &self.first()?.dir;
            self.gone_unless(dir)?;
            return Ok(Stats::V2(Box::new(v2(dir))));
        }
        for leaf in &self.leaves {
            self.gone_unless(&leaf.dir)?;
        }
        let mut stats = StatsV1::default();
        if let Some(dir) = self.v1("pids") {
            stats.pids = pids(dir);
        }
        if let Some(dir) = self.v1("cpuacct") {
            stats.cpu = cpu_v1(dir);
        }
        if let Some(dir) = self.v1("cpu") {
            stats.throttling = Throttle::from_lines(&read_lines(&dir.join("cpu.stat")));
        }
        if let Some(dir) = self.v1("memory") {
            stats.memory = MemoryV1::from_lines(&read_lines(&dir.join("memory.stat")));
            stats.memory_usage = memory_entry(dir, "memory");
            stats.memory_swap = memory_entry(dir, "memory.memsw");
            stats.memory_kernel = memory_entry(dir, "memory.kmem");
            stats.memory_kernel_tcp = memory_entry(dir, "memory.kmem.tcp");
            stats.memory_oom_control =
                OomControl::from_lines(&read_lines(&dir.join("memory.oom_control")));
        }
        if let Some(dir) = self.v1("blkio") {
            stats.io_service_bytes_recursive = blkio(dir, "io_service_bytes_recursive");
            stats.io_serviced_recursive = blkio(dir, "io_serviced_recursive");
        }
        if let Some(dir) = self.v1("hugetlb") {
            stats.hugetlb = hugetlb(dir, "usage_in_bytes", "max_usage_in_bytes");
        }
        Ok(Stats::V1(Box::new(stats)))
    }

    fn gone_unless(&self, dir: &Path) -> Result<(), CgroupError> {
        if dir.is_dir() {
            return Ok(());
        }
        Err(CgroupError::Gone {
            step: "read the numbers",
            dir: dir.to_owned(),
        })
    }
}

fn v2(dir: &Path) -> StatsV2 {
    let file = |name: &str| number(&dir.join(name)).unwrap_or(0);
    let text = |name: &str| read(&dir.join(name)).unwrap_or_default();
    let limit = |name: &str| number(&dir.join(name)).unwrap_or(u64::MAX);
    StatsV2 {
        pids: pids(dir),
        cpu: CpuV2::from_lines(&read_lines(&dir.join("cpu.stat"))),
        cpu_psi: psi(&text("cpu.pressure")),
        memory: MemoryV2::from_lines(&read_lines(&dir.join("memory.stat"))),
        memory_usage: file("memory.current"),
        memory_usage_limit: limit("memory.max"),
        memory_max_usage: file("memory.peak"),
        memory_swap_usage: file("memory.swap.current"),
        memory_swap_limit: limit("memory.swap.max"),
        memory_swap_max_usage: file("memory.swap.peak"),
        memory_psi: psi(&text("memory.pressure")),
        memory_events: MemoryEvents::from_lines(&read_lines(&dir.join("memory.events"))),
        io: io_stat(&text("io.stat")),
        io_psi: psi(&text("io.pressure")),
        hugetlb: hugetlb(dir, "current", "max"),
    }
}

fn pids(dir: &Path) -> Pids {
    Pids {
        current: number(&dir.join("pids.current")).unwrap_or(0),
        limit: number(&dir.join("pids.max"))
            .filter(|l| *l != u64::MAX)
            .unwrap_or(0),
    }
}

fn cpu_v1(dir: &Path) -> CpuV1 {
    // The split is in ticks; the nanosecond files are newer (Linux 4.7).
    let file = |name: &str| number(&dir.join(name)).unwrap_or(0);
    CpuV1 {
        total: file("cpuacct.usage"),
        kernel: file("cpuacct.usage_sys"),
        user: file("cpuacct.usage_user"),
        per_cpu: read(&dir.join("cpuacct.usage_percpu"))
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect(),
    }
}

fn memory_entry(dir: &Path, prefix: &str) -> MemoryEntry {
    let file = |name: &str| number(&dir.join(format!("{prefix}.{name}"))).unwrap_or(0);
    MemoryEntry {
        limit: file("limit_in_bytes"),
        usage: file("usage_in_bytes"),
        max: file("max_usage_in_bytes"),
        failcnt: file("failcnt"),
    }
}

/// BFQ's files count only what went through BFQ, and are there without it:
/// those of throttling count everything.
fn blkio(dir: &Path, name: &str) -> Vec<BlkioEntry> {
    ["blkio.throttle", "blkio.bfq", "blkio"]
        .iter()
        .map(|prefix| {
            blkio_entries(&read(&dir.join(format!("{prefix}.{name}"))).unwrap_or_default())
        })
        .find(|entries| !entries.is_empty())
        .unwrap_or_default()
}

/// Lines `8:0 Read 4096`; the last one is `Total 4096`.
fn blkio_entries(text: &str) -> Vec<BlkioEntry> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            Some(BlkioEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                op: words.next()?.to_owned(),
                value: words.next()?.parse().ok()?,
            })
        })
        .collect()
}

/// Lines `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`; a device
/// without traffic has a line without words.
fn io_stat(text: &str) -> Vec<IoEntry> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let mut entry = IoEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..IoEntry::default()
            };
            for (key, value) in words.filter_map(|w| w.split_once('=')) {
                let Ok(value) = value.parse() else { continue };
                match key {
                    "rbytes" => entry.rbytes = value,
                    "wbytes" => entry.wbytes = value,
                    "rios" => entry.rios = value,
                    "wios" => entry.wios = value,
                    _ => {}
                }
            }
            Some(entry)
        })
        .collect()
}

/// Lines `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and `full ...`; the
/// latter is missing for the processor on older kernels. `None` without PSI.
fn psi(text: &str) -> Option<Psi> {
    let mut psi = None;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let kind = words.next();
        let mut data = PsiData::default();
        for (key, value) in words.filter_map(|w| w.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match kind {
            Some("some") => psi.get_or_insert_with(Psi::default).some = data,
            Some("full") => psi.get_or_insert_with(Psi::default).full = data,
            _ => {}
        }
    }
    psi
}

/// One entry for every `hugetlb.SIZE.<usage>` file.
fn hugetlb(dir: &Path, usage: &str, max: &str) -> Vec<Hugetlb> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut all: Vec<Hugetlb> = entries
        .filter_map(|e| {
            let name = e.ok()?.file_name();
            let size = name
                .to_str()?
                .strip_prefix("hugetlb.")?
                .strip_suffix(usage)?
                .strip_suffix('.')?;
            // `hugetlb.2MB.rsvd.current` counts reservations.
            if size.contains('.') {
                return None;
            }
            let file = |what: &str| dir.join(format!("hugetlb.{size}.{what}"));
            Some(Hugetlb {
                usage: number(&file(usage)).unwrap_or(0),
                max: number(&file(max)).unwrap_or(0),
                failcnt: number(&file("failcnt"))
                    .or_else(|| files::line(&file("events"), "max").ok().flatten())
                    .unwrap_or(0),
                pagesize: size.to_owned(),
            })
        })
        .collect();
    all.sort_by(|a, b| a.pagesize.cmp(&b.pagesize));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_has_a_format() {
        let found = psi(
            "some avg10=1.50 avg60=0.25 avg300=0.00 total=123\nfull avg10=0.00 avg60=x total=7\n",
        )
        .unwrap();
        assert_eq!((found.some.avg10, found.some.avg60), (1.5, 0.25));
        assert_eq!((found.some.total, found.full.total), (123, 7));
        assert_eq!(psi(""), None);
        assert_eq!(psi("nonsense\n"), None);
    }

    #[test]
    fn io_lines_are_per_device() {
        let found = io_stat(
            "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:1\nx y\n8:1 rbytes=z\n",
        );
        assert_eq!(found.len(), 3);
        assert_eq!((found[0].rbytes, found[0].wios), (1, 4));
        assert_eq!((found[1].major, found[1].minor, found[1].rbytes), (7, 1, 0));
    }

    #[test]
    fn blkio_lines_have_an_operation_each() {
        let found = blkio_entries("8:0 Read 4096\n8:0 Write 0\nTotal 4096\n8:0 Read\n");
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].op.as_str(), found[0].value), ("Read", 4096));
    }
}

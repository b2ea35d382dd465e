//! The numbers of a cgroup, with the field names of containerd's
//! `io.containerd.cgroups.v1.Metrics` and `io.containerd.cgroups.v2.Metrics`,
//! so that the caller only copies. A file or line that isn't there is 0 (or
//! empty): kernels and their configurations differ.

use std::collections::HashMap;

/// Makes a struct of counters and its reader from `key value` lines.
macro_rules! counters {
    ($(#[$doc:meta])* $name:ident { $($field:ident : $key:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct $name {
            $(#[doc = concat!("Line `", $key, "`.")] pub $field: u64,)+
        }
        impl $name {
            pub(crate) fn from_lines(lines: &HashMap<String, u64>) -> Self {
                let get = |key: &str| lines.get(key).copied().unwrap_or(0);
                Self { $($field: get($key),)+ }
            }
        }
    };
}

/// All numbers of one cgroup.
#[derive(Debug, Clone, PartialEq)]
pub enum Stats {
    /// From version 1's controllers.
    V1(Box<StatsV1>),
    /// From the unified hierarchy.
    V2(Box<StatsV2>),
}

/// What `io.containerd.cgroups.v1.Metrics` needs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StatsV1 {
    /// One per page size.
    pub hugetlb: Vec<Hugetlb>,
    /// Tasks.
    pub pids: Pids,
    /// Processor time in nanoseconds.
    pub cpu: CpuV1,
    /// Bandwidth control, `cpu.stat`.
    pub throttling: Throttle,
    /// `memory.stat`.
    pub memory: MemoryV1,
    /// `memory.*` (memory).
    pub memory_usage: MemoryEntry,
    /// `memory.memsw.*` (memory and swap).
    pub memory_swap: MemoryEntry,
    /// `memory.kmem.*`.
    pub memory_kernel: MemoryEntry,
    /// `memory.kmem.tcp.*`.
    pub memory_kernel_tcp: MemoryEntry,
    /// `memory.oom_control`.
    pub memory_oom_control: OomControl,
    /// `blkio.*.io_service_bytes_recursive`.
    pub io_service_bytes_recursive: Vec<BlkioEntry>,
    /// `blkio.*.io_serviced_recursive`.
    pub io_serviced_recursive: Vec<BlkioEntry>,
}

/// What `io.containerd.cgroups.v2.Metrics` needs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StatsV2 {
    /// Tasks.
    pub pids: Pids,
    /// `cpu.stat`, microseconds.
    pub cpu: CpuV2,
    /// `cpu.pressure`.
    pub cpu_psi: Option<Psi>,
    /// `memory.stat`.
    pub memory: MemoryV2,
    /// `memory.current`.
    pub memory_usage: u64,
    /// `memory.max`; `u64::MAX` when there is none.
    pub memory_usage_limit: u64,
    /// `memory.peak` (Linux 5.19).
    pub memory_max_usage: u64,
    /// `memory.swap.current`.
    pub memory_swap_usage: u64,
    /// `memory.swap.max`; `u64::MAX` when there is none.
    pub memory_swap_limit: u64,
    /// `memory.swap.peak` (Linux 6.5).
    pub memory_swap_max_usage: u64,
    /// `memory.pressure`.
    pub memory_psi: Option<Psi>,
    /// `memory.events`.
    pub memory_events: MemoryEvents,
    /// `io.stat`, one per device.
    pub io: Vec<IoEntry>,
    /// `io.pressure`.
    pub io_psi: Option<Psi>,
    /// One per page size.
    pub hugetlb: Vec<Hugetlb>,
}

/// Tasks of the cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pids {
    /// How many now.
    pub current: u64,
    /// How many at most; 0 when there is no limit, as containerd's own library answers.
    pub limit: u64,
}

/// `cpuacct.*`, nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuV1 {
    /// All.
    pub total: u64,
    /// In the kernel.
    pub kernel: u64,
    /// Outside of it.
    pub user: u64,
    /// Per processor.
    pub per_cpu: Vec<u64>,
}

/// A memory counter of version 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryEntry {
    /// `limit_in_bytes`
    pub limit: u64,
    /// `usage_in_bytes`
    pub usage: u64,
    /// `max_usage_in_bytes`
    pub max: u64,
    /// `failcnt`
    pub failcnt: u64,
}

/// Huge pages of one size, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hugetlb {
    /// Used now.
    pub usage: u64,
    /// v1: the most ever used; v2: the limit.
    pub max: u64,
    /// How often the limit was hit.
    pub failcnt: u64,
    /// Such as `2MB`.
    pub pagesize: String,
}

/// A line of a `blkio.*` file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlkioEntry {
    /// `Read`, `Write`, ...
    pub op: String,
    /// Device number.
    pub major: u64,
    /// Device number.
    pub minor: u64,
    /// Bytes or requests.
    pub value: u64,
}

/// A line of `io.stat`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoEntry {
    /// Device number.
    pub major: u64,
    /// Device number.
    pub minor: u64,
    /// Bytes read.
    pub rbytes: u64,
    /// Bytes written.
    pub wbytes: u64,
    /// Reads.
    pub rios: u64,
    /// Writes.
    pub wios: u64,
}

/// Pressure stall information (kernel: Documentation/accounting/psi.rst).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Psi {
    /// Some tasks stalled.
    pub some: PsiData,
    /// All tasks stalled.
    pub full: PsiData,
}

/// One line of a pressure file.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PsiData {
    /// Percent over 10 s.
    pub avg10: f64,
    /// Percent over 60 s.
    pub avg60: f64,
    /// Percent over 300 s.
    pub avg300: f64,
    /// Microseconds in all.
    pub total: u64,
}

counters! {
    /// `cpu.stat` of version 1 (times in nanoseconds).
    Throttle { periods: "nr_periods", throttled_periods: "nr_throttled", throttled_time: "throttled_time", }
}
counters! {
    /// `memory.oom_control`.
    OomControl { oom_kill_disable: "oom_kill_disable", under_oom: "under_oom", oom_kill: "oom_kill", }
}
counters! {
    /// `cpu.stat` of version 2.
    CpuV2 {
        usage_usec: "usage_usec",
        user_usec: "user_usec",
        system_usec: "system_usec",
        nr_periods: "nr_periods",
        nr_throttled: "nr_throttled",
        throttled_usec: "throttled_usec",
        nr_bursts: "nr_bursts",
        burst_usec: "burst_usec",
    }
}
counters! {
    /// `memory.events`.
    MemoryEvents { low: "low", high: "high", max: "max", oom: "oom", oom_kill: "oom_kill", oom_group_kill: "oom_group_kill", }
}
counters! {
    /// `memory.stat` of version 1.
    MemoryV1 {
        cache: "cache",
        rss: "rss",
        rss_huge: "rss_huge",
        mapped_file: "mapped_file",
        dirty: "dirty",
        writeback: "writeback",
        pg_pg_in: "pgpgin",
        pg_pg_out: "pgpgout",
        pg_fault: "pgfault",
        pg_maj_fault: "pgmajfault",
        inactive_anon: "inactive_anon",
        active_anon: "active_anon",
        inactive_file: "inactive_file",
        active_file: "active_file",
        unevictable: "unevictable",
        hierarchical_memory_limit: "hierarchical_memory_limit",
        hierarchical_swap_limit: "hierarchical_memsw_limit",
        total_cache: "total_cache",
        total_rss: "total_rss",
        total_rss_huge: "total_rss_huge",
        total_mapped_file: "total_mapped_file",
        total_dirty: "total_dirty",
        total_writeback: "total_writeback",
        total_pg_pg_in: "total_pgpgin",
        total_pg_pg_out: "total_pgpgout",
        total_pg_fault: "total_pgfault",
        total_pg_maj_fault: "total_pgmajfault",
        total_inactive_anon: "total_inactive_anon",
        total_active_anon: "total_active_anon",
        total_inactive_file: "total_inactive_file",
        total_active_file: "total_active_file",
        total_unevictable: "total_unevictable",
    }
}
counters! {
    /// `memory.stat` of version 2.
    MemoryV2 {
        anon: "anon",
        file: "file",
        kernel_stack: "kernel_stack",
        slab: "slab",
        sock: "sock",
        shmem: "shmem",
        file_mapped: "file_mapped",
        file_dirty: "file_dirty",
        file_writeback: "file_writeback",
        anon_thp: "anon_thp",
        inactive_anon: "inactive_anon",
        active_anon: "active_anon",
        inactive_file: "inactive_file",
        active_file: "active_file",
        unevictable: "unevictable",
        slab_reclaimable: "slab_reclaimable",
        slab_unreclaimable: "slab_unreclaimable",
        pgfault: "pgfault",
        pgmajfault: "pgmajfault",
        workingset_refault: "workingset_refault",
        workingset_activate: "workingset_activate",
        workingset_nodereclaim: "workingset_nodereclaim",
        pgrefill: "pgrefill",
        pgscan: "pgscan",
        pgsteal: "pgsteal",
        pgactivate: "pgactivate",
        pgdeactivate: "pgdeactivate",
        pglazyfree: "pglazyfree",
        pglazyfreed: "pglazyfreed",
        thp_fault_alloc: "thp_fault_alloc",
        thp_collapse_alloc: "thp_collapse_alloc",
    }
}

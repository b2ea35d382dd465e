//! Stats: a cgroup's numbers in containerd's two messages. Never another type:
//! containerd fails the whole node's list over one that it doesn't know.

use casemate_cgroup::{BlkioEntry, MemoryEntry, Psi, PsiData, Stats, StatsV1, StatsV2};
use containerd_shim_protos::api::{StatsRequest, StatsResponse};
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use super::control::cgroup;
use crate::error::ShimError;
use crate::pod::Pod;

/// The numbers of one container.
pub fn stats(pod: &Pod, request: &StatsRequest) -> Result<StatsResponse, ShimError> {
    let task = pod.task(&request.id)?;
    let numbers = cgroup(&task)?.stats().map_err(|error| {
        ShimError::NotFound(format!("stats of container {:?}: {error}", request.id))
    })?;
    let stats =
        pack(&numbers).map_err(|error| ShimError::Unknown(format!("encode the stats: {error}")))?;
    Ok(StatsResponse {
        stats: MessageField::some(stats),
        ..StatsResponse::default()
    })
}

/// Numbers as one of containerd's two messages.
pub fn pack(stats: &Stats) -> protobuf::Result<Any> {
    let (type_url, value) = match stats {
        Stats::V1(stats) => (
            "io.containerd.cgroups.v1.Metrics",
            metrics_v1(stats).write_to_bytes()?,
        ),
        Stats::V2(stats) => (
            "io.containerd.cgroups.v2.Metrics",
            metrics_v2(stats).write_to_bytes()?,
        ),
    };
    Ok(Any {
        type_url: type_url.to_owned(),
        value,
        ..Any::default()
    })
}

/// A message with the fields of the same name, and some more.
macro_rules! copy {
    ($message:ty, $from:expr, [$($field:ident)+] $(, $name:ident: $value:expr)*) => {{
        let from = $from;
        let mut message = <$message>::default();
        $(message.$field = from.$field.clone();)+
        $(message.$name = $value;)*
        message
    }};
}

fn metrics_v1(stats: &StatsV1) -> v1::Metrics {
    let cpu = v1::CPUStat {
        usage: some(copy!(v1::CPUUsage, &stats.cpu, [total kernel user per_cpu])),
        throttling: some(copy!(
            v1::Throttle,
            &stats.throttling,
            [periods throttled_periods throttled_time]
        )),
        ..v1::CPUStat::default()
    };
    let memory = copy!(
        v1::MemoryStat,
        &stats.memory,
        [cache rss rss_huge mapped_file dirty writeback pg_pg_in pg_pg_out pg_fault
         pg_maj_fault inactive_anon active_anon inactive_file active_file unevictable
         hierarchical_memory_limit hierarchical_swap_limit total_cache total_rss
         total_rss_huge total_mapped_file total_dirty total_writeback total_pg_pg_in
         total_pg_pg_out total_pg_fault total_pg_maj_fault total_inactive_anon
         total_active_anon total_inactive_file total_active_file total_unevictable],
        usage: memory_entry(&stats.memory_usage),
        swap: memory_entry(&stats.memory_swap),
        kernel: memory_entry(&stats.memory_kernel),
        kernel_tcp: memory_entry(&stats.memory_kernel_tcp)
    );
    let blkio = v1::BlkIOStat {
        io_service_bytes_recursive: blkio(&stats.io_service_bytes_recursive),
        io_serviced_recursive: blkio(&stats.io_serviced_recursive),
        ..v1::BlkIOStat::default()
    };
    v1::Metrics {
        hugetlb: stats
            .hugetlb
            .iter()
            .map(|huge| copy!(v1::HugetlbStat, huge, [usage max failcnt pagesize]))
            .collect(),
        pids: some(copy!(v1::PidsStat, &stats.pids, [current limit])),
        cpu: some(cpu),
        memory: some(memory),
        blkio: some(blkio),
        memory_oom_control: some(copy!(
            v1::MemoryOomControl,
            &stats.memory_oom_control,
            [oom_kill_disable under_oom oom_kill]
        )),
        ..v1::Metrics::default()
    }
}

fn metrics_v2(stats: &StatsV2) -> v2::Metrics {
    let cpu = copy!(
        v2::CPUStat,
        &stats.cpu,
        [usage_usec user_usec system_usec nr_periods nr_throttled throttled_usec
         nr_bursts burst_usec],
        psi: psi(&stats.cpu_psi)
    );
    let memory = copy!(
        v2::MemoryStat,
        &stats.memory,
        [anon file kernel_stack slab sock shmem file_mapped file_dirty file_writeback
         anon_thp inactive_anon active_anon inactive_file active_file unevictable
         slab_reclaimable slab_unreclaimable pgfault pgmajfault workingset_refault
         workingset_activate workingset_nodereclaim pgrefill pgscan pgsteal pgactivate
         pgdeactivate pglazyfree pglazyfreed thp_fault_alloc thp_collapse_alloc],
        usage: stats.memory_usage,
        usage_limit: stats.memory_usage_limit,
        swap_usage: stats.memory_swap_usage,
        swap_limit: stats.memory_swap_limit,
        max_usage: stats.memory_max_usage,
        swap_max_usage: stats.memory_swap_max_usage,
        psi: psi(&stats.memory_psi)
    );
    let io = v2::IOStat {
        usage: stats
            .io
            .iter()
            .map(|io| copy!(v2::IOEntry, io, [major minor rbytes wbytes rios wios]))
            .collect(),
        psi: psi(&stats.io_psi),
        ..v2::IOStat::default()
    };
    v2::Metrics {
        pids: some(copy!(v2::PidsStat, &stats.pids, [current limit])),
        cpu: some(cpu),
        memory: some(memory),
        io: some(io),
        hugetlb: stats
            .hugetlb
            .iter()
            .map(|huge| copy!(v2::HugeTlbStat, huge, [max pagesize failcnt], current: huge.usage))
            .collect(),
        memory_events: some(copy!(
            v2::MemoryEvents,
            &stats.memory_events,
            [low high max oom oom_kill oom_group_kill]
        )),
        ..v2::Metrics::default()
    }
}

fn memory_entry(entry: &MemoryEntry) -> MessageField<v1::MemoryEntry> {
    some(copy!(v1::MemoryEntry, entry, [limit usage max failcnt]))
}

fn blkio(entries: &[BlkioEntry]) -> Vec<v1::BlkIOEntry> {
    entries
        .iter()
        .map(|entry| copy!(v1::BlkIOEntry, entry, [op major minor value]))
        .collect()
}

fn psi(psi: &Option<Psi>) -> MessageField<v2::PSIStats> {
    let line = |data: &PsiData| some(copy!(v2::PSIData, data, [avg10 avg60 avg300 total]));
    psi.as_ref()
        .map(|psi| v2::PSIStats {
            some: line(&psi.some),
            full: line(&psi.full),
            ..v2::PSIStats::default()
        })
        .into()
}

fn some<T>(message: T) -> MessageField<T> {
    MessageField::some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_is_told_with_what_cri_reads() {
        let mut stats = StatsV1::default();
        stats.cpu.total = 1;
        stats.memory_usage.usage = 2;
        stats.memory.total_inactive_file = 3;
        stats.pids.current = 4;
        let any = pack(&Stats::V1(Box::new(stats))).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage.total, 1);
        assert_eq!(metrics.memory.usage.usage, 2);
        assert_eq!(metrics.memory.total_inactive_file, 3);
        assert_eq!(metrics.pids.current, 4);
    }

    #[test]
    fn version_2_is_told_with_what_cri_reads() {
        let mut stats = StatsV2 {
            memory_usage: 1,
            memory_usage_limit: u64::MAX,
            cpu_psi: Some(Psi::default()),
            ..StatsV2::default()
        };
        stats.cpu.usage_usec = 2;
        stats.memory.inactive_file = 3;
        let any = pack(&Stats::V2(Box::new(stats))).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.memory.usage, 1);
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!(metrics.cpu.usage_usec, 2);
        assert_eq!(metrics.memory.inactive_file, 3);
        assert!(metrics.cpu.psi.is_some() && metrics.memory.psi.is_none());
    }
}

//! A container's figures in the messages of containerd's cgroup libraries.

use agent_api::rpc;
use containerd_shim_protos::{cgroups, cgroups_v2};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

/// `type_url`s, bare as containerd registers them.
const V1: &str = "io.containerd.cgroups.v1.Metrics";
const V2: &str = "io.containerd.cgroups.v2.Metrics";

/// Which message a caller reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// What iSulad takes every answer for.
    V1,
    /// What containerd reads, whatever its own host has.
    V2,
}

/// `stats` as `format` has them.
pub(super) fn metrics(stats: &rpc::StatsResponse, format: Format) -> ttrpc::Result<Any> {
    let (type_url, value) = match format {
        Format::V1 => (V1, v1(stats).write_to_bytes()),
        Format::V2 => (V2, v2(stats).write_to_bytes()),
    };
    Ok(Any {
        type_url: type_url.to_owned(),
        value: value.map_err(|e| ttrpc::Error::Others(e.to_string()))?,
        ..Default::default()
    })
}

fn v2(stats: &rpc::StatsResponse) -> cgroups_v2::metrics::Metrics {
    use cgroups_v2::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_nr_periods,
            nr_throttled: stats.cpu_nr_throttled,
            throttled_usec: stats.cpu_throttled_us,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: stats.memory_anon_bytes,
            file: stats.memory_file_bytes,
            inactive_file: stats.memory_inactive_file_bytes,
            usage: stats.memory_usage_bytes,
            usage_limit: stats.memory_limit_bytes,
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            oom_kill: stats.memory_oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn v1(stats: &rpc::StatsResponse) -> cgroups::metrics::Metrics {
    use cgroups::metrics::{
        CPUStat, CPUUsage, MemoryEntry, MemoryOomControl, MemoryStat, Metrics, PidsStat, Throttle,
    };
    // Nanoseconds there.
    let ns = |us: u64| us.saturating_mul(1000);
    let memory = MemoryStat {
        cache: stats.memory_file_bytes,
        total_cache: stats.memory_file_bytes,
        rss: stats.memory_anon_bytes,
        total_rss: stats.memory_anon_bytes,
        inactive_file: stats.memory_inactive_file_bytes,
        total_inactive_file: stats.memory_inactive_file_bytes,
        hierarchical_memory_limit: stats.memory_limit_bytes,
        usage: MessageField::some(MemoryEntry {
            usage: stats.memory_usage_bytes,
            limit: stats.memory_limit_bytes,
            ..Default::default()
        }),
        ..Default::default()
    };
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage: MessageField::some(CPUUsage {
                total: ns(stats.cpu_usage_us),
                user: ns(stats.cpu_user_us),
                kernel: ns(stats.cpu_system_us),
                ..Default::default()
            }),
            throttling: MessageField::some(Throttle {
                periods: stats.cpu_nr_periods,
                throttled_periods: stats.cpu_nr_throttled,
                throttled_time: ns(stats.cpu_throttled_us),
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory: MessageField::some(memory),
        memory_oom_control: MessageField::some(MemoryOomControl {
            oom_kill: stats.memory_oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    }
}

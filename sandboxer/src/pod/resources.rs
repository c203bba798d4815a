//! How large a pod's machine is.

use crate::config;
use crate::rpc::cri::LinuxContainerResources;

use super::error::{PodError, Result};

/// The default period of the CPU controller, in microseconds.
const DEFAULT_PERIOD_US: i64 = 100_000;

/// Guest memory is rounded up to this many bytes.
const MEMORY_ALIGN_BYTES: u64 = 2 << 20;

/// vCPUs and memory of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineSize {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
}

impl MachineSize {
    /// The size for a pod with these limits: `ceil(quota / period)` vCPUs, and the memory
    /// limit plus the overhead for the guest's kernel and agent; the configured defaults
    /// where there is no limit. `overhead` is what the pod's runtime class adds.
    ///
    /// # Errors
    /// The limits ask for more vCPUs than the host has, or for more memory than a number
    /// can hold.
    pub fn for_pod(
        limits: Option<&LinuxContainerResources>,
        overhead: Option<&LinuxContainerResources>,
        defaults: &config::Vm,
    ) -> Result<Self> {
        let vcpus = vcpus(limits, overhead).map_or(Ok(defaults.vcpus), |wanted| {
            let host = std::thread::available_parallelism().map_or(1, usize::from);
            u32::try_from(wanted)
                .ok()
                .filter(|&n| u64::from(n) <= MAX_VCPUS)
                .ok_or_else(|| {
                    PodError::invalid(
                        "linux.resources.cpu_quota",
                        format!("{wanted} CPUs"),
                        format!("a VM can have {MAX_VCPUS} vCPUs, this host has {host}"),
                    )
                })
        })?;
        let memory_bytes = match positive(limits, |r| r.memory_limit_in_bytes) {
            None => defaults.memory.as_u64(),
            Some(limit) => {
                let extra = positive(overhead, |r| r.memory_limit_in_bytes)
                    .unwrap_or_else(|| defaults.memory_overhead.as_u64());
                limit
                    .checked_add(extra)
                    .and_then(|sum| sum.checked_next_multiple_of(MEMORY_ALIGN_BYTES))
                    .ok_or_else(|| {
                        PodError::invalid(
                            "linux.resources.memory_limit_in_bytes",
                            limit.to_string(),
                            "must fit the host's memory",
                        )
                    })?
            }
        };
        Ok(Self {
            vcpus,
            memory_bytes: memory_bytes.max(config::MIN_MEMORY.as_u64()),
        })
    }
}

/// More than this many vCPUs no VM gets.
const MAX_VCPUS: u64 = 255;

fn vcpus(
    limits: Option<&LinuxContainerResources>,
    overhead: Option<&LinuxContainerResources>,
) -> Option<u64> {
    let quota_us = positive(limits, |r| r.cpu_quota)?;
    let period_us = positive(limits, |r| r.cpu_period).unwrap_or(DEFAULT_PERIOD_US.cast_unsigned());
    let extra_us = positive(overhead, |r| r.cpu_quota).unwrap_or(0);
    Some(quota_us.saturating_add(extra_us).div_ceil(period_us))
}

fn positive(
    resources: Option<&LinuxContainerResources>,
    field: impl FnOnce(&LinuxContainerResources) -> i64,
) -> Option<u64> {
    resources
        .map(field)
        .and_then(|value| u64::try_from(value).ok())
        .filter(|&value| value > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(quota: i64, period: i64, memory: i64) -> LinuxContainerResources {
        LinuxContainerResources {
            cpu_quota: quota,
            cpu_period: period,
            memory_limit_in_bytes: memory,
            ..Default::default()
        }
    }

    #[test]
    fn limits_decide_and_defaults_fill_in() {
        let defaults = config::Vm::default();
        let size = |l: Option<LinuxContainerResources>| {
            MachineSize::for_pod(l.as_ref(), None, &defaults).unwrap()
        };
        assert_eq!(size(None).vcpus, 1);
        assert_eq!(size(None).memory_bytes, 128 << 20);
        assert_eq!(size(Some(limits(-1, 0, 0))), size(None));
        assert_eq!(size(Some(limits(150_000, 100_000, 0))).vcpus, 2);
        assert_eq!(size(Some(limits(50_000, 0, 0))).vcpus, 1);
        assert_eq!(
            size(Some(limits(0, 0, 100 << 20))).memory_bytes,
            148 << 20,
            "limit and vm.memory_overhead"
        );
        assert_eq!(
            size(Some(limits(0, 0, 1))).memory_bytes,
            64 << 20,
            "a guest needs that much"
        );
    }

    #[test]
    fn an_overhead_of_the_runtime_class_replaces_ours() {
        let size = MachineSize::for_pod(
            Some(&limits(100_000, 100_000, 100 << 20)),
            Some(&limits(100_000, 0, 28 << 20)),
            &config::Vm::default(),
        )
        .unwrap();
        assert_eq!(size.vcpus, 2);
        assert_eq!(size.memory_bytes, 128 << 20);
    }

    #[test]
    fn sizes_no_host_has_are_refused() {
        for asked in [limits(i64::MAX, 1, 0), limits(0, 0, i64::MAX)] {
            let size = MachineSize::for_pod(Some(&asked), None, &config::Vm::default());
            if let Ok(size) = size {
                assert!(size.memory_bytes >= i64::MAX.cast_unsigned());
            } else {
                assert!(size.unwrap_err().to_string().contains("linux.resources"));
            }
        }
    }
}

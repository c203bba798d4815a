//! A pod whose containers get more than its machine has.

use serde_json::Value;
use tracing::{info, warn};
use vmm_core::vm::{Vm, VmError, VmSize};

use super::{Machine, Pod, PodError, Result};

/// The default period of the CPU controller, in microseconds.
const DEFAULT_PERIOD_US: u64 = 100_000;

impl Pod {
    /// Makes room for new limits of a container, OCI `LinuxResources`, where they are above
    /// what the machine has. It does not shrink: others may use what one gives up.
    ///
    /// # Errors
    /// The memory limit is above what the machine can have, or its guest does not take the
    /// memory in time.
    pub(super) async fn grow(&self, machine: &Machine, resources: &Value) -> Result<()> {
        let Some((mut now, most)) = machine.vm.resizable() else {
            return Ok(());
        };
        if let Some(limit) = number(resources, "memory", "limit")
            // Within the machine's size there is nothing to do.
            .filter(|limit| *limit > now.memory_bytes)
        {
            fits("memory.limit", limit, most.memory_bytes, "vm.max_memory")?;
            // The guest's kernel needs some, too, as far as there is more.
            let overhead = self.environment.vm.memory_overhead.as_u64();
            let memory_bytes = limit.saturating_add(overhead).min(most.memory_bytes);
            let size = VmSize {
                vcpus: now.vcpus,
                memory_bytes,
            };
            now = self.grow_machine(machine, size).await?;
        }
        let online = u64::from(machine.online_cpus());
        // A quota above what there is does no harm: the container has all of the CPUs then.
        let vcpus = cpus(resources).unwrap_or(0).min(most.vcpus.into());
        if vcpus > online {
            let count = u32::try_from(vcpus).unwrap_or(u32::MAX);
            if count > now.vcpus {
                let size = VmSize {
                    vcpus: count,
                    ..now
                };
                self.grow_machine(machine, size).await?;
            }
            let count = machine.agent.set_cpus(count).await?;
            machine.set_online_cpus(count);
            info!(pod = self.id(), "{count} CPUs are online");
        }
        Ok(())
    }

    async fn grow_machine(&self, machine: &Machine, size: VmSize) -> Result<VmSize> {
        let limit = self.environment.timeouts.agent_call;
        let grown = machine.vm.resize(size, limit).await;
        let grown = grown.map_err(|e| self.vm_error(e))?;
        if grown.memory_bytes < size.memory_bytes || grown.vcpus < size.vcpus {
            return Err(self.vm_error(VmError::Deadline {
                what: "giving the guest more memory or CPUs",
                limit,
            }));
        }
        self.pin(machine.vm.as_ref());
        info!(
            pod = self.id(),
            "grown to {} CPUs and {} bytes of memory", grown.vcpus, grown.memory_bytes
        );
        Ok(grown)
    }

    /// Keeps the vCPUs, those that were just plugged in among them, on the configured CPUs.
    pub(super) fn pin(&self, vm: &dyn Vm) {
        if let Err(e) = self.environment.vm.pin(|| vm.vcpu_threads()) {
            warn!(pod = self.id(), "vm.cpu_affinity has no effect: {e}");
        }
    }
}

fn fits(field: &'static str, value: u64, most: u64, key: &str) -> Result<()> {
    if value <= most {
        return Ok(());
    }
    Err(PodError::invalid(
        field,
        value.to_string(),
        format!("is more than this sandbox can have, {most}: raise {key} for new ones"),
    ))
}

fn number(resources: &Value, table: &str, key: &str) -> Option<u64> {
    let value = resources.get(table)?.get(key)?.as_i64()?;
    u64::try_from(value).ok().filter(|value| *value > 0)
}

/// CPUs that the quota needs.
fn cpus(resources: &Value) -> Option<u64> {
    let quota = number(resources, "cpu", "quota")?;
    let period = number(resources, "cpu", "period").unwrap_or(DEFAULT_PERIOD_US);
    Some(quota.div_ceil(period))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn quotas_are_rounded_up_to_cpus() {
        let cpu =
            |quota: i64, period: i64| cpus(&json!({"cpu": {"quota": quota, "period": period}}));
        assert_eq!(cpu(150_000, 100_000), Some(2));
        assert_eq!(cpu(200_000, 0), Some(2));
        assert_eq!(cpu(-1, 100_000), None);
        assert_eq!(cpus(&json!({})), None);
    }

    #[test]
    fn what_does_not_fit_names_the_key() {
        fits("memory.limit", 5, 5, "vm.max_memory").unwrap();
        let err = fits("memory.limit", 6, 5, "vm.max_memory").unwrap_err();
        assert!(err.to_string().contains("raise vm.max_memory"), "{err}");
    }
}

//! `[hypervisor]`: the external hypervisor that runs pods when `sandbox.mode` is `external`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use external_hv::cloud_hypervisor::ChConfig;
use external_hv::qemu::{Accel, QemuConfig};
use external_hv::stratovirt::{MachineType, StratoConfig};
use serde::de::IntoDeserializer;
use serde::de::value::StrDeserializer;
use serde::{Deserialize, Serialize};

use super::{ConfigError, wrong_in};

/// `[hypervisor]`: which one, and what is common to all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hypervisor {
    /// Which hypervisor. `--hypervisor` overrides it.
    pub kind: HypervisorKind,
    /// The program beside each VM that serves it our devices; unset: `kuasar-vmm-supervisor`
    /// in the folder of the running program.
    pub supervisor: Option<PathBuf>,
    /// Longest wait for one answer of the hypervisor.
    #[serde(with = "humantime_serde")]
    pub api_timeout: Duration,
    /// QEMU.
    pub qemu: QemuConfig,
    /// Cloud Hypervisor.
    #[serde(rename = "cloud-hypervisor")]
    pub cloud_hypervisor: ChConfig,
    /// StratoVirt.
    pub stratovirt: StratoConfig,
}

impl Default for Hypervisor {
    fn default() -> Self {
        Self {
            kind: HypervisorKind::default(),
            supervisor: None,
            api_timeout: Duration::from_secs(10),
            qemu: QemuConfig::default(),
            cloud_hypervisor: ChConfig::default(),
            stratovirt: StratoConfig::default(),
        }
    }
}

/// An external hypervisor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum HypervisorKind {
    /// QEMU.
    #[default]
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// StratoVirt.
    #[serde(rename = "stratovirt")]
    #[value(name = "stratovirt")]
    StratoVirt,
}

/// Overrides `hypervisor.qemu.accel`.
pub(crate) const ACCEL_VAR: &str = "KUASAR_QEMU_ACCEL";

impl Hypervisor {
    pub(super) fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let wrong = wrong_in(path);
        if self.api_timeout.is_zero() {
            return wrong(
                "hypervisor.api_timeout",
                "0s".to_owned(),
                "must be longer than nothing, for instance \"10s\"",
            );
        }
        if !(1..=256).contains(&self.qemu.memory_slots) {
            let value = self.qemu.memory_slots.to_string();
            return wrong("hypervisor.qemu.memory_slots", value, "must be 1 to 256");
        }
        let strato = &self.stratovirt;
        if let (Some(firmware), MachineType::Microvm) = (&strato.firmware, strato.machine) {
            let value = firmware.display().to_string();
            let fix = "must be unset for the machine \"microvm\", which has none";
            return wrong("hypervisor.stratovirt.firmware", value, fix);
        }
        Ok(())
    }
}

/// What runs the guests of QEMU: as configured, or as [`ACCEL_VAR`] says.
pub(crate) fn accel(configured: Accel) -> Accel {
    let Ok(wanted) = std::env::var(ACCEL_VAR) else {
        return configured;
    };
    let wanted: StrDeserializer<'_, serde::de::value::Error> = wanted.as_str().into_deserializer();
    Accel::deserialize(wanted).unwrap_or(configured)
}

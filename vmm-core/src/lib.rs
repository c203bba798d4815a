//! A microVM as a value.
//!
//! [`Host::probe`] finds out what this host's KVM can do, a [`MachineConfig`] says what a
//! machine is made of, and [`Machine::build`] makes it: a Linux guest whose vCPUs and
//! devices are threads of this process. From then on it is a [`vm::Vm`]. Start with
//! `examples/boot.rs`.
//!
//! The library keeps no process-wide state, starts no process, never exits, and installs
//! one signal handler, which does nothing (see [`VcpuState`]). Any number of machines run
//! in one process: a guest that crashes, or a bug in one of its devices, ends that
//! machine with an [`vm::ExitReason`] and no other.
//!
//! | module | idea |
//! |---|---|
//! | `host` | what KVM can do, kernels that are emulated |
//! | `config` | a machine's parts, checked |
//! | `memory`, `kvm_vm` | guest memory and its life |
//! | `arch` | layout, boot protocol, tables, CPUID, registers |
//! | `bus` | addresses to devices |
//! | `vcpu` | threads that run the guest |
//! | `thread`, `exit` | how threads are born, how a machine ends |
//! | `machine` | putting it together |

mod arch;
pub mod bus;
pub mod config;
mod device_set;
mod exit;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod host;
mod kvm_vm;
pub mod machine;
pub mod memory;
pub mod seccomp;
mod snapshot;
mod thread;
mod vcpu;
pub mod vm;

pub use arch::BootError;
pub use config::MachineConfig;
pub use device_set::{DeviceSet, NamedDevice};
pub use exit::panic_words;
pub use host::Host;
pub use machine::{BuildError, CloneConfig, DiskError, Identity, Machine, VmShell};
pub use snapshot::{Snapshot, SnapshotError};
pub use vcpu::VcpuState;

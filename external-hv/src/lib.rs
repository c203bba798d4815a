//! External hypervisors behind the [`vmm_core::vm::Vm`] trait.
//!
//! | module | idea |
//! |---|---|
//! | [`machine`] | [`ExternalVm`]: one pod's VM in another process |
//! | [`capability`] | what each backend can do |
//! | [`hypervisor`] | what an adapter has to provide |
//! | [`cloud_hypervisor`] | Cloud Hypervisor, by its REST API |
//! | [`qemu`] | QEMU, by command line and QMP |
//! | [`quark`] | Quark's sandboxes, by their launcher |
//! | [`stratovirt`] | StratoVirt, by command line and QMP |
//! | [`supervisor`] | the process beside each VMM: our devices over vhost-user, console, exit |
//! | [`vsock`] | host and guest ports as Unix sockets |
//! | [`process`] | which process is whose, also after a restart |
//!
//! Every VM has one supervisor process, parent of its VMM: what a VMM can do to the process
//! that maps its memory it does to its own supervisor, and both outlive the daemon.

mod args;
pub mod capability;
pub mod cloud_hypervisor;
mod dial;
pub mod hypervisor;
pub mod machine;
pub mod process;
pub mod qemu;
mod qmp;
pub mod quark;
mod rights;
pub mod stratovirt;
pub mod supervisor;
mod told;
pub mod vsock;

pub use hypervisor::{HvError, MachineSpec};
pub use machine::ExternalVm;

use vmm_core::Host;

/// What guests need of a kernel here, on a machine with PCI.
fn kernel_parameters(host: &Host) -> Vec<String> {
    let parameters = host.kernel_parameters().iter();
    let environment = host.guest_environment().iter();
    parameters
        .filter(|word| **word != "pci=off")
        .map(|word| (*word).to_owned())
        .chain(environment.map(|(name, value)| format!("{name}={value}")))
        .collect()
}

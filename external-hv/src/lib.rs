//! External hypervisors behind the [`vmm_core::vm::Vm`] trait.
//!
//! | module | idea |
//! |---|---|
//! | [`machine`] | [`ExternalVm`]: one pod's VM in another process |
//! | [`hypervisor`] | what an adapter has to provide |
//! | [`qemu`] | QEMU, by command line and QMP |
//! | [`supervisor`] | the process beside each VMM: our devices over vhost-user, console, exit |
//! | [`vsock`] | host and guest ports as Unix sockets |
//! | [`process`] | which process is whose, also after a restart |
//!
//! Every VM has one supervisor process, parent of its VMM: what a VMM can do to the process
//! that maps its memory it does to its own supervisor, and both outlive the daemon.

pub mod hypervisor;
pub mod machine;
pub mod process;
pub mod qemu;
mod qmp;
pub mod supervisor;
pub mod vsock;

pub use hypervisor::{HvError, MachineSpec};
pub use machine::ExternalVm;

//! Running one vCPU and serving its exits.

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::sync::Arc;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::counters::{ExitCounters, ExitKind};
use crate::bus::Bus;
use crate::exit::ExitNotice;
use crate::kvm_vm::KvmVm;
use crate::machine::Phases;
use crate::vm::ExitReason;

/// Longest x86 instruction.
const INSTRUCTION_BYTES: usize = 15;
/// Widest single port access; longer data comes from a string instruction.
const WIDEST_PORT_ACCESS: usize = 4;

/// The two address spaces of devices.
#[derive(Debug, Default)]
pub(crate) struct Buses {
    pub(crate) pio: Bus,
    pub(crate) mmio: Bus,
}

/// One vCPU, locked by its thread while that runs it.
#[derive(Debug)]
pub(crate) struct Vcpu {
    index: usize,
    // Dropped before the VM's memory can be.
    fd: VcpuFd,
    vm: Arc<KvmVm>,
    buses: Arc<Buses>,
    exit: ExitNotice,
    phases: Arc<Phases>,
}

/// What a return from the guest asks for.
enum Next {
    Again,
    Interrupted,
    End(ExitReason),
    InternalError,
    Failed(String),
}

impl Vcpu {
    pub(crate) fn new(
        index: usize,
        fd: VcpuFd,
        vm: Arc<KvmVm>,
        buses: Arc<Buses>,
        exit: ExitNotice,
        phases: Arc<Phases>,
    ) -> Self {
        Self {
            index,
            fd,
            vm,
            buses,
            exit,
            phases,
        }
    }

    /// Its fd, to save its state while it is paused.
    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Reports that this vCPU cannot run.
    pub(crate) fn fail(&self, what: &str) {
        self.exit
            .report(ExitReason::Kvm(format!("vCPU {}: {what}", self.index)));
    }

    /// Tells the guest, by its KVM clock, that it did not run for a while, so that its
    /// watchdogs do not take the pause for a lock-up.
    pub(crate) fn excuse_pause(&self) {
        // EINVAL: the guest uses another clock.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Runs the guest until it is interrupted, or for good: then the reason is reported
    /// and the thread has to end.
    pub(crate) fn run(&mut self, counters: &ExitCounters) -> ControlFlow<()> {
        self.phases.mark_first(Phases::KERNEL_ENTERED);
        loop {
            match self.enter_guest(counters) {
                Next::Again => {}
                Next::Interrupted => return ControlFlow::Continue(()),
                Next::End(reason) => {
                    self.exit.report(reason);
                    return ControlFlow::Break(());
                }
                Next::InternalError => {
                    let what = self.describe_internal_error();
                    let state = self.describe();
                    self.fail(&format!("{what} {state}"));
                    return ControlFlow::Break(());
                }
                Next::Failed(what) => {
                    let state = self.describe();
                    self.fail(&format!("{what} {state}"));
                    return ControlFlow::Break(());
                }
            }
        }
    }

    fn enter_guest(&mut self, counters: &ExitCounters) -> Next {
        match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                counters.count(ExitKind::Mmio);
                self.buses.mmio.read(address, data);
                Next::Again
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                counters.count(ExitKind::Mmio);
                self.buses.mmio.write(address, data);
                Next::Again
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                counters.count(ExitKind::Io);
                read_port(&self.buses.pio, port, data);
                Next::Again
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                counters.count(ExitKind::Io);
                write_port(&self.buses.pio, port, data);
                Next::Again
            }
            Ok(VcpuExit::Intr) => {
                counters.count(ExitKind::Interrupted);
                Next::Interrupted
            }
            Ok(other) => {
                counters.count(ExitKind::Other);
                rare_exit(&other)
            }
            Err(err) => match err.errno() {
                libc::EINTR => {
                    counters.count(ExitKind::Interrupted);
                    Next::Interrupted
                }
                // A secondary vCPU was woken while it waits for its start-up signal.
                libc::EAGAIN => Next::Again,
                libc::EFAULT if self.vm.has_shared() => Next::Failed(format!(
                    "KVM_RUN: {err}: maybe what the guest has mapped of a file of its share was \
                     cut off on the host"
                )),
                _ => Next::Failed(format!("KVM_RUN: {err}")),
            },
        }
    }

    fn describe_internal_error(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so `internal` is the union's
        // valid member; it consists of plain integers.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        match suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
                "KVM cannot emulate an instruction".to_owned()
            }
            other => format!("KVM internal error {other}"),
        }
    }

    /// RIP and the bytes there, as far as they can be had.
    fn describe(&self) -> String {
        let Ok(regs) = self.fd.get_regs() else {
            return "(registers unknown)".to_owned();
        };
        let mut text = format!("at RIP {:#x}:", regs.rip);
        for byte in self.instruction(regs.rip) {
            let _ = write!(text, " {byte:02x}");
        }
        text
    }

    fn instruction(&self, rip: u64) -> Vec<u8> {
        let cs_base = self.fd.get_sregs().map_or(0, |sregs| sregs.cs.base);
        let Some(ram) = self.vm.ram() else {
            return Vec::new();
        };
        let Ok(translation) = self.fd.translate_gva(cs_base.wrapping_add(rip)) else {
            return Vec::new();
        };
        if translation.valid == 0 {
            return Vec::new();
        }
        let mut bytes = vec![0; INSTRUCTION_BYTES];
        let read = ram
            .guest_memory()
            .read(&mut bytes, GuestAddress(translation.physical_address))
            .unwrap_or(0);
        bytes.truncate(read);
        bytes
    }
}

/// Exits that end the machine.
fn rare_exit(exit: &VcpuExit<'_>) -> Next {
    match exit {
        VcpuExit::Shutdown => Next::End(ExitReason::TripleFault),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
            Next::End(ExitReason::GuestReset)
        }
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
            Next::End(ExitReason::GuestPanic("reported by the guest".to_owned()))
        }
        VcpuExit::FailEntry(reason, cpu) => Next::Failed(format!(
            "entry failed with hardware reason {reason:#x} on CPU {cpu}"
        )),
        VcpuExit::InternalError => Next::InternalError,
        other => Next::Failed(format!("unexpected exit {other:?}")),
    }
}

/// Every device behind ports here has 8-bit registers, so a string instruction is as many
/// single accesses.
fn read_port(bus: &Bus, port: u16, data: &mut [u8]) {
    if data.len() <= WIDEST_PORT_ACCESS {
        bus.read(port.into(), data);
    } else {
        for byte in data.chunks_mut(1) {
            bus.read(port.into(), byte);
        }
    }
}

fn write_port(bus: &Bus, port: u16, data: &[u8]) {
    if data.len() <= WIDEST_PORT_ACCESS {
        bus.write(port.into(), data);
    } else {
        for byte in data.chunks(1) {
            bus.write(port.into(), byte);
        }
    }
}

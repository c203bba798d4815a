//! Everything KVM holds of a machine besides its memory: saved while no vCPU runs, and
//! put into a fresh VM with as many vCPUs.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Error, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::host::Host;
use crate::snapshot::at_most;

/// Interrupt controllers.
const CHIPS: usize = 3;
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// A step that KVM refused, by name.
pub(crate) type Refused = (&'static str, Error);

fn step<T>(name: &'static str, result: Result<T, Error>) -> Result<T, Refused> {
    result.map_err(|err| (name, err))
}

/// Interrupt controllers, timer and clock of a VM.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ChipsState {
    /// Master PIC, slave PIC, I/O APIC.
    #[serde(deserialize_with = "at_most::<CHIPS, _, _>")]
    chips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

impl ChipsState {
    pub(crate) fn save(vm: &VmFd) -> Result<Self, Refused> {
        let mut chips = Vec::new();
        for chip_id in [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            step(
                "read an interrupt controller",
                vm.get_irqchip(&mut chip).map(|()| chip),
            )?;
            chips.push(chip);
        }
        Ok(Self {
            chips,
            pit: step("read the timer", vm.get_pit2())?,
            clock: step("read the clock", vm.get_clock())?,
        })
    }

    /// Guest time goes on from where it was saved: the pause does not show in it.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), Refused> {
        for chip in &self.chips {
            step("set an interrupt controller", vm.set_irqchip(chip))?;
        }
        step("set the timer", vm.set_pit2(&self.pit))?;
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        step("set the clock", vm.set_clock(&clock))
    }
}

/// All of one vCPU.
///
/// The extended state is the classic 4096 bytes: a process gets larger (AMX) state into
/// guests only by asking the kernel for it, which this one does not.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    #[serde(deserialize_with = "at_most::<KVM_MAX_CPUID_ENTRIES, _, _>")]
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    /// Where the CPU has XSAVE.
    xcrs: Option<kvm_xcrs>,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    #[serde(deserialize_with = "at_most::<KVM_MAX_MSR_ENTRIES, _, _>")]
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Saves a vCPU that has finished its last exit.
    pub(crate) fn save(host: &Host, vcpu: &VcpuFd) -> Result<Self, Refused> {
        let cpuid = step("read CPUID", vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
        let has_xcrs = host.kvm().check_extension(Cap::Xcrs);
        // First: KVM processes pending start-up signals in it, which changes the rest.
        let mp_state = step("read the run state", vcpu.get_mp_state())?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            mp_state,
            regs: step("read registers", vcpu.get_regs())?,
            sregs: step("read system registers", vcpu.get_sregs())?,
            xsave: Box::new(step("read extended state", vcpu.get_xsave())?),
            xcrs: has_xcrs
                .then(|| step("read extended control registers", vcpu.get_xcrs()))
                .transpose()?,
            debug: step("read debug registers", vcpu.get_debug_regs())?,
            lapic: step("read the local APIC", vcpu.get_lapic())?,
            msrs: save_msrs(host, vcpu)?,
            events: step("read pending events", vcpu.get_vcpu_events())?,
        })
    }

    /// Puts the state into a vCPU that has never run.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), Refused> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| ("hold CPUID", too_big()))?;
        step("set CPUID", vcpu.set_cpuid2(&cpuid))?;
        step("set the run state", vcpu.set_mp_state(self.mp_state))?;
        step("set registers", vcpu.set_regs(&self.regs))?;
        step("set system registers", vcpu.set_sregs(&self.sregs))?;
        // SAFETY: KVM reads 4096 bytes from here unless this process has enabled larger
        // dynamic features for guests, which no code of ours does.
        let xsave = unsafe { vcpu.set_xsave(&self.xsave) };
        step("set extended state", xsave)?;
        if let Some(xcrs) = &self.xcrs {
            step("set extended control registers", vcpu.set_xcrs(xcrs))?;
        }
        step("set debug registers", vcpu.set_debug_regs(&self.debug))?;
        step("set the local APIC", vcpu.set_lapic(&self.lapic))?;
        self.restore_msrs(vcpu)?;
        step("set pending events", vcpu.set_vcpu_events(&self.events))
    }

    /// A register that this KVM refuses is left out: reading it worked when it was saved,
    /// and what cannot be written is read-only.
    fn restore_msrs(&self, vcpu: &VcpuFd) -> Result<(), Refused> {
        let mut rest = self.msrs.as_slice();
        while !rest.is_empty() {
            let msrs = Msrs::from_entries(rest).map_err(|_| ("hold MSRs", too_big()))?;
            let done = step("set MSRs", vcpu.set_msrs(&msrs))?;
            let Some((refused, after)) = rest.get(done..).and_then(<[_]>::split_first) else {
                break;
            };
            tracing::debug!(msr = refused.index, "KVM does not set this MSR");
            rest = after;
        }
        Ok(())
    }
}

/// Every MSR that KVM lists and can read, in the order in which they have to be written.
fn save_msrs(host: &Host, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, Refused> {
    let list = step("list MSRs", host.kvm().get_msr_index_list())?;
    let mut saved = Vec::with_capacity(list.as_slice().len());
    for &index in list.as_slice() {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| ("hold MSRs", too_big()))?;
        // Listed ones may not exist on this CPU model.
        if vcpu.get_msrs(&mut msrs).is_ok_and(|read| read == 1) {
            saved.extend_from_slice(msrs.as_slice());
        }
    }
    // A deadline is compared with the TSC when it is written.
    saved.sort_by_key(|entry| match entry.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(saved)
}

fn too_big() -> Error {
    Error::new(libc::E2BIG)
}

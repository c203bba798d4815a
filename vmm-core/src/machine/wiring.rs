//! Connecting devices: buses, interrupt lines, notifications.

use std::io;
use std::sync::Arc;

use devices::event_loop::EventLoop;
use devices::legacy::{
    AcpiPower, Cmos, CmosState, ConsoleOutput, I8042, PowerControl, SerialPort, SerialPortError,
    SerialPortState,
};
use devices::transport::mmio::MmioTransport;
use devices::virtio::DeviceType;
use kvm_ioctls::IoEventAddress;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::{MmioDevice, layout};
use crate::bus::Bus;
use crate::device_set::NamedDevice;
use crate::exit::ExitNotice;
use crate::kvm_vm::KvmVm;
use crate::memory::GuestRam;
use crate::vm::ExitReason;

/// Where the guest's resets and power-offs lead: both end the machine.
#[derive(Debug)]
struct PowerSwitch {
    exit: ExitNotice,
}

impl PowerControl for PowerSwitch {
    fn reset(&self) {
        self.exit.report(ExitReason::GuestReset);
    }

    fn power_off(&self) {
        self.exit.report(ExitReason::GuestReset);
    }
}

/// An eventfd that raises interrupt line `irq`, an edge for each write.
pub(super) fn irq_line(vm: &KvmVm, irq: u32) -> io::Result<EventFd> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    vm.fd().register_irqfd(&event, irq)?;
    Ok(event)
}

/// The PC's own devices that have a state.
#[derive(Debug)]
pub(super) struct Legacy {
    serial: Arc<SerialPort>,
    cmos: Arc<Cmos>,
}

/// What a snapshot keeps of them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LegacyState {
    serial: SerialPortState,
    cmos: CmosState,
}

impl Legacy {
    pub(super) fn save(&self) -> LegacyState {
        LegacyState {
            serial: self.serial.save(),
            cmos: self.cmos.save(),
        }
    }

    pub(super) fn restore(&self, state: &LegacyState) -> Result<(), SerialPortError> {
        self.cmos.restore(state.cmos);
        self.serial.restore(&state.serial)
    }
}

/// Puts the PC's own devices on the bus: serial port, reset and power, clock.
pub(super) fn legacy(
    vm: &KvmVm,
    console: &ConsoleOutput,
    exit: &ExitNotice,
    pio: &mut Bus,
) -> io::Result<Legacy> {
    let power: Arc<dyn PowerControl> = Arc::new(PowerSwitch { exit: exit.clone() });
    let line = irq_line(vm, SerialPort::COM1_IRQ)?;
    let serial = Arc::new(SerialPort::new(line, console.clone()));
    let cmos = Arc::new(Cmos::default());
    let mut add = |port: u64, ports: u64, device| {
        pio.insert(port..port.saturating_add(ports), device)
            .map_err(io::Error::other)
    };
    add(
        SerialPort::COM1,
        SerialPort::PORTS,
        Arc::clone(&serial) as _,
    )?;
    add(
        I8042::PORT,
        I8042::PORTS,
        Arc::new(I8042::new(Arc::clone(&power))),
    )?;
    add(
        AcpiPower::PORT,
        AcpiPower::PORTS,
        Arc::new(AcpiPower::new(power)),
    )?;
    add(Cmos::PORT, Cmos::PORTS, Arc::clone(&cmos) as _)?;
    Ok(Legacy { serial, cmos })
}

/// One virtio device on the bus.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) transport: Arc<MmioTransport>,
    pub(super) place: MmioDevice,
}

/// Puts a virtio device in slot `index`: registers on the bus, an interrupt line of its
/// own, and notifications that the kernel delivers without an exit to this process.
pub(super) fn virtio(
    vm: &KvmVm,
    ram: &GuestRam,
    event_loop: &EventLoop,
    index: usize,
    device: NamedDevice,
    mmio: &mut Bus,
) -> io::Result<Attached> {
    let place = slot(index)?;
    // An exit is cheaper than the registration for those that are hardly ever notified.
    let rare = [DeviceType::Balloon, DeviceType::Mem];
    let kernel_notifies = !rare.contains(&device.device.device_type());
    let line = irq_line(vm, place.irq)?;
    if let Some(shared) = device.device.shared_memory() {
        vm.map_shared(shared, ram.size().devices_start())?;
    }
    let transport = MmioTransport::new(
        device.device,
        Arc::clone(ram.guest_memory()),
        event_loop.runner(),
        Arc::new(line),
    )?;
    let start = u64::from(place.address);
    let notify = IoEventAddress::Mmio(notify_address(place));
    if kernel_notifies {
        for (queue, event) in (0_u32..).zip(transport.queue_notifies()) {
            vm.fd().register_ioevent(event, &notify, queue)?;
        }
    }
    let transport = Arc::new(transport);
    let end = start.saturating_add(MmioTransport::BYTES);
    mmio.insert(start..end, Arc::clone(&transport) as _)
        .map_err(io::Error::other)?;
    Ok(Attached { transport, place })
}

/// Where the driver of the device at `place` writes what notifies it.
pub(super) fn notify_address(place: MmioDevice) -> u64 {
    u64::from(place.address).saturating_add(MmioTransport::QUEUE_NOTIFY)
}

fn slot(index: usize) -> io::Result<MmioDevice> {
    place(index, index)
}

/// The place of disk slot `index` behind `fixed` other devices. Slots share the interrupt
/// lines that those leave: each edge makes the guest ask every driver on the line.
pub(super) fn disk_slot(fixed: usize, index: usize) -> io::Result<MmioDevice> {
    let lines = layout::DEVICE_IRQS.len().saturating_sub(fixed);
    let line = index.checked_rem(lines).ok_or_else(no_line)?;
    place(fixed.saturating_add(index), fixed.saturating_add(line))
}

fn no_line() -> io::Error {
    io::Error::other("no interrupt line is left")
}

fn place(index: usize, line: usize) -> io::Result<MmioDevice> {
    let irq = *layout::DEVICE_IRQS.get(line).ok_or_else(no_line)?;
    let bytes = u32::try_from(MmioTransport::BYTES).map_err(io::Error::other)?;
    let address = u32::try_from(index)
        .ok()
        .and_then(|index| index.checked_mul(bytes))
        .and_then(|offset| offset.checked_add(layout::MMIO_DEVICES))
        .ok_or_else(no_line)?;
    Ok(MmioDevice {
        address,
        bytes,
        irq,
    })
}

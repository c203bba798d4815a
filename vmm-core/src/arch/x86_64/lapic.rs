//! Local interrupt controllers: the two lines that firmware would have connected.

use kvm_ioctls::VcpuFd;

/// Register offsets (Intel SDM, volume 3, table 11-1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Delivery modes, bits 10-8.
const MODE_EXT_INT: u32 = 7 << 8;
const MODE_NMI: u32 = 4 << 8;
const MODE_MASK: u32 = 7 << 8;

/// LINT0 takes the PIC's interrupts, LINT1 NMIs, as the MP table says.
pub(super) fn configure(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut lapic = vcpu.get_lapic()?;
    for (offset, mode) in [(LVT_LINT0, MODE_EXT_INT), (LVT_LINT1, MODE_NMI)] {
        let end = offset.saturating_add(4);
        let Some(bytes) = lapic.regs.get_mut(offset..end) else {
            return Err(kvm_ioctls::Error::new(libc::EINVAL));
        };
        let mut value = 0_u32;
        for (shift, byte) in [0, 8, 16, 24].into_iter().zip(bytes.iter()) {
            value |= u32::from(byte.cast_unsigned()) << shift;
        }
        let value = value & !MODE_MASK | mode;
        for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *byte = new.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic)
}

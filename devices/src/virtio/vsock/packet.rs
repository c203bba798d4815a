//! The packet header: virtio 1.2, 5.10.6.

use vm_memory::{ByteValued, Le16, Le32, Le64};

/// The host's well-known address.
pub const CID_HOST: u64 = 2;
/// Lowest address a guest can have; those below are reserved (5.10.4).
pub const CID_GUEST_MIN: u64 = 3;

/// The only socket type offered: `VIRTIO_VSOCK_TYPE_STREAM`.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_OP_*`.
pub mod op {
    /// Connect.
    pub const REQUEST: u16 = 1;
    /// Accept.
    pub const RESPONSE: u16 = 2;
    /// Refuse or abort.
    pub const RST: u16 = 3;
    /// Half or full close.
    pub const SHUTDOWN: u16 = 4;
    /// Payload.
    pub const RW: u16 = 5;
    /// Tells the sender's buffer state.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a credit update.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `VIRTIO_VSOCK_SHUTDOWN_RCV`: the sender will receive no more.
pub const SHUTDOWN_RCV: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_SEND`: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// Largest payload of one packet, either way; Linux uses the same bound.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// Bytes of a header in guest memory.
pub const HEADER_LEN: usize = size_of::<Wire>();

/// The header as it lies in guest memory.
#[derive(Clone, Copy, Default)]
#[repr(C, packed)]
struct Wire {
    src_cid: Le64,
    dst_cid: Le64,
    src_port: Le32,
    dst_port: Le32,
    len: Le32,
    kind: Le16,
    op: Le16,
    flags: Le32,
    buf_alloc: Le32,
    fwd_cnt: Le32,
}

// SAFETY: only little-endian integers, packed: no padding, and every bit pattern is valid.
unsafe impl ByteValued for Wire {}

/// A header in host form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Payload bytes that follow the header.
    pub len: u32,
    /// Socket type, [`TYPE_STREAM`].
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Meaning depends on `op`.
    pub flags: u32,
    /// The sender's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of that buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut wire = Wire::default();
        wire.as_mut_slice().copy_from_slice(bytes);
        Self {
            src_cid: wire.src_cid.into(),
            dst_cid: wire.dst_cid.into(),
            src_port: wire.src_port.into(),
            dst_port: wire.dst_port.into(),
            len: wire.len.into(),
            kind: wire.kind.into(),
            op: wire.op.into(),
            flags: wire.flags.into(),
            buf_alloc: wire.buf_alloc.into(),
            fwd_cnt: wire.fwd_cnt.into(),
        }
    }

    /// The header as the guest expects it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let wire = Wire {
            src_cid: self.src_cid.into(),
            dst_cid: self.dst_cid.into(),
            src_port: self.src_port.into(),
            dst_port: self.dst_port.into(),
            len: self.len.into(),
            kind: self.kind.into(),
            op: self.op.into(),
            flags: self.flags.into(),
            buf_alloc: self.buf_alloc.into(),
            fwd_cnt: self.fwd_cnt.into(),
        };
        let mut bytes = [0; HEADER_LEN];
        bytes.copy_from_slice(wire.as_slice());
        bytes
    }

    /// The RST that answers this packet: ports swapped, nothing promised.
    #[must_use]
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: CID_HOST,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_the_layout_of_5_10_6() {
        assert_eq!(HEADER_LEN, 44);
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1122_3344,
            dst_port: 1024,
            len: 5,
            kind: TYPE_STREAM,
            op: op::RW,
            flags: 3,
            buf_alloc: 0x10000,
            fwd_cnt: 7,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[16..20], [0x44, 0x33, 0x22, 0x11]);
        assert_eq!(bytes[24..28], [5, 0, 0, 0]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[36..40], [0, 0, 1, 0]);
        assert_eq!(Header::from_bytes(&bytes), header);
    }
}

//! A descriptor chain as a checked request (virtio 1.2, 5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap};

use super::{
    ID_BYTES, MAX_DISCARD_SECTORS, MAX_EXTENTS, MAX_REQUEST_BYTES, MAX_WRITE_ZEROES_SECTORS,
    SECTOR_BYTES,
};
use crate::virtio::chain::{Chain, Parts};

/// `struct virtio_blk_req` up to its data: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`.
const EXTENT_BYTES: usize = 16;

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(super) fn byte(self) -> u8 {
        let code = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        code.to_le_bytes()[0]
    }
}

/// A range of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// A zeroed range may be deallocated.
    pub(super) unmap: bool,
}

/// What is to be done; offsets in bytes, all within the capacity.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Disk to guest.
    Read { offset: u64 },
    /// Guest to disk.
    Write { offset: u64 },
    /// Completed writes to stable storage.
    Flush,
    /// The device id.
    GetId,
    /// Deallocate.
    Discard(Vec<Extent>),
    /// Zero.
    WriteZeroes(Vec<Extent>),
}

/// What a request may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Capacity in sectors.
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    /// As negotiated.
    pub(super) features: u64,
}

/// A chain is no request that can be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// There is no status byte: the chain goes back as it came.
    Silent,
    /// The status, and where it goes.
    Status(GuestAddress, Status),
}

/// A request that passed all checks. Its data is in `chain`: readable for writes, writable
/// for reads and the id.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) status: GuestAddress,
    pub(super) kind: Kind,
}

/// Checks the request in `chain` and cuts header and status off its halves.
pub(super) fn parse(
    memory: &GuestMemoryMmap<()>,
    chain: &mut Chain,
    limits: &Limits,
) -> Result<Request, Refusal> {
    let status = chain.writable.pop_byte().map_err(|_| Refusal::Silent)?;
    if !memory.address_in_range(status) {
        return Err(Refusal::Silent);
    }
    let kind = kind(memory, chain, limits).map_err(|code| Refusal::Status(status, code))?;
    Ok(Request { status, kind })
}

fn kind(memory: &GuestMemoryMmap<()>, chain: &mut Chain, limits: &Limits) -> Result<Kind, Status> {
    let mut header = [0; HEADER_BYTES];
    let readable = &mut chain.readable;
    readable
        .read(memory, 0, &mut header)
        .and_then(|()| readable.skip(HEADER_BYTES))
        .map_err(|_| Status::IoError)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => Ok(Kind::Read {
            offset: data_offset(sector, &chain.writable, limits)?,
        }),
        VIRTIO_BLK_T_OUT => {
            refuse_read_only(limits)?;
            Ok(Kind::Write {
                offset: data_offset(sector, &chain.readable, limits)?,
            })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Kind::Flush),
        VIRTIO_BLK_T_GET_ID if chain.writable.len() == ID_BYTES => Ok(Kind::GetId),
        VIRTIO_BLK_T_GET_ID => Err(Status::IoError),
        VIRTIO_BLK_T_DISCARD if negotiated(limits, VIRTIO_BLK_F_DISCARD) => {
            refuse_read_only(limits)?;
            let rules = ExtentRules {
                max_sectors: MAX_DISCARD_SECTORS,
                flags: 0,
            };
            extents(memory, &chain.readable, limits, &rules).map(Kind::Discard)
        }
        VIRTIO_BLK_T_WRITE_ZEROES if negotiated(limits, VIRTIO_BLK_F_WRITE_ZEROES) => {
            refuse_read_only(limits)?;
            let rules = ExtentRules {
                max_sectors: MAX_WRITE_ZEROES_SECTORS,
                flags: VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
            };
            extents(memory, &chain.readable, limits, &rules).map(Kind::WriteZeroes)
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.read_only => {
            Err(Status::IoError)
        }
        _ => Err(Status::Unsupported),
    }
}

fn negotiated(limits: &Limits, feature: u32) -> bool {
    limits.features & 1 << feature != 0
}

/// 5.2.6.2: a read-only device answers IOERR to everything that would write.
fn refuse_read_only(limits: &Limits) -> Result<(), Status> {
    if limits.read_only {
        Err(Status::IoError)
    } else {
        Ok(())
    }
}

/// Where `data` starts on the disk; all of it is within the capacity.
fn data_offset(sector: u64, data: &Parts, limits: &Limits) -> Result<u64, Status> {
    if data.len() > MAX_REQUEST_BYTES {
        return Err(Status::IoError);
    }
    let len = u64::try_from(data.len()).map_err(|_| Status::IoError)?;
    if !len.is_multiple_of(SECTOR_BYTES) {
        return Err(Status::IoError);
    }
    range(sector, len / SECTOR_BYTES, limits).map(|extent| extent.offset)
}

fn range(sector: u64, sectors: u64, limits: &Limits) -> Result<Extent, Status> {
    let end = sector.checked_add(sectors).ok_or(Status::IoError)?;
    if end > limits.sectors {
        return Err(Status::IoError);
    }
    let bytes = |sectors: u64| sectors.checked_mul(SECTOR_BYTES).ok_or(Status::IoError);
    Ok(Extent {
        offset: bytes(sector)?,
        len: bytes(sectors)?,
        unmap: false,
    })
}

struct ExtentRules {
    max_sectors: u32,
    /// Flags known for this request.
    flags: u32,
}

/// The ranges of a discard or write-zeroes request; empty ones are left out.
fn extents(
    memory: &GuestMemoryMmap<()>,
    data: &Parts,
    limits: &Limits,
    rules: &ExtentRules,
) -> Result<Vec<Extent>, Status> {
    let mut raw = [0; MAX_EXTENTS * EXTENT_BYTES];
    let raw = raw.get_mut(..data.len()).ok_or(Status::IoError)?;
    data.read(memory, 0, raw).map_err(|_| Status::IoError)?;
    let (entries, rest) = raw.as_chunks::<EXTENT_BYTES>();
    if entries.is_empty() || !rest.is_empty() {
        return Err(Status::IoError);
    }
    let mut extents = Vec::with_capacity(entries.len());
    for entry in entries {
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = *entry;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        // 5.2.6.2: unknown flags, and unmap in a discard.
        if flags & !rules.flags != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > rules.max_sectors {
            return Err(Status::IoError);
        }
        let mut extent = range(u64::from_le_bytes(sector), sectors.into(), limits)?;
        extent.unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if extent.len > 0 {
            extents.push(extent);
        }
    }
    Ok(extents)
}

//! Guest memory statistics (virtio 1.2, 5.5.6.3).

use vm_memory::GuestMemoryMmap;

use crate::virtio::chain::Chain;
use crate::virtio::serve::{Descriptors, ServeError};

/// Most bytes read of one statistics buffer; Linux sends 16 entries.
pub const MAX_STATS_BYTES: usize = 64 * ENTRY_BYTES;

/// Most descriptors that statistics may be cut into.
const MAX_DESCRIPTORS: usize = 16;
/// `struct virtio_balloon_stat`: tag (16 bits), value (64 bits), packed.
const ENTRY_BYTES: usize = 10;

/// What the guest last said of its memory; `None` where it said nothing. The guest may
/// lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// Bytes swapped in.
    pub swap_in_bytes: Option<u64>,
    /// Bytes swapped out.
    pub swap_out_bytes: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Memory not used for any purpose.
    pub free_bytes: Option<u64>,
    /// All memory of the guest.
    pub total_bytes: Option<u64>,
    /// What new workloads could use without swapping.
    pub available_bytes: Option<u64>,
    /// Memory of caches that can be reclaimed quickly.
    pub cache_bytes: Option<u64>,
}

impl BalloonStats {
    /// Takes the last value of each known tag; unknown tags and a trailing fragment are
    /// ignored.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        for &[t0, t1, v0, v1, v2, v3, v4, v5, v6, v7] in entries {
            let value = Some(u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]));
            match u16::from_le_bytes([t0, t1]) {
                0 => stats.swap_in_bytes = value,
                1 => stats.swap_out_bytes = value,
                2 => stats.major_faults = value,
                3 => stats.minor_faults = value,
                4 => stats.free_bytes = value,
                5 => stats.total_bytes = value,
                6 => stats.available_bytes = value,
                7 => stats.cache_bytes = value,
                _ => {}
            }
        }
        stats
    }
}

/// Reads the statistics in `descriptors`, [`MAX_STATS_BYTES`] at most.
pub(super) fn read(
    memory: &GuestMemoryMmap<()>,
    descriptors: Descriptors<'_>,
) -> Result<BalloonStats, ServeError> {
    let mut chain = Chain::default();
    chain.load(descriptors, MAX_DESCRIPTORS)?;
    let mut bytes = [0; MAX_STATS_BYTES];
    let len = chain.readable.len().min(bytes.len());
    let bytes = bytes.get_mut(..len).unwrap_or_default();
    chain.readable.read(memory, 0, bytes)?;
    Ok(BalloonStats::parse(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_tags_are_taken_and_the_rest_ignored() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4_u16, 100_u64), (99, 1), (5, 200), (4, 150)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([6, 0, 1]);
        let stats = BalloonStats::parse(&bytes);
        assert_eq!(stats.free_bytes, Some(150));
        assert_eq!(stats.total_bytes, Some(200));
        assert_eq!(stats.available_bytes, None);
    }
}

//! What a device is built from, and the configuration space (virtio 1.2, 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{
    Engine, ID_BYTES, MAX_DISCARD_SECTORS, MAX_EXTENTS, MAX_QUEUES, MAX_SEGMENT_BYTES,
    MAX_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, SECTOR_BYTES,
};

/// Bytes of `struct virtio_blk_config` up to the write-zeroes fields.
const SPACE_BYTES: usize = 60;
/// Largest block size offered: Linux takes none above its page size.
const MAX_BLOCK_SIZE: u32 = 4096;

/// How to make a block device. It stays as it is while backings come and go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockConfig {
    /// For the names of its threads, a few characters ("blk0").
    pub name: String,
    /// What the driver gets as device id, at most [`ID_BYTES`] bytes of printable ASCII.
    /// Linux shows it as the disk's serial number.
    pub serial: String,
    /// Writes, discards and write-zeroes are refused, whatever the backing allows.
    pub read_only: bool,
    /// Logical block size in bytes: a power of two from 512 to 4096.
    pub block_size: u32,
    /// Physical block size in bytes, a power-of-two multiple of `block_size`: what the
    /// driver should align to.
    pub physical_block_size: u32,
    /// Request queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// How requests are run.
    pub engine: Engine,
}

impl Default for BlockConfig {
    fn default() -> Self {
        Self {
            name: "blk".to_owned(),
            serial: String::new(),
            read_only: false,
            block_size: 512,
            physical_block_size: 4096,
            queues: 1,
            engine: Engine::Auto,
        }
    }
}

/// A device cannot be built like that.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// `block_size`.
    #[error("block_size {0}: use a power of two from 512 to {MAX_BLOCK_SIZE}")]
    BlockSize(u32),
    /// `physical_block_size`.
    #[error("physical_block_size {physical}: use a power of two from block_size ({logical}) up")]
    PhysicalBlockSize {
        /// As given.
        physical: u32,
        /// The logical block size.
        logical: u32,
    },
    /// `serial`.
    #[error("serial {0:?}: use at most {ID_BYTES} printable ASCII characters")]
    Serial(String),
    /// `queues`.
    #[error("queues {0}: use 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// `engine`: io_uring was asked for.
    #[error("engine io_uring: {0}; use engine auto or sync")]
    Uring(String),
}

impl BlockConfig {
    /// Checks everything that can be checked without the host.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let logical = self.block_size;
        if !logical.is_power_of_two() || !(512..=MAX_BLOCK_SIZE).contains(&logical) {
            return Err(ConfigError::BlockSize(logical));
        }
        let physical = self.physical_block_size;
        if !physical.is_power_of_two() || physical < logical {
            return Err(ConfigError::PhysicalBlockSize { physical, logical });
        }
        let printable = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
        if self.serial.len() > ID_BYTES || !self.serial.bytes().all(printable) {
            return Err(ConfigError::Serial(self.serial.clone()));
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(ConfigError::Queues(self.queues));
        }
        Ok(())
    }

    /// Feature bits offered (5.2.3).
    #[must_use]
    pub fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        if self.queues > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        features
    }

    /// The device id, padded with zeroes.
    #[must_use]
    pub fn id(&self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(self.serial.bytes()) {
            *to = from;
        }
        id
    }

    /// The configuration space for a capacity in sectors.
    #[must_use]
    pub fn space(&self, capacity: u64) -> [u8; SPACE_BYTES] {
        let exponent = self
            .physical_block_size
            .checked_div(self.block_size)
            .map_or(0, u32::trailing_zeros);
        let alignment = u32::try_from(u64::from(self.block_size) / SECTOR_BYTES).unwrap_or(1);
        let mut space = [0; SPACE_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            for (to, from) in space.iter_mut().skip(offset).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &capacity.to_le_bytes());
        put(8, &MAX_SEGMENT_BYTES.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        // Topology: physical block exponent, alignment offset 0, minimum I/O size in
        // logical blocks, no preferred maximum.
        put(24, &[u8::try_from(exponent).unwrap_or(0)]);
        let minimum = 1_u16.checked_shl(exponent).unwrap_or(1);
        put(26, &minimum.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        let extents = u32::try_from(MAX_EXTENTS).unwrap_or(1);
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &extents.to_le_bytes());
        put(44, &alignment.to_le_bytes());
        put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(52, &extents.to_le_bytes());
        // write_zeroes_may_unmap
        put(56, &[1]);
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_5_2_4() {
        let config = BlockConfig {
            block_size: 1024,
            queues: 3,
            ..BlockConfig::default()
        };
        let space = config.space(0x1122_3344_5566_7788);
        let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!(space[..8], 0x1122_3344_5566_7788_u64.to_le_bytes());
        assert_eq!(u32_at(8), MAX_SEGMENT_BYTES);
        assert_eq!(u32_at(12), MAX_SEGMENTS);
        assert_eq!(u32_at(20), 1024);
        assert_eq!(space[24..28], [2, 0, 4, 0]);
        assert_eq!(space[34..36], [3, 0]);
        assert_eq!(u32_at(36), MAX_DISCARD_SECTORS);
        assert_eq!(u32_at(40), 32);
        assert_eq!(u32_at(44), 2);
        assert_eq!(u32_at(48), MAX_WRITE_ZEROES_SECTORS);
        assert_eq!(u32_at(52), 32);
        assert_eq!(space[56], 1);
    }

    #[test]
    fn what_cannot_be_built_is_named() {
        let base = BlockConfig::default;
        base().validate().unwrap();
        let bad = [
            BlockConfig {
                block_size: 0,
                ..base()
            },
            BlockConfig {
                block_size: 768,
                ..base()
            },
            BlockConfig {
                block_size: 8192,
                physical_block_size: 8192,
                ..base()
            },
            BlockConfig {
                physical_block_size: 256,
                ..base()
            },
            BlockConfig {
                serial: "x".repeat(21),
                ..base()
            },
            BlockConfig {
                serial: "é".to_owned(),
                ..base()
            },
            BlockConfig {
                queues: 0,
                ..base()
            },
            BlockConfig {
                queues: 33,
                ..base()
            },
        ];
        for config in bad {
            config.validate().unwrap_err();
        }
    }

    #[test]
    fn read_only_devices_offer_no_writes() {
        let config = BlockConfig {
            read_only: true,
            ..BlockConfig::default()
        };
        assert_ne!(config.features() & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(config.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
        assert_eq!(config.features() & 1 << VIRTIO_BLK_F_WRITE_ZEROES, 0);
    }
}

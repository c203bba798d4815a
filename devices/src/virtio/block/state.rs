//! What a snapshot keeps of a block device.

use serde::{Deserialize, Serialize};

use super::{BlockConfig, ConfigError};

/// The only version so far.
const VERSION: u16 = 1;

/// Everything the driver knows of the device. The queues belong to the transport, the
/// backing to whoever restores: a clone attaches its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    version: u16,
    serial: String,
    read_only: bool,
    block_size: u32,
    physical_block_size: u32,
    queues: u16,
    /// Capacity in sectors that the driver has seen: after a restore it is zero until
    /// something is attached, which the driver is told.
    sectors: u64,
}

/// A saved device cannot be made again.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Saved by a release with another layout.
    #[error("state of the block device has version {found}, this release reads {VERSION}")]
    Version {
        /// In the state.
        found: u16,
    },
    /// The state or the host does not allow it.
    #[error("cannot restore the block device: {0}")]
    Config(#[from] ConfigError),
}

impl BlockState {
    pub(super) fn new(config: &BlockConfig, sectors: u64) -> Self {
        Self {
            version: VERSION,
            serial: config.serial.clone(),
            read_only: config.read_only,
            block_size: config.block_size,
            physical_block_size: config.physical_block_size,
            queues: config.queues,
            sectors,
        }
    }

    /// The device's configuration, with what only concerns the host from `host`.
    pub(super) fn config(&self, host: &BlockConfig) -> Result<BlockConfig, RestoreError> {
        if self.version != VERSION {
            return Err(RestoreError::Version {
                found: self.version,
            });
        }
        let config = BlockConfig {
            name: host.name.clone(),
            engine: host.engine,
            serial: self.serial.clone(),
            read_only: self.read_only,
            block_size: self.block_size,
            physical_block_size: self.physical_block_size,
            queues: self.queues,
        };
        config.validate()?;
        Ok(config)
    }

    /// Capacity in sectors when it was saved.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::VirtioDevice;
    use crate::virtio::block::{Block, Engine};

    proptest! {
        /// What is saved restores to a device that saves the same and looks the same.
        #[test]
        fn round_trip(
            serial in "[ -~]{0,20}",
            read_only: bool,
            block in 9_u32..=12,
            physical in 0_u32..4,
            queues in 1_u16..=32,
            sectors: u64,
        ) {
            let config = BlockConfig {
                serial,
                read_only,
                block_size: 1 << block,
                physical_block_size: 1 << (block + physical),
                queues,
                engine: Engine::Sync,
                ..BlockConfig::default()
            };
            let state = BlockState::new(&config, sectors);
            let bytes = serde_json::to_vec(&state).unwrap();
            let read: BlockState = serde_json::from_slice(&bytes).unwrap();
            prop_assert_eq!(&read, &state);
            prop_assert_eq!(read.config(&config).unwrap(), config.clone());
            let host = BlockConfig { name: "other".to_owned(), engine: Engine::Sync, ..BlockConfig::default() };
            let (device, handle) = Block::restore(&read, &host).unwrap();
            let (original, _) = Block::new(config).unwrap();
            prop_assert_eq!(device.features(), original.features());
            prop_assert_eq!(device.queue_sizes(), original.queue_sizes());
            prop_assert_eq!(device.save(), BlockState { sectors: 0, ..state });
            prop_assert!(!handle.is_attached());
        }
    }

    #[test]
    fn other_versions_and_damaged_states_are_refused() {
        let config = BlockConfig::default();
        let state = BlockState::new(&config, 0);
        let newer = BlockState {
            version: 2,
            ..state.clone()
        };
        let err = Block::restore(&newer, &config).unwrap_err();
        assert!(matches!(err, RestoreError::Version { found: 2 }), "{err}");
        let damaged = BlockState { queues: 0, ..state };
        Block::restore(&damaged, &config).unwrap_err();
    }
}

//! What a snapshot keeps of a block device.

use serde::{Deserialize, Serialize};

use super::BlockConfig;
use crate::virtio::{DeviceType, StateError, state};

/// The only version so far.
const VERSION: u16 = 1;

/// Everything the driver knows of the device. The queues belong to the transport, the
/// backing to whoever restores: a clone attaches its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BlockState {
    serial: String,
    read_only: bool,
    block_size: u32,
    physical_block_size: u32,
    queues: u16,
    /// Capacity in sectors that the driver has seen: after a restore it is zero until
    /// something is attached, which the driver is told.
    pub(super) sectors: u64,
    /// The driver has yet to be told of a change of it.
    pub(super) change_pending: bool,
}

impl BlockState {
    pub(super) fn new(config: &BlockConfig, sectors: u64, change_pending: bool) -> Self {
        Self {
            serial: config.serial.clone(),
            read_only: config.read_only,
            block_size: config.block_size,
            physical_block_size: config.physical_block_size,
            queues: config.queues,
            sectors,
            change_pending,
        }
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, StateError> {
        state::encode(DeviceType::Block, VERSION, self)
    }

    /// The state in `bytes`, if it is of a device like `config`. Name and engine are the
    /// host's affair and may differ.
    pub(super) fn decode(bytes: &[u8], config: &BlockConfig) -> Result<Self, StateError> {
        let state: Self = state::decode(DeviceType::Block, VERSION, bytes)?;
        let same = [
            ("serial", state.serial == config.serial),
            ("read_only", state.read_only == config.read_only),
            ("block_size", state.block_size == config.block_size),
            (
                "physical_block_size",
                state.physical_block_size == config.physical_block_size,
            ),
            ("queues", state.queues == config.queues),
        ];
        match same.iter().find(|(_, same)| !same) {
            Some((field, _)) => Err(StateError::mismatch(DeviceType::Block, *field)),
            None => Ok(state),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::block::{Block, Engine};
    use crate::virtio::{VirtioDevice, state_tests};

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
            let bytes = BlockState::new(&config, sectors, false).encode().unwrap();
            let host = BlockConfig { name: "other".to_owned(), ..config };
            let (mut device, handle) = Block::new(host).unwrap();
            device.restore(&bytes).unwrap();
            prop_assert!(!handle.is_attached());
            prop_assert_eq!(handle.capacity_bytes(), 0);
            let empty = BlockState::new(&BlockConfig { name: String::new(), ..device.config().clone() }, 0, sectors != 0);
            prop_assert_eq!(device.save().unwrap(), empty.encode().unwrap());
        }
    }

    #[test]
    fn states_of_other_devices_are_refused() {
        let config = BlockConfig {
            engine: Engine::Sync,
            queues: 2,
            ..BlockConfig::default()
        };
        let state = BlockState::new(&config, 7, false).encode().unwrap();
        let others = [
            BlockConfig {
                serial: "x".to_owned(),
                ..config.clone()
            },
            BlockConfig {
                read_only: true,
                ..config.clone()
            },
            BlockConfig {
                block_size: 4096,
                ..config.clone()
            },
            BlockConfig {
                physical_block_size: 512,
                ..config.clone()
            },
            BlockConfig {
                queues: 1,
                ..config.clone()
            },
        ];
        for other in others {
            let (mut device, _handle) = Block::new(other).unwrap();
            let err = device.restore(&state).unwrap_err();
            assert!(matches!(err, StateError::Mismatch { .. }), "{err}");
        }
        state_tests::check_hostile(&state, || Block::new(config.clone()).unwrap().0);
    }
}

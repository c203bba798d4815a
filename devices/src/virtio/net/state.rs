//! What a snapshot keeps of a network device.

use serde::{Deserialize, Serialize};

use super::NetConfig;
use super::config::GUEST_OFFLOADS;
use super::link::Settings;
use crate::virtio::{DeviceType, StateError, state};

/// The only version so far.
const VERSION: u16 = 1;

/// Everything the driver knows of the device and has set. The queues belong to the
/// transport, the tap and the limits to whoever restores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NetState {
    /// As configured: what a driver gets after a reset.
    pub(super) mac: [u8; 6],
    mtu: Option<u16>,
    queue_pairs: u16,
    /// The status field that the driver has seen.
    pub(super) status: u16,
    /// The driver has yet to be told of a change.
    pub(super) change_pending: bool,
    pub(super) settings: Settings,
}

impl NetState {
    pub(super) fn new(
        config: &NetConfig,
        status: u16,
        change_pending: bool,
        settings: Settings,
    ) -> Self {
        Self {
            mac: config.mac,
            mtu: config.mtu,
            queue_pairs: config.queue_pairs,
            status,
            change_pending,
            settings,
        }
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, StateError> {
        state::encode(DeviceType::Net, VERSION, self)
    }

    /// The state in `bytes`, if it is of a device like `config`. The limits are the host's
    /// affair, and the address is the driver's: it keeps the one it knows.
    pub(super) fn decode(bytes: &[u8], config: &NetConfig) -> Result<Self, StateError> {
        let state: Self = state::decode(DeviceType::Net, VERSION, bytes)?;
        for (field, same) in [
            ("mtu", state.mtu == config.mtu),
            ("queue_pairs", state.queue_pairs == config.queue_pairs),
        ] {
            if !same {
                return Err(StateError::mismatch(DeviceType::Net, field));
            }
        }
        let invalid = |what| Err(StateError::invalid(DeviceType::Net, what));
        let checked = NetConfig {
            mac: state.mac,
            ..config.clone()
        };
        if let Err(err) = checked.validate() {
            return invalid(err.to_string());
        }
        if !(1..=state.queue_pairs).contains(&state.settings.pairs) {
            return invalid("more queue pairs in use than there are".to_owned());
        }
        if state.settings.offloads & !GUEST_OFFLOADS != 0 {
            return invalid("unknown offloads".to_owned());
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::net::{Net, Rate, RateLimit};
    use crate::virtio::{VirtioDevice, state_tests};

    fn settings() -> impl Strategy<Value = Settings> {
        let flags = (any::<bool>(), any::<bool>(), any::<u8>());
        (any::<[u8; 6]>(), 1_u16..=4, any::<u64>(), flags).prop_map(
            |(mac, pairs, offloads, (up, announce, rx_mode))| Settings {
                mac,
                pairs,
                offloads: offloads & GUEST_OFFLOADS,
                rx_mode,
                up,
                announce,
            },
        )
    }

    proptest! {
        /// What is saved restores to a device that saves the same and looks the same.
        #[test]
        fn round_trip(settings in settings(), mtu in proptest::option::of(68_u16..), pairs in 4_u16..=32) {
            let config = NetConfig {
                mtu,
                queue_pairs: pairs,
                ..NetConfig::new([2, 0, 0, 0, 0, 7])
            };
            let bytes = NetState::new(&config, 0, false, settings.clone()).encode().unwrap();
            let rate = Rate { per_second: 1, burst: 1 };
            let host = NetConfig {
                rx_limit: RateLimit { bytes: Some(rate), frames: None },
                mac: [2, 9, 9, 9, 9, 9],
                ..config
            };
            let (mut device, handle) = Net::new(host).unwrap();
            device.restore(&bytes).unwrap();
            prop_assert_eq!(handle.mac(), settings.mac);
            prop_assert_eq!(device.save().unwrap(), bytes);
        }
    }

    #[test]
    fn states_of_other_devices_are_refused() {
        let config = NetConfig::new([2, 0, 0, 0, 0, 7]);
        let state = NetState::new(&config, 1, false, Settings::new(config.mac));
        let restore = |config: &NetConfig, state: &NetState| {
            let (mut device, _handle) = Net::new(config.clone()).unwrap();
            device.restore(&state.encode().unwrap())
        };
        restore(&config, &state).unwrap();
        for change in [
            |settings: &mut Settings| settings.pairs = 2,
            |settings: &mut Settings| settings.pairs = 0,
            |settings: &mut Settings| settings.offloads = 1,
        ] {
            let mut damaged = state.clone();
            change(&mut damaged.settings);
            let err = restore(&config, &damaged).unwrap_err();
            assert!(matches!(err, StateError::Invalid { .. }), "{err}");
        }
        for other in [
            NetConfig {
                queue_pairs: 2,
                ..config.clone()
            },
            NetConfig {
                mtu: Some(1400),
                ..config.clone()
            },
        ] {
            let err = restore(&other, &state).unwrap_err();
            assert!(matches!(err, StateError::Mismatch { .. }), "{err}");
        }
        let state = state.encode().unwrap();
        state_tests::check_hostile(&state, || Net::new(config.clone()).unwrap().0);
    }
}

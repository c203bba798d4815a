//! What a snapshot keeps of a network device.

use serde::{Deserialize, Serialize};

use super::link::Settings;
use super::{ConfigError, NetConfig};

/// The only version so far.
const VERSION: u16 = 1;

/// Everything the driver knows of the device and has set. The queues belong to the
/// transport, the tap and the limits to whoever restores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    version: u16,
    /// As configured: what a driver gets after a reset.
    mac: [u8; 6],
    mtu: Option<u16>,
    queue_pairs: u16,
    settings: Settings,
}

/// A saved device cannot be made again.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Saved by a release with another layout.
    #[error("state of the network device has version {found}, this release reads {VERSION}")]
    Version {
        /// In the state.
        found: u16,
    },
    /// A number that no device can have saved.
    #[error("state of the network device: {0}")]
    Invalid(&'static str),
    /// The state or the host does not allow it.
    #[error("cannot restore the network device: {0}")]
    Config(#[from] ConfigError),
}

impl NetState {
    pub(super) fn new(config: &NetConfig, settings: Settings) -> Self {
        Self {
            version: VERSION,
            mac: config.mac,
            mtu: config.mtu,
            queue_pairs: config.queue_pairs,
            settings,
        }
    }

    /// The device's configuration, with what only concerns the host from `host`, and what
    /// its driver has set.
    pub(super) fn open(&self, host: &NetConfig) -> Result<(NetConfig, Settings), RestoreError> {
        if self.version != VERSION {
            return Err(RestoreError::Version {
                found: self.version,
            });
        }
        let config = NetConfig {
            mac: self.mac,
            mtu: self.mtu,
            queue_pairs: self.queue_pairs,
            rx_limit: host.rx_limit,
            tx_limit: host.tx_limit,
        };
        config.validate()?;
        if !(1..=self.queue_pairs).contains(&self.settings.pairs) {
            return Err(RestoreError::Invalid(
                "more queue pairs in use than there are",
            ));
        }
        if self.settings.offloads & !super::config::GUEST_OFFLOADS != 0 {
            return Err(RestoreError::Invalid("unknown offloads"));
        }
        Ok((config, self.settings.clone()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::VirtioDevice;
    use crate::virtio::net::{Net, Rate, RateLimit};

    fn settings() -> impl Strategy<Value = Settings> {
        let flags = (any::<bool>(), any::<bool>(), any::<u8>());
        (any::<[u8; 6]>(), 1_u16..=4, any::<u64>(), flags).prop_map(
            |(mac, pairs, offloads, (up, announce, rx_mode))| Settings {
                mac,
                pairs,
                offloads: offloads & super::super::config::GUEST_OFFLOADS,
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
            let state = NetState::new(&config, settings);
            let bytes = serde_json::to_vec(&state).unwrap();
            let read: NetState = serde_json::from_slice(&bytes).unwrap();
            prop_assert_eq!(&read, &state);
            let rate = Rate { per_second: 1, burst: 1 };
            let host = NetConfig {
                rx_limit: RateLimit { bytes: Some(rate), frames: None },
                ..NetConfig::new([2, 9, 9, 9, 9, 9])
            };
            prop_assert_eq!(read.open(&host).unwrap().0.rx_limit, host.rx_limit);
            let (device, handle) = Net::restore(&read, &host).unwrap();
            let (original, _) = Net::new(config).unwrap();
            prop_assert_eq!(device.features(), original.features());
            prop_assert_eq!(device.queue_sizes(), original.queue_sizes());
            prop_assert_eq!(handle.mac(), state.settings.mac);
            prop_assert_eq!(device.save(), state);
        }
    }

    #[test]
    fn other_versions_and_damaged_states_are_refused() {
        let config = NetConfig::new([2, 0, 0, 0, 0, 7]);
        let state = NetState::new(&config, Settings::new(config.mac));
        Net::restore(&state, &config).unwrap();
        let newer = NetState {
            version: 2,
            ..state.clone()
        };
        let err = Net::restore(&newer, &config).unwrap_err();
        assert!(matches!(err, RestoreError::Version { found: 2 }), "{err}");
        for change in [
            |settings: &mut Settings| settings.pairs = 2,
            |settings: &mut Settings| settings.pairs = 0,
            |settings: &mut Settings| settings.offloads = 1,
        ] {
            let mut damaged = state.clone();
            change(&mut damaged.settings);
            Net::restore(&damaged, &config).unwrap_err();
        }
        let damaged = NetState {
            queue_pairs: 0,
            ..state
        };
        Net::restore(&damaged, &config).unwrap_err();
    }
}

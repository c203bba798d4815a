//! What a device is built from, features (virtio 1.2, 5.1.3) and configuration space
//! (5.1.4).

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{HEADER_BYTES, MAX_FRAME_BYTES, MAX_QUEUE_PAIRS, MIN_MTU, RateLimit};

/// Bytes of `struct virtio_net_config` up to `duplex`.
const SPACE_BYTES: usize = 17;
/// Ethernet header with a VLAN tag.
const ETHERNET_BYTES: usize = 18;
/// What an Ethernet carries when nobody says more.
const USUAL_MTU: u16 = 1500;

/// Frames the driver may leave, or take, unfinished.
pub(super) const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_UFO;
/// The ones that make frames longer than the MTU.
const LARGE_FRAMES: u64 = GUEST_OFFLOADS & !(1 << VIRTIO_NET_F_GUEST_CSUM);

/// How to make a network device. It stays as it is while taps come and go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The guest's address; unicast.
    pub mac: [u8; 6],
    /// Largest packet, in bytes; without it the driver takes 1500.
    pub mtu: Option<u16>,
    /// Pairs of queues offered, 1 to [`MAX_QUEUE_PAIRS`]; the driver chooses how many of
    /// them to use.
    pub queue_pairs: u16,
    /// Limits towards the guest, for all its queues together.
    pub rx_limit: RateLimit,
    /// Limits from the guest, for all its queues together.
    pub tx_limit: RateLimit,
}

impl NetConfig {
    /// One pair of queues without limits.
    #[must_use]
    pub fn new(mac: [u8; 6]) -> Self {
        Self {
            mac,
            mtu: None,
            queue_pairs: 1,
            rx_limit: RateLimit::default(),
            tx_limit: RateLimit::default(),
        }
    }

    /// Checks everything that can be checked without the host.
    ///
    /// # Errors
    /// Names the field that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.mac == [0; 6] || self.mac.first().is_some_and(|byte| byte & 1 != 0) {
            return Err(ConfigError::Mac(self.mac));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(ConfigError::Mtu(mtu));
        }
        if !(1..=MAX_QUEUE_PAIRS).contains(&self.queue_pairs) {
            return Err(ConfigError::QueuePairs(self.queue_pairs));
        }
        Ok(())
    }

    /// Feature bits offered.
    #[must_use]
    pub fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_HOST_ECN
            | 1 << VIRTIO_NET_F_HOST_UFO
            | GUEST_OFFLOADS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
            | 1 << VIRTIO_NET_F_CTRL_VQ
            | 1 << VIRTIO_NET_F_CTRL_RX
            | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
            | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
            | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
        if self.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        if self.queue_pairs > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        features
    }

    /// The configuration space.
    #[must_use]
    pub(super) fn space(&self, mac: [u8; 6], status: u16) -> [u8; SPACE_BYTES] {
        let mut space = [0; SPACE_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            for (to, from) in space.iter_mut().skip(offset).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &mac);
        put(6, &status.to_le_bytes());
        put(8, &self.queue_pairs.to_le_bytes());
        put(10, &self.mtu.unwrap_or(USUAL_MTU).to_le_bytes());
        // Speed and duplex: unknown.
        put(12, &u32::MAX.to_le_bytes());
        put(16, &[0xff]);
        space
    }

    /// Longest frame the tap may give us, its header included.
    #[must_use]
    pub(super) fn longest_frame(&self, offloads: u64) -> usize {
        if offloads & LARGE_FRAMES != 0 {
            return MAX_FRAME_BYTES;
        }
        let mtu = usize::from(self.mtu.unwrap_or(USUAL_MTU));
        mtu.saturating_add(HEADER_BYTES + ETHERNET_BYTES)
    }
}

/// A device cannot be built like that.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// `mac`.
    #[error("mac {0:02x?}: use a unicast address")]
    Mac([u8; 6]),
    /// `mtu`.
    #[error("mtu {0}: use at least {MIN_MTU}")]
    Mtu(u16),
    /// `queue_pairs`.
    #[error("queue_pairs {0}: use 1 to {MAX_QUEUE_PAIRS}")]
    QueuePairs(u16),
    /// No fds.
    #[error("cannot set up the network device: {0}")]
    System(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_5_1_4() {
        let config = NetConfig {
            mtu: Some(9000),
            queue_pairs: 4,
            ..NetConfig::new([2, 0, 0, 0, 0, 1])
        };
        let space = config.space([2, 0, 0, 0, 0, 9], 1);
        assert_eq!(space[..6], [2, 0, 0, 0, 0, 9]);
        assert_eq!(space[6..12], [1, 0, 4, 0, 0x28, 0x23]);
        assert_eq!(config.longest_frame(0), 9030);
        assert_eq!(config.longest_frame(1 << VIRTIO_NET_F_GUEST_CSUM), 9030);
        assert_eq!(config.longest_frame(GUEST_OFFLOADS), MAX_FRAME_BYTES);
    }

    #[test]
    fn what_cannot_be_built_is_named() {
        let base = || NetConfig::new([2, 0, 0, 0, 0, 1]);
        base().validate().unwrap();
        let bad = [
            NetConfig {
                mac: [1, 0, 0, 0, 0, 1],
                ..base()
            },
            NetConfig {
                mac: [0; 6],
                ..base()
            },
            NetConfig {
                mtu: Some(67),
                ..base()
            },
            NetConfig {
                queue_pairs: 0,
                ..base()
            },
            NetConfig {
                queue_pairs: 33,
                ..base()
            },
        ];
        for config in bad {
            config.validate().unwrap_err();
        }
        assert_eq!(base().features() & 1 << VIRTIO_NET_F_MQ, 0);
        assert_eq!(base().features() & 1 << VIRTIO_NET_F_MTU, 0);
    }
}

//! What a snapshot keeps of a socket device.

use serde::{Deserialize, Serialize};

use super::connection::Ports;
use super::held::{Held, HeldDials};
use super::muxer::FIRST_LOCAL_PORT;
use crate::virtio::{DeviceType, StateError, state};

/// The only version so far.
const VERSION: u16 = 1;
/// Most resets kept: more than wait at a time, with an answer to each connection.
pub const MAX_RESETS: usize = 1 << 16;

/// Streams end in this process and cannot be kept: what is, is what lets another process
/// tell the guest so, and the connects that nobody has answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    guest_cid: u32,
    /// Where to go on looking for free host ports.
    pub next_local_port: u32,
    /// The guest has yet to be told to forget all connections.
    pub resetting: bool,
    /// Connects held.
    pub held: Vec<Held>,
    /// Resets that had not reached the guest, and those of the connections there were.
    pub resets: Vec<Ports>,
}

impl VsockState {
    /// Of a device that has no connections.
    pub fn new(guest_cid: u32) -> Self {
        Self {
            guest_cid,
            next_local_port: FIRST_LOCAL_PORT,
            resetting: false,
            held: Vec::new(),
            resets: Vec::new(),
        }
    }

    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        state::encode(DeviceType::Vsock, VERSION, self)
    }

    /// The state in `bytes`, if it is of the guest `guest_cid`.
    pub fn decode(bytes: &[u8], guest_cid: u32) -> Result<Self, StateError> {
        let state: Self = state::decode(DeviceType::Vsock, VERSION, bytes)?;
        if state.guest_cid != guest_cid {
            return Err(StateError::mismatch(
                DeviceType::Vsock,
                format!("guest_cid {}, here {guest_cid}", state.guest_cid),
            ));
        }
        let invalid = |what| Err(StateError::invalid(DeviceType::Vsock, what));
        if state.next_local_port < FIRST_LOCAL_PORT {
            return invalid("next_local_port");
        }
        if HeldDials::restored(state.held.clone()).is_none() {
            return invalid("held connects");
        }
        if state.resets.len() > MAX_RESETS {
            return invalid("too many resets");
        }
        Ok(state)
    }
}

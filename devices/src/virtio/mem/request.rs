//! Requests and responses as bytes (virtio 1.2, 5.15.6).

/// `struct virtio_mem_req`.
pub(super) const REQUEST_BYTES: usize = 24;
/// `struct virtio_mem_resp`.
pub(super) const RESPONSE_BYTES: usize = 10;
/// The same, as the used ring counts.
pub(super) const RESPONSE_LEN: u32 = 10;

/// What the driver wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Span),
    Unplug(Span),
    UnplugAll,
    State(Span),
    /// A type that nobody knows.
    Unknown(u16),
}

/// `blocks` blocks from `address` on, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) address: u64,
    pub(super) blocks: u16,
}

impl Request {
    pub(super) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Self {
        let [t0, t1, _, _, _, _, _, _, rest @ ..] = bytes;
        let [a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = *rest;
        let span = Span {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            blocks: u16::from_le_bytes([n0, n1]),
        };
        match u16::from_le_bytes([*t0, *t1]) {
            0 => Self::Plug(span),
            1 => Self::Unplug(span),
            2 => Self::UnplugAll,
            3 => Self::State(span),
            other => Self::Unknown(other),
        }
    }
}

/// What the driver gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    /// Done; for a state request, with the state.
    Ack(BlockState),
    /// Not now, and not before the requested size grows.
    Nack,
    /// Not now: try again.
    Busy,
    /// The request makes no sense.
    Error,
}

impl Response {
    /// Done, for requests other than state requests.
    pub(super) const DONE: Self = Self::Ack(BlockState::Plugged);

    pub(super) fn to_bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Self::Ack(state) => (0, state as u8),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

/// State of a run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum BlockState {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A request as drivers send it.
    pub(in super::super) fn encode(kind: u16, address: u64, blocks: u16) -> Vec<u8> {
        let mut bytes = vec![0; REQUEST_BYTES];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        bytes
    }

    #[test]
    fn requests_5_15_6() {
        let parse = |kind| {
            let bytes = encode(kind, 0x1_2345_0000, 0x0201);
            Request::parse(&bytes.try_into().unwrap())
        };
        let span = Span {
            address: 0x1_2345_0000,
            blocks: 0x0201,
        };
        assert_eq!(parse(0), Request::Plug(span));
        assert_eq!(parse(1), Request::Unplug(span));
        assert_eq!(parse(2), Request::UnplugAll);
        assert_eq!(parse(3), Request::State(span));
        assert_eq!(parse(0x104), Request::Unknown(0x104));
    }

    #[test]
    fn responses_5_15_6() {
        assert_eq!(Response::DONE.to_bytes(), [0; 10]);
        assert_eq!(Response::Error.to_bytes()[0], 3);
        let mixed = Response::Ack(BlockState::Mixed).to_bytes();
        assert_eq!(mixed, [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    }
}

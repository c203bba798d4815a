//! Guests' connects that are neither accepted nor refused yet.
//!
//! A guest that waits in connect() has no open connection: it can be saved, and each of
//! its clones is answered by a host of its own.

use serde::{Deserialize, Serialize};

use super::connection::Ports;
use super::packet::{CID_HOST, Header, TYPE_STREAM, op};

/// Most connects held at a time.
pub const MAX_HELD: usize = 16;

/// A guest's connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Where from and to.
    pub ports: Ports,
    /// As in the header of the request.
    pub buf_alloc: u32,
    /// As in the header of the request.
    pub fwd_cnt: u32,
}

impl Held {
    /// The request once more.
    pub fn request(&self, guest_cid: u64) -> Header {
        Header {
            src_cid: guest_cid,
            dst_cid: CID_HOST,
            src_port: self.ports.peer,
            dst_port: self.ports.local,
            kind: TYPE_STREAM,
            op: op::REQUEST,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }
}

/// What a packet for a held connect means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is held as before.
    Holds,
    /// The packet is to be refused; nothing is held any more.
    Ends,
    /// None is held for these ports.
    Unknown,
}

/// All that are held, in the order in which they came.
#[derive(Debug, Default)]
pub struct HeldDials {
    dials: Vec<Held>,
}

impl HeldDials {
    /// As saved; `None` when nobody can have saved that.
    pub fn restored(dials: Vec<Held>) -> Option<Self> {
        let mut held = Self::default();
        for dial in dials {
            let known = held.find(dial.ports).is_some();
            if known || held.is_full() {
                return None;
            }
            held.dials.push(dial);
        }
        Some(held)
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = &Held> {
        self.dials.iter()
    }

    /// Holds the connect `request`; false when there are too many.
    pub fn add(&mut self, ports: Ports, request: &Header) -> bool {
        if self.is_full() {
            return false;
        }
        self.dials.push(Held {
            ports,
            buf_alloc: request.buf_alloc,
            fwd_cnt: request.fwd_cnt,
        });
        true
    }

    /// The guest has sent `header` for `ports`.
    pub fn receive(&mut self, ports: Ports, header: &Header) -> Outcome {
        let Some(at) = self.find(ports) else {
            return Outcome::Unknown;
        };
        // A second request is the first one's caller, who has given up, or another.
        if matches!(header.op, op::REQUEST | op::CREDIT_UPDATE)
            && let Some(dial) = self.dials.get_mut(at)
        {
            dial.buf_alloc = header.buf_alloc;
            dial.fwd_cnt = header.fwd_cnt;
            return Outcome::Holds;
        }
        self.dials.remove(at);
        Outcome::Ends
    }

    /// The first connect to a port for which `released` holds; no longer held.
    pub fn take(&mut self, released: impl Fn(u32) -> bool) -> Option<Held> {
        let at = self
            .dials
            .iter()
            .position(|dial| released(dial.ports.local))?;
        Some(self.dials.remove(at))
    }

    /// Forgets them all.
    pub fn clear(&mut self) {
        self.dials.clear();
    }

    fn find(&self, ports: Ports) -> Option<usize> {
        self.dials.iter().position(|dial| dial.ports == ports)
    }

    fn is_full(&self) -> bool {
        self.dials.len() >= MAX_HELD
    }
}

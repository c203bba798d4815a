//! Bytes that the guest sent and the host side has not taken yet.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, sendmsg};

use super::buffers::Buffers;

/// Copied from guest memory per step.
const STEP: usize = 4096;
/// An empty buffer keeps at most this much memory.
const KEEP: usize = 16 * 1024;

/// A bounded queue of bytes; grows only as far as it is filled.
#[derive(Debug)]
pub struct TxBuffer {
    bytes: VecDeque<u8>,
    capacity: usize,
}

impl TxBuffer {
    /// Room for `capacity` bytes.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            capacity,
        }
    }

    /// Nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes that still fit.
    #[must_use]
    pub fn room(&self) -> usize {
        self.capacity.saturating_sub(self.bytes.len())
    }

    /// Appends payload bytes `from..to`; the caller has checked the room.
    pub fn push(&mut self, buffers: &Buffers<'_>, from: usize, to: usize) {
        let mut step = [0; STEP];
        let mut offset = from;
        while let Some(part) = step.get_mut(..to.saturating_sub(offset).min(STEP)) {
            if part.is_empty() {
                return;
            }
            buffers.copy_payload(offset, part);
            self.bytes.extend(part.iter());
            offset = offset.saturating_add(part.len());
        }
    }

    /// Drops what waits; returns how much that was.
    pub fn clear(&mut self) -> usize {
        std::mem::take(&mut self.bytes).len()
    }

    /// Writes what the socket takes; returns how much that was.
    ///
    /// # Errors
    /// As sendmsg(2), except `WouldBlock`, which is zero bytes.
    pub fn flush(&mut self, socket: &UnixStream) -> io::Result<usize> {
        if self.bytes.is_empty() {
            return Ok(0);
        }
        let (front, back) = self.bytes.as_slices();
        let sent = sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(front), IoSlice::new(back)],
            &[],
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Ok(sent) => {
                self.bytes.drain(..sent.min(self.bytes.len()));
                if self.bytes.is_empty() && self.bytes.capacity() > KEEP {
                    self.bytes = VecDeque::new();
                }
                Ok(sent)
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(0),
            Err(err) => Err(err.into()),
        }
    }
}

//! Bytes between descriptor chains, the log and the attached stream.

use std::io::Write;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use vm_memory::GuestMemoryMmap;

use super::handle::{Attached, State};
use crate::virtio::chain::Chain;
use crate::virtio::serve::{Answer, Descriptors, ServeError};

/// Most bytes of output moved before other handlers get their turn.
pub const MAX_TURN_BYTES: usize = 64 << 10;
/// Most bytes of input put into one buffer of the guest.
pub const MAX_INPUT_BYTES: usize = 4096;

/// Most descriptors of one chain: all of a queue's.
const MAX_DESCRIPTORS: usize = 128;
/// Bytes copied at a time.
const PIECE: usize = 4096;

/// What one turn found out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Turn {
    /// Bytes of output moved so far.
    output: usize,
    /// The stream takes no more output.
    pub(super) blocked: bool,
    /// There is output left that could be moved.
    pub(super) more_output: bool,
    /// The guest has a buffer, but the stream has no input.
    pub(super) wants_input: bool,
    /// The stream is of no use any more.
    pub(super) closed: bool,
}

impl Turn {
    /// Moves what is left of a chain of the transmit queue (5.3.6).
    pub(super) fn transmit(
        &mut self,
        state: &mut State,
        memory: &GuestMemoryMmap<()>,
        descriptors: Descriptors<'_>,
    ) -> Result<Answer, ServeError> {
        let mut chain = Chain::default();
        chain.load(descriptors, MAX_DESCRIPTORS)?;
        let mut piece = [0; PIECE];
        loop {
            let left = chain.readable.len().saturating_sub(state.sent);
            if left == 0 {
                state.sent = 0;
                return Ok(Answer::Used(0));
            }
            let now = left
                .min(PIECE)
                .min(MAX_TURN_BYTES.saturating_sub(self.output));
            if now == 0 {
                self.more_output = true;
                return Ok(Answer::Later);
            }
            let bytes = piece.get_mut(..now).unwrap_or_default();
            chain.readable.read(memory, state.sent, bytes)?;
            let taken = self.output(state, bytes);
            state.sent = state.sent.saturating_add(taken);
            self.output = self.output.saturating_add(taken);
            if self.blocked {
                return Ok(Answer::Later);
            }
        }
    }

    /// Writes what the stream takes to it and to the log; all of it without a stream.
    fn output(&mut self, state: &mut State, bytes: &[u8]) -> usize {
        let stream = state.stream.as_ref().filter(|_| !self.closed);
        let taken = match stream.map(|attached| send_now(attached, bytes)) {
            None => bytes.len(),
            Some(Ok(taken)) => taken,
            Some(Err(Errno::EAGAIN)) => {
                self.blocked = true;
                0
            }
            Some(Err(_)) => {
                self.closed = true;
                bytes.len()
            }
        };
        let bytes = bytes.get(..taken).unwrap_or_default();
        if let Some(log) = &mut state.log
            && let Err(err) = log.write_all(bytes)
        {
            // A full disk must not stop the guest.
            tracing::warn!(%err, "the console log ends here");
            state.log = None;
        }
        taken
    }

    /// Fills a chain of the receive queue with input of the stream, if there is any.
    pub(super) fn receive(
        &mut self,
        attached: &mut Attached,
        memory: &GuestMemoryMmap<()>,
        descriptors: Descriptors<'_>,
    ) -> Result<Answer, ServeError> {
        let mut chain = Chain::default();
        chain.load(descriptors, MAX_DESCRIPTORS)?;
        let room = chain.writable.len().min(MAX_INPUT_BYTES);
        if room == 0 {
            return Ok(Answer::Used(0));
        }
        let mut input = [0; MAX_INPUT_BYTES];
        let buffer = input.get_mut(..room).unwrap_or_default();
        match receive_now(attached, buffer) {
            Ok(0) => {
                attached.input = false;
                Ok(Answer::Later)
            }
            Ok(len) => {
                let bytes = input.get(..len).unwrap_or_default();
                chain.writable.write(memory, 0, bytes)?;
                Ok(Answer::Used(u32::try_from(len).unwrap_or(u32::MAX)))
            }
            Err(Errno::EAGAIN) => {
                self.wants_input = true;
                Ok(Answer::Later)
            }
            Err(_) => {
                self.closed = true;
                Ok(Answer::Later)
            }
        }
    }
}

/// Never blocks, and never raises SIGPIPE.
fn send_now(attached: &Attached, bytes: &[u8]) -> Result<usize, Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    retry(|| send(attached.stream.as_raw_fd(), bytes, flags))
}

fn receive_now(attached: &Attached, bytes: &mut [u8]) -> Result<usize, Errno> {
    retry(|| recv(attached.stream.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT))
}

fn retry(mut call: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_log_that_fails_does_not_stop_the_guest() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::Error::other("disk full"))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let shared = super::super::handle::Shared::new(Some(Box::new(Full))).unwrap();
        let mut state = shared.lock();
        let mut turn = Turn::default();
        assert_eq!(turn.output(&mut state, b"one"), 3);
        assert_eq!(turn.output(&mut state, b"two"), 3);
        assert!(state.log.is_none());
        assert_eq!(turn, Turn::default());
    }
}

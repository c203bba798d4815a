//! Sending fds beside bytes (SCM_RIGHTS).

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Most fds of one message: a card's queues.
pub(crate) const MAX_FDS: usize = 64;

/// Sends what of `bytes` the socket takes, and `fds` with it.
pub(crate) fn try_send(
    stream: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    stream.try_io(Interest::WRITABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let parts = [IoSlice::new(bytes)];
        Ok(sendmsg(
            stream.as_fd(),
            &parts,
            &mut control,
            SendFlags::NOSIGNAL,
        )?)
    })
}

/// Adds what comes next to `bytes` and `fds`; 0 when the peer has hung up.
#[cfg(test)]
pub(crate) async fn receive(
    stream: &UnixStream,
    bytes: &mut Vec<u8>,
    fds: &mut Vec<std::os::fd::OwnedFd>,
) -> io::Result<usize> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut piece = [0; 4096];
    let mut receive = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [io::IoSliceMut::new(&mut piece)];
        let n = recvmsg(stream, parts, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        bytes.extend_from_slice(&piece[..n]);
        Ok(n)
    };
    loop {
        stream.readable().await?;
        match stream.try_io(Interest::READABLE, &mut receive) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

//! Who on the host asked for a connection, and how they learn of the guest's answer.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, sendmsg};

use super::host::Waiter;

/// Who asked for a connection.
#[derive(Debug)]
pub enum Opener {
    /// An in-process caller, who gets the other half of the socket pair.
    InProcess {
        /// The caller.
        waiter: Waiter,
        /// Its half.
        stream: UnixStream,
    },
    /// A client of the Unix socket, who gets the `OK` line.
    Client,
}

impl Opener {
    /// The guest accepted: `local_port` is the connection's port on the host, `ours` the
    /// device's end of its socket. False if nobody waits any more.
    pub fn accepted(self, ours: &UnixStream, local_port: u32) -> bool {
        match self {
            Self::InProcess { waiter, stream } => waiter.resolve(Ok(stream)),
            Self::Client => greet(ours, local_port),
        }
    }

    /// There will be no connection.
    pub fn refused(self, why: io::Error) {
        match self {
            Self::InProcess { waiter, .. } => {
                // The caller may have gone first.
                let _ = waiter.resolve(Err(why));
            }
            // Closing its socket is the answer.
            Self::Client => {}
        }
    }
}

/// Sends the `OK` line; the socket is fresh, so that it fits or the client is gone.
fn greet(client: &UnixStream, local_port: u32) -> bool {
    let line = format!("OK {local_port}\n");
    let sent = sendmsg::<()>(
        client.as_raw_fd(),
        &[IoSlice::new(line.as_bytes())],
        &[],
        MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
        None,
    );
    sent == Ok(line.len())
}

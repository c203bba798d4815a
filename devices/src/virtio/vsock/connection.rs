//! One connection: virtio 1.2, 5.10.6.3 to 5.10.6.6.
//!
//! A connection moves bytes between a host stream socket and the guest. It never blocks
//! and never buffers more than it has promised the guest in `buf_alloc`: what the host
//! does not take stays in [`TxBuffer`], what the guest does not take stays in the socket.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::buffers::Buffers;
use super::credit::{Credit, Granted};
use super::host::Waiter;
use super::opener::Opener;
use super::packet::{
    CID_HOST, Header, MAX_PAYLOAD, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use super::tx_buffer::TxBuffer;
use crate::virtio::{Interest, Ready};

/// How long the guest may take to answer a connect.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the guest may take to confirm a close of both directions.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// What names a connection; the guest's address is the same for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ports {
    /// On the host's side.
    pub local: u32,
    /// On the guest's side.
    pub peer: u32,
}

/// Where a connection stands.
#[derive(Debug)]
enum State {
    /// The guest has been or will be asked; it has not answered.
    Requested(Opener),
    /// Both sides agree that there is a connection.
    Open,
    /// The guest is done with it; the host has yet to read what is buffered.
    Flushing,
    /// To be removed.
    Closed,
}

/// Control packets that wait to be sent.
#[derive(Debug, Default)]
struct Pending {
    request: bool,
    response: bool,
    credit_request: bool,
    credit_update: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    guest_cid: u64,
    stream: UnixStream,
    state: State,
    pending: Pending,
    /// The guest has seen a packet of this connection and is not known to have closed it.
    guest_knows: bool,
    deadline: Option<Instant>,

    // Guest to host.
    tx: TxBuffer,
    granted: Granted,
    /// The host takes no more.
    host_deaf: bool,

    // Host to guest.
    credit: Credit,
    /// The socket may have data.
    readable: bool,
    /// A credit request was sent and not answered with credit.
    asked: bool,
    /// The host sends no more.
    host_eof: bool,
    /// The socket hung up: readiness says nothing new from here on.
    hung_up: bool,

    /// Directions that the guest has closed: `SHUTDOWN_*` as in its packets.
    peer_shutdown: u32,
    /// Directions that the guest was told are closed.
    sent_shutdown: u32,
}

impl Connection {
    fn new(ports: Ports, guest_cid: u64, stream: UnixStream, state: State, buf_alloc: u32) -> Self {
        Self {
            ports,
            guest_cid,
            stream,
            state,
            pending: Pending::default(),
            guest_knows: false,
            deadline: None,
            tx: TxBuffer::new(usize::try_from(buf_alloc).unwrap_or(usize::MAX)),
            granted: Granted::new(buf_alloc),
            host_deaf: false,
            credit: Credit::default(),
            readable: false,
            asked: false,
            host_eof: false,
            hung_up: false,
            peer_shutdown: 0,
            sent_shutdown: 0,
        }
    }

    /// A connection that the host asks for.
    pub fn requested(
        ports: Ports,
        guest_cid: u64,
        stream: UnixStream,
        opener: Opener,
        buf_alloc: u32,
    ) -> Self {
        let mut connection = Self::new(
            ports,
            guest_cid,
            stream,
            State::Requested(opener),
            buf_alloc,
        );
        connection.pending.request = true;
        connection.deadline = Some(Instant::now() + CONNECT_TIMEOUT);
        connection
    }

    /// A connection that the guest asked for with `request`, and the host has accepted.
    pub fn accepted(
        ports: Ports,
        guest_cid: u64,
        stream: UnixStream,
        request: &Header,
        buf_alloc: u32,
    ) -> Self {
        let mut connection = Self::new(ports, guest_cid, stream, State::Open, buf_alloc);
        connection.pending.response = true;
        connection.guest_knows = true;
        connection.note_credit(request);
        connection
    }

    /// Its name.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// The host's socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// For the waiter of a requested connection.
    pub fn waiter(&mut self) -> Option<&mut Waiter> {
        match &mut self.state {
            State::Requested(Opener::InProcess { waiter, .. }) => Some(waiter),
            _ => None,
        }
    }

    /// To be removed.
    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }

    /// The guest has forgotten it: its ports are free.
    pub fn guest_is_done(&self) -> bool {
        matches!(self.state, State::Flushing | State::Closed)
    }

    /// The guest knows of it and has not heard of its end.
    pub fn guest_waits(&self) -> bool {
        self.guest_knows && !self.guest_is_done()
    }

    /// The reset that the guest is due when the connection ends now.
    pub fn parting_reset(&mut self) -> Option<Header> {
        std::mem::take(&mut self.guest_knows).then(|| self.header(op::RST))
    }

    /// When to call [`Self::expire`].
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Nothing could happen for `pause`.
    pub fn postpone(&mut self, pause: Duration) {
        self.deadline = self.deadline.and_then(|at| at.checked_add(pause));
    }

    /// The deadline has passed.
    pub fn expire(&mut self) {
        let timed_out = || io::Error::new(io::ErrorKind::TimedOut, "the guest did not answer");
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Requested(opener) => opener.refused(timed_out()),
            // The guest has confirmed nothing, but it sends nothing more either.
            State::Open => self.flush_then_close(),
            State::Flushing | State::Closed => {}
        }
    }

    /// Ends the connection without regard to buffered data.
    pub fn abort(&mut self, why: io::Error) {
        if let State::Requested(opener) = std::mem::replace(&mut self.state, State::Closed) {
            opener.refused(why);
        }
    }

    // ---- from the guest ----

    /// Handles a packet with the header `header`; its payload is in `buffers`.
    pub fn receive(&mut self, header: &Header, buffers: &Buffers<'_>) {
        self.note_credit(header);
        match (&self.state, header.op) {
            (State::Requested(_), op::RESPONSE) => self.establish(),
            (State::Requested(_), op::RST) => {
                self.guest_knows = false;
                self.abort(io::Error::from(io::ErrorKind::ConnectionRefused));
            }
            (State::Requested(_) | State::Open, op::CREDIT_UPDATE) => {}
            (State::Requested(_) | State::Open, op::CREDIT_REQUEST) => {
                self.pending.credit_update = true;
            }
            (State::Open, op::RW) => self.take_payload(header, buffers),
            (State::Open, op::SHUTDOWN) => self.peer_closes(header.flags),
            (State::Open, op::RST) => {
                self.guest_knows = false;
                self.flush_then_close();
            }
            // Not in this state, or no operation at all.
            _ => self.abort(io::Error::from(io::ErrorKind::InvalidData)),
        }
    }

    fn note_credit(&mut self, header: &Header) {
        self.credit.note(header.buf_alloc, header.fwd_cnt);
        if self.credit.left() > 0 {
            self.asked = false;
        }
        self.ask_for_credit();
    }

    fn establish(&mut self) {
        let opener = match std::mem::replace(&mut self.state, State::Open) {
            State::Requested(opener) => opener,
            other => {
                self.state = other;
                return;
            }
        };
        self.deadline = None;
        let told = opener.accepted(&self.stream, self.ports.local);
        if !told {
            self.state = State::Closed;
        }
    }

    fn take_payload(&mut self, header: &Header, buffers: &Buffers<'_>) {
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        let honest = len <= buffers.payload_len()
            && len <= self.tx.room()
            && self.peer_shutdown & SHUTDOWN_SEND == 0;
        if !honest {
            self.abort(io::Error::from(io::ErrorKind::InvalidData));
            return;
        }
        if len == 0 {
            return;
        }
        if self.host_deaf {
            self.forwarded(len);
            return;
        }
        let mut done = 0;
        if self.tx.is_empty() {
            match buffers.send_payload(&self.stream, 0, len) {
                Ok(sent) => done = sent,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.host_stops_reading();
                    self.forwarded(len);
                    return;
                }
            }
        }
        self.tx.push(buffers, done, len);
        self.forwarded(done);
    }

    fn peer_closes(&mut self, flags: u32) {
        self.peer_shutdown |= flags & SHUTDOWN_BOTH;
        if self.peer_shutdown & SHUTDOWN_RCV != 0 {
            self.readable = false;
            self.pending.credit_request = false;
            // The host's writers get EPIPE. Fails if the host is gone already.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if self.peer_shutdown == SHUTDOWN_BOTH {
            // A clean close is confirmed with RST (5.10.6.5), at once: the host may take
            // its time to read the rest, the guest need not wait for it.
            self.flush_then_close();
        } else {
            self.pass_on_eof();
        }
    }

    /// Half-close towards the host, after the last byte.
    fn pass_on_eof(&mut self) {
        if self.peer_shutdown & SHUTDOWN_SEND != 0 && self.tx.is_empty() && !self.host_deaf {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn flush_then_close(&mut self) {
        self.deadline = None;
        self.state = if self.tx.is_empty() || self.host_deaf {
            State::Closed
        } else {
            State::Flushing
        };
    }

    // ---- from the host ----

    /// The socket is ready.
    pub fn ready(&mut self, ready: Ready) {
        match self.state {
            State::Requested(_) => {
                if ready.hangup {
                    self.abort(io::Error::from(io::ErrorKind::ConnectionAborted));
                }
            }
            State::Open => {
                if ready.writable {
                    self.flush();
                }
                if ready.hangup {
                    // What the host has written is still there; it reads nothing more.
                    self.hung_up = true;
                    self.host_stops_reading();
                    // Nothing of it is wanted when the guest has stopped receiving.
                    self.host_eof |= !self.listens_to_host();
                }
                if (ready.readable || ready.hangup) && self.listens_to_host() {
                    self.readable = true;
                    self.ask_for_credit();
                }
            }
            State::Flushing => {
                if ready.hangup {
                    self.state = State::Closed;
                } else {
                    self.flush();
                    if self.tx.is_empty() {
                        self.state = State::Closed;
                    }
                }
            }
            State::Closed => {}
        }
    }

    fn flush(&mut self) {
        match self.tx.flush(&self.stream) {
            Ok(sent) => {
                self.forwarded(sent);
                self.pass_on_eof();
            }
            Err(_) => self.host_stops_reading(),
        }
    }

    /// Nobody will read what the guest sends: swallow what is in flight, tell the guest.
    fn host_stops_reading(&mut self) {
        self.host_deaf = true;
        let dropped = self.tx.clear();
        self.forwarded(dropped);
    }

    fn listens_to_host(&self) -> bool {
        !self.host_eof && self.peer_shutdown & SHUTDOWN_RCV == 0
    }

    /// What to watch the socket for; `None` when readiness can say nothing useful.
    pub fn interest(&self) -> Option<Interest> {
        let interest = match self.state {
            // Only the hang-up that is always reported.
            State::Requested(_) => Interest::default(),
            State::Open => Interest {
                readable: self.listens_to_host() && !self.readable,
                writable: !self.tx.is_empty(),
            },
            State::Flushing => Interest {
                readable: false,
                writable: true,
            },
            State::Closed => return None,
        };
        // A hang-up is reported over and over.
        (!self.hung_up).then_some(interest)
    }

    // ---- to the guest ----

    /// Whether [`Self::fill`] has something to send.
    pub fn wants_to_send(&self) -> bool {
        match self.state {
            State::Requested(_) => self.pending.request || self.pending.credit_update,
            State::Open => {
                self.pending.response
                    || self.pending.credit_request
                    || self.pending.credit_update
                    || self.can_read()
                    || self.shutdown_to_send().is_some()
            }
            State::Flushing | State::Closed => false,
        }
    }

    /// The next packet: its header is returned, its payload is in `buffers`.
    pub fn fill(&mut self, buffers: &Buffers<'_>) -> Option<Header> {
        if self.guest_is_done() {
            return None;
        }
        if std::mem::take(&mut self.pending.request) {
            self.guest_knows = true;
            return Some(self.header(op::REQUEST));
        }
        if std::mem::take(&mut self.pending.response) {
            return Some(self.header(op::RESPONSE));
        }
        if std::mem::take(&mut self.pending.credit_request) {
            return Some(self.header(op::CREDIT_REQUEST));
        }
        if self.can_read()
            && let Some(len) = self.read_host(buffers)
        {
            let mut header = self.header(op::RW);
            header.len = len;
            return Some(header);
        }
        if let Some(flags) = self.shutdown_to_send() {
            self.sent_shutdown = flags;
            if flags == SHUTDOWN_BOTH {
                self.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
            }
            let mut header = self.header(op::SHUTDOWN);
            header.flags = flags;
            return Some(header);
        }
        std::mem::take(&mut self.pending.credit_update).then(|| self.header(op::CREDIT_UPDATE))
    }

    fn can_read(&self) -> bool {
        matches!(self.state, State::Open)
            && self.readable
            && self.listens_to_host()
            && self.credit.left() > 0
    }

    /// Reads from the host into `buffers` what the guest has room for.
    fn read_host(&mut self, buffers: &Buffers<'_>) -> Option<u32> {
        let credit = usize::try_from(self.credit.left()).unwrap_or(usize::MAX);
        let limit = credit.min(MAX_PAYLOAD).min(buffers.payload_len());
        match buffers.recv_payload(&self.stream, limit) {
            Ok(0) => {
                self.readable = false;
                self.host_eof = true;
                None
            }
            Ok(len) => {
                if len < limit && !self.hung_up {
                    // Drained; the loop will tell when there is more.
                    self.readable = false;
                }
                let len = u32::try_from(len).ok()?;
                self.credit.spend(len);
                self.ask_for_credit();
                Some(len)
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            Err(_) => {
                self.readable = false;
                self.host_eof = true;
                None
            }
        }
    }

    /// Directions to be closed that the guest has not been told of.
    fn shutdown_to_send(&self) -> Option<u32> {
        let mut flags = 0;
        if self.host_deaf {
            flags |= SHUTDOWN_RCV;
        }
        if self.host_eof {
            flags |= SHUTDOWN_SEND;
        }
        (flags != self.sent_shutdown).then_some(flags)
    }

    fn header(&mut self, op: u16) -> Header {
        self.pending.credit_update = false;
        let (buf_alloc, fwd_cnt) = self.granted.announce();
        Header {
            src_cid: CID_HOST,
            dst_cid: self.guest_cid,
            src_port: self.ports.local,
            dst_port: self.ports.peer,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc,
            fwd_cnt,
        }
    }

    // ---- flow control ----

    /// Asks once when data waits and there is no credit.
    fn ask_for_credit(&mut self) {
        let stuck = matches!(self.state, State::Open) && self.readable && self.credit.left() == 0;
        if stuck && !self.asked {
            self.asked = true;
            self.pending.credit_request = true;
        }
    }

    /// Bytes have left the buffer: the guest has to know at some point.
    fn forwarded(&mut self, len: usize) {
        self.pending.credit_update |= self.granted.forwarded(len);
    }
}

#[cfg(test)]
mod tests;

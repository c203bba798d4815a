//! One connection: virtio 1.2, 5.10.6.3 to 5.10.6.6.
//!
//! A connection moves bytes between a host stream socket and the guest. It never blocks
//! and never buffers more than it has promised the guest in `buf_alloc`: what the host
//! does not take stays in [`TxBuffer`], what the guest does not take stays in the socket.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, sendmsg};

use super::buffers::Buffers;
use super::host::Waiter;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// On the host's side.
    pub local: u32,
    /// On the guest's side.
    pub peer: u32,
}

/// Who gets told that the guest has accepted.
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
    /// What the guest may have in flight: the size of `tx`.
    buf_alloc: u32,
    /// Bytes handed to the host, modulo 2^32.
    fwd_cnt: u32,
    /// The `fwd_cnt` that the guest was last told.
    announced: u32,
    /// The host takes no more.
    host_deaf: bool,

    // Host to guest.
    /// The guest's receive buffer.
    peer_buf_alloc: u32,
    /// What the guest says it has taken out of it, modulo 2^32.
    peer_fwd_cnt: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
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
            buf_alloc,
            fwd_cnt: 0,
            announced: 0,
            host_deaf: false,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent: 0,
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

    /// The reset that the guest is due when the connection ends now.
    pub fn parting_reset(&mut self) -> Option<Header> {
        std::mem::take(&mut self.guest_knows).then(|| self.header(op::RST))
    }

    /// When to call [`Self::expire`].
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The deadline has passed.
    pub fn expire(&mut self) {
        let timed_out = || io::Error::new(io::ErrorKind::TimedOut, "the guest did not answer");
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Requested(opener) => refuse(opener, timed_out()),
            // The guest has confirmed nothing, but it sends nothing more either.
            State::Open => self.flush_then_close(),
            State::Flushing | State::Closed => {}
        }
    }

    /// Ends the connection without regard to buffered data.
    pub fn abort(&mut self, why: io::Error) {
        if let State::Requested(opener) = std::mem::replace(&mut self.state, State::Closed) {
            refuse(opener, why);
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
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
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
        let told = match opener {
            Opener::InProcess { waiter, stream } => waiter.resolve(Ok(stream)),
            Opener::Client => self.greet(),
        };
        if !told {
            self.state = State::Closed;
        }
    }

    /// Sends the `OK` line; the socket is fresh, so that it fits or the client is gone.
    fn greet(&self) -> bool {
        let line = format!("OK {}\n", self.ports.local);
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(line.as_bytes())],
            &[],
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            None,
        );
        sent == Ok(line.len())
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
            && self.credit() > 0
    }

    /// Reads from the host into `buffers` what the guest has room for.
    fn read_host(&mut self, buffers: &Buffers<'_>) -> Option<u32> {
        let credit = usize::try_from(self.credit()).unwrap_or(usize::MAX);
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
                self.sent = self.sent.wrapping_add(len);
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
        self.announced = self.fwd_cnt;
        self.pending.credit_update = false;
        Header {
            src_cid: CID_HOST,
            dst_cid: self.guest_cid,
            src_port: self.ports.local,
            dst_port: self.ports.peer,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    // ---- credit, 5.10.6.3 ----

    /// Bytes that the guest has room for. Whatever it claims, the result is only a limit
    /// on what it is sent; nonsense stalls its own connection.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// Asks once when data waits and there is no credit.
    fn ask_for_credit(&mut self) {
        if matches!(self.state, State::Open) && self.readable && self.credit() == 0 && !self.asked {
            self.asked = true;
            self.pending.credit_request = true;
        }
    }

    /// Counts bytes that left the buffer; tells the guest once a quarter of it is free
    /// again, so that it neither stalls nor hears of every byte.
    fn forwarded(&mut self, len: usize) {
        // Modulo 2^32 by definition; `len` is at most the buffer's size.
        self.fwd_cnt = self
            .fwd_cnt
            .wrapping_add(u32::try_from(len).unwrap_or(u32::MAX));
        if self.fwd_cnt.wrapping_sub(self.announced) >= self.buf_alloc / 4 {
            self.pending.credit_update = true;
        }
    }
}

fn refuse(opener: Opener, why: io::Error) {
    match opener {
        Opener::InProcess { waiter, .. } => {
            // The caller may have gone first.
            let _ = waiter.resolve(Err(why));
        }
        // Closing its socket is the answer.
        Opener::Client => {}
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use tokio::sync::oneshot;
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::super::buffers::Direction;
    use super::super::packet::HEADER_LEN;
    use super::*;

    const READABLE: Ready = Ready {
        readable: true,
        writable: false,
        hangup: false,
    };

    fn packet(op: u16, buf_alloc: u32, fwd_cnt: u32, len: u32) -> Header {
        Header {
            src_cid: 3,
            dst_cid: CID_HOST,
            src_port: 5,
            dst_port: 6,
            len,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc,
            fwd_cnt,
        }
    }

    fn open(memory: &GuestMemoryMmap<()>, peer_buf_alloc: u32) -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ports = Ports { local: 6, peer: 5 };
        let request = packet(op::REQUEST, peer_buf_alloc, 0, 0);
        let mut connection = Connection::accepted(ports, 3, ours, &request, 64 * 1024);
        let response = connection
            .fill(&buffers(memory, Direction::ToGuest))
            .unwrap();
        assert_eq!(response.op, op::RESPONSE);
        (connection, theirs)
    }

    fn memory() -> GuestMemoryMmap<()> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40000)]).unwrap()
    }

    /// One buffer of a whole packet.
    fn buffers(memory: &GuestMemoryMmap<()>, direction: Direction) -> Buffers<'_> {
        let flags = if direction == Direction::ToGuest {
            2
        } else {
            0
        };
        let len = u32::try_from(HEADER_LEN + MAX_PAYLOAD).unwrap();
        let mut buffers = Buffers::default();
        let chain = std::iter::once(Descriptor::new(0, len, flags, 0));
        buffers.load(memory, chain, direction).unwrap();
        buffers
    }

    #[test]
    fn counters_wrap_around() {
        let memory = memory();
        let (mut connection, mut host) = open(&memory, 1000);
        for start in [u32::MAX - 10, u32::MAX, 0] {
            // To the host.
            connection.fwd_cnt = start;
            connection.announced = start;
            memory
                .write_slice(b"across the edge", GuestAddress(HEADER_LEN as u64))
                .unwrap();
            // To the guest: 990 of 1000 bytes are in flight across the edge.
            connection.sent = start.wrapping_add(990);
            let from = buffers(&memory, Direction::FromGuest);
            connection.receive(&packet(op::RW, 1000, start, 15), &from);
            let mut got = [0; 15];
            host.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"across the edge");
            assert_eq!(connection.fwd_cnt, start.wrapping_add(15));
            assert_eq!(connection.credit(), 10);
            host.write_all(&[1; 25]).unwrap();
            connection.ready(READABLE);
            let to = buffers(&memory, Direction::ToGuest);
            let header = connection.fill(&to).unwrap();
            assert_eq!((header.op, header.len), (op::RW, 10));
            assert_eq!(header.fwd_cnt, start.wrapping_add(15));
            assert_eq!(connection.fill(&to).unwrap().op, op::CREDIT_REQUEST);
            assert!(!connection.wants_to_send());
            let update = packet(op::CREDIT_UPDATE, 1000, start.wrapping_add(1000), 0);
            connection.receive(&update, &to);
            assert_eq!(connection.fill(&to).unwrap().len, 15);
        }
    }

    #[test]
    fn credit_is_announced_when_a_quarter_is_free() {
        let memory = memory();
        let (mut connection, _host) = open(&memory, 1000);
        let from = buffers(&memory, Direction::FromGuest);
        connection.receive(&packet(op::RW, 0, 0, 16 * 1024 - 1), &from);
        assert!(!connection.wants_to_send());
        connection.receive(&packet(op::RW, 0, 0, 1), &from);
        let to = buffers(&memory, Direction::ToGuest);
        let update = connection.fill(&to).unwrap();
        assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, 16 * 1024));
        assert!(!connection.wants_to_send());
    }

    #[test]
    fn a_guest_that_never_answers_times_out() {
        let memory = memory();
        let (ours, stream) = UnixStream::pair().unwrap();
        let (reply, mut result) = oneshot::channel();
        let opener = Opener::InProcess {
            waiter: Waiter::new(reply),
            stream,
        };
        let ports = Ports { local: 1, peer: 2 };
        let mut connection = Connection::requested(ports, 3, ours, opener, 4096);
        let left = connection.deadline().unwrap() - Instant::now();
        assert!(left <= CONNECT_TIMEOUT);
        let to = buffers(&memory, Direction::ToGuest);
        assert_eq!(connection.fill(&to).unwrap().op, op::REQUEST);
        connection.expire();
        assert!(connection.is_closed());
        assert_eq!(connection.parting_reset().unwrap().op, op::RST);
        assert!(connection.parting_reset().is_none());
        let err = result.try_recv().unwrap().unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn an_unconfirmed_close_times_out() {
        let memory = memory();
        let (mut connection, host) = open(&memory, 1000);
        assert_eq!(connection.deadline(), None);
        drop(host);
        connection.ready(Ready {
            readable: true,
            writable: false,
            hangup: true,
        });
        let to = buffers(&memory, Direction::ToGuest);
        let shutdown = connection.fill(&to).unwrap();
        assert_eq!((shutdown.op, shutdown.flags), (op::SHUTDOWN, SHUTDOWN_BOTH));
        assert!(connection.deadline().unwrap() - Instant::now() <= CLOSE_TIMEOUT);
        connection.expire();
        assert!(connection.is_closed());
        assert_eq!(connection.parting_reset().unwrap().op, op::RST);
    }
}

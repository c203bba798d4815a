//! All connections of one device: who gets a packet, who sends the next one, who has
//! taken too long.

mod lifecycle;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffers::Buffers;
use super::connection::{Connection, Ports};
use super::deadlines::Deadlines;
use super::entry::Entry;
use super::held::{HeldDials, Outcome};
use super::host::{Connect, Host, Offer};
use super::opener::Opener;
use super::packet::{CID_HOST, Header, TYPE_STREAM, op};
use super::uds::{self, Client, Handshake};
use crate::virtio::{Interest, Loop, Ready};

/// Numbers of connections and clients start here; smaller loop tokens are the handler's.
/// A number is never used twice, so that a late event cannot reach the wrong one.
pub const FIRST_ID: u64 = 16;

/// How long a client of the Unix socket may take to say where it wants to go.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Replies that wait for the guest before no more of its packets are taken.
const MAX_REPLIES: usize = 256;
/// Host ports of connections that the host opens, clear of well-known ones.
pub const FIRST_LOCAL_PORT: u32 = 1 << 30;

/// The guest may have this many bytes in flight on each of its first connections ...
const BUF_ALLOC: u32 = 256 * 1024;
/// ... and this many on those beyond [`MANY`], to bound what a guest can pin here.
const BUF_ALLOC_MANY: u32 = 64 * 1024;
const MANY: usize = 64;

const READ: Interest = Interest {
    readable: true,
    writable: false,
};

/// See the module's documentation.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    limit: usize,
    host: Arc<Host>,
    entries: HashMap<u64, Entry>,
    by_ports: HashMap<Ports, u64>,
    clients: HashMap<u64, (Client, Instant)>,
    /// Connections with something to send, served in turns.
    sending: VecDeque<u64>,
    /// Connects of the guest that wait for a listener.
    held: HeldDials,
    /// Resets that belong to no connection any more.
    replies: VecDeque<Header>,
    deadlines: Deadlines,
    next_id: u64,
    next_local_port: u32,
    /// Since when it is on no loop.
    paused: Option<Instant>,
    /// The transport reset event has yet to be delivered.
    resetting: bool,
}

impl Muxer {
    /// Without connections; at most `limit` of them later.
    pub fn new(guest_cid: u64, limit: usize, host: Arc<Host>) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            limit,
            host,
            entries: HashMap::new(),
            by_ports: HashMap::new(),
            clients: HashMap::new(),
            sending: VecDeque::new(),
            held: HeldDials::default(),
            replies: VecDeque::new(),
            deadlines: Deadlines::new()?,
            next_id: FIRST_ID,
            next_local_port: FIRST_LOCAL_PORT,
            paused: None,
            resetting: false,
        })
    }

    /// The deadlines, whose fd the handler watches.
    pub fn deadlines(&mut self) -> &mut Deadlines {
        &mut self.deadlines
    }

    /// So many replies wait that no further packet of the guest is to be taken.
    pub fn is_congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    /// Something may be there for [`Self::fill`].
    pub fn has_output(&self) -> bool {
        !self.replies.is_empty() || (!self.resetting && !self.sending.is_empty())
    }

    // ---- the guest's queues ----

    /// Takes one packet of the guest.
    pub fn receive(&mut self, lp: &mut dyn Loop, buffers: &Buffers<'_>) {
        let header = Header::from_bytes(&buffers.header());
        // 5.10.6.4.2 leaves packets for others undelivered; there is nobody to tell.
        if header.src_cid != self.guest_cid || header.dst_cid != CID_HOST {
            return;
        }
        let ports = Ports {
            local: header.dst_port,
            peer: header.src_port,
        };
        if header.kind != TYPE_STREAM {
            self.reply_reset(&header);
        } else if let Some(&id) = self.by_ports.get(&ports) {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.connection.receive(&header, buffers);
            }
            self.settle(lp, id);
        } else {
            match self.held.receive(ports, &header) {
                Outcome::Holds => {}
                Outcome::Unknown if header.op == op::REQUEST => {
                    self.release_held(lp);
                    self.dialled(lp, ports, &header);
                }
                Outcome::Unknown | Outcome::Ends => self.reply_reset(&header),
            }
        }
    }

    /// A guest's connect, to be held or answered.
    fn dialled(&mut self, lp: &mut dyn Loop, ports: Ports, request: &Header) {
        if !self.host.holds(ports.local) {
            self.accept_guest(lp, ports, request);
        } else if self.held.add(ports, request) {
            self.host.tell_held(ports.local);
        } else {
            self.reply_reset(request);
        }
    }

    /// Answers the held connects whose port has a listener now.
    fn release_held(&mut self, lp: &mut dyn Loop) {
        while let Some(dial) = self.held.take(|port| !self.host.holds(port)) {
            self.accept_guest(lp, dial.ports, &dial.request(self.guest_cid));
        }
        for dial in self.held.iter() {
            self.host.tell_held(dial.ports.local);
        }
    }

    /// Refuses a packet; a reset is never answered.
    fn reply_reset(&mut self, header: &Header) {
        if header.op != op::RST {
            self.replies.push_back(header.reset_reply());
        }
    }

    /// Puts the next packet into `buffers`, except for its header, which is returned.
    pub fn fill(&mut self, lp: &mut dyn Loop, buffers: &Buffers<'_>) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        if self.resetting {
            return None;
        }
        // Each connection once at most: one that has nothing to send is not queued again.
        for _ in 0..self.sending.len() {
            let id = self.sending.pop_front()?;
            let Some(entry) = self.entries.get_mut(&id) else {
                continue;
            };
            entry.queued = false;
            let header = entry.connection.fill(buffers);
            self.settle(lp, id);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// A guest's connect: to a listener in this process, else to a socket named by the port.
    fn accept_guest(&mut self, lp: &mut dyn Loop, ports: Ports, request: &Header) {
        match self.host_end(ports.local) {
            Some(stream) => {
                let connection =
                    Connection::accepted(ports, self.guest_cid, stream, request, self.buf_alloc());
                let id = self.take_id();
                self.add(lp, id, connection);
            }
            None => self.reply_reset(request),
        }
    }

    fn host_end(&self, port: u32) -> Option<UnixStream> {
        if self.is_full() {
            return None;
        }
        let mut ours = None;
        let offer = self.host.offer(port, || {
            let (here, there) = stream_pair()?;
            ours = Some(here);
            Ok(there)
        });
        match offer.ok()? {
            Offer::Taken => ours,
            Offer::Refused => None,
            Offer::NoListener => uds::connect_to_port(self.host.socket()?.path(), port).ok(),
        }
    }

    // ---- the host's requests ----

    /// Starts and cancels what [`super::VsockHandle`]s have asked for.
    pub fn serve_host(&mut self, lp: &mut dyn Loop) {
        if self.host.take_transport_reset() {
            self.drop_connections(lp);
            self.resetting = true;
        }
        for id in self.host.take_cancelled() {
            self.abort(lp, id, io::Error::from(io::ErrorKind::ConnectionAborted));
        }
        self.release_held(lp);
        while let Some(connect) = self.host.next_connect() {
            self.connect(lp, connect);
        }
    }

    fn connect(&mut self, lp: &mut dyn Loop, connect: Connect) {
        let Connect {
            guest_port,
            mut waiter,
        } = connect;
        let id = self.take_id();
        if waiter.cancelled_or_watch(&self.host, id) {
            return;
        }
        if self.is_full() {
            waiter.resolve(Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                format!("the VM already has {} vsock connections", self.limit),
            )));
            return;
        }
        match stream_pair() {
            Ok((ours, stream)) => {
                let opener = Opener::InProcess { waiter, stream };
                self.open(lp, id, guest_port, ours, opener);
            }
            Err(err) => {
                waiter.resolve(Err(err));
            }
        }
    }

    /// Starts the connection `id` to `guest_port`.
    fn open(
        &mut self,
        lp: &mut dyn Loop,
        id: u64,
        guest_port: u32,
        stream: UnixStream,
        opener: Opener,
    ) {
        let ports = Ports {
            local: self.free_local_port(guest_port),
            peer: guest_port,
        };
        let connection =
            Connection::requested(ports, self.guest_cid, stream, opener, self.buf_alloc());
        self.add(lp, id, connection);
    }

    fn free_local_port(&mut self, peer: u32) -> u32 {
        // There are far fewer connections than ports: one more try than connections.
        for _ in 0..=self.by_ports.len() {
            let local = self.next_local_port;
            self.next_local_port = local.checked_add(1).unwrap_or(FIRST_LOCAL_PORT);
            if !self.by_ports.contains_key(&Ports { local, peer }) {
                return local;
            }
        }
        self.next_local_port
    }

    /// Takes a client of the Unix socket.
    pub fn add_client(&mut self, lp: &mut dyn Loop, stream: UnixStream) {
        // Too many: closing its socket is the answer.
        if self.is_full() {
            return;
        }
        let id = self.take_id();
        if lp.watch(stream.as_raw_fd(), id, READ).is_ok() {
            let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
            self.deadlines.add(deadline, id);
            self.clients.insert(id, (Client::new(stream), deadline));
        }
    }

    fn client_ready(&mut self, lp: &mut dyn Loop, id: u64) {
        let Some((client, _)) = self.clients.get_mut(&id) else {
            return;
        };
        let handshake = client.read();
        if handshake == Handshake::Incomplete {
            return;
        }
        if let Some(client) = self.remove_client(lp, id)
            && let Handshake::Connect(port) = handshake
        {
            let id = self.take_id();
            self.open(lp, id, port, client.into_stream(), Opener::Client);
        }
    }

    fn remove_client(&mut self, lp: &mut dyn Loop, id: u64) -> Option<Client> {
        let (client, deadline) = self.clients.remove(&id)?;
        self.deadlines.remove(deadline, id);
        lp.forget(client.stream().as_raw_fd());
        Some(client)
    }

    // ---- events ----

    /// The socket of a connection or client is ready.
    pub fn ready(&mut self, lp: &mut dyn Loop, id: u64, ready: Ready) {
        let Some(entry) = self.entries.get_mut(&id) else {
            self.client_ready(lp, id);
            return;
        };
        // Interest is only given up when an event shows that it is a nuisance: switching
        // it off and on around every packet would cost two system calls each.
        let wanted = entry.connection.interest().unwrap_or_default();
        if (ready.readable && !wanted.readable) || (ready.writable && !wanted.writable) {
            let fd = entry.connection.stream().as_raw_fd();
            if lp.rewatch(fd, id, wanted).is_ok() {
                entry.watched = Some(wanted);
            }
        }
        entry.connection.ready(ready);
        self.settle(lp, id);
    }

    /// Ends what has taken too long.
    pub fn expire(&mut self, lp: &mut dyn Loop) {
        self.deadlines.acknowledge();
        let now = Instant::now();
        while let Some(id) = self.deadlines.pop_expired(now) {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.deadline = None;
                entry.connection.expire();
                self.settle(lp, id);
            } else {
                self.remove_client(lp, id);
            }
        }
    }

    // ---- transport reset, 5.10.6.7 ----

    /// The event is to be put into the event queue.
    pub fn wants_reset_event(&self) -> bool {
        self.resetting
    }

    /// The event is in the queue.
    pub fn reset_event_sent(&mut self) {
        self.resetting = false;
    }

    /// Drops every connection without a word to the guest.
    pub fn drop_connections(&mut self, lp: &mut dyn Loop) {
        for (id, entry) in self.entries.drain() {
            if let Some(at) = entry.deadline {
                self.deadlines.remove(at, id);
            }
            let mut connection = entry.connection;
            if entry.watched.is_some() {
                lp.forget(connection.stream().as_raw_fd());
            }
            connection.abort(io::Error::from(io::ErrorKind::ConnectionReset));
        }
        self.by_ports.clear();
        self.sending.clear();
        self.replies.clear();
    }

    // ---- tables ----

    fn is_full(&self) -> bool {
        self.entries.len().saturating_add(self.clients.len()) >= self.limit
    }

    fn buf_alloc(&self) -> u32 {
        if self.entries.len() < MANY {
            BUF_ALLOC
        } else {
            BUF_ALLOC_MANY
        }
    }

    fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        // Never wraps: 2^64 connections.
        self.next_id = id.wrapping_add(1);
        id
    }

    fn add(&mut self, lp: &mut dyn Loop, id: u64, connection: Connection) {
        self.by_ports.insert(connection.ports(), id);
        self.entries.insert(id, Entry::new(connection));
        self.settle(lp, id);
    }

    fn abort(&mut self, lp: &mut dyn Loop, id: u64, why: io::Error) {
        if let Some(entry) = self.entries.get_mut(&id) {
            // A late cancel: the caller has got its stream.
            if entry.connection.waiter().is_none() {
                return;
            }
            entry.connection.abort(why);
            self.settle(lp, id);
        }
    }

    /// Makes the tables agree with what a connection now is and wants.
    fn settle(&mut self, lp: &mut dyn Loop, id: u64) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        if !entry.watch(lp, id) {
            entry
                .connection
                .abort(io::Error::other("the event loop cannot watch the socket"));
        }
        let deadline = entry.connection.deadline();
        if deadline != entry.deadline {
            if let Some(at) = entry.deadline {
                self.deadlines.remove(at, id);
            }
            if let Some(at) = deadline {
                self.deadlines.add(at, id);
            }
            entry.deadline = deadline;
        }
        if entry.connection.wants_to_send() && !entry.queued {
            entry.queued = true;
            self.sending.push_back(id);
        }
        if entry.connection.guest_is_done() {
            if entry.named {
                entry.named = false;
                self.by_ports.remove(&entry.connection.ports());
            }
            self.replies.extend(entry.connection.parting_reset());
        }
        if entry.connection.is_closed() {
            if entry.watched.is_some() {
                lp.forget(entry.connection.stream().as_raw_fd());
            }
            if let Some(at) = entry.deadline {
                self.deadlines.remove(at, id);
            }
            self.entries.remove(&id);
        }
    }
}

impl Drop for Muxer {
    fn drop(&mut self) {
        self.close();
    }
}

fn stream_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((ours, theirs))
}

//! Plays the guest's vsock driver.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::testing::{Buffer, DeviceDriver, PATIENCE};
use crate::virtio::vsock::packet::{CID_HOST, HEADER_LEN, Header, TYPE_STREAM, op};
use crate::virtio::vsock::{Vsock, VsockConfig, VsockHandle};

pub const GUEST_CID: u32 = 3;
pub const RX: usize = 0;
pub const TX: usize = 1;
pub const EVENT: usize = 2;
/// What the guest advertises unless a test says otherwise.
pub const GUEST_BUFFER: u32 = 64 * 1024;

/// A device and its guest.
pub struct Guest {
    pub driver: DeviceDriver<Vsock>,
    pub handle: VsockHandle,
    /// Advertised in each packet.
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Guest {
    /// An active device without a Unix socket.
    pub fn new() -> Self {
        let mut guest = Self::inactive(VsockConfig::new(GUEST_CID));
        guest.activate();
        guest
    }

    pub fn inactive(config: VsockConfig) -> Self {
        let (device, handle) = Vsock::new(config).unwrap();
        Self {
            driver: DeviceDriver::new(device),
            handle,
            buf_alloc: GUEST_BUFFER,
            fwd_cnt: 0,
        }
    }

    pub fn activate(&mut self) {
        self.driver.activate().unwrap();
        self.add_rx(32);
    }

    /// Gives the device `count` receive buffers of Linux's size.
    pub fn add_rx(&mut self, count: usize) {
        for _ in 0..count {
            self.driver.queues[RX].add(&[Buffer::Writable(4096)]);
        }
        self.driver.queues[RX].kick();
    }

    /// The next packet from the device; its buffer is replaced.
    pub fn recv(&mut self) -> (Header, Vec<u8>) {
        let used = self.driver.wait_used(RX);
        self.add_rx(1);
        assert!(used.len as usize >= HEADER_LEN, "{used:?}");
        let (header, payload) = used.data.split_at(HEADER_LEN);
        let header = Header::from_bytes(header.try_into().unwrap());
        assert_eq!(header.src_cid, CID_HOST);
        assert_eq!(header.len as usize, payload.len());
        (header, payload.to_vec())
    }

    /// The next packet, which has to be `op`.
    pub fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.recv();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// A header towards the host.
    pub fn header(&self, op: u16, host_port: u32, guest_port: u32) -> Header {
        Header {
            src_cid: u64::from(GUEST_CID),
            dst_cid: CID_HOST,
            src_port: guest_port,
            dst_port: host_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    /// Sends raw bytes as one packet and waits until the device has taken it.
    pub fn send_raw(&mut self, bytes: Vec<u8>) {
        self.driver.request(TX, &[Buffer::Readable(bytes)]);
    }

    pub fn send_header(&mut self, header: &Header, payload: &[u8]) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(payload);
        self.send_raw(bytes);
    }

    /// Sends a packet on the connection whose last packet from the host was `of`.
    pub fn answer(&mut self, of: &Header, op: u16, flags: u32, payload: &[u8]) {
        let mut header = self.header(op, of.src_port, of.dst_port);
        header.flags = flags;
        header.len = u32::try_from(payload.len()).unwrap();
        self.send_header(&header, payload);
    }

    /// A connection that the host opened and this guest accepted.
    pub fn accept(&mut self, port: u32) -> (Header, UnixStream) {
        let result = self.handle.connect(port);
        let request = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        self.answer(&request, op::RESPONSE, 0, &[]);
        (request, resolve(result).unwrap())
    }

    /// A connection that this guest opened and `listener` accepted.
    pub fn connect(
        &mut self,
        host_port: u32,
        guest_port: u32,
        listener: &mut mpsc::Receiver<UnixStream>,
    ) -> (Header, UnixStream) {
        let request = self.header(op::REQUEST, host_port, guest_port);
        self.send_header(&request, &[]);
        let response = self.expect(op::RESPONSE);
        assert_eq!(
            (response.src_port, response.dst_port),
            (host_port, guest_port)
        );
        (response, next(listener).unwrap())
    }
}

/// Waits for a connect.
pub fn resolve(result: oneshot::Receiver<io::Result<UnixStream>>) -> io::Result<UnixStream> {
    block_on(result).expect("connects are always answered")
}

/// Waits for a stream.
pub fn next(listener: &mut mpsc::Receiver<UnixStream>) -> Option<UnixStream> {
    block_on(listener.recv())
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(async { tokio::time::timeout(PATIENCE, future).await })
        .expect("an answer in time")
}

/// The stream as tests like it: blocking, but not for ever.
pub fn blocking(stream: UnixStream) -> UnixStream {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Bytes that differ at every offset for a while.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at * 31 + at / 251) % 256).unwrap())
        .collect()
}

/// Short enough for a test to wait when nothing is expected to happen.
pub const MOMENT: Duration = Duration::from_millis(50);

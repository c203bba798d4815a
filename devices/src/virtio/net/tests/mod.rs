//! The device, driven as a guest would, on real taps in a network namespace of the test's
//! own, or on none.

mod control;
mod hostile;
mod limits;
mod slots;
mod traffic;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, recv, send,
    setsockopt, socket, sockopt,
};

use super::{HEADER_BYTES, Net, NetConfig, NetHandle, TapDevice};
use crate::testing::{Buffer, DeviceDriver, PATIENCE, RawDescriptor, Used, process};
use crate::virtio::VirtioDevice;

const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x07];
const HOST: [u8; 6] = [0x02, 0, 0, 0, 0, 0x08];
const BROADCAST: [u8; 6] = [0xff; 6];
/// An experimental EtherType (IEEE 802): nothing on the host answers it.
const ETHERTYPE: u16 = 0x88b5;
const SOON: Duration = Duration::from_secs(10);

/// Runs `test` on a thread with a network namespace of its own; not at all where that is
/// not permitted.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let (skipped, reason) = mpsc::channel();
    let thread = thread::spawn(move || {
        let ready = unshare(CloneFlags::CLONE_NEWNET)
            .map_err(io::Error::from)
            .and_then(|()| std::fs::metadata("/dev/net/tun").map(drop));
        match ready {
            Ok(()) => test(),
            Err(err) => skipped.send(err).unwrap(),
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
    if let Ok(err) = reason.try_recv() {
        println!("skipped: no network namespace with taps: {err}");
    }
}

/// Runs `ip` in the calling thread's namespace.
fn ip(args: &str) {
    let output = Command::new("ip").args(args.split(' ')).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {args}: {error}");
}

/// A tap that is up and has no IPv6, so that it sends nothing of its own.
fn tap(name: &str, queues: u16) -> TapDevice {
    let end = Instant::now() + PATIENCE;
    let tap = loop {
        match TapDevice::open(name, queues) {
            Ok(tap) => break tap,
            // As `wait_gone`: the one before may still be there.
            Err(err) if Instant::now() > end => panic!("{err}"),
            Err(_) => thread::yield_now(),
        }
    };
    // Where there is no IPv6 it cannot be switched off either. The file is that of the
    // calling thread's namespace.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    ip(&format!("link set {name} up"));
    tap
}

/// Closing its last queue removes an interface: its name is free again. A child that another
/// test is just starting may hold a copy of the queue for a moment.
fn wait_gone(interface: &str) {
    let end = Instant::now() + SOON;
    while nix::net::if_::if_nametoindex(interface).is_ok() {
        assert!(Instant::now() < end, "the interface outlived its queue");
        thread::yield_now();
    }
}

/// The host's end of the wire: sends and receives raw frames on an interface.
struct Wire {
    socket: OwnedFd,
}

impl Wire {
    fn new(interface: &str) -> Self {
        Self::of_type(interface, ETHERTYPE)
    }

    /// Receives frames of another type only.
    fn of_type(interface: &str, ethertype: u16) -> Self {
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::EthAll,
        )
        .unwrap();
        let index = nix::net::if_::if_nametoindex(interface).unwrap();
        // SAFETY: all zero is a valid address.
        let mut raw: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        raw.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        raw.sll_protocol = ethertype.to_be();
        raw.sll_ifindex = i32::try_from(index).unwrap();
        let len = libc::socklen_t::try_from(size_of_val(&raw)).unwrap();
        // SAFETY: a complete sockaddr_ll of this length.
        let addr = unsafe { LinkAddr::from_raw((&raw const raw).cast(), Some(len)) }.unwrap();
        nix::sys::socket::bind(socket.as_raw_fd(), &addr).unwrap();
        let patience = nix::sys::time::TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience).unwrap();
        Self { socket }
    }

    fn send(&self, frame: &[u8]) {
        send(self.socket.as_raw_fd(), frame, MsgFlags::empty()).unwrap();
    }

    /// Sends a frame with a virtio header of 10 bytes: one that the kernel may have to cut.
    fn send_unfinished(&self, header: [u8; 10], frame: &[u8]) {
        /// linux/if_packet.h
        const PACKET_VNET_HDR: libc::c_int = 15;
        let on: libc::c_int = 1;
        let len = libc::socklen_t::try_from(size_of_val(&on)).unwrap();
        // SAFETY: the kernel reads one int.
        let done = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_VNET_HDR,
                (&raw const on).cast(),
                len,
            )
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        self.send(&[&header[..], frame].concat());
    }

    /// The next frame of ours.
    fn receive(&self) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let len = recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap();
        bytes.truncate(len);
        bytes
    }

    fn is_quiet(&self) -> bool {
        recv(
            self.socket.as_raw_fd(),
            &mut [0; 64],
            MsgFlags::MSG_DONTWAIT,
        )
        .is_err()
    }
}

fn frame(from: [u8; 6], to: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let mut bytes = to.to_vec();
    bytes.extend(from);
    bytes.extend(ETHERTYPE.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Bytes that differ from frame to frame.
fn payload(seed: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|index| u8::try_from((index * 7 + seed * 31) % 251).unwrap())
        .collect()
}

/// A device and its guest.
struct Nic {
    driver: DeviceDriver<Net>,
    handle: NetHandle,
}

impl Nic {
    fn inactive(config: NetConfig) -> Self {
        let (device, handle) = Net::new(config).unwrap();
        Self {
            driver: DeviceDriver::new(device),
            handle,
        }
    }

    /// Active with all features but `without`.
    fn new(config: NetConfig, without: u64) -> Self {
        let mut nic = Self::inactive(config);
        let features = nic.driver.device.features() & !without;
        nic.driver.activate_with(features).unwrap();
        nic
    }

    /// Gives the device `count` receive buffers of `len` bytes on `queue`.
    fn provide(&mut self, queue: usize, count: usize, len: u32) {
        for _ in 0..count {
            self.driver.queues[queue].add(&[Buffer::Writable(len)]);
        }
        self.driver.queues[queue].kick();
    }

    /// Sends a frame without offloads and waits until the device has taken it.
    fn send(&mut self, queue: usize, frame: &[u8]) {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes.extend(frame);
        let used = self.driver.request(queue, &[Buffer::Readable(bytes)]);
        assert_eq!(used.len, 0);
    }

    /// The next frame from the receive queue, and the number of its buffers.
    fn receive(&mut self, queue: usize) -> (Vec<u8>, u16) {
        let Used { data, .. } = self.driver.wait_used(queue);
        let count = u16::from_le_bytes([data[10], data[11]]);
        let mut bytes = data[HEADER_BYTES..].to_vec();
        for _ in 1..count {
            // There once the first is there.
            bytes.extend(self.driver.queues[queue].pop_used().unwrap().data);
        }
        (bytes, count)
    }

    /// A command; returns the ack.
    fn command(&mut self, queue: usize, class: u8, command: u8, data: &[u8]) -> u8 {
        let used = self.driver.request(
            queue,
            &[
                Buffer::Readable(vec![class, command]),
                Buffer::Readable(data.to_vec()),
                Buffer::Writable(1),
            ],
        );
        assert_eq!(used.len, 1);
        used.data[0]
    }

    fn status(&self) -> u16 {
        let mut bytes = [0; 2];
        self.driver.device.read_config(6, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Waits until `done`, looking after every turn of the device's loop.
    fn wait(&self, mut done: impl FnMut(&NetHandle) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(&self.handle) {
            assert!(Instant::now() < end, "{:?}", self.handle.stats());
            thread::yield_now();
        }
    }
}

fn raw(addr: u64, len: u32, flags: u16) -> Buffer {
    Buffer::Raw(RawDescriptor {
        addr,
        len,
        flags,
        next: 0,
    })
}

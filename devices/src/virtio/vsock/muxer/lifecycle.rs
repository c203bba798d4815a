//! Between event loops, and between processes.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::{Muxer, READ};
use crate::virtio::Loop;
use crate::virtio::vsock::connection::{Connection, Ports};
use crate::virtio::vsock::held::HeldDials;
use crate::virtio::vsock::packet::{CID_HOST, Header, TYPE_STREAM, op};
use crate::virtio::vsock::state::{MAX_RESETS, VsockState};

impl Muxer {
    /// What a snapshot keeps.
    pub fn save(&self, state: &mut VsockState) {
        state.next_local_port = self.next_local_port;
        state.resetting = self.resetting;
        state.held = self.held.iter().copied().collect();
        // Their streams end in this process. Resets, not the event that resets all: with
        // that, Linux reports an error on its sockets and nothing to read, and a program
        // that waits to read waits on.
        let connections = self.entries.values().map(|entry| &entry.connection);
        let lost = connections
            .filter(|connection| connection.guest_waits())
            .map(Connection::ports);
        let replies = self.replies.iter().map(|reply| Ports {
            local: reply.src_port,
            peer: reply.dst_port,
        });
        state.resets = replies.chain(lost).take(MAX_RESETS).collect();
    }

    /// Takes what another process has saved.
    pub fn restore(&mut self, state: VsockState) {
        self.next_local_port = state.next_local_port;
        self.resetting = state.resetting;
        self.host
            .keep_holding(state.held.iter().map(|dial| dial.ports.local));
        self.held = HeldDials::restored(state.held).unwrap_or_default();
        let guest_cid = self.guest_cid;
        let reset = |ports: Ports| Header {
            src_cid: CID_HOST,
            dst_cid: guest_cid,
            src_port: ports.local,
            dst_port: ports.peer,
            kind: TYPE_STREAM,
            op: op::RST,
            ..Header::default()
        };
        self.replies = state.resets.into_iter().map(reset).collect();
    }

    /// Leaves the loop for a while, which does not count for deadlines.
    pub fn pause(&mut self) {
        self.paused = Some(Instant::now());
    }

    /// Begins on a loop, which watches nothing of it yet.
    pub fn start(&mut self, lp: &mut dyn Loop) {
        let pause = self.paused.take().map_or(Duration::ZERO, |at| at.elapsed());
        for entry in self.entries.values_mut() {
            entry.watched = None;
            entry.connection.postpone(pause);
        }
        for (id, (_, deadline)) in &mut self.clients {
            self.deadlines.remove(*deadline, *id);
            *deadline = deadline.checked_add(pause).unwrap_or(*deadline);
            self.deadlines.add(*deadline, *id);
        }
        let ids: Vec<u64> = self.entries.keys().copied().collect();
        for id in ids {
            self.settle(lp, id);
        }
        let mut refused = Vec::new();
        for (id, (client, _)) in &self.clients {
            if lp.watch(client.stream().as_raw_fd(), *id, READ).is_err() {
                refused.push(*id);
            }
        }
        for id in refused {
            self.remove_client(lp, id);
        }
    }

    /// Ends everything without a word to the guest. The loop has forgotten the fds.
    pub fn close(&mut self) {
        for (_, mut entry) in self.entries.drain() {
            entry
                .connection
                .abort(io::Error::from(io::ErrorKind::ConnectionReset));
        }
        self.by_ports.clear();
        self.clients.clear();
        self.sending.clear();
        self.replies.clear();
        self.held.clear();
    }
}

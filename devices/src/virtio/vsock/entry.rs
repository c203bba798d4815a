//! A connection's place in the muxer's tables and on the event loop.

use std::os::fd::AsRawFd;
use std::time::Instant;

use super::connection::Connection;
use crate::virtio::{Interest, Loop};

/// A connection and its place in the muxer's tables.
#[derive(Debug)]
pub struct Entry {
    /// The connection.
    pub connection: Connection,
    /// What its socket is watched for, if it is.
    pub watched: Option<Interest>,
    /// In the list of those with something to send.
    pub queued: bool,
    /// In the deadline table, at this time.
    pub deadline: Option<Instant>,
    /// In the table of ports.
    pub named: bool,
}

impl Entry {
    /// A connection that has its name.
    pub fn new(connection: Connection) -> Self {
        Self {
            connection,
            watched: None,
            queued: false,
            deadline: None,
            named: true,
        }
    }

    /// Adds what is missing to the watch; false if the loop refuses.
    pub fn watch(&mut self, lp: &mut dyn Loop, id: u64) -> bool {
        let fd = self.connection.stream().as_raw_fd();
        match (self.connection.interest(), self.watched) {
            (None, None) => {}
            (None, Some(_)) => {
                lp.forget(fd);
                self.watched = None;
            }
            (Some(wanted), None) => {
                if lp.watch(fd, id, wanted).is_err() {
                    return false;
                }
                self.watched = Some(wanted);
            }
            (Some(wanted), Some(has)) => {
                if (wanted.readable && !has.readable) || (wanted.writable && !has.writable) {
                    if lp.rewatch(fd, id, wanted).is_err() {
                        return false;
                    }
                    self.watched = Some(wanted);
                }
            }
        }
        true
    }
}

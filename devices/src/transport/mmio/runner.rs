//! A runner that does not wait for handlers to start.

use std::io;
use std::sync::Arc;

use crate::virtio::{EventHandler, HandlerId, Runner, StopToken, WorkerId};

/// Posts what is added.
#[derive(Debug)]
pub(super) struct Posting(pub(super) Arc<dyn Runner>);

impl Runner for Posting {
    fn add(&self, handler: Box<dyn EventHandler>) -> io::Result<HandlerId> {
        self.0.post(handler)
    }

    fn remove(&self, id: HandlerId) {
        self.0.remove(id);
    }

    fn spawn(&self, name: &str, work: Box<dyn FnOnce(StopToken) + Send>) -> io::Result<WorkerId> {
        self.0.spawn(name, work)
    }

    fn join(&self, id: WorkerId) {
        self.0.join(id);
    }
}

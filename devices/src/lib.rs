//! Virtio device models and the transports that serve them.
//!
//! A device model ([`virtio::VirtioDevice`]) sees virtqueues, config space, an interrupt
//! and guest memory, and nothing else: no MMIO, no KVM. A transport drives it:
//! [`transport::mmio`] in-process, [`transport::vhost_user`] for an external VMM.
//! Nothing here keeps process-wide state, installs signal handlers or exits.

pub mod bus;
pub mod event_loop;
pub mod legacy;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
pub mod virtio;

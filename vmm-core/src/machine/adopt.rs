//! A machine that was made, and started, before it was known whose it is.

use std::path::PathBuf;

use devices::virtio::fs::ShareRoot;

use super::{Machine, Phases};
use crate::config::{self, ConsoleLog};
use crate::vm::VmError;

/// What is one pod's own, and can be given to a machine later.
#[derive(Debug)]
pub struct Identity {
    /// Names the machine in threads and logs, as [`crate::MachineConfig::name`].
    pub name: String,
    /// Serial console output from here on.
    pub console: ConsoleLog,
    /// What the guest finds in [`crate::DeviceSet::with_share`]'s device.
    pub share: PathBuf,
    /// As [`devices::virtio::vsock::VsockConfig::uds_path`].
    pub vsock_socket: Option<PathBuf>,
}

impl Machine {
    /// Gives a machine without any of it the identity of a pod. Its phases count from now. The
    /// guest has to be told what of it concerns the guest.
    ///
    /// # Errors
    /// The machine has ended, its guest uses the share already, or a file cannot be made. It is
    /// of no further use then.
    pub fn adopt(&self, identity: Identity) -> Result<(), VmError> {
        self.phases.begin_again();
        if let Some(reason) = self.exit.get() {
            return Err(VmError::Exited(reason));
        }
        let Identity {
            name,
            console,
            share,
            vsock_socket,
        } = identity;
        config::validate_name(&name).map_err(|err| VmError::Backend(Box::new(err)))?;
        let io = |what: &str| {
            let what = what.to_owned();
            move |source| VmError::Io { what, source }
        };
        if let Some(handle) = &self.share {
            let moved = handle.move_to(&ShareRoot::Path(share));
            moved.map_err(|err| VmError::Backend(Box::new(err)))?;
        }
        if let (Some(vsock), Some(path)) = (&self.vsock, vsock_socket) {
            vsock.bind(&path).map_err(io("making the vsock socket"))?;
        }
        if let Some(path) = console.path {
            let log = self.console.log_to(path, console.cap_bytes);
            log.map_err(io("making the console log"))?;
        }
        self.threads.rename(&name);
        self.phases.mark_first(Phases::ADOPTED);
        tracing::info!(pod = name, "machine adopted");
        Ok(())
    }
}

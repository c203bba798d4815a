//! What makes the machine under a pod.
//!
//! A [`SandboxBackend`] turns a [`MachineRequest`] into a [`Vm`]: something that runs,
//! ends, and carries byte streams to an agent inside. Pods know nothing else about it.

pub mod external;
mod place;
pub mod quark;
pub mod vmm;
pub mod wasm;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use vmm_core::Host;
use vmm_core::vm::{Disk, Vm, VmError};

use crate::agent::{AgentClient, AgentError, Connected, Limits};
use crate::rpc::cri::LinuxContainerResources;

/// The machine that a pod needs.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineRequest {
    /// Id of the pod, for thread names and logs.
    pub pod: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Folder exported to the guest under [`agent_api::SHARE_TAG`].
    pub share: PathBuf,
    /// Folder for sockets and logs of the machine; removed with the pod.
    pub dir: PathBuf,
    /// The network namespace that CNI prepared for the pod.
    pub netns: Option<PathBuf>,
    /// What CRI limits the pod as a whole to.
    pub limits: Option<LinuxContainerResources>,
    /// Disks plugged in from the beginning, with their slots.
    pub disks: Vec<(usize, Disk)>,
}

/// See [`SandboxBackend::guest_environment`].
fn guest_environment(host: &Host) -> BTreeMap<String, String> {
    let variables = host.guest_environment().iter();
    variables
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// A machine that does not run yet. Dropping it ends it.
#[derive(Debug)]
pub struct Built {
    /// The machine.
    pub vm: Arc<dyn Vm>,
    /// Its agent, where that has answered before the machine was paused; otherwise
    /// [`SandboxBackend::agent`] waits for it.
    pub met: Option<Connected>,
}

impl<V: Vm + 'static> From<Arc<V>> for Built {
    fn from(vm: Arc<V>) -> Self {
        Self { vm, met: None }
    }
}

/// A pod's sockets are in its folder, and their paths must fit an address (`sun_path`, unix(7));
/// `longest` is the longest name among them.
fn check_folder(dir: &Path, longest: &str) -> Result<(), VmError> {
    let most = 107_usize.saturating_sub(longest.len() + 1);
    let bytes = dir.as_os_str().len();
    if bytes <= most {
        return Ok(());
    }
    Err(VmError::Io {
        what: format!(
            "the pod's folder {} has a path of {bytes} bytes, and {most} are the most for its \
             sockets: use a shorter --dir",
            dir.display()
        ),
        source: ErrorKind::InvalidFilename.into(),
    })
}

/// Waits for [`SandboxBackend::agent`]'s answer.
pub type Connecting = Pin<Box<dyn Future<Output = Result<Connected, AgentError>> + Send>>;

/// Makes machines of one kind.
#[async_trait]
pub trait SandboxBackend: Send + Sync + fmt::Debug {
    /// Name for `kuasar-ctl` and logs.
    fn name(&self) -> &'static str;

    /// Whether guests run their kernel a thousand times slower than on hardware, so that
    /// timeouts have to be stretched.
    fn slow_kernel(&self) -> bool;

    /// Environment that every process in a guest needs on this host.
    fn guest_environment(&self) -> BTreeMap<String, String>;

    /// Makes ready what machines like this one have in common, which may take as long as a
    /// boot; without it [`SandboxBackend::build`] does. Cancel safe.
    async fn prepare(&self, request: &MachineRequest) {
        let _ = request;
    }

    /// Builds a machine.
    async fn build(&self, request: MachineRequest) -> Result<Built, VmError>;

    /// What runs containers in `vm`, the machine of `pod`: an agent that dials once `vm` runs.
    ///
    /// # Errors
    /// Nobody can dial out of `vm`.
    fn agent(&self, pod: &str, vm: &dyn Vm, limits: Limits) -> Result<Connecting, VmError> {
        let _ = pod;
        let listener = vm.listen(agent_api::CONTROL_PORT)?;
        Ok(Box::pin(AgentClient::connect(listener, limits)))
    }

    /// Whether a pod's sockets are opened in its network namespace, where they need no cards
    /// of a machine.
    fn enters_namespace(&self) -> bool {
        false
    }

    /// Whether its machines go on when this daemon ends; the next one finds them with
    /// [`SandboxBackend::recover`].
    fn outlives_daemon(&self) -> bool {
        false
    }

    /// The machine that an earlier daemon built for this request, running; `None` when it has
    /// ended.
    async fn recover(&self, request: MachineRequest) -> Result<Option<Arc<dyn Vm>>, VmError> {
        let _ = request;
        Ok(None)
    }

    /// Names everything that a machine written to disk depends on besides itself.
    fn identity(&self) -> String {
        self.name().to_owned()
    }

    /// Builds a machine that goes on from what [`Vm::snapshot`] wrote to `dir`, not running
    /// yet.
    async fn restore(
        &self,
        request: MachineRequest,
        dir: &Path,
        label: &str,
    ) -> Result<Arc<dyn Vm>, VmError> {
        let _ = (request, dir, label);
        Err(VmError::Unsupported {
            what: "restore a VM from disk",
            backend: self.name(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_too_long_for_sockets_is_refused() {
        let longest = "vsock.sock_1024";
        check_folder(Path::new(&format!("/run/kuasar-vmm/{:064}", 0)), longest).unwrap();
        let why = check_folder(Path::new(&format!("/{:091}", 0)), longest).unwrap_err();
        assert!(why.to_string().contains("92 bytes, and 91"), "{why}");
    }
}

//! The contract between the daemon on the host and `vmm-task`, PID 1 of the guest.
//!
//! One crate, used by both ends, so that they cannot drift: the RPC service
//! ([`rpc`]), the header of byte streams ([`stream`]), the ports and the version.
//! The prose of the contract is in `proto/agent.proto`.

pub mod stream;

/// Messages and the ttrpc service, generated from `proto/agent.proto`.
#[allow(
    warnings,
    missing_docs,
    missing_debug_implementations,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
pub mod rpc {
    mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    mod agent_ttrpc {
        use super::agent;
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
    pub use agent::*;
    pub use agent_ttrpc::*;
}

/// Version of the contract. A host refuses an agent of another version, and the reverse:
/// both are built from one tree, so a difference means a stale guest image.
pub const PROTOCOL_VERSION: u32 = 3;

/// Host port (CID 2) that the agent dials when it is ready to serve.
pub const CONTROL_PORT: u32 = 1024;

/// Guest port on which the agent accepts byte streams.
pub const STREAM_PORT: u32 = 1025;

/// Path of a PID namespace in a container's spec that stands for the one that the pod's
/// containers share; the agent makes it when the first container joins.
pub const POD_PID_NAMESPACE: &str = "/run/kuasar/pid-namespace";

/// Shared memory of the pod: what containers in its IPC namespace have as `/dev/shm`.
pub const POD_SHM: &str = "/dev/shm";

/// Where the guest mounts the pod's virtio-fs share.
pub const SHARE_DIR: &str = "/run/kuasar/state";

/// Where the guest keeps what belongs to one container, a folder each, on tmpfs.
pub const CONTAINERS_DIR: &str = "/run/kuasar/containers";

/// virtio-fs tag of the pod's share.
pub const SHARE_TAG: &str = "kuasar";

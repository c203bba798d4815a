//! What runs the containers of a pod, as pods see it.

use agent_api::rpc;
use agent_api::stream::StreamKind;
use async_trait::async_trait;
use vmm_core::vm::{GuestStream, Vm, VmError};

use super::{AgentError, ProcessId, Result};
use crate::pod::ErrorCode;

/// Runs the containers of one pod: the agent in its guest, reached by
/// [`super::AgentClient`], or this process, for pods that are no virtual machine.
#[async_trait]
pub trait Agent: Send + Sync + std::fmt::Debug {
    /// Once per pod, before the first container.
    ///
    /// # Errors
    /// See [`AgentError`]; so for every call below.
    async fn setup_sandbox(&self, request: rpc::SetupSandboxRequest) -> Result<()>;

    /// Makes the pod's network another; nothing to do where it is the namespace's itself.
    async fn update_network(&self, network: rpc::Network) -> Result<()> {
        let _ = network;
        Ok(())
    }

    /// Finds a disk that was plugged in.
    async fn attach_disk(&self, disk: rpc::Disk) -> Result<rpc::DiskReply> {
        let _ = disk;
        Err(no_machine("find the disk"))
    }

    /// Lets go of a disk that is to be unplugged.
    async fn detach_disk(&self, disk: rpc::Disk) -> Result<()> {
        let _ = disk;
        Err(no_machine("let go of the disk"))
    }

    /// Brings CPUs online or takes them off; returns how many are online.
    async fn set_cpus(&self, count: u32) -> Result<u32> {
        let _ = count;
        Err(no_machine("set the number of CPUs"))
    }

    /// Creates a container with its init process; returns the guest's pid.
    async fn create_container(&self, request: rpc::CreateContainerRequest) -> Result<u32>;

    /// Adds a process to a running container.
    async fn create_exec(&self, request: rpc::CreateExecRequest) -> Result<()>;

    /// Starts a created process; returns the guest's pid.
    async fn start_process(&self, process: &ProcessId) -> Result<u32>;

    /// Sends a signal to a process, or to every process of its container.
    async fn signal(&self, process: &ProcessId, signal: u32, all: bool) -> Result<()>;

    /// Sets the size of a process's terminal.
    async fn resize_pty(&self, process: &ProcessId, width: u32, height: u32) -> Result<()>;

    /// Ends a process's stdin after what was sent before.
    async fn close_stdin(&self, process: &ProcessId) -> Result<()>;

    /// Forgets an exited process; with the init process, its container.
    async fn delete_process(&self, process: &ProcessId) -> Result<()>;

    /// Guest pids of everything in a container.
    async fn list_pids(&self, container_id: &str) -> Result<Vec<u32>>;

    /// cgroup figures of a container.
    async fn stats(&self, container_id: &str) -> Result<rpc::StatsResponse>;

    /// Freezes a container.
    async fn pause_container(&self, container_id: &str) -> Result<()>;

    /// Thaws a container.
    async fn resume_container(&self, container_id: &str) -> Result<()>;

    /// New limits for a container, OCI `LinuxResources` as JSON.
    async fn update_container(&self, container_id: &str, resources: Vec<u8>) -> Result<()>;

    /// Flushes the guest's file systems and resets it.
    async fn shutdown(&self) -> Result<()>;

    /// Opens one byte stream of a process.
    ///
    /// # Errors
    /// The guest refuses or does not answer in time.
    async fn open_stream(
        &self,
        vm: &dyn Vm,
        process: &ProcessId,
        kind: StreamKind,
    ) -> std::result::Result<Box<dyn GuestStream>, VmError>;
}

fn no_machine(call: &'static str) -> AgentError {
    AgentError::Refused {
        call,
        code: ErrorCode::Unimplemented,
        message: "the pod is no virtual machine".to_owned(),
    }
}

//! Operations on containers and processes that exist.

use std::sync::Arc;

use agent_api::rpc;
use serde_json::Value;

use super::container::Container;
use super::process::ProcessState;
use super::{Pod, PodError, Result};

impl Pod {
    /// Sends a signal to a process, or to every process of its container. Signal 0 asks
    /// whether it lives.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub async fn signal(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let process = self.container(container)?.process(exec)?;
        if matches!(process.state(), ProcessState::Exited(_)) {
            let (what, id) = process.what();
            return Err(PodError::not_found(what, format!("{id} (it has exited)")));
        }
        if signal == 0 {
            return Ok(());
        }
        let machine = self.machine()?;
        machine.agent.signal(process.id(), signal, all).await?;
        Ok(())
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// The process has none, or the guest refuses.
    pub async fn resize_pty(
        &self,
        container: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<()> {
        let process = self.container(container)?.process(exec)?;
        if !process.stdio_paths().terminal {
            return Err(PodError::State {
                action: "resize the terminal of",
                what: process.what().0,
                id: process.what().1,
                state: "without a terminal".to_owned(),
            });
        }
        let machine = self.machine()?;
        machine
            .agent
            .resize_pty(process.id(), width, height)
            .await?;
        Ok(())
    }

    /// The caller writes nothing more to the stdin of a process.
    ///
    /// # Errors
    /// There is no such process.
    pub fn close_stdin(&self, container: &str, exec: &str) -> Result<()> {
        let process = self.container(container)?.process(exec)?;
        if let Some(stdio) = process.stdio() {
            stdio.close_stdin();
        }
        Ok(())
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// It does not run, or the guest refuses.
    pub async fn pause(&self, container: &str) -> Result<()> {
        let container = self.running(container, "pause")?;
        self.machine()?
            .agent
            .pause_container(container.id())
            .await?;
        container.set_paused(true);
        Ok(())
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// It does not run, or the guest refuses.
    pub async fn resume(&self, container: &str) -> Result<()> {
        let container = self.running(container, "resume")?;
        self.machine()?
            .agent
            .resume_container(container.id())
            .await?;
        container.set_paused(false);
        Ok(())
    }

    /// Guest pids of a container, never empty: callers take the first for its init.
    ///
    /// # Errors
    /// There is no such container.
    pub async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        let container = self.container(container)?;
        let listed = match self.machine() {
            Ok(machine) => machine.agent.list_pids(container.id()).await,
            Err(_) => Ok(Vec::new()),
        };
        let mut pids = listed.unwrap_or_default();
        if pids.is_empty() {
            pids.push(container.init().pid());
        }
        Ok(pids)
    }

    /// cgroup figures of a container.
    ///
    /// # Errors
    /// It does not run, or the guest refuses.
    pub async fn stats(&self, container: &str) -> Result<rpc::StatsResponse> {
        let container = self.container(container)?;
        Ok(self.machine()?.agent.stats(container.id()).await?)
    }

    /// New limits for a container, OCI `LinuxResources` as JSON.
    ///
    /// # Errors
    /// Not such a document, or the guest refuses.
    pub async fn update(&self, container: &str, resources_json: &[u8]) -> Result<()> {
        let container = self.running(container, "update")?;
        let mut resources: Value = serde_json::from_slice(resources_json).map_err(|e| {
            PodError::invalid(
                "resources",
                e.to_string(),
                "must be OCI LinuxResources as JSON",
            )
        })?;
        super::oci::clean_resources(&mut resources);
        let machine = self.machine()?;
        self.grow(&machine, &resources).await?;
        let resources = super::containers::to_json(&resources)?;
        machine
            .agent
            .update_container(container.id(), resources)
            .await?;
        Ok(())
    }

    fn running(&self, container: &str, action: &'static str) -> Result<Arc<Container>> {
        let container = self.container(container)?;
        if container.init().state() == ProcessState::Running {
            return Ok(container);
        }
        Err(container.init().wrong_state(action))
    }
}

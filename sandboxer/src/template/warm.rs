//! Clones whose agents have answered before there is a pod for them.
//!
//! Waking a clone's agent, its dial and its first answer are most of what a pod waits for,
//! and the same for every pod. A warm clone has that behind it, touched the memory that it
//! takes, and is paused until a pod gives it its identity.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::watch;
use tracing::{info, warn};
use vmm_core::Machine;
use vmm_core::vm::{Vm, VmError};

use super::TemplateKey;
use crate::agent::{AgentClient, AgentError, Connected, Limits};
use crate::causes::with_causes;

/// For ending a clone that nobody takes.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Calls to an agent before it is paused.
const REHEARSALS: usize = 2;

/// A machine that is paused, and its agent.
#[derive(Debug)]
pub struct WarmClone {
    /// Without identity: [`Machine::adopt`].
    pub machine: Arc<Machine>,
    /// What its agent said.
    pub connected: Connected,
}

/// Why there is no warm clone.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    /// The machine failed.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Its agent failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

impl WarmClone {
    /// Lets `machine` run until its agent has answered.
    ///
    /// # Errors
    /// It ended, or did not answer within `limits`.
    pub async fn meet(machine: Machine, limits: Limits) -> Result<Self, WarmError> {
        let listener = machine.listen(agent_api::CONTROL_PORT)?;
        machine.start().await?;
        let connected = AgentClient::connect(listener, limits).await?;
        // Touches what every call takes; that there is no such container is an answer, too.
        for _ in 0..REHEARSALS {
            let _ = connected.client.list_pids("none").await;
        }
        machine.pause().await?;
        Ok(Self {
            machine: Arc::new(machine),
            connected,
        })
    }

    fn is_fit(&self) -> bool {
        self.machine.exited().borrow().is_none()
    }
}

/// A folder that nothing can be put into, for the share of a guest that has none yet.
///
/// # Errors
/// When there is no room for temporary files.
pub fn nowhere() -> io::Result<OwnedFd> {
    // Removed at once: it lives on as this descriptor.
    let folder = tempfile::tempdir()?;
    Ok(File::open(folder.path())?.into())
}

/// Makes one warm clone.
pub type MakeWarm = Arc<dyn Fn() -> BoxFuture<'static, Result<WarmClone, WarmError>> + Send + Sync>;

/// The warm clones of one daemon.
#[derive(Debug)]
pub struct WarmPool {
    /// For each template.
    most: usize,
    templates: Mutex<HashMap<TemplateKey, Ready>>,
    /// How many clones there are.
    count: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Ready {
    clones: Vec<WarmClone>,
    /// Another one is being made.
    refilling: bool,
}

impl WarmPool {
    /// Up to `most` clones of each template.
    #[must_use]
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            templates: Mutex::default(),
            count: watch::Sender::new(0),
        })
    }

    /// A clone of this template, if there is one.
    pub fn take(&self, key: &TemplateKey) -> Option<WarmClone> {
        let mut templates = self.lock();
        let clones = &mut templates.get_mut(key)?.clones;
        // The others are dropped outside the lock, by whoever refills.
        let fit = clones.iter().rposition(WarmClone::is_fit)?;
        let clone = clones.swap_remove(fit);
        self.tell(&templates);
        Some(clone)
    }

    /// Makes clones of this template until there are as many as wanted, one at a time, in the
    /// background. Ends those that are unfit.
    pub fn refill(self: &Arc<Self>, key: &TemplateKey, make: MakeWarm) {
        let unfit: Vec<_> = {
            let mut templates = self.lock();
            let ready = templates.entry(key.clone()).or_default();
            if ready.refilling {
                return;
            }
            let unfit = ready
                .clones
                .extract_if(.., |clone| !clone.is_fit())
                .collect();
            ready.refilling = ready.clones.len() < self.most;
            if !ready.refilling {
                return end(unfit);
            }
            unfit
        };
        end(unfit);
        let (pool, key) = (Arc::clone(self), key.clone());
        tokio::spawn(async move { while pool.put(&key, make().await) {} });
    }

    /// Whether there is room for another one.
    fn put(&self, key: &TemplateKey, made: Result<WarmClone, WarmError>) -> bool {
        let mut templates = self.lock();
        // Gone with its template.
        let Some(ready) = templates.get_mut(key) else {
            return false;
        };
        match made {
            Ok(clone) => {
                info!(template = %key, "a warm clone waits for a pod");
                ready.clones.push(clone);
                ready.refilling = ready.clones.len() < self.most;
            }
            Err(err) => {
                warn!(template = %key, "no warm clone: {}", with_causes(&err));
                ready.refilling = false;
            }
        }
        let refilling = ready.refilling;
        self.tell(&templates);
        refilling
    }

    /// Waits until there is a clone, of whatever template.
    pub async fn wait(&self) {
        // Fails only without this pool.
        let _ = self.count.subscribe().wait_for(|count| *count > 0).await;
    }

    fn tell(&self, templates: &HashMap<TemplateKey, Ready>) {
        let count = templates.values().map(|ready| ready.clones.len()).sum();
        self.count.send_replace(count);
    }

    /// Ends the clones of a template.
    pub fn forget(&self, key: &TemplateKey) {
        let gone = {
            let mut templates = self.lock();
            let gone = templates.remove(key);
            self.tell(&templates);
            gone
        };
        end(gone.map(|ready| ready.clones).unwrap_or_default());
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TemplateKey, Ready>> {
        self.templates
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends clones without waiting for it.
fn end(clones: Vec<WarmClone>) {
    for clone in clones {
        tokio::spawn(async move {
            if let Err(err) = clone.machine.stop(STOP_LIMIT).await {
                warn!("a warm clone does not end: {}", with_causes(&err));
            }
        });
    }
}

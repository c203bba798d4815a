//! Templates in memory: loaded or built when they are first needed, once.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tracing::{info, warn};
use vmm_core::{Host, Snapshot, VmShell};

use super::TemplateKey;
use super::build::{BuildTemplateError, TemplateMachine, blocking, io_error};
use super::store::{TemplateInfo, TemplateStore};
use super::warm::WarmPool;
use crate::causes::with_causes;
use crate::config::{self, GuestFiles};

/// A template that could not be built is not tried again for so long.
const FAILURE_HOLDS: Duration = Duration::from_secs(300);

/// How a template came out; the error as text, for everybody who waits.
type Outcome = Result<Snapshot, Arc<BuildTemplateError>>;

/// Templates of one daemon.
#[derive(Debug)]
pub struct TemplateManager {
    host: Host,
    store: TemplateStore,
    guest: GuestFiles,
    keep: usize,
    shells: usize,
    warm: Arc<WarmPool>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<TemplateKey, Entry>,
    /// Shells by their number of vCPUs.
    shells: HashMap<u32, Vec<VmShell>>,
    /// Shells being made.
    refilling: HashMap<u32, usize>,
}

#[derive(Clone, Debug)]
enum Entry {
    /// Being loaded or built.
    Coming(Shared<BoxFuture<'static, Outcome>>),
    /// There, and when it was last used.
    There(Snapshot, Instant),
    /// Failed, and when.
    Failed(Arc<BuildTemplateError>, Instant),
}

impl TemplateManager {
    /// A manager of the templates in `store`, as `settings` say.
    #[must_use]
    pub fn new(
        host: Host,
        store: TemplateStore,
        guest: GuestFiles,
        settings: &config::Templates,
    ) -> Arc<Self> {
        Arc::new(Self {
            host,
            store,
            guest,
            keep: settings.keep.max(1),
            shells: settings.shells,
            warm: WarmPool::new(settings.warm),
            state: Mutex::default(),
        })
    }

    /// The template of `key`: from memory, from disk, or built from what `machine` makes,
    /// which happens once however many wait. Cancel safe: a build that was begun goes on.
    ///
    /// # Errors
    /// It could not be built, now or a short while ago.
    pub async fn get(
        self: &Arc<Self>,
        key: &TemplateKey,
        machine: impl FnOnce(&std::path::Path) -> Result<TemplateMachine, BuildTemplateError>
        + Send
        + 'static,
    ) -> Outcome {
        let coming = {
            let mut state = self.lock();
            match state.entries.get_mut(key) {
                Some(Entry::There(snapshot, used)) => {
                    *used = Instant::now();
                    return Ok(snapshot.clone());
                }
                Some(Entry::Failed(err, when)) if when.elapsed() < FAILURE_HOLDS => {
                    let again = BuildTemplateError::Recently(with_causes(&**err));
                    return Err(Arc::new(again));
                }
                Some(Entry::Coming(coming)) => coming.clone(),
                Some(Entry::Failed(..)) | None => {
                    let work = Arc::clone(self).obtain(key.clone(), machine);
                    let coming = detached(work).boxed().shared();
                    let entry = Entry::Coming(coming.clone());
                    state.entries.insert(key.clone(), entry);
                    coming
                }
            }
        };
        coming.await
    }

    /// Loads or builds, and records how it came out.
    async fn obtain(
        self: Arc<Self>,
        key: TemplateKey,
        machine: impl FnOnce(&std::path::Path) -> Result<TemplateMachine, BuildTemplateError> + Send,
    ) -> Outcome {
        let outcome = match self.load(&key).await {
            Some(snapshot) => Ok(snapshot),
            None => self.build(&key, machine).await.map_err(Arc::new),
        };
        let now = Instant::now();
        let entry = match &outcome {
            Ok(snapshot) => Entry::There(snapshot.clone(), now),
            Err(err) => Entry::Failed(Arc::clone(err), now),
        };
        let forgotten = {
            let mut state = self.lock();
            state.entries.insert(key, entry);
            state.forget_unused(self.keep)
        };
        for key in forgotten {
            self.warm.forget(&key);
        }
        outcome
    }

    async fn load(&self, key: &TemplateKey) -> Option<Snapshot> {
        let (store, wanted) = (self.store.clone(), key.clone());
        let loaded = blocking("loading a template", move || store.load(&wanted)).await;
        match loaded {
            Ok(Ok(snapshot)) => {
                info!(template = %key, "template loaded");
                Some(snapshot)
            }
            Ok(Err(err)) if err.is_missing() => None,
            Ok(Err(err)) => {
                warn!(template = %key, "template not usable, building it again: {}", with_causes(&err));
                let (store, key) = (self.store.clone(), key.clone());
                let removed = blocking("removing a template", move || store.remove(&key)).await;
                if let Ok(Err(err)) = removed {
                    warn!("{}", with_causes(&err));
                }
                None
            }
            Err(err) => {
                warn!("{}", with_causes(&err));
                None
            }
        }
    }

    async fn build(
        &self,
        key: &TemplateKey,
        machine: impl FnOnce(&std::path::Path) -> Result<TemplateMachine, BuildTemplateError>,
    ) -> Result<Snapshot, BuildTemplateError> {
        info!(template = %key, "building a template: the first pod of its kind waits for it");
        let began = Instant::now();
        let unfinished = self
            .store
            .begin()
            .map_err(|err| io_error("making room for a template")(std::io::Error::other(err)))?;
        let share = unfinished.path().join("share");
        std::fs::create_dir(&share).map_err(io_error("making the template's share"))?;
        let machine = machine(&share)?;
        let snapshot = machine.boot(&self.host).await?;
        std::fs::remove_dir(&share).map_err(io_error("removing the template's share"))?;
        let build_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        info!(template = %key, build_ms, "template built");
        let info = TemplateInfo {
            key: key.to_string(),
            vcpus: snapshot.vcpus(),
            memory_bytes: snapshot.memory_bytes(),
            kernel: self.guest.kernel.clone(),
            initramfs: self.guest.initramfs.clone(),
            built_at: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            build_ms,
        };
        let (store, stored, key, keep) =
            (self.store.clone(), snapshot.clone(), key.clone(), self.keep);
        let written = blocking("storing a template", move || {
            store.finish(unfinished, &key, &stored, &info)?;
            store.evict(keep, &key)
        })
        .await?;
        if let Err(err) = written {
            // This daemon has it in memory.
            warn!(
                "the template is not kept for the next daemon: {}",
                with_causes(&err)
            );
        }
        Ok(snapshot)
    }

    /// The clones that wait for pods.
    #[must_use]
    pub fn warm(&self) -> &Arc<WarmPool> {
        &self.warm
    }

    /// A shell made ahead of time, if there is one; others are made in its place.
    pub fn shell(self: &Arc<Self>, vcpus: u32) -> Option<VmShell> {
        let shell = self.lock().shells.get_mut(&vcpus).and_then(Vec::pop);
        self.refill(vcpus);
        shell
    }

    /// Makes shells until there are as many as wanted, one at a time, off the async threads.
    pub fn refill(self: &Arc<Self>, vcpus: u32) {
        {
            let mut state = self.lock();
            let there = state.shells.get(&vcpus).map_or(0, Vec::len);
            let coming = state.refilling.entry(vcpus).or_default();
            if *coming > 0 || there >= self.shells {
                return;
            }
            *coming = 1;
        }
        let manager = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            loop {
                let made = VmShell::create(&manager.host, vcpus);
                let mut state = manager.lock();
                let full = match made {
                    Ok(shell) => {
                        let shells = state.shells.entry(vcpus).or_default();
                        shells.push(shell);
                        shells.len() >= manager.shells
                    }
                    Err(err) => {
                        warn!("no VM shell ahead of time: {}", with_causes(&err));
                        true
                    }
                };
                if full {
                    state.refilling.remove(&vcpus);
                    return;
                }
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Machines that run keep the memory of their template. Returns which are gone.
    fn forget_unused(&mut self, keep: usize) -> Vec<TemplateKey> {
        let mut there: Vec<_> = self
            .entries
            .iter()
            .filter_map(|(key, entry)| match entry {
                Entry::There(_, used) => Some((*used, key.clone())),
                _ => None,
            })
            .collect();
        there.sort();
        let excess = there.len().saturating_sub(keep);
        there.truncate(excess);
        let gone: Vec<_> = there.into_iter().map(|(_, key)| key).collect();
        self.entries.retain(|key, _| !gone.contains(key));
        gone
    }
}

/// Runs to its end even when nobody waits any more.
async fn detached(work: impl Future<Output = Outcome> + Send + 'static) -> Outcome {
    tokio::spawn(work).await.unwrap_or_else(|err| {
        Err(Arc::new(io_error("building the template")(
            std::io::Error::other(err),
        )))
    })
}

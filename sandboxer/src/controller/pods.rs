//! The pods of a daemon, by id.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::{info, warn};

use crate::pod::recovery::{self, LeftPod};
use crate::pod::{Phase, Pod, PodEnvironment, PodError, PodRequest, Result, SavedPod};
use crate::task::TaskServer;

/// A pod and the server of its Task API.
#[derive(Debug)]
struct Entry {
    pod: Arc<Pod>,
    task_server: Mutex<Option<TaskServer>>,
    /// Held while the pod is removed: whoever comes second waits until it is gone.
    removal: tokio::sync::Mutex<()>,
}

/// The pods of a daemon.
#[derive(Debug)]
pub struct Pods {
    environment: Arc<PodEnvironment>,
    entries: Mutex<HashMap<String, Arc<Entry>>>,
}

impl Pods {
    /// No pods yet.
    #[must_use]
    pub fn new(environment: Arc<PodEnvironment>) -> Self {
        Self {
            environment,
            entries: Mutex::new(HashMap::new()),
        }
    }

    /// A pod.
    ///
    /// # Errors
    /// There is none of that id.
    pub fn get(&self, id: &str) -> Result<Arc<Pod>> {
        self.entry(id).map(|entry| Arc::clone(&entry.pod))
    }

    /// Ids of all pods.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        lock(&self.entries).keys().cloned().collect()
    }

    /// Makes a pod, not started.
    ///
    /// # Errors
    /// As for [`Pod::create`].
    pub async fn create(&self, request: PodRequest) -> Result<()> {
        let environment = Arc::clone(&self.environment);
        // A caller that goes away drops the answer, and with it the pod.
        let pod = tokio::task::spawn_blocking(move || Pod::create(request, environment))
            .await
            .unwrap_or(Err(PodError::Cancelled("creating the sandbox")))?;
        self.insert(pod);
        Ok(())
    }

    fn insert(&self, pod: Pod) -> Arc<Entry> {
        let entry = Arc::new(Entry {
            pod: Arc::new(pod),
            task_server: Mutex::new(None),
            removal: tokio::sync::Mutex::new(()),
        });
        let id = entry.pod.id().to_owned();
        info!(pod = id, "created");
        lock(&self.entries).insert(id, Arc::clone(&entry));
        entry
    }

    /// Starts a pod. When that fails, or the caller goes away first, nothing is left of it.
    ///
    /// # Errors
    /// As for [`Pod::begin_start`] and [`Pod::start`].
    pub async fn start(self: &Arc<Self>, id: &str) -> Result<Arc<Pod>> {
        let entry = self.entry(id)?;
        entry.pod.begin_start()?;
        self.bring_up(entry, None).await
    }

    /// Makes a pod of what was written to `dir` and lets it go on. When that fails, or the
    /// caller goes away first, nothing is left of it; the folder stays as it is.
    ///
    /// # Errors
    /// As for [`Pod::from_disk`] and [`Pod::restore`].
    pub async fn restore(self: &Arc<Self>, dir: &Path) -> Result<Arc<Pod>> {
        let (environment, from) = (Arc::clone(&self.environment), dir.to_owned());
        let made = tokio::task::spawn_blocking(move || Pod::from_disk(&from, environment));
        let (pod, saved) = made
            .await
            .unwrap_or(Err(PodError::Cancelled("creating the sandbox")))?;
        let entry = self.insert(pod);
        entry.pod.begin_start()?;
        self.bring_up(entry, Some((dir.to_owned(), saved))).await
    }

    /// Takes over the pods whose machines outlived an earlier daemon, all at once.
    pub async fn recover(self: &Arc<Self>) {
        let environment = Arc::clone(&self.environment);
        let left = tokio::task::spawn_blocking(move || recovery::left_pods(&environment.dir));
        let taking = left.await.unwrap_or_default().into_iter().map(|left| {
            let pods = Arc::clone(self);
            async move { pods.take_over(left).await }
        });
        futures::future::join_all(taking).await;
    }

    async fn take_over(self: &Arc<Self>, left: LeftPod) {
        let environment = Arc::clone(&self.environment);
        let made = tokio::task::spawn_blocking(move || (Pod::left(&left, environment), left));
        let (pod, left) = match made.await {
            Ok((Ok(pod), left)) => (pod, left),
            Ok((Err(e), left)) => {
                warn!("the pod in {} is lost: {e}", left.dir.display());
                return;
            }
            Err(_) => return,
        };
        let entry = self.insert(pod);
        let server = TaskServer::start(&entry.pod).await;
        let taken = match server {
            Ok(server) => {
                *lock(&entry.task_server) = Some(server);
                entry.pod.take_over(&left).await
            }
            Err(e) => {
                entry.pod.fail_start(&e).await;
                Err(e)
            }
        };
        // It stays listed, not ready, until its owner removes it.
        if let Err(e) = taken {
            warn!(pod = entry.pod.id(), "cannot be taken over: {e}");
        }
    }

    async fn bring_up(
        self: &Arc<Self>,
        entry: Arc<Entry>,
        from: Option<(PathBuf, SavedPod)>,
    ) -> Result<Arc<Pod>> {
        let abandoned = entry.pod.give_up_start_on_drop();
        let pods = Arc::clone(self);
        let id = entry.pod.id().to_owned();
        let work = async move {
            let started = Self::serve_and_start(&entry, from).await;
            if started.is_err() {
                pods.release(&id, &entry).await;
            }
            started.map(|()| Arc::clone(&entry.pod))
        };
        let started = tokio::spawn(work)
            .await
            .unwrap_or(Err(PodError::Cancelled("starting the sandbox")));
        // Nobody is left waiting, so there is nothing to give up any more.
        let _ = abandoned.disarm();
        started
    }

    async fn serve_and_start(entry: &Entry, from: Option<(PathBuf, SavedPod)>) -> Result<()> {
        let server = TaskServer::start(&entry.pod).await;
        match server {
            Ok(server) => {
                *lock(&entry.task_server) = Some(server);
                match from {
                    None => entry.pod.start().await,
                    Some((dir, saved)) => entry.pod.restore(&dir, &saved).await,
                }
            }
            Err(e) => {
                entry.pod.fail_start(&e).await;
                Err(e)
            }
        }
    }

    /// Stops a pod; one that is not there is stopped.
    ///
    /// # Errors
    /// As for [`Pod::stop`].
    pub async fn stop(&self, id: &str, limit: Option<Duration>) -> Result<()> {
        match self.get(id) {
            Ok(pod) => pod.stop(limit).await,
            Err(_) => Ok(()),
        }
    }

    /// Stops a pod and releases everything it holds; one that is not there is released.
    ///
    /// # Errors
    /// As for [`Pod::shutdown`].
    pub async fn shutdown(self: &Arc<Self>, id: &str) -> Result<()> {
        let Ok(entry) = self.entry(id) else {
            return Ok(());
        };
        let pods = Arc::clone(self);
        let id = id.to_owned();
        // Carried through even if the caller goes away.
        tokio::spawn(async move { pods.remove(&id, &entry).await })
            .await
            .unwrap_or(Err(PodError::Cancelled("shutting the sandbox down")))
    }

    async fn remove(&self, id: &str, entry: &Arc<Entry>) -> Result<()> {
        let _removing = entry.removal.lock().await;
        entry.pod.stop(None).await?;
        let server = lock(&entry.task_server).take();
        if let Some(server) = server {
            server.close().await;
        }
        entry.pod.shutdown().await?;
        // Another call may have been faster, and the id be taken again since.
        let mut entries = lock(&self.entries);
        if entries
            .get(id)
            .is_some_and(|found| Arc::ptr_eq(found, entry))
        {
            entries.remove(id);
            info!(pod = id, "removed");
        }
        Ok(())
    }

    /// Removes what a failed start left.
    async fn release(&self, id: &str, entry: &Arc<Entry>) {
        if let Err(e) = self.remove(id, entry).await {
            warn!(pod = id, "cannot clean up after a failed start: {e}");
        }
    }

    /// Stops and removes all pods at once, within `limit`.
    pub async fn shutdown_all(self: &Arc<Self>, limit: Duration) {
        let stopping = self.ids().into_iter().map(|id| {
            let pods = Arc::clone(self);
            async move {
                if let Err(e) = pods.shutdown(&id).await {
                    warn!(pod = id, "cannot be stopped: {e}");
                }
            }
        });
        if tokio::time::timeout(limit, futures::future::join_all(stopping))
            .await
            .is_err()
        {
            warn!("some sandboxes did not stop within {limit:?}");
        }
    }

    /// Whether they go on when this daemon ends.
    #[must_use]
    pub fn outlive_daemon(&self) -> bool {
        self.environment.backend.outlives_daemon()
    }

    /// How many pods can run containers.
    #[must_use]
    pub fn ready(&self) -> usize {
        lock(&self.entries)
            .values()
            .filter(|entry| entry.pod.phase() == Phase::Ready)
            .count()
    }

    fn entry(&self, id: &str) -> Result<Arc<Entry>> {
        lock(&self.entries)
            .get(id)
            .cloned()
            .ok_or_else(|| PodError::not_found("sandbox", id))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

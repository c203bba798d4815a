//! What this daemon can do with pods beyond containerd's API.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::{Pods, status};
use crate::pod::PodError;
use crate::rpc::pods as api;
use crate::rpc::pods::pods_server::Pods as PodsApi;

/// Serves [`api`].
#[derive(Clone, Debug)]
pub struct AdminService {
    pods: Arc<Pods>,
}

impl AdminService {
    /// Serves `pods`.
    #[must_use]
    pub fn new(pods: Arc<Pods>) -> Self {
        Self { pods }
    }
}

fn folder(field: &'static str, dir: &str) -> Result<PathBuf, PodError> {
    let path = Path::new(dir);
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    Err(PodError::invalid(field, dir, "must be an absolute path"))
}

#[tonic::async_trait]
impl PodsApi for AdminService {
    async fn pause(&self, request: Request<api::PodRef>) -> Result<Response<api::Empty>, Status> {
        self.pods
            .get(&request.into_inner().id)?
            .pause_machine()
            .await?;
        Ok(Response::new(api::Empty {}))
    }

    async fn resume(&self, request: Request<api::PodRef>) -> Result<Response<api::Empty>, Status> {
        self.pods
            .get(&request.into_inner().id)?
            .resume_machine()
            .await?;
        Ok(Response::new(api::Empty {}))
    }

    async fn snapshot(
        &self,
        request: Request<api::SnapshotRequest>,
    ) -> Result<Response<api::Empty>, Status> {
        let request = request.into_inner();
        let dir = folder("dir", &request.dir)?;
        let base = match request.base.as_str() {
            "" => None,
            base => Some(folder("base", base)?),
        };
        let pod = self.pods.get(&request.id)?;
        pod.save(&dir, base.as_deref()).await?;
        if request.keep_running {
            pod.resume_machine().await?;
        } else {
            pod.discard().await?;
            self.pods.shutdown(&request.id).await?;
        }
        Ok(Response::new(api::Empty {}))
    }

    async fn restore(
        &self,
        request: Request<api::RestoreRequest>,
    ) -> Result<Response<api::RestoreReply>, Status> {
        let dir = folder("dir", &request.into_inner().dir)?;
        let pod = self.pods.restore(&dir).await?;
        Ok(Response::new(api::RestoreReply {
            id: pod.id().to_owned(),
            address: status::address(&pod),
        }))
    }
}

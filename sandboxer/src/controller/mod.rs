//! containerd's sandbox Controller over the pods of this daemon.

mod admin;
mod pods;
mod status;

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tonic::{Request, Response, Status};

pub use admin::AdminService;
pub use pods::Pods;

use crate::causes::with_causes;
use crate::pod::{EVENTS_ANNOTATION, ErrorCode, Phase, PodError, PodRequest, TASKS_EXTENSION};
use crate::rpc::controller as api;
use crate::rpc::controller::controller_server::Controller;
use crate::rpc::cri::PodSandboxConfig;
use crate::rpc::{POD_SANDBOX_CONFIG_TYPE, types};

/// Version of the Task API that callers are told to use. containerd ignores an address with
/// a lower one and looks for a shim instead.
pub const TASK_API_VERSION: u32 = 3;

/// Update field with the task list, as iSulad sends it.
const TASKS_FIELD: &str = "extensions.tasks";

/// Serves the Controller.
#[derive(Clone, Debug)]
pub struct ControllerService {
    pods: Arc<Pods>,
}

impl ControllerService {
    /// Serves `pods`.
    #[must_use]
    pub fn new(pods: Arc<Pods>) -> Self {
        Self { pods }
    }
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create(
        &self,
        request: Request<api::ControllerCreateRequest>,
    ) -> Result<Response<api::ControllerCreateResponse>, Status> {
        let request = request.into_inner();
        let config = decode_config(request.options)?;
        let events = request.annotations.get(EVENTS_ANNOTATION);
        let pod = PodRequest::new(&request.sandbox_id, &request.netns_path, config)?
            .with_events(events.map_or("", String::as_str))?;
        self.pods.create(pod).await?;
        Ok(Response::new(api::ControllerCreateResponse {
            sandbox_id: request.sandbox_id,
        }))
    }

    async fn start(
        &self,
        request: Request<api::ControllerStartRequest>,
    ) -> Result<Response<api::ControllerStartResponse>, Status> {
        let id = request.into_inner().sandbox_id;
        let pod = self.pods.start(&id).await?;
        Ok(Response::new(api::ControllerStartResponse {
            sandbox_id: id,
            pid: pod.pid(),
            created_at: Some(pod.created_at().into()),
            address: status::address(&pod),
            version: TASK_API_VERSION,
            ..Default::default()
        }))
    }

    /// Answers for any id: iSulad asks for one that may be lost to find out whether this
    /// daemon is back.
    async fn platform(
        &self,
        _request: Request<api::ControllerPlatformRequest>,
    ) -> Result<Response<api::ControllerPlatformResponse>, Status> {
        Ok(Response::new(api::ControllerPlatformResponse {
            platform: Some(types::Platform {
                os: "linux".to_owned(),
                architecture: status::architecture().to_owned(),
                ..Default::default()
            }),
        }))
    }

    async fn stop(
        &self,
        request: Request<api::ControllerStopRequest>,
    ) -> Result<Response<api::ControllerStopResponse>, Status> {
        let request = request.into_inner();
        let limit = match request.timeout_secs {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.into())),
        };
        self.pods.stop(&request.sandbox_id, limit).await?;
        Ok(Response::new(api::ControllerStopResponse {}))
    }

    async fn wait(
        &self,
        request: Request<api::ControllerWaitRequest>,
    ) -> Result<Response<api::ControllerWaitResponse>, Status> {
        let pod = self.pods.get(&request.into_inner().sandbox_id)?;
        let exit = pod.wait().await;
        Ok(Response::new(api::ControllerWaitResponse {
            exit_status: exit.code,
            exited_at: Some(exit.at.into()),
        }))
    }

    async fn status(
        &self,
        request: Request<api::ControllerStatusRequest>,
    ) -> Result<Response<api::ControllerStatusResponse>, Status> {
        let request = request.into_inner();
        let pod = self.pods.get(&request.sandbox_id)?;
        Ok(Response::new(status::status(&pod, request.verbose)))
    }

    async fn shutdown(
        &self,
        request: Request<api::ControllerShutdownRequest>,
    ) -> Result<Response<api::ControllerShutdownResponse>, Status> {
        self.pods.shutdown(&request.into_inner().sandbox_id).await?;
        Ok(Response::new(api::ControllerShutdownResponse {}))
    }

    async fn metrics(
        &self,
        request: Request<api::ControllerMetricsRequest>,
    ) -> Result<Response<api::ControllerMetricsResponse>, Status> {
        let pod = self.pods.get(&request.into_inner().sandbox_id)?;
        Ok(Response::new(api::ControllerMetricsResponse {
            metrics: Some(status::metrics(&pod)),
        }))
    }

    async fn update(
        &self,
        request: Request<api::ControllerUpdateRequest>,
    ) -> Result<Response<api::ControllerUpdateResponse>, Status> {
        let request = request.into_inner();
        let pod = self.pods.get(&request.sandbox_id)?;
        let extensions = request.sandbox.map(|sandbox| sandbox.extensions);
        for field in &request.fields {
            if field != TASKS_FIELD {
                return Err(Status::unimplemented(format!(
                    "fields = {field:?}: this sandboxer updates {TASKS_FIELD:?} only"
                )));
            }
            let tasks = extensions
                .as_ref()
                .and_then(|extensions| extensions.get(TASKS_EXTENSION))
                .ok_or_else(|| {
                    Status::invalid_argument(format!(
                        "sandbox.extensions has no {TASKS_EXTENSION:?}, which the field \
                         {TASKS_FIELD:?} announces"
                    ))
                })?;
            pod.update_tasks(&tasks.value).await?;
        }
        Ok(Response::new(api::ControllerUpdateResponse {}))
    }
}

/// The pod configuration in the options of Create. iSulad leaves the type empty, and `ctr`
/// sends no options at all.
fn decode_config(options: Option<prost_types::Any>) -> Result<PodSandboxConfig, PodError> {
    let Some(options) = options else {
        return Ok(PodSandboxConfig::default());
    };
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    if !name.is_empty() && name != POD_SANDBOX_CONFIG_TYPE {
        return Err(PodError::invalid(
            "options.type_url",
            options.type_url,
            format!("must be {POD_SANDBOX_CONFIG_TYPE:?} or empty"),
        ));
    }
    PodSandboxConfig::decode(options.value.as_slice()).map_err(|e| {
        PodError::invalid(
            "options.value",
            e.to_string(),
            format!("must be an encoded {POD_SANDBOX_CONFIG_TYPE}"),
        )
    })
}

impl From<PodError> for Status {
    fn from(error: PodError) -> Self {
        let code = match error.code() {
            ErrorCode::Cancelled => tonic::Code::Aborted,
            code => tonic::Code::from_i32(code as i32),
        };
        Self::new(code, with_causes(&error))
    }
}

/// Whether callers should treat a pod as running.
fn is_ready(phase: &Phase) -> bool {
    *phase == Phase::Ready
}

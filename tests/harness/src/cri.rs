//! A client of the Container Runtime Interface, as the kubelet is one.

use std::path::Path;
use std::time::Duration;

use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

/// Messages of CRI.
#[allow(
    warnings,
    missing_docs,
    missing_debug_implementations,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

use v1::image_service_client::ImageServiceClient;
use v1::runtime_service_client::RuntimeServiceClient;

/// Longest call: the first pod of a size waits for its template, on a host that may emulate
/// guest ring 0.
const LIMIT: Duration = Duration::from_secs(300);

/// A connection to a CRI server. Calls block.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    pods: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// Makes a method of [`Cri`] out of each method of the service.
macro_rules! calls {
    ($($name:ident($request:ident) -> $response:ident;)*) => {
        impl Cri {
            $(
                #[doc = concat!("`", stringify!($request), "`.")]
                ///
                /// # Errors
                /// What the server answers, or that it does not.
                pub fn $name(&self, request: v1::$request) -> Result<v1::$response, Status> {
                    let mut client = self.pods.clone();
                    self.finish(async move { client.$name(limited(request)).await })
                }
            )*
        }
    };
}

calls! {
    status(StatusRequest) -> StatusResponse;
    version(VersionRequest) -> VersionResponse;
    run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
    stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
    remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse;
    pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
    pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
    list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
    create_container(CreateContainerRequest) -> CreateContainerResponse;
    start_container(StartContainerRequest) -> StartContainerResponse;
    stop_container(StopContainerRequest) -> StopContainerResponse;
    remove_container(RemoveContainerRequest) -> RemoveContainerResponse;
    list_containers(ListContainersRequest) -> ListContainersResponse;
    container_status(ContainerStatusRequest) -> ContainerStatusResponse;
    container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
    exec_sync(ExecSyncRequest) -> ExecSyncResponse;
    exec(ExecRequest) -> ExecResponse;
    attach(AttachRequest) -> AttachResponse;
    port_forward(PortForwardRequest) -> PortForwardResponse;
    reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
    update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
    list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
}

impl Cri {
    /// A client of the server on `socket`, which need not be there yet.
    ///
    /// # Panics
    /// When there can be no async runtime.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("an async runtime");
        let address = format!("unix://{}", socket.display());
        let endpoint = Endpoint::from_shared(address).expect("a socket's address");
        let channel = runtime.block_on(async { endpoint.connect_lazy() });
        Self {
            runtime,
            pods: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
        }
    }

    /// Names of all images.
    ///
    /// # Errors
    /// What the server answers, or that it does not.
    pub fn images(&self) -> Result<Vec<String>, Status> {
        let mut client = self.images.clone();
        let request = v1::ListImagesRequest { filter: None };
        let listed = self.finish(async move { client.list_images(limited(request)).await })?;
        Ok(listed
            .images
            .into_iter()
            .flat_map(|i| i.repo_tags)
            .collect())
    }

    fn finish<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        self.runtime.block_on(async {
            tokio::time::timeout(LIMIT, call)
                .await
                .unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("over {LIMIT:?}"))))
                .map(Response::into_inner)
        })
    }
}

fn limited<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(LIMIT);
    request
}

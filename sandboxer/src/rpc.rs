//! containerd's Controller service, our own beside it, and the messages they carry, generated
//! from `proto/`.

use std::path::Path;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Error};

/// A channel to the daemon whose socket is `address`.
///
/// # Errors
/// Nothing listens there.
pub async fn channel(address: &Path) -> Result<Channel, Error> {
    let path = address.to_owned();
    let dial = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The name is not resolved: the connector dials the socket.
    Endpoint::from_static("http://sandboxer")
        .connect_with_connector(dial)
        .await
}

/// `containerd.services.sandbox.v1`: messages, client and server.
#[allow(
    warnings,
    missing_docs,
    missing_debug_implementations,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
mod generated {
    pub mod containerd {
        pub mod services {
            pub mod sandbox {
                pub mod v1 {
                    tonic::include_proto!("containerd.services.sandbox.v1");
                }
            }
        }
        pub mod types {
            tonic::include_proto!("containerd.types");
        }
    }
    pub mod kuasar {
        pub mod pods {
            pub mod v1 {
                tonic::include_proto!("kuasar.pods.v1");
            }
        }
    }
    pub mod runtime {
        pub mod v1 {
            tonic::include_proto!("runtime.v1");
        }
    }
}

/// `containerd.services.sandbox.v1`.
pub use generated::containerd::services::sandbox::v1 as controller;
/// `containerd.types`.
pub use generated::containerd::types;
/// `kuasar.pods.v1`: pausing pods and writing them to disk.
pub use generated::kuasar::pods::v1 as pods;
/// `runtime.v1`: what CRI says about a pod.
pub use generated::runtime::v1 as cri;

/// `type_url` under which containerd sends [`cri::PodSandboxConfig`].
pub const POD_SANDBOX_CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

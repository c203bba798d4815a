//! Messages and clients, generated from `proto/`.

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
        pub mod runtime {
            pub mod sandbox {
                pub mod v1 {
                    tonic::include_proto!("containerd.runtime.sandbox.v1");
                }
            }
        }
        pub mod services {
            pub mod sandbox {
                pub mod v1 {
                    tonic::include_proto!("containerd.services.sandbox.v1");
                }
            }
            pub mod version {
                pub mod v1 {
                    tonic::include_proto!("containerd.services.version.v1");
                }
            }
        }
        pub mod shim {
            tonic::include_proto!("containerd.shim");
        }
        pub mod types {
            tonic::include_proto!("containerd.types");
        }
    }
    pub mod runtime {
        pub mod v1 {
            tonic::include_proto!("runtime.v1");
        }
    }
    pub mod ttrpc {
        tonic::include_proto!("ttrpc");
    }
}

/// `containerd.runtime.sandbox.v1`: what containerd asks a shim.
pub(crate) use generated::containerd::runtime::sandbox::v1 as sandbox;
/// `containerd.services.sandbox.v1`: what the daemon serves.
pub(crate) use generated::containerd::services::sandbox::v1 as controller;
/// `containerd.services.version.v1`.
pub(crate) use generated::containerd::services::version::v1 as version;
/// What the programs print.
pub(crate) use generated::containerd::shim as printed;
/// `runtime.v1`: what CRI says about a pod.
pub(crate) use generated::runtime::v1 as cri;
/// What ttrpc frames hold.
pub(crate) use generated::ttrpc;

/// `type_url` of [`cri::PodSandboxConfig`].
pub(crate) const POD_SANDBOX_CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

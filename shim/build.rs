//! Generates messages and gRPC clients, without protoc. The Controller and the pod's
//! configuration are the daemon's own contract, so they are read where it keeps them.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=../sandboxer/proto");
    let files = protox::compile(
        [
            "containerd/runtime/sandbox/v1/sandbox.proto",
            "containerd/services/sandbox/v1/controller.proto",
            "containerd/services/version/v1/version.proto",
            "containerd/shim.proto",
            "runtime/v1/pod.proto",
            "ttrpc/ttrpc.proto",
        ],
        ["proto", "../sandboxer/proto"],
    )?;
    tonic_prost_build::configure()
        .build_server(false)
        .build_client(true)
        .compile_fds(files)?;
    Ok(())
}

//! Generates the gRPC service and messages from `proto/`, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(
        [
            "containerd/services/sandbox/v1/controller.proto",
            "kuasar/pods/v1/pods.proto",
            "runtime/v1/pod.proto",
        ],
        ["proto"],
    )?;
    tonic_prost_build::configure()
        .build_server(true)
        .build_client(true)
        .compile_fds(files)?;
    Ok(())
}

//! containerd's shim for pods of `wasm-sandboxer`, one process per pod.

use std::process::ExitCode;

fn main() -> ExitCode {
    shim::main(&shim::Runtime {
        program: "containerd-shim-kuasar-wasm-v2",
        name: "io.containerd.kuasar-wasm.v2",
        key: "wasm",
        daemon: "wasm-sandboxer",
        socket: "/run/wasm-sandboxer.sock",
        serves: true,
    })
}

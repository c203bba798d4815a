//! containerd's shim for pods of `quark-sandboxer`, one process per pod.

use std::process::ExitCode;

fn main() -> ExitCode {
    shim::main(&shim::Runtime {
        program: "containerd-shim-kuasar-quark-v2",
        name: "io.containerd.kuasar-quark.v2",
        key: "quark",
        daemon: "quark-sandboxer",
        socket: "/run/quark-sandboxer.sock",
        serves: true,
    })
}

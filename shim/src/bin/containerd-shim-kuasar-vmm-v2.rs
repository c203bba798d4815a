//! containerd's shim for pods of `vmm-sandboxer`, one process per pod.

use std::process::ExitCode;

fn main() -> ExitCode {
    shim::main(&shim::Runtime {
        program: "containerd-shim-kuasar-vmm-v2",
        name: "io.containerd.kuasar-vmm.v2",
        key: "vmm",
        daemon: "vmm-sandboxer",
        socket: "/run/vmm-sandboxer.sock",
        serves: true,
    })
}

//! Cleans up for containerd after pods of `vmm-sandboxer` behind a proxy plugin.

use std::process::ExitCode;

fn main() -> ExitCode {
    shim::main(&shim::Runtime {
        program: "containerd-shim-kuasar-vmm-v1",
        name: "io.containerd.kuasar-vmm.v1",
        key: "vmm",
        daemon: "vmm-sandboxer",
        socket: "/run/vmm-sandboxer.sock",
        serves: false,
    })
}

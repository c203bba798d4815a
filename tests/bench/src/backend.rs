//! The backends that pods are measured on.

use std::fs;
use std::path::Path;

use harness::daemon::Daemon;
use serde_json::Value;

use crate::peer::first_line;
use crate::report::{OURS, Report};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// A backend: its name in the table, its program, and its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Backend {
    /// Name in the table.
    pub name: &'static str,
    program: Option<&'static str>,
    /// The daemon's configuration.
    pub config: &'static str,
}

const BACKENDS: [Backend; 4] = [
    Backend {
        name: OURS,
        program: None,
        config: "[templates]\nwarm = 2\n",
    },
    Backend {
        name: "QEMU, TCG",
        program: Some(QEMU),
        config: "[sandbox]\nmode = \"external\"\n[hypervisor.qemu]\naccel = \"tcg\"\n",
    },
    Backend {
        name: "QEMU, KVM",
        program: Some(QEMU),
        config: "[sandbox]\nmode = \"external\"\n[hypervisor.qemu]\naccel = \"kvm\"\n",
    },
    Backend {
        name: "Cloud Hypervisor",
        program: Some("/usr/local/bin/cloud-hypervisor"),
        config: "[sandbox]\nmode = \"external\"\n[hypervisor]\nkind = \"cloud-hypervisor\"\n",
    },
];

/// The backends that this host has, whose versions go into the report, as does what is missing.
pub fn here(report: &mut Report) -> Vec<Backend> {
    let mut found = Vec::new();
    for backend in BACKENDS {
        if let Some(program) = backend.program.map(Path::new) {
            if !program.exists() {
                let why = format!("{}: there is no {}", backend.name, program.display());
                report.skipped.push(why);
                continue;
            }
            let version = first_line(program);
            report.versions.push((backend.name.to_owned(), version));
        }
        found.push(backend);
    }
    found
}

/// The daemon, and the VMMs and supervisors of its pods.
#[must_use]
pub fn processes(daemon: &Daemon) -> Vec<u32> {
    let mut pids = vec![daemon.pid()];
    let pods = fs::read_dir(daemon.state_dir()).into_iter().flatten();
    for pod in pods.flatten() {
        let text = fs::read(pod.path().join("vmm.json")).unwrap_or_default();
        let processes: Value = serde_json::from_slice(&text).unwrap_or_default();
        for name in ["supervisor", "vmm"] {
            let pid = processes.pointer(&format!("/{name}/pid"));
            let pid = pid.and_then(Value::as_u64);
            pids.extend(pid.and_then(|pid| u32::try_from(pid).ok()));
        }
    }
    pids
}

//! The backends that pods are measured on.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use harness::daemon::Daemon;
use serde_json::Value;

use crate::peer::first_line;
use crate::report::{OURS, Report};

/// A backend: its name in the table, its program, and its configuration.
#[derive(Clone, Debug)]
pub struct Backend {
    /// Name in the table.
    pub name: &'static str,
    program: Option<PathBuf>,
    /// The daemon's configuration.
    pub config: String,
}

/// Where the external hypervisors are.
#[derive(Clone, Debug, Args)]
pub struct Programs {
    /// QEMU's program
    #[arg(long, default_value = harness::QEMU, value_name = "FILE")]
    qemu: PathBuf,
    /// Cloud Hypervisor's program
    #[arg(long, default_value = harness::CLOUD_HYPERVISOR, value_name = "FILE")]
    cloud_hypervisor: PathBuf,
}

impl Programs {
    /// The backends that this host has, whose versions go into the report, as does what is
    /// missing.
    pub fn here(&self, report: &mut Report) -> Vec<Backend> {
        let mut found = Vec::new();
        for backend in self.all() {
            if let Some(program) = &backend.program {
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

    /// Our own with a window onto the files of the share, for work on these.
    #[must_use]
    pub fn with_window() -> Backend {
        Backend {
            name: "in-process, DAX",
            program: None,
            config: "[fs]\ndax = \"64MiB\"\n".to_owned(),
        }
    }

    fn all(&self) -> [Backend; 4] {
        let external = |name, program: &Path, kind: &str, rest: &str| Backend {
            name,
            program: Some(program.to_owned()),
            config: format!(
                "[sandbox]\nmode = \"external\"\n[hypervisor]\nkind = \"{kind}\"\n\
                 [hypervisor.{kind}]\npath = {program:?}\n{rest}"
            ),
        };
        [
            Backend {
                name: OURS,
                program: None,
                config: "[templates]\nwarm = 2\n".to_owned(),
            },
            external("QEMU, TCG", &self.qemu, "qemu", "accel = \"tcg\"\n"),
            external("QEMU, KVM", &self.qemu, "qemu", "accel = \"kvm\"\n"),
            external(
                "Cloud Hypervisor",
                &self.cloud_hypervisor,
                "cloud-hypervisor",
                "",
            ),
        ]
    }
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

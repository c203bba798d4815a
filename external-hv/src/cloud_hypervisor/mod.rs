//! Cloud Hypervisor: started empty, then told everything over its REST API.
//!
//! | file | idea |
//! |---|---|
//! | `api` | requests, with fds |
//! | `config` | the VM as the API describes it |
//! | `control` | a running VMM |
//! | `events` | its event monitor |

mod api;
mod config;
mod control;
mod events;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmm_core::Host;
use vmm_core::vm::VmError;

use self::control::ChControl;
use crate::capability::Backend;
use crate::hypervisor::{
    Control, GuestVsock, HvError, Hypervisor, Launch, Layout, MachineSpec, Nic, Started,
    check_program,
};
use crate::supervisor::{FIRST_FREE_FD, Listen};

/// Name for errors and `kuasar-ctl`.
pub const NAME: &str = "cloud-hypervisor";

/// The first release whose VMs have a `payload`, and no `kernel`, `initramfs` and `cmdline`.
const PAYLOAD_SINCE: u32 = 28;
/// The first that can be told a disk's format. Those before look for it in the disk, where a
/// guest can write what they find.
const DISK_FORMAT_SINCE: u32 = 51;

const API_FD: i32 = FIRST_FREE_FD;
const EVENTS_FD: i32 = FIRST_FREE_FD + 1;

/// How Cloud Hypervisor is started: `[hypervisor.cloud-hypervisor]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChConfig {
    /// The program.
    pub path: PathBuf,
    /// Guest memory in huge pages.
    pub hugepages: bool,
    /// Allocate all guest memory at start.
    pub prealloc: bool,
    /// Root file system image, as persistent memory.
    pub image: Option<PathBuf>,
    /// Where the guest's entropy comes from.
    pub entropy_source: PathBuf,
    /// The VMM logs more.
    pub verbose: bool,
    /// The VMM's own system call filter.
    pub seccomp: bool,
}

impl Default for ChConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::from("/usr/local/bin/cloud-hypervisor"),
            hugepages: false,
            prealloc: false,
            image: None,
            entropy_source: PathBuf::from("/dev/urandom"),
            verbose: false,
            seccomp: true,
        }
    }
}

/// Starts Cloud Hypervisors.
#[derive(Clone, Debug)]
pub struct CloudHypervisor {
    config: Arc<ChConfig>,
    /// Major version of the program.
    release: u32,
    /// What guests need of their kernel on this host.
    parameters: Vec<String>,
}

impl CloudHypervisor {
    /// Checks the program, and asks it for its version. Blocks.
    ///
    /// # Errors
    /// It cannot be run, or there is no KVM.
    pub fn new(config: ChConfig, host: &Result<Host, String>) -> Result<Self, HvError> {
        check_program("hypervisor.cloud-hypervisor.path", &config.path)?;
        let wrong = |why: String| HvError::Program {
            key: "hypervisor.cloud-hypervisor.path".to_owned(),
            path: config.path.clone(),
            why,
        };
        let output = Command::new(&config.path).arg("--version").output();
        let output = output.map_err(|err| wrong(err.to_string()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let release = release(&text).ok_or_else(|| {
            wrong(format!(
                "`--version` says {:?}: it is no Cloud Hypervisor",
                text.trim()
            ))
        })?;
        let host = host.as_ref().map_err(|why| wrong(why.clone()))?;
        Ok(Self {
            parameters: crate::kernel_parameters(host),
            release,
            config: Arc::new(config),
        })
    }

    fn args(&self) -> Vec<String> {
        let mut args = vec![
            "--api-socket".to_owned(),
            format!("fd={API_FD}"),
            "--event-monitor".to_owned(),
            format!("fd={EVENTS_FD}"),
            "--seccomp".to_owned(),
            self.config.seccomp.to_string(),
        ];
        if self.config.verbose {
            args.push("-vv".to_owned());
        }
        args
    }
}

fn events_pipe(layout: &Layout) -> PathBuf {
    layout.dir().join("vmm-events")
}

/// The number in "cloud-hypervisor v48.0.0", or of a build in between ("v48.0-12-gabc").
fn release(version: &str) -> Option<u32> {
    let mut words = version.split_whitespace();
    if words.next()? != "cloud-hypervisor" {
        return None;
    }
    let number = words.next()?.trim_start_matches('v');
    number.split(['.', '-']).next()?.parse().ok()
}

#[async_trait]
impl Hypervisor for CloudHypervisor {
    fn backend(&self) -> Backend {
        Backend::CloudHypervisor
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn launch(&self, spec: &MachineSpec, nics: Vec<Nic>) -> Result<Launch, VmError> {
        let layout = Layout::new(&spec.dir);
        let events = events::make(&events_pipe(&layout)).map_err(|source| VmError::Io {
            what: "cannot make the pipe of Cloud Hypervisor's events".to_owned(),
            source,
        })?;
        Ok(Launch {
            program: self.config.path.clone(),
            args: self.args(),
            fds: vec![(events, EVENTS_FD)],
            listens: vec![Listen {
                path: layout.api(),
                fd: API_FD,
            }],
            nics,
            vsock: GuestVsock::Vmms,
        })
    }

    async fn connect(
        &self,
        spec: &MachineSpec,
        started: Started,
    ) -> Result<Box<dyn Control>, VmError> {
        let vm = config::vm(&self.config, self.release, &self.parameters, spec);
        let control = ChControl::connect(spec, self.release, vm, started).await?;
        Ok(Box::new(control))
    }
}

//! Machines on the real KVM, with guests of a few instructions.

mod config;
mod disks;
mod ends;
mod guest;
mod life;
mod pvh;
mod range;
mod snapshot;

use std::time::Duration;

use tokio::runtime::Runtime;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use self::guest::Code;
use super::Machine;
use crate::config::MachineConfig;
use crate::host::Host;
use crate::vm::{ExitReason, Vm};

/// How long a test waits before it fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// The host, or `None` after saying why the test is skipped.
fn host() -> Option<Host> {
    match Host::probe() {
        Ok(host) => Some(host),
        Err(err) => {
            println!("skipped: {err}");
            None
        }
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// A machine of one vCPU that runs `code`, and the folder of its kernel.
fn machine(host: &Host, name: &str, code: &Code) -> Machine {
    machine_with(host, name, code, |config| config)
}

fn machine_with(
    host: &Host,
    name: &str,
    code: &Code,
    change: impl FnOnce(MachineConfig) -> MachineConfig,
) -> Machine {
    let dir = tempfile::tempdir().unwrap();
    let mut config = MachineConfig::new(name, code.kernel(dir.path()));
    config.memory_bytes = 64 << 20;
    Machine::build(host, change(config)).unwrap()
}

impl Machine {
    /// Four bytes of guest memory.
    fn peek(&self, address: u64) -> u32 {
        self.peek_at(address)
    }

    /// Eight bytes of guest memory.
    fn peek_u64(&self, address: u64) -> u64 {
        self.peek_at(address)
    }

    fn peek_at<T: ByteValued>(&self, address: u64) -> T {
        let live = self.live().unwrap();
        let memory = live.vm.ram().unwrap().guest_memory();
        memory.read_obj(GuestAddress(address)).unwrap()
    }
}

/// Starts the machine and waits for its end.
async fn run(machine: &Machine) -> ExitReason {
    machine.start().await.unwrap();
    ended(machine).await
}

async fn ended(machine: &Machine) -> ExitReason {
    let mut exited = machine.exited();
    let reason = tokio::time::timeout(PATIENCE, exited.wait_for(Option::is_some))
        .await
        .expect("the machine ends")
        .unwrap();
    reason.clone().unwrap()
}

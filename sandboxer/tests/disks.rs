//! Disks that come and go in a running machine, with the agent in its guest.
#![allow(
    clippy::panic,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    missing_docs,
    reason = "the whole file is a test"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::rpc;
use sandboxer::agent::{AgentClient, Connected, Limits};
use sandboxer::backend::vmm::{BackendError, VmmBackend};
use sandboxer::backend::{MachineRequest, SandboxBackend};
use sandboxer::config::Config;
use vmm_core::vm::{Disk, DiskPlace, Vm};

const SLOW: Duration = Duration::from_secs(300);

/// A machine of the default size and its agent.
struct Guest {
    vm: Arc<dyn Vm>,
    agent: Connected,
    dir: tempfile::TempDir,
}

impl Guest {
    /// Why there can be none is a reason to skip.
    async fn start() -> Result<Self, BackendError> {
        let config = Config::default();
        let backend = VmmBackend::new(&config).await?;
        let dir = tempfile::tempdir().unwrap();
        let request = MachineRequest {
            pod: "disks".to_owned(),
            vcpus: config.vm.vcpus,
            memory_bytes: config.vm.memory.as_u64(),
            share: dir.path().join("share"),
            dir: dir.path().to_owned(),
            limits: None,
            disks: Vec::new(),
            netns: None,
        };
        fs::create_dir(&request.share).unwrap();
        backend.prepare(&request).await;
        let vm = backend.build(request).await.unwrap().vm;
        let listener = vm.listen(agent_api::CONTROL_PORT).unwrap();
        vm.start().await.unwrap();
        let limits = Limits {
            boot: SLOW,
            call: SLOW,
            connect: SLOW,
        };
        let agent = AgentClient::connect(listener, limits).await.unwrap();
        Ok(Self { vm, agent, dir })
    }

    fn disk(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Plugs a disk in and lets the guest find it.
    async fn attach(&self, slot: usize, path: &Path) -> (rpc::Disk, rpc::DiskReply) {
        let serial = format!("disk{slot}");
        let disk = Disk {
            path: path.to_owned(),
            read_only: false,
            direct: false,
            serial: serial.clone(),
        };
        let place = self.vm.attach_disk(slot, disk).await.unwrap();
        let DiskPlace::MmioDevice(number) = place else {
            panic!("{place:?}");
        };
        let disk = rpc::Disk {
            serial,
            mmio_device: Some(number),
            ..Default::default()
        };
        let found = self.agent.client.attach_disk(disk.clone()).await.unwrap();
        (disk, found)
    }

    async fn detach(&self, slot: usize, disk: rpc::Disk) {
        self.agent.client.detach_disk(disk).await.unwrap();
        self.vm.detach_disk(slot, SLOW).await.unwrap();
    }
}

fn fds() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_running_machine_takes_fifty_disks_one_after_the_other() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let guest = match Guest::start().await {
            Ok(guest) => guest,
            Err(why) => return println!("skipped: {why}"),
        };
        let slots = guest.vm.disk_slots();
        let (small, large) = (
            guest.disk("small", &[1; 4096]),
            guest.disk("large", &[2; 8192]),
        );
        // What the first one leaves in the guest's and the host's caches is no leak.
        let (disk, _) = guest.attach(0, &small).await;
        guest.detach(0, disk).await;
        let before = fds();
        let begin = std::time::Instant::now();
        for round in 0..50_usize {
            let slot = round % slots;
            let (path, bytes) = if round % 2 == 0 {
                (&small, 4096)
            } else {
                (&large, 8192)
            };
            let (disk, found) = guest.attach(slot, path).await;
            // It is found again, and always under the first name: nothing is left of the last.
            let again = guest.agent.client.attach_disk(disk.clone()).await.unwrap();
            assert_eq!(again, found);
            assert_eq!(
                (found.path.as_str(), found.bytes),
                ("/dev/vda", bytes),
                "{round}"
            );
            guest.detach(slot, disk).await;
        }
        println!("50 disks took {:?}", begin.elapsed());
        assert_eq!(fds(), before);
        // All slots at once, and no more.
        let mut all = Vec::new();
        for slot in 0..slots {
            let path = guest.disk(&format!("disk{slot}"), &[3; 512]);
            all.push(guest.attach(slot, &path).await);
        }
        let mut names: Vec<_> = all.iter().map(|(_, found)| found.path.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), slots);
        guest.vm.stop(SLOW).await.unwrap();
    });
}

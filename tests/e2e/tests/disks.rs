//! Block devices and disk images of the host, in containers and in running machines.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::rpc;
use e2e::World;
use harness::disk::{erofs, ext4, read, recover, tools_missing};
use harness::{eventually, kvm_missing, skip_if};
use sandboxer::agent::{AgentClient, Connected, Limits};
use sandboxer::backend::vmm::VmmBackend;
use sandboxer::backend::{MachineRequest, SandboxBackend};
use sandboxer::config::Config;
use vmm_core::vm::{Disk, DiskPlace, Vm};

const SLOW: Duration = Duration::from_secs(300);

/// Prints a number each time the file that it was written to is on the disk.
const SYNCED: &str = "n=0; while :; do n=$((n+1)); echo $n >> /data/count; sync; echo $n; done";

#[test]
fn containers_run_from_disks_and_keep_what_they_synced() {
    skip_if!(kvm_missing());
    skip_if!(tools_missing());
    let mut world = World::new();
    let at = |name: &str| world.scratch().join(name);
    let root = ext4(&at("root.ext4"), 24, Some(&world.rootfs));
    let lower = erofs(&at("root.erofs"), &world.rootfs);
    let data = ext4(&at("data.ext4"), 16, None);
    let raw = at("raw.img");
    fs::write(&raw, "raw disk".repeat(128)).unwrap();
    let raw = format!("{}:/dev/raw:ro", raw.display());

    // A root file system, a volume and a device; the root is written to.
    let mounted = format!("{data}:/data");
    let script = "mount | grep -q '/dev/vda on / type ext4' || exit 2; echo root > /written; \
                  echo data > /data/file; head -c 8 /dev/raw; \
                  echo x 2>&- > /dev/raw && exit 3; exit 0";
    #[rustfmt::skip]
    let ran = world.ctl.run([
        "run", "--rootfs", &root, "--disk", &mounted, "--disk", &raw, "--", "/bin/sh", "-c", script,
    ]);
    assert_eq!(ran.expect_code(0).stdout, "raw disk");
    assert_eq!(read(&root, "written"), "root\n");
    assert_eq!(read(&data, "file"), "data\n");

    // A root file system that cannot be written to has a layer in memory.
    let script = "echo layer > /written && cat /written && head -c 1 /data/file";
    let ran = world.ctl.run([
        "run",
        "--rootfs",
        &lower,
        "--disk",
        &format!("{data}:/data:ro"),
        "--",
        "/bin/sh",
        "-c",
        script,
    ]);
    assert_eq!(ran.expect_code(0).stdout, "layer\nd");
    world.assert_nothing_left();

    // The daemon, and so the pod, is killed while the guest writes.
    let rootfs = world.rootfs.to_str().unwrap().to_owned();
    #[rustfmt::skip]
    let ran = world.ctl.run([
        "run", "--detach", "--name", "writer", "--disk", &mounted, "--rootfs", &rootfs, "--",
        "/bin/sh", "-c", SYNCED,
    ]);
    ran.expect_code(0);
    let synced = || {
        let logs = world.ctl.run(["logs", "writer"]).stdout;
        logs.lines()
            .last()
            .and_then(|line| line.parse::<u32>().ok())
    };
    eventually("the third sync", SLOW, || synced().filter(|n| *n >= 3));
    // An image has one writer.
    #[rustfmt::skip]
    let second = world.ctl.run([
        "run", "--disk", &mounted, "--rootfs", &rootfs, "--", "/bin/true",
    ]);
    second.expect_code(125);
    assert!(second.stderr.contains("in use"), "{second:?}");
    let kept = synced().unwrap();
    world.daemon.kill();
    recover(&data);
    let numbers: Vec<u32> = read(&data, "count")
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    let last = u32::try_from(numbers.len()).unwrap();
    assert!(numbers.iter().copied().eq(1..=last), "{numbers:?}");
    assert!(last >= kept, "{kept} were synced, {last} are there");
}

/// A machine of the default size and its agent.
struct Guest {
    vm: Arc<dyn Vm>,
    agent: Connected,
    dir: tempfile::TempDir,
}

impl Guest {
    async fn start() -> Self {
        let config = Config::default();
        let backend = VmmBackend::new(&config).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let request = MachineRequest {
            pod: "disks".to_owned(),
            vcpus: config.vm.vcpus,
            memory_bytes: config.vm.memory.as_u64(),
            share: dir.path().join("share"),
            dir: dir.path().to_owned(),
            disks: Vec::new(),
            netns: None,
        };
        fs::create_dir(&request.share).unwrap();
        backend.prepare(&request).await;
        let vm = backend.build(request).await.unwrap();
        let listener = vm.listen(agent_api::CONTROL_PORT).unwrap();
        vm.start().await.unwrap();
        let limits = Limits {
            boot: SLOW,
            call: SLOW,
            connect: SLOW,
        };
        let agent = AgentClient::connect(listener, limits).await.unwrap();
        Self { vm, agent, dir }
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
    skip_if!(kvm_missing());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let guest = Guest::start().await;
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

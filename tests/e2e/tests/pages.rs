//! Guest memory in huge pages, and vCPUs on CPUs of their own.
#![allow(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;

use e2e::World;
use harness::{kvm_missing, not_in_process, skip_if};

const CONFIG: &str = "[vm]\nmemory = \"96MiB\"\nhuge_pages = true\ncpu_affinity = [1]\n";
const PAGES: &str = "/proc/sys/vm/nr_hugepages";
/// Of the guest, and some to spare.
const WANTED: u64 = 52;

/// Huge pages of this host, as many as before when dropped.
struct Pages(u64);

impl Pages {
    fn take() -> Result<Self, String> {
        let now = || fs::read_to_string(PAGES).map_err(|e| format!("{PAGES}: {e}"));
        let before: u64 = now()?.trim().parse().map_err(|e| format!("{PAGES}: {e}"))?;
        let set = fs::write(PAGES, (before + WANTED).to_string());
        set.map_err(|e| format!("{PAGES} cannot be written: {e}"))?;
        let pages = Self(before);
        let got: u64 = now()?.trim().parse().map_err(|e| format!("{PAGES}: {e}"))?;
        let missing = (got < before + WANTED).then(|| format!("the host has {got} huge pages"));
        missing.map_or(Ok(pages), Err)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let _ = fs::write(PAGES, self.0.to_string());
    }
}

#[test]
fn a_pod_runs_in_huge_pages_on_its_cpu() {
    skip_if!(kvm_missing());
    skip_if!(not_in_process());
    let pages = Pages::take();
    skip_if!(pages.as_ref().err().cloned());
    let cpus = std::thread::available_parallelism().unwrap().get();
    skip_if!((cpus < 2).then_some("this host has one CPU"));
    let world = World::with_config(CONFIG);
    let rootfs = world.rootfs.to_str().unwrap().to_owned();
    #[rustfmt::skip]
    let run = world.ctl.run([
        "run", "--detach", "--name", "pod", "--rootfs", &rootfs, "--", "/bin/sleep", "1000000",
    ]);
    run.expect_code(0);
    let pid = world.daemon.pid();
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let huge = smaps
        .lines()
        .filter(|line| line.starts_with("KernelPageSize:"));
    assert!(
        huge.into_iter().any(|line| line.contains("2048 kB")),
        "no mapping of huge pages"
    );
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut vcpus = 0;
    for task in tasks.map(|task| task.unwrap().path()) {
        if !fs::read_to_string(task.join("comm"))
            .unwrap()
            .starts_with("vcpu")
        {
            continue;
        }
        vcpus += 1;
        let status = fs::read_to_string(task.join("status")).unwrap();
        assert!(status.contains("Cpus_allowed_list:\t1\n"), "{status}");
    }
    assert_eq!(vcpus, 1);
    world.ctl.run(["rm", "--force", "pod"]).expect_code(0);
    world.assert_nothing_left();

    // There are not enough for one of this size.
    #[rustfmt::skip]
    let large = world.ctl.run([
        "run", "--memory", "8GiB", "--rootfs", &rootfs, "--", "/bin/true",
    ]);
    large.expect_code(125);
    assert!(large.stderr.contains("vm.nr_hugepages"), "{large:?}");
    world.assert_nothing_left();
}

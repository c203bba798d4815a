//! Machines whose memory and CPUs come and go, and that have files as memory.
#![allow(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole file is a test"
)]

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use e2e::World;
use harness::{eventually, kvm_missing, skip_if};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

const SLOW: Duration = Duration::from_secs(300);

/// Room for a second CPU, for one of Linux's memory blocks, and for files above that.
const CONFIG: &str = "[vm]\nmemory = \"192MiB\"\nmax_memory = \"320MiB\"\nmax_vcpus = 2\n\
                      [fs]\ndax = \"64MiB\"\n";

const MIB: u64 = 1 << 20;

#[test]
fn memory_and_cpus_come_and_free_memory_goes_back() {
    skip_if!(kvm_missing());
    let world = World::with_config(CONFIG);
    let rootfs = world.rootfs.to_str().unwrap().to_owned();
    #[rustfmt::skip]
    let run = world.ctl.run([
        "run", "--detach", "--name", "pod", "--rootfs", &rootfs, "--", "/bin/sleep", "1000000",
    ]);
    run.expect_code(0);
    let guest = |command: &str| {
        let exec = world
            .ctl
            .run(["exec", "pod", "--", "/bin/sh", "-c", command]);
        exec.expect_code(0).stdout.trim().to_owned()
    };
    let total = || -> u64 {
        let kib = guest("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo");
        kib.parse::<u64>().unwrap() << 10
    };
    let resident = || -> u64 {
        let inspect = world
            .ctl
            .run(["inspect", "pod"])
            .expect_code(0)
            .stdout
            .clone();
        let inspect: serde_json::Value = serde_json::from_str(&inspect).unwrap();
        find_number(&inspect, "resident_bytes").expect("resident_bytes")
    };

    // Filled memory is the host's again once the guest has freed it.
    let before = resident();
    guest("dd if=/dev/zero of=/dev/shm/file bs=1M count=24 2>/dev/null");
    let filled = resident();
    assert!(filled > before + 20 * MIB, "{before} {filled}");
    guest("rm /dev/shm/file");
    let limit = filled - 12 * MIB;
    let freed = eventually("free memory to go back", SLOW, || {
        Some(resident()).filter(|resident| *resident < limit)
    });
    println!("resident: {before}, filled {filled}, freed {freed}");

    // More than the machine has.
    assert_eq!(guest("nproc"), "1");
    let had = total();
    assert!(had < 192 * MIB, "{had}");
    #[rustfmt::skip]
    let update = world.ctl.run(["update", "--memory", "240MiB", "--cpus", "2", "pod"]);
    update.expect_code(0);
    assert_eq!(guest("nproc"), "2");
    let has = total();
    assert!(has >= had + 48 * MIB, "{had} {has}");
    // More than it can have.
    let update = world.ctl.run(["update", "--memory", "1GiB", "pod"]);
    update.expect_code(125);
    assert!(update.stderr.contains("vm.max_memory"), "{update:?}");

    world.ctl.run(["rm", "--force", "pod"]).expect_code(0);
    world.assert_nothing_left();
}

/// KVM tells at once of a page that is gone, or never.
const NOTICED: Duration = Duration::from_secs(20);

/// Maps a file, and reads it all again and again; says so once it has.
const READER: &str = r#"
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
int main(int argc, char **argv) {
	struct stat is;
	int fd = open(argv[argc - 1], O_RDONLY);
	if (fd < 0 || fstat(fd, &is))
		return 1;
	volatile char *file = mmap(0, is.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (file == MAP_FAILED)
		return 2;
	for (int told = 0;; told = 1) {
		for (long at = 0; at < is.st_size; at += 4096)
			(void)file[at];
		if (!told) {
			puts("reading");
			fflush(stdout);
		}
	}
}
"#;

#[test]
fn files_of_the_share_are_memory_of_the_guest() {
    skip_if!(kvm_missing());
    skip_if!(harness::not_in_process());
    let mut world = World::with_config(CONFIG);
    let data = world.scratch().join("data");
    fs::create_dir(&data).unwrap();
    let kind = nix::sys::statfs::statfs(&data).unwrap().filesystem_type();
    if kind == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC {
        return println!("skipped: temporary files are on an overlay, which is not mapped");
    }
    let built = compile(READER, &data.join("reader"));
    let rootfs = world.rootfs.to_str().unwrap().to_owned();
    fs::copy(world.rootfs.join("bin/busybox"), data.join("busybox")).unwrap();
    let mut content: Vec<u8> = (0..3 * MIB).map(|i| ((i * 31) >> 3) as u8).collect();
    fs::write(data.join("file"), &content).unwrap();
    let volume = format!("{}:/data", data.display());
    let run = |name: &str| {
        #[rustfmt::skip]
        let run = world.ctl.run([
            "run", "--detach", "--name", name, "--volume", &volume, "--rootfs", &rootfs,
            "--", "/bin/sleep", "1000000",
        ]);
        run.expect_code(0);
    };
    run("pod");
    let guest = |command: &str| {
        let exec = ["exec", "pod", "--", "/bin/sh", "-c", command];
        world.ctl.run(exec).expect_code(0).stdout.clone()
    };
    let sum = |content: &[u8]| format!("{:x}", Sha256::digest(content));
    let maps = || fs::read_to_string(format!("/proc/{}/maps", world.daemon.pid())).unwrap();

    assert!(guest("sha256sum /data/file").starts_with(&sum(&content)));
    let path = data.join("file");
    let lines = |maps: &str, access: &str| {
        // By its name in the share.
        let of_file = |line: &&str| line.ends_with("/mounts/0/file");
        let lines = maps.lines().filter(of_file);
        lines.filter(|line| line.contains(access)).count()
    };
    assert!(lines(&maps(), " r--s ") > 0, "{}", maps());
    // The host writes in place, then the guest; neither changes the size.
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    for at in [5, 2 * MIB + 7] {
        file.write_all_at(b"host", at).unwrap();
        content[usize::try_from(at).unwrap()..][..4].copy_from_slice(b"host");
    }
    assert!(guest("sha256sum /data/file").starts_with(&sum(&content)));
    guest("printf guest | dd of=/data/file bs=1 seek=3000000 conv=notrunc 2>/dev/null; sync");
    content[3_000_000..3_000_005].copy_from_slice(b"guest");
    assert!(
        fs::read(&path).unwrap() == content,
        "the guest's write differs"
    );
    assert!(lines(&maps(), " rw-s ") > 0, "{}", maps());
    // Programs run from there; files grow and shrink.
    let shown = guest("/data/busybox echo run; echo end >> /data/file; tail -c 4 /data/file");
    assert_eq!(shown, "run\nend\n");
    guest("/data/busybox truncate -s 5000 /data/file");
    content.truncate(5000);
    assert!(guest("sha256sum /data/file").starts_with(&sum(&content)));

    // What is mapped goes with the machine.
    world.ctl.run(["snapshot", "pod"]).expect_code(0);
    assert_eq!(lines(&maps(), "s "), 0, "{}", maps());
    world.ctl.run(["restore", "pod"]).expect_code(0);
    assert!(lines(&maps(), "s ") > 0, "{}", maps());
    assert!(guest("sha256sum /data/file").starts_with(&sum(&content)));

    // The host cuts off what the guest reads: at most its machine ends.
    match built {
        Err(why) => println!("skipped: a file that is cut off: {why}"),
        Ok(()) => {
            fs::write(data.join("cut"), vec![7; 1 << 20]).unwrap();
            let mut reader = world
                .ctl
                .command(["exec", "pod", "--", "/data/reader", "/data/cut"]);
            let mut reader = reader.stdout(Stdio::piped()).spawn().unwrap();
            let mut said = [0; 8];
            reader
                .stdout
                .as_mut()
                .unwrap()
                .read_exact(&mut said)
                .unwrap();
            let cut = fs::File::options()
                .write(true)
                .open(data.join("cut"))
                .unwrap();
            cut.set_len(0).unwrap();
            let pid = Pid::from_raw(reader.id().cast_signed());
            let (told, ended) = std::sync::mpsc::channel();
            std::thread::spawn(move || told.send(reader.wait().unwrap()));
            if let Ok(ended) = ended.recv_timeout(NOTICED) {
                assert!(!ended.success(), "{ended}");
                let log = world.daemon.log();
                assert!(log.contains("cut off on the host"), "{log}");
                println!("cut off: {ended}");
            } else {
                println!("KVM does not say that a page is gone: the vCPU tries for ever");
                kill(pid, Signal::SIGKILL).unwrap();
            }
        }
    }
    world.ctl.run(["rm", "--force", "pod"]).expect_code(0);
    assert_eq!(lines(&maps(), "s "), 0, "{}", maps());
    world.assert_nothing_left();
    // The daemon goes on.
    run("other");
    world.ctl.run(["rm", "--force", "other"]).expect_code(0);
    assert!(world.daemon.is_running());
}

/// Builds a static program, or says why not.
fn compile(source: &str, to: &Path) -> Result<(), String> {
    let from = to.with_extension("c");
    fs::write(&from, source).unwrap();
    let mut cc = Command::new("cc");
    match cc.args(["-O1", "-static", "-o"]).args([to, &from]).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("cc: {status}")),
        Err(err) => Err(format!("cc: {err}")),
    }
}

/// The first number of this name, however deep.
fn find_number(value: &serde_json::Value, name: &str) -> Option<u64> {
    match value {
        serde_json::Value::Object(fields) => fields
            .get(name)
            .and_then(serde_json::Value::as_u64)
            .or_else(|| fields.values().find_map(|value| find_number(value, name))),
        serde_json::Value::Array(items) => items.iter().find_map(|value| find_number(value, name)),
        _ => None,
    }
}

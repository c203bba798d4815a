//! Machines that go on where others were saved.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use super::*;
use crate::config::ConsoleLog;
use crate::machine::{BuildError, CloneConfig, VmShell};
use crate::snapshot::{Snapshot, SnapshotError};
use crate::vcpu::VcpuState;
use crate::vm::VmError;
use crate::{DeviceSet, SnapshotError as Error};

/// Prints "up ", then counts in memory, and prints a dot each 64 counts.
fn counter() -> Code {
    Code::new().print("up ").count_for_ever()
}

fn count(machine: &Machine) -> u32 {
    machine.peek(guest::COUNTER.into())
}

async fn printed(machine: &Machine, text: &str) {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !machine.console_tail().unwrap().contains(text) {
        assert!(tokio::time::Instant::now() < end, "{machine:?}");
        tokio::task::yield_now().await;
    }
}

fn devices() -> DeviceSet {
    DeviceSet::new().with_rng().unwrap()
}

fn clone_config(name: &str) -> CloneConfig {
    CloneConfig {
        name: name.to_owned(),
        console: ConsoleLog::default(),
        devices: devices(),
    }
}

/// A snapshot of a guest that has counted for a while.
fn snapshot(host: &Host, vcpus: u32) -> (Snapshot, u32) {
    let machine = machine_with(host, "original", &counter(), |mut config| {
        config.vcpus = vcpus;
        config.devices = devices();
        config
    });
    runtime().block_on(async {
        machine.start().await.unwrap();
        printed(&machine, "up ..").await;
        machine.pause().await.unwrap();
    });
    let counted = count(&machine);
    (machine.into_snapshot().unwrap(), counted)
}

#[test]
fn clones_go_on_where_the_original_was_and_share_nothing_they_write() {
    let Some(host) = host() else { return };
    let (snapshot, counted) = snapshot(&host, 1);
    assert!(counted >= 128);
    let before = snapshot.memory().resident_bytes().unwrap();
    let shell = VmShell::create(&host, 1).unwrap();
    let first = Machine::restore(&host, clone_config("first"), &snapshot, Some(shell)).unwrap();
    let second = Machine::restore(&host, clone_config("second"), &snapshot, None).unwrap();
    assert_eq!(first.vcpu_states(), [VcpuState::Paused]);
    assert_eq!((count(&first), count(&second)), (counted, counted));
    assert_eq!(first.stats().resident_bytes, Some(0), "nothing is its own");
    runtime().block_on(async {
        first.start().await.unwrap();
        printed(&first, "..").await;
        first.pause().await.unwrap();
        let ahead = count(&first);
        assert!(ahead > counted, "{ahead} {counted}");
        // The other has not moved, and neither has the template.
        assert_eq!(count(&second), counted);
        second.start().await.unwrap();
        printed(&second, ".").await;
        second.pause().await.unwrap();
        assert!(count(&second) > counted);
        assert_eq!(count(&first), ahead);
        // The original's output is the original's.
        assert!(!first.console_tail().unwrap().contains("up"));
        for clone in [&first, &second] {
            let own = clone.stats().resident_bytes.unwrap();
            assert!((4096..1 << 20).contains(&own), "{own}");
            clone.stop(PATIENCE).await.unwrap();
        }
    });
    let after = snapshot.memory().resident_bytes().unwrap();
    assert_eq!(after, before, "the template does not grow");
    let third = Machine::restore(&host, clone_config("third"), &snapshot, None).unwrap();
    assert_eq!(count(&third), counted);
}

#[test]
fn nobody_can_write_to_a_template() {
    let Some(host) = host() else { return };
    let (snapshot, _) = snapshot(&host, 1);
    snapshot.memory().try_to_change();
}

#[test]
fn what_is_stored_is_loaded_and_runs_after_its_files_are_gone() {
    let Some(host) = host() else { return };
    let (original, counted) = snapshot(&host, 2);
    let dir = tempfile::tempdir().unwrap();
    original.store(dir.path(), "counter").unwrap();
    for file in ["state", "memory", "chunks"] {
        let mode = fs::metadata(dir.path().join(file)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600, "{file}");
    }
    drop(original);
    let loaded = Snapshot::load(dir.path(), "counter").unwrap();
    assert_eq!((loaded.vcpus(), loaded.memory_bytes()), (2, 64 << 20));
    drop(dir);
    let clone = Machine::restore(&host, clone_config("loaded"), &loaded, None).unwrap();
    assert_eq!(count(&clone), counted);
    runtime().block_on(async {
        clone.start().await.unwrap();
        printed(&clone, ".").await;
        clone.stop(PATIENCE).await.unwrap();
    });
}

#[test]
fn running_clones_are_stored_with_what_they_wrote() {
    let Some(host) = host() else { return };
    let (template, counted) = snapshot(&host, 1);
    let clone = Machine::restore(&host, clone_config("clone"), &template, None).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let stored_at = runtime().block_on(async {
        clone.start().await.unwrap();
        printed(&clone, "..").await;
        clone.snapshot(dir.path(), "pod", None).await.unwrap();
        let stored_at = count(&clone);
        assert!(stored_at > counted);
        // It goes on, and its copy stays.
        clone.resume().await.unwrap();
        while count(&clone) == stored_at {
            tokio::task::yield_now().await;
        }
        clone.stop(PATIENCE).await.unwrap();
        stored_at
    });
    drop(template);
    let loaded = Snapshot::load(dir.path(), "pod").unwrap();
    let again = Machine::restore(&host, clone_config("again"), &loaded, None).unwrap();
    assert_eq!(count(&again), stored_at);
    runtime().block_on(async {
        again.start().await.unwrap();
        printed(&again, "..").await;
        again.stop(PATIENCE).await.unwrap();
    });
}

/// Bytes on disk.
fn disk_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(dir.join("memory")).unwrap();
    meta.blocks() * 512
}

#[test]
fn a_machine_over_files_reads_what_it_needs_and_is_stored_as_a_difference() {
    let Some(host) = host() else { return };
    let (original, counted) = snapshot(&host, 2);
    let root = tempfile::tempdir().unwrap();
    let dirs = ["full", "diff", "second"].map(|name| root.path().join(name));
    for dir in &dirs {
        fs::create_dir(dir).unwrap();
    }
    let [full, diff, second] = &dirs;
    original.store(full, "pod").unwrap();
    drop(original);
    let restore = |dir: &Path, name| {
        let opened = Snapshot::open(dir, "pod").unwrap();
        Machine::restore(&host, clone_config(name), &opened, None).unwrap()
    };
    let mut counts = vec![counted];
    for (from, to) in [(full, diff), (diff, second)] {
        let machine = restore(from, "lazy");
        assert!(machine.stats().resident_bytes.unwrap() < 1 << 20);
        assert_eq!(count(&machine), *counts.last().unwrap());
        runtime().block_on(async {
            machine.start().await.unwrap();
            printed(&machine, "..").await;
            machine.snapshot(to, "pod", Some(from)).await.unwrap();
            counts.push(count(&machine));
            machine.stop(PATIENCE).await.unwrap();
        });
        assert!(counts.is_sorted_by(|a, b| a < b), "{counts:?}");
        assert!(disk_bytes(to) < disk_bytes(full), "only what changed");
    }
    // Read whole, files of other snapshots included.
    let loaded = Snapshot::load(second, "pod").unwrap();
    let clone = Machine::restore(&host, clone_config("whole"), &loaded, None).unwrap();
    assert_eq!(Some(&count(&clone)), counts.last());
    // No base, and another machine's in its place.
    fs::rename(full, root.path().join("kept")).unwrap();
    let open = || Snapshot::open(second, "pod").map(drop).unwrap_err();
    assert!(open().to_string().contains("full/state"), "{}", open());
    fs::create_dir(full).unwrap();
    let (other, _) = self::snapshot(&host, 1);
    other.store(full, "pod").unwrap();
    let SnapshotError::File { source, .. } = open() else {
        panic!("{}", open());
    };
    assert!(source.to_string().contains("below"), "{source}");
}

#[test]
fn a_machine_whose_files_are_cut_short_ends_alone() {
    let Some(host) = host() else { return };
    let (original, _) = snapshot(&host, 1);
    let dir = tempfile::tempdir().unwrap();
    original.store(dir.path(), "pod").unwrap();
    let opened = Snapshot::open(dir.path(), "pod").unwrap();
    let machine = Machine::restore(&host, clone_config("cut"), &opened, None).unwrap();
    let memory = dir.path().join("memory");
    let file = fs::OpenOptions::new().write(true).open(memory).unwrap();
    file.set_len(0).unwrap();
    let reason = runtime().block_on(async {
        machine.start().await.unwrap();
        let reason = machine
            .exited()
            .wait_for(Option::is_some)
            .await
            .unwrap()
            .clone();
        machine.stop(PATIENCE).await.unwrap();
        reason
    });
    let Some(ExitReason::Device(why)) = reason else {
        panic!("{reason:?}");
    };
    assert!(why.contains("guest memory cannot be read"), "{why}");
}

#[test]
fn other_devices_or_shells_are_refused() {
    let Some(host) = host() else { return };
    let (snapshot, _) = snapshot(&host, 1);
    let mut config = clone_config("none");
    config.devices = DeviceSet::new();
    let err = Machine::restore(&host, config, &snapshot, None).unwrap_err();
    assert_eq!(
        err.to_string(),
        "the snapshot has 1 devices, this machine has 0"
    );
    let mut config = clone_config("vsock");
    let vsock = devices::virtio::vsock::VsockConfig::new(3);
    config.devices = DeviceSet::new().with_vsock(vsock).unwrap();
    let err = Machine::restore(&host, config, &snapshot, None).unwrap_err();
    assert!(matches!(err, BuildError::Restore { .. }), "{err}");
    let shell = VmShell::create(&host, 2).unwrap();
    let err = Machine::restore(&host, clone_config("two"), &snapshot, Some(shell)).unwrap_err();
    assert!(matches!(err, BuildError::Mismatch { .. }), "{err}");
}

#[test]
fn a_machine_that_has_ended_cannot_be_saved() {
    let Some(host) = host() else { return };
    let machine = machine(&host, "over", &Code::new().reset());
    runtime().block_on(run(&machine));
    let err = machine.into_snapshot().unwrap_err();
    assert!(
        matches!(err, Error::Exited(ExitReason::GuestReset)),
        "{err}"
    );
}

#[test]
fn a_machine_that_never_ran_can_be_saved() {
    let Some(host) = host() else { return };
    let machine = machine(&host, "fresh", &Code::new().print("ran").reset());
    let snapshot = machine.into_snapshot().unwrap();
    let mut config = clone_config("fresh2");
    config.devices = DeviceSet::new();
    let clone = Machine::restore(&host, config, &snapshot, None).unwrap();
    assert_eq!(runtime().block_on(run(&clone)), ExitReason::GuestReset);
    assert_eq!(clone.console_tail().unwrap(), "ran");
}

#[test]
fn damaged_and_foreign_files_are_refused() {
    let Some(host) = host() else { return };
    let (snapshot, _) = snapshot(&host, 1);
    let dir = tempfile::tempdir().unwrap();
    snapshot.store(dir.path(), "label").unwrap();
    let load = || Snapshot::load(dir.path(), "label").map(drop);
    load().unwrap();
    let err = Snapshot::load(dir.path(), "other").unwrap_err();
    assert!(matches!(err, SnapshotError::Label { .. }), "{err}");
    let state = dir.path().join("state");
    let good = fs::read(&state).unwrap();
    let refused = |bytes: &[u8], what: &str| {
        fs::write(&state, bytes).unwrap();
        let err = load().unwrap_err();
        let SnapshotError::File { source, .. } = &err else {
            panic!("{err}");
        };
        let text = source.to_string();
        assert!(text.contains(what), "{text}");
    };
    refused(b"", "not the state of a VM");
    refused(
        b"\x7fELF and so on, for more than a header",
        "not the state of a VM",
    );
    for len in [7, 8, 11, 12, 19, 20, 21, good.len() / 2, good.len() - 1] {
        refused(
            &good[..len],
            if len < 8 {
                "not the state"
            } else {
                "cut short"
            },
        );
    }
    for at in [20, 100, good.len() / 2, good.len() - 33, good.len() - 1] {
        let mut flipped = good.clone();
        flipped[at] ^= 4;
        refused(&flipped, "digest");
    }
    let mut newer = good.clone();
    newer[8] += 1;
    refused(&newer, "this release reads version");
    let longer = [&good[..], &[0]].concat();
    refused(&longer, "digest");
    fs::write(&state, &good).unwrap();
    load().unwrap();

    let memory = dir.path().join("memory");
    let file = fs::OpenOptions::new().write(true).open(&memory).unwrap();
    let at = u64::from(guest::COUNTER);
    let mut before = [0];
    fs::File::open(&memory)
        .unwrap()
        .read_exact_at(&mut before, at)
        .unwrap();
    file.write_all_at(&[!before[0]], at).unwrap();
    assert!(load().unwrap_err().to_string().contains("memory"));
    file.write_all_at(&before, at).unwrap();
    load().unwrap();
    let chunks = dir.path().join("chunks");
    let list = fs::read(&chunks).unwrap();
    for damaged in [&list[1..], &list[..list.len() - 40], &list.repeat(2)] {
        fs::write(&chunks, damaged).unwrap();
        load().unwrap_err();
    }
    fs::write(&chunks, list).unwrap();
    load().unwrap();
    file.set_len(4096).unwrap();
    load().unwrap_err();
    fs::remove_file(&memory).unwrap();
    load().unwrap_err();
}

#[test]
fn restored_machines_stop_and_fail_like_others() {
    let Some(host) = host() else { return };
    let (snapshot, _) = snapshot(&host, 1);
    let clone = Machine::restore(&host, clone_config("idle"), &snapshot, None).unwrap();
    runtime().block_on(async {
        clone.stop(PATIENCE).await.unwrap();
        assert!(matches!(
            clone.start().await,
            Err(VmError::Exited(ExitReason::Stopped))
        ));
    });
    let mut config = clone_config("../etc");
    config.devices = devices();
    Machine::restore(&host, config, &snapshot, None).unwrap_err();
}

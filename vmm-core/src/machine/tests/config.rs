//! Configurations that cannot be, and what the user is told.

use std::fs;

use super::*;
use crate::machine::BuildError;

fn refused(host: &Host, change: impl FnOnce(&mut MachineConfig)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut config = MachineConfig::new("test", Code::new().halt().kernel(dir.path()));
    change(&mut config);
    let err = Machine::build(host, config).unwrap_err();
    assert!(matches!(err, BuildError::Config(_) | BuildError::Boot(_)));
    err.to_string()
}

#[test]
fn errors_name_the_field_the_value_and_the_fix() {
    let Some(host) = host() else { return };
    for (vcpus, name) in [(0, "vcpus = 0"), (1000, "vcpus = 1000")] {
        let message = refused(&host, |config| config.vcpus = vcpus);
        assert!(
            message.contains(name) && message.contains("use 1 to"),
            "{message}"
        );
    }
    for bytes in [0, 1 << 20, (64 << 20) + 1] {
        let message = refused(&host, |config| config.memory_bytes = bytes);
        assert!(
            message.contains(&format!("memory_bytes = {bytes}")),
            "{message}"
        );
        assert!(message.contains("64 MiB"), "{message}");
    }
    let message = refused(&host, |config| config.memory_bytes = 1 << 60);
    assert!(message.contains("the host has"), "{message}");
    let message = refused(&host, |config| config.name = "a/b".into());
    assert!(message.contains("\"a/b\""), "{message}");
    let message = refused(&host, |config| config.cmdline = "x\ny".into());
    assert!(message.contains("cmdline"), "{message}");
    let message = refused(&host, |config| config.cmdline = "x".repeat(5000));
    assert!(message.contains("the kernel reads 2047"), "{message}");
    let message = refused(&host, |config| {
        config.devices = (0..18).fold(crate::DeviceSet::new(), |devices, _| {
            devices.with_rng().unwrap()
        });
    });
    assert!(message.contains("18 are configured"), "{message}");
}

#[test]
fn kernels_that_are_none_are_told_apart() {
    let Some(host) = host() else { return };
    let dir = tempfile::tempdir().unwrap();
    let elf = Code::new().halt().elf();
    let mut arm = elf.clone();
    arm[18] = 183;
    let mut elf32 = elf.clone();
    elf32[4] = 1;
    let mut cut = Code::new().nops(100_000).elf();
    cut.truncate(50_000);
    for (content, expected) in [
        (Vec::new(), "the file is empty"),
        (b"#!/bin/sh\n".to_vec(), "neither an ELF file nor a bzImage"),
        (elf[..40].to_vec(), "ends within the ELF header"),
        (arm, "another architecture"),
        (elf32, "32-bit"),
        (cut, "truncated"),
    ] {
        let path = dir.path().join("kernel");
        fs::write(&path, content).unwrap();
        let message = refused(&host, |config| config.kernel = path.clone());
        assert!(message.contains(expected), "{message}");
        assert!(message.contains("kernel = "), "{message}");
    }
    let message = refused(&host, |config| config.kernel = "/nonexistent".into());
    assert!(message.contains("kernel = /nonexistent"), "{message}");
    let message = refused(&host, |config| config.kernel = "/tmp".into());
    assert!(message.contains("directory"), "{message}");
}

#[test]
fn an_initramfs_has_to_fit() {
    let Some(host) = host() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("initramfs");
    fs::write(&path, "").unwrap();
    let message = refused(&host, |config| config.initramfs = Some(path.clone()));
    assert!(message.contains("empty"), "{message}");
    fs::File::create(&path).unwrap().set_len(80 << 20).unwrap();
    let message = refused(&host, |config| config.initramfs = Some(path.clone()));
    assert!(message.contains("do not fit"), "{message}");
}

//! How machines end.

use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use devices::virtio::{
    ActivateError, Activation, DeviceType, EventHandler, Interest, Loop, Ready, SharedMemory,
    VirtioDevice,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::DeviceSet;

#[test]
fn a_guest_prints_and_resets_itself() {
    let Some(host) = host() else { return };
    let machine = machine(&host, "hello", &Code::new().print("hello\n").reset());
    runtime().block_on(async {
        assert_eq!(run(&machine).await, ExitReason::GuestReset);
    });
    assert_eq!(machine.console_tail().unwrap(), "hello\n");
    let stats = machine.stats();
    assert_eq!(stats.exits["io"], 7);
    let phases: Vec<_> = stats.phases.iter().map(|phase| phase.name).collect();
    let expected = [
        "memory mapped",
        "devices attached",
        "vm built",
        "kernel entered",
    ];
    assert_eq!(phases, expected);
    assert_eq!(stats.phases[3].exits["io"], 0);
    machine.mark_phase("over");
    assert_eq!(machine.stats().phases[4].exits["io"], 7);
    assert!(stats.resident_bytes.unwrap() > 0);
}

#[test]
fn a_bzimage_boots_at_its_64_bit_entry() {
    let Some(host) = host() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bzImage");
    let code = Code::new().print("bz").reset();
    std::fs::write(&path, code.bzimage(true)).unwrap();
    let machine = Machine::build(&host, MachineConfig::new("bzimage", &path)).unwrap();
    runtime().block_on(async {
        assert_eq!(run(&machine).await, ExitReason::GuestReset);
    });
    assert_eq!(machine.console_tail().unwrap(), "bz");

    std::fs::write(&path, code.bzimage(false)).unwrap();
    let err = Machine::build(&host, MachineConfig::new("bzimage", &path)).unwrap_err();
    assert!(err.to_string().contains("no 64-bit entry point"), "{err}");
}

#[test]
fn a_guest_that_panics_leaves_its_last_words() {
    let Some(host) = host() else { return };
    let code = Code::new()
        .print("x\nKernel panic - not syncing: test\n")
        .reset();
    let machine = machine(&host, "panic", &code);
    runtime().block_on(async {
        let expected = ExitReason::GuestPanic("Kernel panic - not syncing: test".into());
        assert_eq!(run(&machine).await, expected);
    });
}

#[test]
fn acpi_power_off_ends_the_machine() {
    let Some(host) = host() else { return };
    let machine = machine(
        &host,
        "off",
        &Code::new().out(0x600, 5 << 2 | 1 << 5).halt(),
    );
    runtime().block_on(async {
        assert_eq!(run(&machine).await, ExitReason::GuestReset);
    });
}

#[test]
fn a_triple_fault_ends_the_machine() {
    let Some(host) = host() else { return };
    let machine = machine(&host, "triple", &Code::new().triple_fault());
    runtime().block_on(async {
        let reason = run(&machine).await;
        // The emulator gives up on it instead.
        let emulated = host.emulated_ring0() && matches!(reason, ExitReason::Kvm(_));
        assert!(reason == ExitReason::TripleFault || emulated, "{reason}");
    });
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_shown() {
    let Some(host) = host() else { return };
    if !host.emulated_ring0() {
        println!("skipped: this host's CPU runs every instruction of the test");
        return;
    }
    let machine = machine(&host, "popcnt", &Code::new().popcnt().reset());
    runtime().block_on(async {
        let ExitReason::Kvm(what) = run(&machine).await else {
            panic!("{:?}", machine.exited().borrow());
        };
        assert!(what.contains("cannot emulate"), "{what}");
        assert!(what.contains("at RIP 0x100000: f3 0f b8 c0"), "{what}");
    });
}

/// Panics when its driver touches it: at configuration space, or on the event loop.
#[derive(Debug)]
struct Bomb {
    on_read: bool,
    bell: Arc<EventFd>,
}

impl Bomb {
    fn new(on_read: bool) -> Box<Self> {
        Box::new(Self {
            on_read,
            bell: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        })
    }
}

impl VirtioDevice for Bomb {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[]
    }

    fn features(&self) -> u64 {
        1 << 32
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        assert!(!self.on_read, "config bomb");
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let handler = BombHandler(Arc::clone(&self.bell));
        activation.runner.add(Box::new(handler)).unwrap();
        self.bell.write(1).unwrap();
        Ok(())
    }

    fn reset(&mut self) {}
}

struct BombHandler(Arc<EventFd>);

impl EventHandler for BombHandler {
    fn start(&mut self, lp: &mut dyn Loop) -> std::io::Result<()> {
        let readable = Interest {
            readable: true,
            writable: false,
        };
        lp.watch(self.0.as_raw_fd(), 0, readable)
    }

    fn ready(&mut self, _: &mut dyn Loop, _: u64, _: Ready) {
        panic!("handler bomb");
    }
}

#[test]
fn a_panic_in_a_device_ends_its_machine_and_no_other() {
    let Some(host) = host() else { return };
    let busy = machine(
        &host,
        "bystander",
        &Code::new().write_port_for_ever(guest::NOWHERE),
    );
    let idle = machine(&host, "idle", &Code::new().halt());
    let code = Code::new().map_devices().load(0x100).halt();
    let on_vcpu = machine_with(&host, "bomb1", &code, |mut config| {
        config.devices = config.devices.with_device("bomb", Bomb::new(true));
        config
    });
    let code = Code::new().map_devices().drive_device().halt();
    let on_loop = machine_with(&host, "bomb2", &code, |mut config| {
        config.devices = config.devices.with_device("bomb", Bomb::new(false));
        config
    });
    runtime().block_on(async {
        busy.start().await.unwrap();
        idle.start().await.unwrap();
        assert_eq!(
            run(&on_vcpu).await,
            ExitReason::Panic {
                thread: "vcpu0-bomb1".into(),
                message: "config bomb".into()
            }
        );
        assert_eq!(
            run(&on_loop).await,
            ExitReason::Panic {
                thread: "dev-bomb2".into(),
                message: "handler bomb".into()
            }
        );
        on_vcpu.stop(PATIENCE).await.unwrap();
        on_loop.stop(PATIENCE).await.unwrap();
        // The others go on.
        assert_eq!(*busy.exited().borrow(), None);
        assert_eq!(*idle.exited().borrow(), None);
        busy.pause().await.unwrap();
        let before = busy.stats().exits["io"];
        busy.resume().await.unwrap();
        while busy.stats().exits["io"] <= before {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_driver_finds_its_device() {
    let Some(host) = host() else { return };
    let code = Code::new()
        .map_devices()
        .load(0)
        .print_eax()
        .load(8)
        .print_eax()
        .reset();
    let machine = machine_with(&host, "magic", &code, |mut config| {
        config.devices = config.devices.with_rng().unwrap();
        config
    });
    runtime().block_on(async {
        assert_eq!(run(&machine).await, ExitReason::GuestReset);
    });
    assert_eq!(machine.console_tail().unwrap(), "virt\x04\0\0\0");
    assert_eq!(machine.stats().exits["mmio"], 2);
}

#[test]
fn queue_notifications_do_not_exit_to_this_process() {
    let Some(host) = host() else { return };
    let code = Code::new()
        .map_devices()
        .store(0x50, 0)
        .store(0x50, 0)
        .reset();
    let machine = machine_with(&host, "notify", &code, |mut config| {
        config.devices = config.devices.with_rng().unwrap();
        config
    });
    runtime().block_on(async {
        assert_eq!(run(&machine).await, ExitReason::GuestReset);
    });
    assert_eq!(machine.stats().exits["mmio"], 0);
}

/// A device that a guest has talked into what it must not do.
#[derive(Debug)]
struct Captured;

impl VirtioDevice for Captured {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {
        // On the vCPU's thread.
        assert_eq!(nix::unistd::chroot("/"), Err(nix::errno::Errno::EPERM));
    }

    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Ok(())
    }

    fn reset(&mut self) {}
}

#[test]
fn a_forbidden_system_call_ends_its_machine_only() {
    let Some(host) = host() else { return };
    let other = machine(&host, "other", &Code::new().spin());
    let code = Code::new().map_devices().load(0x100).spin();
    let captured = machine_with(&host, "captured", &code, |mut config| {
        config.devices = DeviceSet::new().with_device("captured", Box::new(Captured));
        config
    });
    runtime().block_on(async {
        other.start().await.unwrap();
        let reason = run(&captured).await;
        let call = format!("system call {}", libc::SYS_chroot);
        assert!(
            matches!(&reason, ExitReason::Device(what) if what.contains(&call)),
            "{reason:?}"
        );
        assert_eq!(*other.exited().borrow(), None);
        other.stop(PATIENCE).await.unwrap();
    });
}

/// A device with memory of its own.
#[derive(Debug)]
struct Windowed(Arc<SharedMemory>);

impl VirtioDevice for Windowed {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &[]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn shared_memory(&self) -> Option<Arc<SharedMemory>> {
        Some(Arc::clone(&self.0))
    }

    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Ok(())
    }

    fn reset(&mut self) {}
}

/// A machine that runs `code` with `file` in its window.
fn with_file(host: &Host, name: &str, code: &Code, file: &std::fs::File) -> Machine {
    let window = SharedMemory::reserve(2 << 20).unwrap();
    window.map(0, 2 << 20, file, 0, true).unwrap();
    machine_with(host, name, code, |mut config| {
        let device = Box::new(Windowed(Arc::new(window)));
        config.devices = config.devices.with_device("window", device);
        config
    })
}

#[test]
fn a_guest_uses_a_file_through_a_window_until_it_is_cut_off() {
    let Some(host) = host() else { return };
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"virtio").unwrap();
    let code = Code::new().map_window().load(0).print_eax();
    let code = code.store(2, u32::from_le_bytes(*b"NDOW")).reset();
    let machine = with_file(&host, "window", &code, &file);
    runtime().block_on(async {
        assert_eq!(run(&machine).await, ExitReason::GuestReset);
    });
    assert_eq!(machine.console_tail().unwrap(), "virt");
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "viNDOW");

    let code = Code::new().map_window().load(0).print("on").reset();
    let machine = with_file(&host, "cut-off", &code, &file);
    file.set_len(0).unwrap();
    runtime().block_on(async {
        let reason = run(&machine).await;
        // Where KVM emulates the instruction, it takes the address for a device's.
        let emulated = host.emulated_ring0() && reason == ExitReason::GuestReset;
        let ended = matches!(&reason, ExitReason::Kvm(what) if what.contains("cut off"));
        assert!(ended || emulated, "{reason}");
    });
}

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use vmm_core::vm::VmError;

use super::{Engine, MachineType, QemuConfig};
use crate::args::Args;
use crate::hypervisor::{GuestVsock, Launch, Layout, MachineSpec, Nic, card_address};
use crate::supervisor::{FIRST_FREE_FD, Listen};

/// Where QEMU's QMP socket is.
const QMP_FD: i32 = FIRST_FREE_FD;
/// What QEMU's filter forbids besides what nobody needs: other programs, other users, and the
/// host's resources.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

pub(super) fn launch(
    config: &QemuConfig,
    engine: &Engine,
    spec: &MachineSpec,
    nics: Vec<Nic>,
) -> Result<Launch, VmError> {
    let layout = Layout::new(&spec.dir);
    let mut args = Args::default();
    args.add("name", format!("{},debug-threads=on", escape(&spec.name)));
    args.flag("no-user-config");
    args.flag("nodefaults");
    args.flag("no-reboot");
    args.add("display", "none");
    args.add("machine", machine(config));
    args.add("accel", accelerator(engine));
    if config.machine == MachineType::Microvm {
        // Its virtio devices are those of the first virtio otherwise, which ours are not.
        args.add("global", "virtio-mmio.force-legacy=false");
    }
    args.add("cpu", cpu(config, engine));
    size(&mut args, config, spec);
    if config.seccomp {
        args.add("sandbox", SANDBOX);
    }
    if config.lock_memory {
        args.add("overcommit", "mem-lock=on");
    }
    if let Some(firmware) = &config.firmware {
        args.add("bios", path(firmware));
    }
    args.add("kernel", path(&spec.kernel));
    if let Some(initramfs) = &spec.initramfs {
        args.add("initrd", path(initramfs));
    }
    args.add("append", command_line(config, engine, spec));
    control(&mut args);
    let bus = Bus::of(config.machine);
    root_ports(&mut args, config, spec);
    devices(&mut args, config, bus, &layout, spec);
    let fds = cards(&mut args, bus, nics)?;
    Ok(Launch {
        program: config.path.clone(),
        args: args.into(),
        fds,
        listens: vec![Listen {
            path: layout.api(),
            fd: QMP_FD,
        }],
        nics: Vec::new(),
        vsock: GuestVsock::Ours,
    })
}

/// How devices are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bus {
    Pci,
    Mmio,
}

impl Bus {
    fn of(machine: MachineType) -> Self {
        match machine {
            MachineType::Microvm => Self::Mmio,
            MachineType::Q35 | MachineType::Pc | MachineType::Virt => Self::Pci,
        }
    }

    fn device(self, name: &str) -> String {
        match self {
            Self::Pci => format!("{name}-pci"),
            Self::Mmio => format!("{name}-device"),
        }
    }
}

fn machine(config: &QemuConfig) -> String {
    let mut machine = format!("{},memory-backend=ram0", config.machine.name());
    match config.machine {
        // The timer and the interrupt controllers are for kernels that calibrate by them.
        MachineType::Microvm => machine.push_str(",pit=on,pic=on,rtc=on,isa-serial=on,acpi=off"),
        MachineType::Q35 | MachineType::Pc => machine.push_str(",usb=off,vmport=off,smbus=off"),
        MachineType::Virt => machine.push_str(",usb=off,gic-version=max"),
    }
    if !config.machine_options.is_empty() {
        machine.push(',');
        machine.push_str(&config.machine_options);
    }
    machine
}

fn accelerator(engine: &Engine) -> &'static str {
    match engine {
        Engine::Kvm { .. } => "kvm",
        Engine::Tcg => "tcg,thread=multi",
    }
}

fn cpu(config: &QemuConfig, engine: &Engine) -> String {
    let fitting = match engine {
        // Such a KVM refuses the register.
        Engine::Kvm {
            emulated_ring0: true,
            ..
        } => "host,-arch-capabilities",
        Engine::Kvm { .. } => "host",
        Engine::Tcg => "max",
    };
    // The host's CPU cannot be translated.
    let translated_host = config.cpu == "host" && matches!(engine, Engine::Tcg);
    let mut cpu = if config.cpu.is_empty() || translated_host {
        fitting.to_owned()
    } else {
        config.cpu.clone()
    };
    if !config.cpu_features.is_empty() {
        cpu.push(',');
        cpu.push_str(&config.cpu_features);
    }
    cpu
}

fn size(args: &mut Args, config: &QemuConfig, spec: &MachineSpec) {
    let bytes = spec.memory_bytes;
    let mut memory = format!("size={}k", bytes / 1024);
    if spec.most.memory_bytes > bytes {
        let (slots, most) = (config.memory_slots, spec.most.memory_bytes / 1024);
        memory.push_str(&format!(",slots={slots},maxmem={most}k"));
    }
    args.add("m", memory);
    let mut backing = match &config.memory_path {
        Some(folder) => format!("memory-backend-file,mem-path={}", path(folder)),
        None => "memory-backend-memfd".to_owned(),
    };
    backing.push_str(&format!(",id=ram0,size={bytes},share=on"));
    if config.hugepages && config.memory_path.is_none() {
        backing.push_str(",hugetlb=on");
    }
    if config.prealloc {
        backing.push_str(",prealloc=on");
    }
    args.add("object", backing);
    let most = spec.most.vcpus;
    args.add("smp", format!("cpus={},maxcpus={most}", spec.vcpus));
}

fn command_line(config: &QemuConfig, engine: &Engine, spec: &MachineSpec) -> String {
    let mut words = match config.machine {
        MachineType::Virt => vec!["console=ttyAMA0".to_owned()],
        MachineType::Microvm => vec!["console=ttyS0".to_owned(), "reboot=t".to_owned()],
        MachineType::Q35 | MachineType::Pc => {
            vec!["console=ttyS0".to_owned(), "reboot=k".to_owned()]
        }
    };
    words.push("panic=-1".to_owned());
    match engine {
        Engine::Kvm { parameters, .. } => words.extend(parameters.iter().cloned()),
        // Translated code is late for the timer's check, and lines on the console cost much.
        Engine::Tcg => words.extend(["no_timer_check", "quiet"].map(str::to_owned)),
    }
    if config.image.is_some() {
        words.push("root=/dev/vda ro".to_owned());
    }
    if !spec.cmdline.trim().is_empty() {
        words.push(spec.cmdline.trim().to_owned());
    }
    words.join(" ")
}

/// QMP on the socket that is inherited, the console on stdout.
fn control(args: &mut Args) {
    args.add(
        "chardev",
        format!("socket,id=qmp,fd={QMP_FD},server=on,wait=off"),
    );
    args.add("mon", "chardev=qmp,mode=control");
    args.add("chardev", "file,id=console,path=/dev/stdout");
    args.add("serial", "chardev:console");
}

/// First device number of the root ports on their bus.
const FIRST_ROOT_PORT: u32 = 0x10;

/// Places for devices that come later, eight to a device number.
fn root_ports(args: &mut Args, config: &QemuConfig, spec: &MachineSpec) {
    for port in 0..super::root_ports(config.machine, spec) {
        let (chassis, function) = (port.saturating_add(1), port % 8);
        let device = FIRST_ROOT_PORT.saturating_add(port / 8);
        args.add(
            "device",
            format!(
                "pcie-root-port,id=rp{port},chassis={chassis},slot={chassis},\
                 addr={device:#x}.{function},multifunction=on"
            ),
        );
    }
}

fn devices(args: &mut Args, config: &QemuConfig, bus: Bus, layout: &Layout, spec: &MachineSpec) {
    let socket = |id: &str, at: PathBuf| format!("socket,id={id},path={}", path(&at));
    args.add("chardev", socket("fs", layout.fs()));
    let fs = bus.device("vhost-user-fs");
    args.add("device", format!("{fs},chardev=fs,tag={}", spec.share_tag));
    args.add("chardev", socket("vsock", layout.vsock_device()));
    let vsock = bus.device("vhost-user-vsock");
    args.add("device", format!("{vsock},chardev=vsock"));
    let source = path(&config.entropy_source);
    args.add("object", format!("rng-random,id=rng0,filename={source}"));
    args.add("device", format!("{},rng=rng0", bus.device("virtio-rng")));
    if spec.balloon {
        let balloon = bus.device("virtio-balloon");
        args.add("device", format!("{balloon},free-page-reporting=on"));
    }
    if config.iothread {
        args.add("object", "iothread,id=io0");
    }
    if let Some(image) = &config.image {
        let image = path(image);
        args.add(
            "blockdev",
            format!("driver=file,node-name=image,filename={image},read-only=on"),
        );
        let mut disk = format!("{},drive=image", bus.device("virtio-blk"));
        if config.iothread {
            disk.push_str(",iothread=io0");
        }
        args.add("device", disk);
    }
}

/// The cards that are there from the start.
fn cards(args: &mut Args, bus: Bus, nics: Vec<Nic>) -> Result<Vec<(OwnedFd, i32)>, VmError> {
    let mut fds = Vec::new();
    let mut next = QMP_FD.saturating_add(1);
    for nic in nics {
        let (slot, queues) = (nic.slot, nic.queues.len());
        let mut numbers = Vec::with_capacity(queues);
        for queue in nic.queues {
            numbers.push(next.to_string());
            fds.push((queue, next));
            next = next.saturating_add(1);
        }
        args.add(
            "netdev",
            format!("tap,id=net{slot},fds={},vhost=off", numbers.join(":")),
        );
        let device = bus.device("virtio-net");
        let mut card = format!(
            "{device},id=nic{slot},netdev=net{slot},mac={}",
            card_address(slot)
        );
        if bus == Bus::Pci {
            card.push_str(",romfile=");
            if queues > 1 {
                let vectors = queues.saturating_mul(2).saturating_add(2);
                card.push_str(&format!(",mq=on,vectors={vectors}"));
            }
        }
        args.add("device", card);
    }
    Ok(fds)
}

/// Commas begin the next option unless they are doubled.
fn escape(text: &str) -> String {
    text.replace(',', ",,")
}

fn path(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

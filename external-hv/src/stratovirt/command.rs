use std::os::fd::OwnedFd;
use std::path::Path;

use super::cid::GuestCid;
use super::{MachineType, StratoConfig};
use crate::args::Args;
use crate::hypervisor::{GuestVsock, Launch, Layout, MachineSpec, Nic, card_address};
use crate::supervisor::FIRST_FREE_FD;

/// What a VM needs that is open already.
#[derive(Debug, Default)]
pub(super) struct Opened {
    /// The kernel, unless its file is used.
    pub(super) kernel: Option<OwnedFd>,
    /// The guest's address on the host's vsock.
    pub(super) vsock: Option<GuestCid>,
    /// Cards.
    pub(super) nics: Vec<Nic>,
}

pub(super) fn launch(
    config: &StratoConfig,
    parameters: &[String],
    spec: &MachineSpec,
    opened: Opened,
) -> Launch {
    let layout = Layout::new(&spec.dir);
    let cid = opened.vsock.as_ref().map(|vsock| vsock.cid);
    let mut line = Line {
        args: Args::default(),
        fds: Vec::new(),
        machine: config.machine,
        next_address: 1,
    };
    let args = &mut line.args;
    args.add("name", spec.name.clone());
    args.add("machine", machine(config));
    size(args, config, spec);
    if !config.seccomp {
        args.flag("disable-seccomp");
    }
    args.add("qmp", format!("unix:{},server,nowait", path(&layout.api())));
    // On stdout, which the supervisor reads.
    args.add("serial", "file,path=/dev/stdout");
    if let (Some(firmware), MachineType::Q35) = (&config.firmware, config.machine) {
        let firmware = path(firmware);
        args.add(
            "drive",
            format!("file={firmware},if=pflash,unit=0,readonly=true"),
        );
    }
    let kernel = match opened.kernel {
        Some(kernel) => format!("/proc/self/fd/{}", line.inherit(kernel)),
        None => path(&spec.kernel),
    };
    let args = &mut line.args;
    args.add("kernel", kernel);
    if let Some(initramfs) = &spec.initramfs {
        args.add("initrd", path(initramfs));
    }
    args.add("append", command_line(config, parameters, spec, cid));
    line.devices(config, &layout, spec);
    if let Some(vsock) = opened.vsock {
        let fd = line.inherit(vsock.device);
        let options = format!("id=vsock,guest-cid={},vhostfd={fd}", vsock.cid);
        line.device("vhost-vsock", &options);
    }
    line.root_ports(spec);
    for nic in opened.nics {
        line.card(nic);
    }
    Launch {
        program: config.path.clone(),
        args: line.args.into(),
        fds: line.fds,
        listens: Vec::new(),
        nics: Vec::new(),
        // Without one there is nothing to carry either.
        vsock: cid.map_or(GuestVsock::Vmms, GuestVsock::Kernels),
    }
}

/// A command line and what it names.
struct Line {
    args: Args,
    fds: Vec<(OwnedFd, i32)>,
    machine: MachineType,
    /// On the bus of the board.
    next_address: u32,
}

impl Line {
    /// Number under which the VMM gets `fd`.
    fn inherit(&mut self, fd: OwnedFd) -> i32 {
        let taken = i32::try_from(self.fds.len()).unwrap_or(i32::MAX);
        let number = FIRST_FREE_FD.saturating_add(taken);
        self.fds.push((fd, number));
        number
    }

    /// A device on the board.
    fn device(&mut self, kind: &str, options: &str) {
        let device = match self.machine {
            MachineType::Microvm => format!("{kind}-device,{options}"),
            MachineType::Q35 => {
                let address = self.next_address;
                self.next_address = address.saturating_add(1);
                format!("{kind}-pci,{options},bus=pcie.0,addr={address:#x}")
            }
        };
        self.args.add("device", device);
    }

    fn devices(&mut self, config: &StratoConfig, layout: &Layout, spec: &MachineSpec) {
        if let Some(image) = &config.image {
            let image = path(image);
            let drive = format!("id=image,file={image},readonly=on,direct=off");
            self.args.add("drive", drive);
            self.device("virtio-blk", "id=image,drive=image");
        }
        let share = path(&layout.fs());
        let chardev = format!("socket,id=fs,path={share},server,nowait");
        self.args.add("chardev", chardev);
        let options = format!("id=share,chardev=fs,tag={}", spec.share_tag);
        self.device("vhost-user-fs", &options);
        let source = path(&config.entropy_source);
        let object = format!("rng-random,id=rng0,filename={source}");
        self.args.add("object", object);
        self.device("virtio-rng", "id=rng,rng=rng0");
        if spec.balloon {
            let options = "id=balloon,free-page-reporting=true,deflate-on-oom=true";
            self.device("virtio-balloon", options);
        }
    }

    /// Places for what can be plugged in and out, eight to an address.
    fn root_ports(&mut self, spec: &MachineSpec) {
        if self.machine == MachineType::Microvm {
            return;
        }
        // Otherwise the guest waits five seconds before it lets go of a device.
        self.args.add("global", "pcie-root-port.fast-unplug=1");
        for port in 0..spec.net_slots.saturating_add(spec.disk_slots) {
            let address = FIRST_ROOT_PORT.saturating_add(port / 8);
            let (number, function) = (port.saturating_add(1), port % 8);
            self.args.add(
                "device",
                format!(
                    "pcie-root-port,id=rp{port},port={number:#x},bus=pcie.0,\
                     addr={address:#x}.{function:#x},multifunction=on"
                ),
            );
        }
    }

    /// A card that is there from the start.
    fn card(&mut self, nic: Nic) {
        let (slot, mut queues) = (nic.slot, nic.queues);
        if self.machine == MachineType::Microvm {
            // Its cards have one; the tap loses those that are closed.
            queues.truncate(1);
        }
        let several = queues.len() > 1;
        let fds = queues
            .into_iter()
            .map(|queue| self.inherit(queue).to_string());
        let fds = fds.collect::<Vec<_>>().join(":");
        self.args
            .add("netdev", format!("tap,id=net{slot},fds={fds}"));
        let options = format!("id=nic{slot},netdev=net{slot},mac={}", card_address(slot));
        let card = match self.machine {
            MachineType::Microvm => format!("virtio-net-device,{options}"),
            MachineType::Q35 => {
                let queues = if several { ",mq=on" } else { "" };
                format!("virtio-net-pci,{options}{queues},bus=rp{slot},addr=0x0")
            }
        };
        self.args.add("device", card);
    }
}

/// First address of the root ports.
const FIRST_ROOT_PORT: u32 = 0x10;

fn machine(config: &StratoConfig) -> String {
    // Our devices have to see the memory.
    let mut machine = format!("{},mem-share=on", config.machine.name());
    if !config.machine_options.is_empty() {
        machine.push(',');
        machine.push_str(&config.machine_options);
    }
    machine
}

fn size(args: &mut Args, config: &StratoConfig, spec: &MachineSpec) {
    args.add("smp", format!("cpus={}", spec.vcpus));
    args.add("m", format!("size={}K", spec.memory_bytes / 1024));
    if let Some(folder) = &config.memory_path {
        args.add("mem-path", path(folder));
    }
    if config.prealloc {
        args.flag("mem-prealloc");
    }
}

fn command_line(
    config: &StratoConfig,
    parameters: &[String],
    spec: &MachineSpec,
    cid: Option<u32>,
) -> String {
    let mut words: Vec<String> = match config.machine {
        // Hotplug is the guest's own: no firmware handles it, nor says that the guest may.
        MachineType::Q35 => {
            ["console=ttyS0", "reboot=k", "panic=-1", "pcie_ports=native"].as_slice()
        }
        MachineType::Microvm => ["console=ttyS0", "reboot=t", "panic=-1", "pci=off"].as_slice(),
    }
    .iter()
    .map(|word| (*word).to_owned())
    .collect();
    words.extend(parameters.iter().cloned());
    if config.image.is_some() {
        words.push("root=/dev/vda ro".to_owned());
    }
    // Host ports are one for all guests, addresses are not.
    words.extend(cid.map(|cid| format!("task.control_port={cid}")));
    if !spec.cmdline.trim().is_empty() {
        words.push(spec.cmdline.trim().to_owned());
    }
    words.join(" ")
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

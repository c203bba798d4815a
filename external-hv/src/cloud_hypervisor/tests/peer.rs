//! The documented REST API, strictly: an unknown call or field, a call at the wrong time, fds
//! where none belong or too few are refused. It describes no more than what we use; release
//! 53.0 itself accepted all of it. There is no VM behind it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::AbortHandle;

use crate::cloud_hypervisor::{PAYLOAD_SINCE, events, events_pipe};
use crate::hypervisor::Layout;
use crate::rights::receive;

type Refusal = (u16, String);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VmConfig {
    cpus: Cpus,
    memory: Memory,
    payload: Option<Payload>,
    kernel: Option<OnePath>,
    initramfs: Option<OnePath>,
    cmdline: Option<CommandLine>,
    #[serde(rename = "rng")]
    _rng: Rng,
    #[serde(rename = "balloon")]
    _balloon: Option<Balloon>,
    fs: Vec<Fs>,
    vsock: Vsock,
    #[serde(rename = "pmem", default)]
    _pmem: Vec<Pmem>,
    serial: Console,
    console: Console,
}

/// Declares what an object may and must have.
macro_rules! objects {
    ($($name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code, reason = "that it is there is what counts")]
        struct $name { $($field: $type),* }
    )*};
}

objects! {
    Cpus { boot_vcpus: u32, max_vcpus: u32 }
    Memory {
        size: u64, shared: bool, hugepages: bool, prefault: bool, hotplug_size: Option<u64>,
    }
    Payload { kernel: String, cmdline: String, initramfs: Option<String> }
    OnePath { path: String }
    CommandLine { args: String }
    Rng { src: String }
    Balloon { size: u64, deflate_on_oom: bool, free_page_reporting: bool }
    Fs { id: String, tag: String, socket: String, num_queues: usize, queue_size: u16 }
    Vsock { id: String, cid: u32, socket: String }
    Pmem { id: String, file: String, discard_writes: bool }
    Console { mode: String }
    Net { id: String, mac: String, num_queues: usize }
    Disk {
        id: String, path: String, image_type: String, readonly: bool, direct: bool,
        serial: String,
    }
    Id { id: String }
    Size { desired_vcpus: u32, desired_ram: u64 }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    NoVm,
    Created,
    Running,
    Paused,
}

#[derive(Debug)]
struct Vmm {
    release: u32,
    state: State,
    vm: Option<VmConfig>,
    devices: BTreeSet<String>,
    calls: Vec<String>,
    pipe: File,
}

/// A VMM without a VM.
#[derive(Debug)]
pub(super) struct Peer {
    vmm: Arc<Mutex<Vmm>>,
    serving: AbortHandle,
}

impl Peer {
    /// One of this release, in the folder of `layout`.
    pub(super) fn start(layout: &Layout, release: u32) -> Self {
        let pipe = events::make(&events_pipe(layout)).unwrap().into();
        let vmm = Arc::new(Mutex::new(Vmm {
            release,
            state: State::NoVm,
            vm: None,
            devices: BTreeSet::new(),
            calls: Vec::new(),
            pipe,
        }));
        let listener = UnixListener::bind(layout.api()).unwrap();
        let served = Arc::clone(&vmm);
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                answer(stream, &served).await.unwrap();
            }
        });
        Self {
            vmm,
            serving: serving.abort_handle(),
        }
    }

    /// What was called and not refused, in order.
    pub(super) fn calls(&self) -> Vec<String> {
        lock(&self.vmm).calls.clone()
    }

    /// Has it tell something by itself.
    pub(super) fn tell(&self, source: &str, event: &str, properties: &Value) {
        lock(&self.vmm).tell(source, event, properties);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn lock(vmm: &Mutex<Vmm>) -> std::sync::MutexGuard<'_, Vmm> {
    vmm.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn answer(mut stream: UnixStream, vmm: &Mutex<Vmm>) -> io::Result<()> {
    let (head, body, fds) = request(&stream).await?;
    let mut words = head.split_whitespace();
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let call = path.strip_prefix("/api/v1/").unwrap_or("");
    let done = lock(vmm).call(method, call, &body, &fds);
    let (status, text) = match done {
        Ok(None) => (204, String::new()),
        Ok(Some(answer)) => (200, answer.to_string()),
        Err((status, why)) => (status, why),
    };
    let length = text.len();
    let answer = format!("HTTP/1.1 {status} \r\nContent-Length: {length}\r\n\r\n{text}");
    stream.write_all(answer.as_bytes()).await
}

/// Head, body and fds.
async fn request(stream: &UnixStream) -> io::Result<(String, Vec<u8>, Vec<OwnedFd>)> {
    let (mut bytes, mut fds) = (Vec::new(), Vec::new());
    loop {
        if receive(stream, &mut bytes, &mut fds).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some(end) = bytes.windows(4).position(|end| end == b"\r\n\r\n") else {
            continue;
        };
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let mut lines = head.lines().filter_map(|line| line.split_once(": "));
        let length = lines.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let length = length.map_or(0, |(_, length)| length.parse().unwrap());
        if bytes.len() - (end + 4) >= length {
            return Ok((head, bytes[end + 4..].to_vec(), fds));
        }
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T, Refusal> {
    Err((500, why.into()))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|err| (400, err.to_string()))
}

impl Vmm {
    fn tell(&mut self, source: &str, event: &str, properties: &Value) {
        let event = json!({
            "timestamp": {"secs": 1, "nanos": 2}, "source": source, "event": event,
            "properties": properties,
        });
        write!(self.pipe, "{event:#}\n\n").unwrap();
    }

    fn call(
        &mut self,
        method: &str,
        call: &str,
        body: &[u8],
        fds: &[OwnedFd],
    ) -> Result<Option<Value>, Refusal> {
        let wanted = if matches!(call, "vmm.ping" | "vm.info") {
            "GET"
        } else {
            "PUT"
        };
        let bodiless = [
            "vmm.ping",
            "vm.info",
            "vm.boot",
            "vm.pause",
            "vm.resume",
            "vmm.shutdown",
        ];
        if method != wanted {
            return Err((400, format!("{call} is no {method}")));
        }
        if bodiless.contains(&call) != body.is_empty() {
            return Err((400, format!("{call} has a body of {} bytes", body.len())));
        }
        if call != "vm.add-net" && !fds.is_empty() {
            return Err((400, format!("{call} takes no fds")));
        }
        let answer = self.act(call, body, fds.len())?;
        self.calls.push(call.to_owned());
        Ok(answer)
    }

    fn expect(&self, states: &[State]) -> Result<(), Refusal> {
        if states.contains(&self.state) {
            return Ok(());
        }
        refuse(format!("the VM is in state {:?}", self.state))
    }

    fn act(&mut self, call: &str, body: &[u8], fds: usize) -> Result<Option<Value>, Refusal> {
        use State::{Created, NoVm, Paused, Running};
        match call {
            "vmm.ping" => {
                let version = format!("v{}.0.0", self.release);
                return Ok(Some(json!({"version": version, "pid": 1, "features": []})));
            }
            "vmm.shutdown" => (self.state, self.vm) = (NoVm, None),
            "vm.create" => {
                self.expect(&[NoVm])?;
                self.create(parse(body)?)?;
                self.state = Created;
            }
            "vm.boot" => {
                self.expect(&[Created])?;
                self.state = Running;
            }
            "vm.pause" => {
                self.expect(&[Running])?;
                self.state = Paused;
            }
            "vm.resume" => {
                self.expect(&[Paused])?;
                self.state = Running;
            }
            "vm.info" => {
                self.expect(&[Created, Running, Paused])?;
                return Ok(self.vm.as_ref().map(|vm| {
                    json!({
                        "state": format!("{:?}", self.state),
                        "config": {
                            "cpus": {"boot_vcpus": vm.cpus.boot_vcpus},
                            "memory": {"size": vm.memory.size},
                        },
                    })
                }));
            }
            "vm.add-net" => {
                self.expect(&[Created, Running])?;
                let card: Net = parse(body)?;
                if fds == 0 || card.num_queues != fds * 2 {
                    return refuse(format!("{} queues with {fds} fds", card.num_queues));
                }
                return self.plug(&card.id);
            }
            "vm.add-disk" => {
                self.expect(&[Running])?;
                let disk: Disk = parse(body)?;
                if !["Raw", "Qcow2", "FixedVhd", "Vhdx"].contains(&disk.image_type.as_str()) {
                    return refuse(format!("there are no disks of type {}", disk.image_type));
                }
                return self.plug(&disk.id);
            }
            "vm.remove-device" => {
                self.expect(&[Running])?;
                let Id { id } = parse(body)?;
                if !self.devices.remove(&id) {
                    return refuse(format!("there is no device {id}"));
                }
                // The guest lets go of it at once.
                self.tell(
                    "vm",
                    "device-removed",
                    &json!({"id": id, "bdf": "0000:00:09.0"}),
                );
            }
            "vm.resize" => {
                self.expect(&[Running])?;
                self.resize(&parse(body)?)?;
            }
            _ => return Err((404, format!("there is no {call}"))),
        }
        Ok(None)
    }

    fn create(&mut self, vm: VmConfig) -> Result<(), Refusal> {
        let new = vm.payload.is_some();
        let old = vm.kernel.is_some() || vm.cmdline.is_some() || vm.initramfs.is_some();
        if new == old || new != (self.release >= PAYLOAD_SINCE) {
            return refuse("what to boot is not said as this release wants it");
        }
        if vm.cpus.boot_vcpus == 0 || vm.cpus.boot_vcpus > vm.cpus.max_vcpus {
            return refuse("boot_vcpus");
        }
        // vhost-user devices have to see the memory.
        if !vm.fs.is_empty() && !vm.memory.shared {
            return refuse("memory.shared");
        }
        for console in [&vm.serial, &vm.console] {
            if !["Off", "Null", "Tty", "Pty"].contains(&console.mode.as_str()) {
                return refuse(format!("there is no mode {}", console.mode));
            }
        }
        let ids = vm.fs.iter().map(|fs| &fs.id).chain([&vm.vsock.id]);
        self.devices = ids.cloned().collect();
        self.vm = Some(vm);
        Ok(())
    }

    fn plug(&mut self, id: &str) -> Result<Option<Value>, Refusal> {
        if !self.devices.insert(id.to_owned()) {
            return refuse(format!("{id} is not unique"));
        }
        let hot = self.state != State::Created;
        Ok(hot.then(|| json!({"id": id, "bdf": "0000:00:09.0"})))
    }

    fn resize(&mut self, size: &Size) -> Result<(), Refusal> {
        let Some(vm) = &mut self.vm else {
            return refuse("there is no VM");
        };
        if size.desired_vcpus > vm.cpus.max_vcpus {
            return refuse("desired_vcpus");
        }
        let more = size.desired_ram.checked_sub(vm.memory.size);
        let room = vm.memory.hotplug_size.unwrap_or(0);
        let Some(more) = more.filter(|more| more % (128 << 20) == 0 && *more <= room) else {
            return refuse("desired_ram");
        };
        vm.memory.hotplug_size = Some(room - more);
        vm.memory.size = size.desired_ram;
        vm.cpus.boot_vcpus = size.desired_vcpus;
        Ok(())
    }
}

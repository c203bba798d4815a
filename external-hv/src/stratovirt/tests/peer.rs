//! StratoVirt's QMP, strictly: an unknown command or argument, an id that is no string, two
//! commands at once, fds where none belong, a place that is taken or not there are refused. It
//! describes no more than what we use. There is no VM behind it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::AbortHandle;

use super::line::Devices;
use crate::hypervisor::Layout;
use crate::rights::receive;

/// Declares what arguments may and must have.
macro_rules! arguments {
    ($($name:ident { $($(#[$rename:meta])? $field:ident: $type:ty),* $(,)? })*) => {$(
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code, reason = "that it is there is what counts")]
        struct $name { $($(#[$rename])? $field: $type),* }
    )*};
}

arguments! {
    Nothing {}
    Id { id: String }
    Node { #[serde(rename = "node-name")] node: String }
    Fd { fdname: String }
    Netdev { id: String, r#type: String, fds: String }
    Direct { direct: bool }
    File { driver: String, filename: String, aio: String }
    Blockdev {
        #[serde(rename = "node-name")] node: String,
        driver: String,
        #[serde(rename = "read-only")] read_only: bool,
        discard: String,
        cache: Direct,
        file: File,
    }
    Device {
        id: String, driver: String,
        bus: Option<String>, addr: Option<String>,
        netdev: Option<String>, mac: Option<String>, mq: Option<String>,
        drive: Option<String>, serial: Option<String>,
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Command {
    execute: String,
    arguments: Value,
    id: String,
}

/// A VMM without a VM.
#[derive(Debug)]
struct Vmm {
    /// Devices behind root ports.
    ports: BTreeMap<String, Option<String>>,
    nodes: BTreeSet<String>,
    netdevs: BTreeSet<String>,
    fds: BTreeMap<String, OwnedFd>,
    paused: bool,
    commands: Vec<String>,
    /// To be told.
    events: Vec<Value>,
}

#[derive(Debug)]
pub(super) struct Peer {
    vmm: Arc<Mutex<Vmm>>,
    reset: Arc<tokio::sync::Notify>,
    serving: AbortHandle,
}

impl Peer {
    /// One that was started with these devices, in the folder of `layout`.
    pub(super) fn start(layout: &Layout, devices: Devices) -> Self {
        let vmm = Arc::new(Mutex::new(Vmm {
            ports: devices.ports,
            nodes: BTreeSet::new(),
            netdevs: devices.netdevs,
            fds: BTreeMap::new(),
            paused: false,
            commands: Vec::new(),
            events: Vec::new(),
        }));
        let listener = UnixListener::bind(layout.api()).unwrap();
        let reset = Arc::new(tokio::sync::Notify::new());
        let (served, resetting) = (Arc::clone(&vmm), Arc::clone(&reset));
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // One client at a time; one that hangs up is no failure.
                let _ = serve(stream, &served, &resetting).await;
            }
        });
        Self {
            vmm,
            reset,
            serving: serving.abort_handle(),
        }
    }

    /// What was done and not refused, in order.
    pub(super) fn commands(&self) -> Vec<String> {
        lock(&self.vmm).commands.clone()
    }

    /// The guest resets itself.
    pub(super) fn reset(&self) {
        self.reset.notify_one();
    }

    /// What is behind root ports.
    pub(super) fn plugged(&self) -> Vec<(String, String)> {
        let ports = lock(&self.vmm).ports.clone();
        let taken = |(port, device): (String, Option<String>)| Some((port, device?));
        ports.into_iter().filter_map(taken).collect()
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

async fn say(stream: &mut UnixStream, message: &Value) -> io::Result<()> {
    stream.write_all(format!("{message}\r\n").as_bytes()).await
}

async fn serve(
    mut stream: UnixStream,
    vmm: &Mutex<Vmm>,
    reset: &tokio::sync::Notify,
) -> io::Result<()> {
    let version =
        json!({"qemu": {"micro": 1, "minor": 0, "major": 5}, "package": "StratoVirt-2.5.0"});
    say(
        &mut stream,
        &json!({"QMP": {"version": version, "capabilities": []}}),
    )
    .await?;
    loop {
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        tokio::select! {
            () = reset.notified() => {
                say(&mut stream, &event("RESET", &json!({"guest": true}))).await?;
                continue;
            }
            received = receive(&stream, &mut bytes, &mut fds) => if received? == 0 {
                return Ok(());
            }
        }
        let (answer, events) = {
            let mut vmm = lock(vmm);
            let answer = vmm.answer(&bytes, fds);
            (answer, std::mem::take(&mut vmm.events))
        };
        say(&mut stream, &answer).await?;
        for event in events {
            say(&mut stream, &event).await?;
        }
    }
}

fn event(name: &str, data: &Value) -> Value {
    json!({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}})
}

fn arguments<T: DeserializeOwned>(arguments: &Value) -> Result<T, String> {
    T::deserialize(arguments).map_err(|err| err.to_string())
}

fn refuse<T>(why: impl Into<String>) -> Result<T, String> {
    Err(why.into())
}

impl Vmm {
    fn answer(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Value {
        // What is read at once is one command to it; ids it cannot read are not in the answer.
        let command: Command = match serde_json::from_slice(bytes) {
            Ok(command) => command,
            Err(err) => return error(&err.to_string()),
        };
        let has_id = command.execute != "qmp_capabilities";
        let mut answer = match self.act(&command, fds) {
            Ok(value) => {
                self.commands.push(command.execute);
                json!({ "return": value })
            }
            Err(why) => error(&why),
        };
        if has_id {
            answer["id"] = command.id.into();
        }
        answer
    }

    fn act(&mut self, command: &Command, mut fds: Vec<OwnedFd>) -> Result<Value, String> {
        let given = &command.arguments;
        if command.execute != "getfd" && !fds.is_empty() {
            return refuse("fds that nobody asked for");
        }
        match command.execute.as_str() {
            "qmp_capabilities" | "quit" => {
                arguments::<Nothing>(given)?;
            }
            "query-status" => {
                arguments::<Nothing>(given)?;
                return Ok(json!({"running": !self.paused, "singlestep": false}));
            }
            "stop" | "cont" => {
                arguments::<Nothing>(given)?;
                let pause = command.execute == "stop";
                if self.paused == pause {
                    return refuse("");
                }
                self.paused = pause;
            }
            "getfd" => {
                let Fd { fdname } = arguments(given)?;
                let Some(fd) = fds.pop().filter(|_| fds.is_empty()) else {
                    return refuse("Invalid SCM message");
                };
                self.fds.insert(fdname, fd);
            }
            "netdev_add" => {
                let netdev: Netdev = arguments(given)?;
                if netdev.r#type != "tap" {
                    return refuse("netdev_type");
                }
                for name in netdev.fds.split(':') {
                    if self.fds.remove(name).is_none() {
                        return refuse(format!("there is no fd {name}"));
                    }
                }
                if !self.netdevs.insert(netdev.id) {
                    return refuse("Netdev has been added");
                }
            }
            "netdev_del" => {
                let Id { id } = arguments(given)?;
                if !self.netdevs.remove(&id) {
                    return refuse(format!("Netdev {id} not found"));
                }
            }
            "blockdev-add" => {
                let disk: Blockdev = arguments(given)?;
                let engines: &[&str] = if disk.cache.direct {
                    &["off", "native", "iouring", "threads"]
                } else {
                    &["off"]
                };
                if disk.driver != "raw" || !engines.contains(&disk.file.aio.as_str()) {
                    return refuse(format!("{disk:?}"));
                }
                if !self.nodes.insert(disk.node) {
                    return refuse("Drive has been added");
                }
            }
            "blockdev-del" => {
                let Node { node } = arguments(given)?;
                if !self.nodes.remove(&node) {
                    return refuse(format!("Drive {node} not found"));
                }
            }
            "device_add" => self.add(arguments(given)?)?,
            "device_del" => {
                let Id { id } = arguments(given)?;
                let behind = |place: &&mut Option<String>| place.as_deref() == Some(&id);
                let Some(place) = self.ports.values_mut().find(behind) else {
                    return refuse(format!("Device {id} not found"));
                };
                *place = None;
                // The guest lets go of it at once.
                let data = json!({"device": id, "path": format!("/machine/peripheral/{id}")});
                self.events.push(event("DEVICE_DELETED", &data));
            }
            other => return refuse(format!("unknown variant `{other}`")),
        }
        Ok(json!({}))
    }

    fn add(&mut self, device: Device) -> Result<(), String> {
        let found = match device.driver.as_str() {
            "virtio-net-pci" => device.netdev.is_some_and(|id| self.netdevs.contains(&id)),
            "virtio-blk-pci" => device.drive.is_some_and(|id| self.nodes.contains(&id)),
            other => return refuse(format!("Driver {other} is not support")),
        };
        let on = |known: Option<String>| known.is_none_or(|mq| mq == "on" || mq == "off");
        if !found || !on(device.mq) || device.addr.as_deref() != Some("0x0") {
            return refuse(format!("{} has no backend or place", device.id));
        }
        let id = Some(device.id);
        if self.ports.values().any(|place| *place == id) {
            return refuse("Device id existed");
        }
        match self.ports.get_mut(device.bus.as_deref().unwrap_or("")) {
            Some(place @ None) => *place = id,
            Some(Some(_)) => return refuse("the slot is occupied"),
            None => return refuse("Bus not found"),
        }
        Ok(())
    }
}

fn error(why: &str) -> Value {
    json!({"error": {"class": "GenericError", "desc": why}})
}

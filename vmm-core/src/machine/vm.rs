//! [`Vm`] for the in-process machine.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use devices::virtio::net::{NetHandle, TapDevice};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::Machine;
use super::live::PAUSE_LIMIT;
use crate::vm::{
    Disk, DiskPlace, ExitReason, GuestListener, GuestStream, Vm, VmError, VmSize, VmStats,
};

impl Machine {
    fn ensure_running(&self) -> Result<Arc<super::Live>, VmError> {
        if let Some(reason) = self.exit.get() {
            return Err(VmError::Exited(reason));
        }
        self.live().ok_or(VmError::Exited(ExitReason::Stopped))
    }

    fn net(&self, slot: usize) -> Result<NetHandle, VmError> {
        self.ensure_running()?;
        self.nets.get(slot).cloned().ok_or(VmError::NoNetSlot {
            slot,
            slots: self.nets.len(),
        })
    }

    fn with_disk_slot(&self, slot: usize) -> Result<Arc<super::Live>, VmError> {
        let live = self.ensure_running()?;
        let slots = live.disks.len();
        if slot >= slots {
            return Err(VmError::NoDiskSlot { slot, slots });
        }
        Ok(live)
    }
}

#[async_trait]
impl Vm for Machine {
    fn backend(&self) -> &'static str {
        "in-process"
    }

    async fn start(&self) -> Result<(), VmError> {
        self.ensure_running()?.vcpus.run();
        tracing::info!(pod = self.threads.machine(), "machine started");
        Ok(())
    }

    async fn stop(&self, deadline: Duration) -> Result<(), VmError> {
        self.exit.report(ExitReason::Stopped);
        if let Some(live) = self.take_live() {
            let torn_down = self.torn_down.clone();
            let pod = self.threads.machine();
            // On a thread of its own, so that it goes on when the deadline has passed or
            // the caller has gone.
            tokio::task::spawn_blocking(move || {
                live.tear_down();
                drop(live);
                torn_down.send_replace(true);
                tracing::info!(pod, "machine stopped");
            });
        }
        let mut torn_down = self.torn_down.subscribe();
        let done = torn_down.wait_for(|done| *done);
        match timeout(deadline, done).await {
            Ok(_) => Ok(()),
            Err(_) => Err(VmError::Deadline {
                what: "stopping the VM",
                limit: deadline,
            }),
        }
    }

    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exit.subscribe()
    }

    async fn connect(
        &self,
        port: u32,
        deadline: Duration,
    ) -> Result<Box<dyn GuestStream>, VmError> {
        self.ensure_running()?;
        let Some(vsock) = &self.vsock else {
            return Err(VmError::Unsupported {
                what: "connect to the guest without a vsock device",
                backend: self.backend(),
            });
        };
        let answer = vsock.connect(port);
        let mut exited = self.exit.subscribe();
        let answered = async {
            tokio::select! {
                answer = answer => Ok(answer),
                _ = exited.wait_for(Option::is_some) => {
                    Err(VmError::Exited(self.exit.get().unwrap_or(ExitReason::Stopped)))
                }
            }
        };
        let answer = timeout(deadline, answered)
            .await
            .map_err(|_| VmError::Deadline {
                what: "connecting to the guest",
                limit: deadline,
            })??;
        let stream = match answer {
            Ok(Ok(stream)) => stream,
            Ok(Err(err)) if err.kind() == io::ErrorKind::ConnectionRefused => {
                return Err(VmError::Refused(port));
            }
            Ok(Err(source)) => {
                return Err(VmError::Io {
                    what: format!("cannot connect to guest port {port}"),
                    source,
                });
            }
            // The device went away with its VM.
            Err(_) => {
                return Err(VmError::Exited(
                    self.exit.get().unwrap_or(ExitReason::Stopped),
                ));
            }
        };
        Ok(Box::new(into_async(stream)?))
    }

    fn listen(&self, port: u32) -> Result<Box<dyn GuestListener>, VmError> {
        self.ensure_running()?;
        let Some(vsock) = &self.vsock else {
            return Err(VmError::Unsupported {
                what: "listen for the guest without a vsock device",
                backend: self.backend(),
            });
        };
        let streams = vsock.listen(port).map_err(|source| VmError::Io {
            what: format!("cannot listen on host port {port}"),
            source,
        })?;
        Ok(Box::new(Listener {
            streams,
            exited: self.exit.subscribe(),
        }))
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn vcpu_threads(&self) -> Vec<i32> {
        self.live()
            .map_or_else(Vec::new, |live| live.vcpus.thread_ids())
    }

    fn stats(&self) -> VmStats {
        let live = self.live();
        VmStats {
            exits: match &live {
                Some(live) => live.vcpus.exits(),
                None => self
                    .final_exits
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .clone(),
            },
            phases: self.phases.all(),
            memory_bytes: self.memory_bytes_now(),
            resident_bytes: live
                .and_then(|live| live.vm.ram().and_then(|ram| ram.resident_bytes().ok())),
        }
    }

    fn net_slots(&self) -> usize {
        self.nets.len()
    }

    async fn attach_nic(&self, slot: usize, tap: TapDevice) -> Result<(), VmError> {
        let attached = self.net(slot)?.attach(tap);
        attached.map_err(|err| VmError::Backend(Box::new(err)))
    }

    async fn detach_nic(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        let net = self.net(slot)?;
        // Waits for the event loop.
        blocking(move || net.detach(deadline)).await
    }

    fn disk_slots(&self) -> usize {
        self.live().map_or(0, |live| live.disks.len())
    }

    async fn attach_disk(&self, slot: usize, disk: Disk) -> Result<DiskPlace, VmError> {
        let live = self.with_disk_slot(slot)?;
        // Opens files.
        let number = blocking(move || live.disks.plug(slot, &disk)).await?;
        Ok(DiskPlace::MmioDevice(number))
    }

    async fn detach_disk(&self, slot: usize, deadline: Duration) -> Result<(), VmError> {
        let live = self.with_disk_slot(slot)?;
        // Waits for requests in flight.
        blocking(move || live.disks.unplug(slot, deadline)).await
    }

    fn resizable(&self) -> Option<(VmSize, VmSize)> {
        self.size_limits()
    }

    async fn resize(&self, size: VmSize, deadline: Duration) -> Result<VmSize, VmError> {
        self.ensure_running()?;
        self.change_size(size, deadline).await
    }

    fn mark_phase(&self, phase: &'static str) {
        self.phases.mark_first(phase);
    }

    fn console_tail(&self) -> Option<String> {
        Some(self.console.tail())
    }

    async fn pause(&self) -> Result<(), VmError> {
        let live = self.ensure_running()?;
        let paused = tokio::task::spawn_blocking(move || live.pause())
            .await
            .map_err(|err| VmError::Io {
                what: "cannot wait for the vCPUs".to_owned(),
                source: io::Error::other(err),
            })?;
        if !paused {
            return Err(VmError::Deadline {
                what: "pausing the vCPUs",
                limit: PAUSE_LIMIT,
            });
        }
        // It may have ended meanwhile.
        self.ensure_running()?;
        Ok(())
    }

    async fn snapshot(&self, dir: &Path, label: &str, base: Option<&Path>) -> Result<(), VmError> {
        let live = self.ensure_running()?;
        let saver = self.saver(live);
        let (dir, label) = (dir.to_owned(), label.to_owned());
        let base = base.map(Path::to_owned);
        blocking(move || saver.store(&dir, &label, base.as_deref())).await
    }

    async fn resume(&self) -> Result<(), VmError> {
        let live = self.ensure_running()?;
        for device in &live.devices {
            // Does nothing unless a snapshot stopped it.
            let resumed = device.transport.resume();
            resumed.map_err(|err| VmError::Backend(Box::new(err)))?;
        }
        let resumed = live.disks.resume();
        resumed.map_err(|err| VmError::Backend(Box::new(err)))?;
        live.vcpus.run();
        Ok(())
    }
}

/// Runs what may block off the async threads.
async fn blocking<T: Send + 'static, E: std::error::Error + Send + Sync + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, VmError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|err| VmError::Backend(Box::new(err)))?
        .map_err(|err| VmError::Backend(Box::new(err)))
}

struct Listener {
    streams: mpsc::Receiver<UnixStream>,
    exited: watch::Receiver<Option<ExitReason>>,
}

#[async_trait]
impl GuestListener for Listener {
    async fn accept(&mut self) -> Option<Box<dyn GuestStream>> {
        loop {
            let stream = tokio::select! {
                biased;
                stream = self.streams.recv() => stream?,
                _ = self.exited.wait_for(Option::is_some) => return None,
            };
            match into_async(stream) {
                Ok(stream) => return Some(Box::new(stream)),
                Err(err) => tracing::warn!(%err, "dropped a stream from the guest"),
            }
        }
    }
}

fn into_async(stream: UnixStream) -> Result<tokio::net::UnixStream, VmError> {
    let convert = || {
        stream.set_nonblocking(true)?;
        tokio::net::UnixStream::from_std(stream)
    };
    convert().map_err(|source| VmError::Io {
        what: "cannot use the stream to the guest".to_owned(),
        source,
    })
}

use std::sync::Arc;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;

use super::{Buffer, TestGuest, TestInterrupt, TestRunner, Used, VirtQueueDriver};
use crate::virtio::{ActivateError, Activation, VirtioDevice};

/// One device with a driver that uses all its queues.
#[derive(Debug)]
pub struct DeviceDriver<D: VirtioDevice> {
    /// The device under test.
    pub device: D,
    /// Its guest.
    pub guest: TestGuest,
    /// One driver half per queue, in index order.
    pub queues: Vec<VirtQueueDriver>,
    /// What the device signalled.
    pub interrupt: Arc<TestInterrupt>,
    /// Where the device runs.
    pub runner: TestRunner,
}

impl<D: VirtioDevice> DeviceDriver<D> {
    /// A guest of 64 MiB whose queues have the device's full sizes; not yet activated.
    #[must_use]
    pub fn new(device: D) -> Self {
        let guest = TestGuest::new(64 << 20);
        let queues = device
            .queue_sizes()
            .iter()
            .map(|size| VirtQueueDriver::new(&guest, *size))
            .collect();
        Self {
            device,
            guest,
            queues,
            interrupt: Arc::new(TestInterrupt::default()),
            runner: TestRunner::start(),
        }
    }

    /// Activates the device with all its queues and features.
    ///
    /// # Errors
    /// The device's own.
    pub fn activate(&mut self) -> Result<(), ActivateError> {
        let features = self.device.features();
        self.activate_with(features)
    }

    /// Activates the device with all its queues and these features. Queues go on where
    /// their used rings are, as after a restore.
    ///
    /// # Errors
    /// The device's own.
    pub fn activate_with(&mut self, features: u64) -> Result<(), ActivateError> {
        let queues = self
            .queues
            .iter()
            .zip(0..)
            .map(|(queue, index)| {
                let mut active = queue.activate(index);
                let used = queue.used_index();
                active.queue.set_next_avail(used);
                active.queue.set_next_used(used);
                active
                    .queue
                    .set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
                active
            })
            .collect();
        self.device.activate(Activation {
            memory: self.guest.memory(),
            queues,
            interrupt: Arc::clone(&self.interrupt) as _,
            features,
            runner: self.runner.runner(),
        })
    }

    /// Adds one chain to `queue`, kicks, and waits for a used chain.
    ///
    /// # Panics
    /// When the device does not answer, or failed.
    pub fn request(&mut self, queue: usize, buffers: &[Buffer]) -> Used {
        self.queues[queue].add(buffers);
        self.queues[queue].kick();
        self.wait_used(queue)
    }

    /// Waits for a used chain on `queue`.
    ///
    /// # Panics
    /// When there is none within [`super::PATIENCE`], or the device failed.
    pub fn wait_used(&mut self, queue: usize) -> Used {
        let driver = &mut self.queues[queue];
        let mut used = None;
        self.interrupt.wait_until(|interrupt| {
            used = driver.pop_used();
            used.is_some() || interrupt.needs_reset_reason().is_some()
        });
        used.unwrap_or_else(|| {
            panic!(
                "no used chain on queue {queue}: needs_reset {:?}, failures {:?}",
                self.interrupt.needs_reset_reason(),
                self.runner.failures()
            )
        })
    }

    /// Waits for the device to ask for a reset, and says why it did.
    ///
    /// # Panics
    /// When it does not within [`super::PATIENCE`].
    pub fn wait_needs_reset(&self) -> String {
        self.interrupt
            .wait_until(|interrupt| interrupt.needs_reset_reason().is_some());
        self.interrupt
            .needs_reset_reason()
            .expect("the device asks for a reset")
    }
}

impl<D: VirtioDevice> Drop for DeviceDriver<D> {
    fn drop(&mut self) {
        self.device.reset();
    }
}

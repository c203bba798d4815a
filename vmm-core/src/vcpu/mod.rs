//! Virtual CPUs: a thread each, told what to do as a group.
//!
//! A vCPU is in one of four states. The group has a target; each thread follows it when
//! it comes out of the guest, and says so:
//!
//! ```text
//!  Created ──run──▶ Running ◀──run/pause──▶ Paused
//!     └───────────────┴────── stop ────────────┴──▶ Stopped (thread ended)
//! ```

mod counters;
mod kick;
mod run;

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

pub(crate) use self::counters::ExitCounters;
use self::kick::ImmediateExit;
pub(crate) use self::run::{Buses, Vcpu};
use crate::thread::{Thread, VmThreads};
use crate::vm::ExitCounts;

/// Where a vCPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuState {
    /// Never ran.
    Created,
    /// In the guest, or serving one of its exits.
    Running,
    /// Between two instructions of the guest, all of its state in KVM.
    Paused,
    /// Its thread has ended or is about to.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Hold,
    Run,
    Stop,
}

/// All vCPUs of one machine.
#[derive(Debug)]
pub(crate) struct VcpuGroup {
    control: Mutex<Control>,
    changed: Condvar,
    members: Vec<Member>,
    threads: Mutex<Vec<Thread>>,
}

#[derive(Debug)]
struct Control {
    target: Target,
    states: Vec<VcpuState>,
    tids: Vec<Option<i32>>,
}

#[derive(Debug)]
struct Member {
    exit_flag: ImmediateExit,
    counters: Arc<ExitCounters>,
}

impl VcpuGroup {
    /// A group for `vcpus`, whose `kvm_run` areas have `run_bytes`, all in `state`: Created
    /// or, with a guest's state in them, Paused. The threads come with [`Self::spawn`].
    pub(crate) fn new<'a>(
        vcpus: impl Iterator<Item = &'a VcpuFd>,
        run_bytes: usize,
        state: VcpuState,
    ) -> io::Result<Arc<Self>> {
        kick::install_handler()?;
        let members = vcpus
            .map(|fd| {
                Ok(Member {
                    exit_flag: ImmediateExit::of(fd, run_bytes)?,
                    counters: Arc::new(ExitCounters::default()),
                })
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Arc::new(Self {
            control: Mutex::new(Control {
                target: Target::Hold,
                states: vec![state; members.len()],
                tids: vec![None; members.len()],
            }),
            changed: Condvar::new(),
            members,
            threads: Mutex::new(Vec::new()),
        }))
    }

    /// Starts a thread for each vCPU; they wait for [`Self::run`].
    pub(crate) fn spawn(
        self: &Arc<Self>,
        vcpus: Vec<Arc<Mutex<Vcpu>>>,
        threads: &VmThreads,
    ) -> io::Result<()> {
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let group = Arc::clone(self);
            let work = move || {
                let mut seat = Seat {
                    group: &group,
                    index,
                };
                let own = || vcpu.lock().unwrap_or_else(PoisonError::into_inner);
                if let Err(err) = kick::accept_kicks() {
                    own().fail(&format!("cannot unblock the kick signal: {err}"));
                    return;
                }
                seat.take();
                while let Some(before) = seat.wait_for_run() {
                    // Given up before the next wait: a paused vCPU can be saved.
                    let mut vcpu = own();
                    if before == VcpuState::Paused {
                        vcpu.excuse_pause();
                    }
                    if vcpu.run(&group.counters(index)).is_break() {
                        return;
                    }
                }
            };
            let thread = threads.start(&format!("vcpu{index}"), work)?;
            self.lock_threads().push(thread);
        }
        self.wait_for_threads();
        Ok(())
    }

    /// Waits until every thread has taken its seat or ended.
    fn wait_for_threads(&self) {
        let mut control = self.lock();
        let absent = |control: &Control| {
            let mut seats = control.states.iter().zip(&control.tids);
            seats.any(|(state, tid)| tid.is_none() && *state != VcpuState::Stopped)
        };
        while absent(&control) {
            control = self
                .changed
                .wait(control)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the vCPUs run, for the first time or again.
    pub(crate) fn run(&self) {
        let mut control = self.lock();
        if control.target != Target::Stop {
            control.target = Target::Run;
            self.changed.notify_all();
        }
    }

    /// Asks the vCPUs to pause and waits until none is in the guest.
    ///
    /// False when one still is at `deadline`.
    pub(crate) fn pause(&self, deadline: Instant) -> bool {
        {
            let mut control = self.lock();
            if control.target == Target::Run {
                control.target = Target::Hold;
                // Threads that have not woken to run yet need not.
                for state in &mut control.states {
                    if *state == VcpuState::Created {
                        *state = VcpuState::Paused;
                    }
                }
                self.ask_to_exit(&control);
            }
        }
        self.kick_all();
        let mut control = self.lock();
        loop {
            if !control.states.contains(&VcpuState::Running) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            control = self
                .changed
                .wait_timeout(control, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Tells the vCPUs to end, without waiting. Safe from any thread, their own included.
    pub(crate) fn request_stop(&self) {
        {
            let mut control = self.lock();
            control.target = Target::Stop;
            self.ask_to_exit(&control);
            self.changed.notify_all();
        }
        self.kick_all();
    }

    /// Ends the vCPUs and joins their threads.
    pub(crate) fn stop(&self) {
        self.request_stop();
        let threads = std::mem::take(&mut *self.lock_threads());
        drop(threads);
    }

    /// The states now, by vCPU.
    pub(crate) fn states(&self) -> Vec<VcpuState> {
        self.lock().states.clone()
    }

    /// Thread ids of the vCPUs that have a thread.
    pub(crate) fn thread_ids(&self) -> Vec<i32> {
        let control = self.lock();
        let live = control.states.iter().zip(&control.tids);
        live.filter(|(state, _)| **state != VcpuState::Stopped)
            .filter_map(|(_, tid)| *tid)
            .collect()
    }

    /// Exits so far, summed over the vCPUs.
    pub(crate) fn exits(&self) -> ExitCounts {
        let mut sums = ExitCounts::new();
        for member in &self.members {
            member.counters.add_to(&mut sums);
        }
        sums
    }

    fn counters(&self, index: usize) -> Arc<ExitCounters> {
        self.members
            .get(index)
            .map(|member| Arc::clone(&member.counters))
            .unwrap_or_default()
    }

    /// Under the lock, so that a thread that reads the old target clears the flag before
    /// it is set here, never after.
    fn ask_to_exit(&self, _: &Control) {
        for member in &self.members {
            member.exit_flag.set(true);
        }
    }

    fn kick_all(&self) {
        for thread in self.lock_threads().iter() {
            if let Some(handle) = thread.handle() {
                kick::kick(handle);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_threads(&self) -> MutexGuard<'_, Vec<Thread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One thread's place in the group; gives it up as Stopped, also when unwinding.
struct Seat<'a> {
    group: &'a VcpuGroup,
    index: usize,
}

impl Seat<'_> {
    fn take(&mut self) {
        let tid = nix::unistd::gettid().as_raw();
        if let Some(slot) = self.group.lock().tids.get_mut(self.index) {
            *slot = Some(tid);
        }
        self.group.changed.notify_all();
    }

    /// Waits until the target says run, and tells the state before; `None` when it says
    /// stop.
    fn wait_for_run(&mut self) -> Option<VcpuState> {
        let mut control = self.group.lock();
        loop {
            match control.target {
                Target::Run => {
                    if let Some(member) = self.group.members.get(self.index) {
                        member.exit_flag.set(false);
                    }
                    let before = self.state(&control);
                    self.set_state(&mut control, VcpuState::Running);
                    return before;
                }
                Target::Stop => return None,
                Target::Hold => {
                    if self.state(&control) == Some(VcpuState::Running) {
                        self.set_state(&mut control, VcpuState::Paused);
                    }
                    control = self
                        .group
                        .changed
                        .wait(control)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn state(&self, control: &Control) -> Option<VcpuState> {
        control.states.get(self.index).copied()
    }

    fn set_state(&self, control: &mut Control, state: VcpuState) {
        if let Some(slot) = control.states.get_mut(self.index) {
            *slot = state;
        }
        self.group.changed.notify_all();
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut control = self.group.lock();
        self.set_state(&mut control, VcpuState::Stopped);
    }
}

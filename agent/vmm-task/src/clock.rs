//! The clocks of the guest.

use std::io;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

fn read(clock: ClockId) -> Duration {
    // These clocks exist on every kernel the agent runs on.
    clock_gettime(clock).map(Duration::from).unwrap_or_default()
}

/// Microseconds since boot, suspended time included.
pub fn boottime_us() -> u64 {
    u64::try_from(read(ClockId::CLOCK_BOOTTIME).as_micros()).unwrap_or(u64::MAX)
}

/// Nanoseconds since the epoch.
pub fn now_ns() -> u64 {
    u64::try_from(read(ClockId::CLOCK_REALTIME).as_nanos()).unwrap_or(u64::MAX)
}

/// Sets the wall clock.
pub fn set_ns(since_epoch: u64) -> io::Result<()> {
    let time = TimeSpec::from(Duration::from_nanos(since_epoch));
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

//! The end of the machine, or of the process where there is no machine of ours.

use nix::sys::reboot::{RebootMode, reboot};
use nix::unistd::sync;

use crate::log;

/// Flushes file systems and resets the machine. Elsewhere than in a guest the process ends.
pub fn reset(guest: bool, code: i32) -> ! {
    sync();
    if guest {
        match reboot(RebootMode::RB_AUTOBOOT) {
            Ok(never) => match never {},
            Err(e) => log::urgent(&format!("the machine cannot be reset: {e}")),
        }
    }
    // For PID 1 of a guest this is a kernel panic, which ends the machine as well.
    crate::sys::exit_child(code)
}

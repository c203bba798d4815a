//! What a program may do, applied right before it is executed.
//!
//! The runtime could drop capabilities itself, at the cost of about fifty system calls more
//! (it reads what it is about to write), and too early: without `noNewPrivileges` a seccomp
//! filter can only be installed while the capabilities are still there.

use std::io;

use libcontainer::capabilities::CapabilityExt;
use libcontainer::oci_spec::runtime::{Capabilities, LinuxCapabilities, Process};

use super::seccomp::Filters;
use crate::sys::{self, CapabilitySets};

/// The privileges of one process.
#[derive(Clone, Debug, Default)]
pub struct Privileges {
    capabilities: Option<Sets>,
    filters: Filters,
    no_new_privileges: bool,
}

/// Bit masks by capability number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sets {
    bounding: u64,
    ambient: u64,
    kept: CapabilitySets,
}

impl Privileges {
    /// Takes the privileges out of a process, so that the runtime leaves them alone.
    /// A process without capabilities in its spec keeps what the agent has.
    pub fn take(process: &mut Process, filters: Filters) -> Self {
        let capabilities = process.capabilities().as_ref().map(Sets::of);
        process.set_capabilities(None);
        Self {
            capabilities,
            filters,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
        }
    }

    /// Gives up everything else. Runs in the new process, after its user is set.
    pub fn apply(&self) -> io::Result<()> {
        if !self.no_new_privileges {
            self.filters.install()?;
        }
        if let Some(sets) = &self.capabilities {
            sets.apply()?;
        }
        // As late as it can be: the filter then need not allow the steps before.
        if self.no_new_privileges {
            self.filters.install()?;
        }
        Ok(())
    }
}

impl Sets {
    fn apply(&self) -> io::Result<()> {
        for number in 0..u64::BITS {
            let keep = self.bounding & 1_u64.wrapping_shl(number) != 0;
            // The first number that the kernel does not know ends the list.
            if !keep && !sys::drop_bounding_capability(number)? {
                break;
            }
        }
        sys::set_capabilities(&self.kept)?;
        for number in 0..u64::BITS {
            if self.ambient & 1_u64.wrapping_shl(number) != 0 {
                // Not permitted or not inheritable: then it is not ambient either.
                let _ = sys::raise_ambient_capability(number);
            }
        }
        Ok(())
    }

    fn of(wanted: &LinuxCapabilities) -> Self {
        Self {
            bounding: mask(wanted.bounding().as_ref()),
            ambient: mask(wanted.ambient().as_ref()),
            kept: CapabilitySets {
                effective: mask(wanted.effective().as_ref()),
                permitted: mask(wanted.permitted().as_ref()),
                inheritable: mask(wanted.inheritable().as_ref()),
            },
        }
    }
}

fn mask(set: Option<&Capabilities>) -> u64 {
    let bits = set.into_iter().flatten().map(|c| c.to_cap().bitmask());
    bits.fold(0, |all, bit| all | bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_become_masks() {
        let json = r#"{"cwd":"/","user":{"uid":0,"gid":0},"capabilities":{
            "bounding":["CAP_CHOWN","CAP_KILL"],"effective":["CAP_KILL"],"permitted":["CAP_KILL"]}}"#;
        let mut process: Process = serde_json::from_str(json).unwrap();
        let taken = Privileges::take(&mut process, Filters::default());
        let sets = taken.capabilities.unwrap();
        assert_eq!(
            (sets.bounding, sets.kept.effective, sets.kept.inheritable),
            (0b10_0001, 0b10_0000, 0)
        );
        assert!(process.capabilities().is_none());
    }

    #[test]
    fn no_capabilities_in_the_spec_is_no_change() {
        let mut process = Process::default();
        process.set_capabilities(None);
        let taken = Privileges::take(&mut process, Filters::default());
        assert_eq!(taken.capabilities, None);
        Privileges::default().apply().unwrap();
    }
}

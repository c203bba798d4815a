//! Acting as a user of the guest, for what gets an owner by being created.
//!
//! Credentials are per thread in Linux; libc's wrappers change all threads, the raw system
//! calls used here do not.

use std::io;

use fuse_backend_rs::api::filesystem::Context;
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, capabilities, set_capabilities, set_thread_res_gid, set_thread_res_uid,
};

use super::names::errno;

/// The calling thread has the guest user's effective uid and gid while this lives.
#[derive(Debug)]
pub struct Acting {
    uid: bool,
    gid: bool,
}

impl Acting {
    /// Becomes the user of `context`. Without privilege there is no other user to become,
    /// and files belong to this process's own.
    ///
    /// # Errors
    /// EINVAL for the reserved id -1; as setresuid(2).
    pub fn user(context: &Context) -> io::Result<Self> {
        let mut acting = Self {
            uid: false,
            gid: false,
        };
        if context.uid == u32::MAX || context.gid == u32::MAX {
            return Err(errno(libc::EINVAL));
        }
        if !rustix::process::geteuid().is_root() {
            return Ok(acting);
        }
        // The group first: only root may change it.
        if context.gid != 0 {
            set_thread_res_gid(None, Gid::from_raw(context.gid), None)?;
            acting.gid = true;
        }
        if context.uid != 0 {
            set_thread_res_uid(None, Uid::from_raw(context.uid), None)?;
            acting.uid = true;
        }
        Ok(acting)
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        // The saved ids are still root's, so these cannot be refused; if they were, this
        // thread would go on with less than it needs, not with more.
        if self.uid
            && let Err(err) = set_thread_res_uid(None, Uid::ROOT, None)
        {
            tracing::error!(%err, "cannot return to the root user");
        }
        if self.gid
            && let Err(err) = set_thread_res_gid(None, Gid::ROOT, None)
        {
            tracing::error!(%err, "cannot return to the root group");
        }
    }
}

/// The kernel clears set-user-id and set-group-id bits of files that this thread changes
/// while this lives, as it does for a user without CAP_FSETID.
#[derive(Debug)]
pub struct ClearsSetId {
    restore: bool,
}

impl ClearsSetId {
    /// Gives the capability up, if `wanted` and it is there.
    ///
    /// # Errors
    /// As capset(2).
    pub fn when(wanted: bool) -> io::Result<Self> {
        if !wanted {
            return Ok(Self { restore: false });
        }
        let mut sets = capabilities(None)?;
        let restore = sets.effective.contains(CapabilitySet::FSETID);
        if restore {
            sets.effective.remove(CapabilitySet::FSETID);
            set_capabilities(None, sets)?;
        }
        Ok(Self { restore })
    }
}

impl Drop for ClearsSetId {
    fn drop(&mut self) {
        if !self.restore {
            return;
        }
        let restored = capabilities(None).and_then(|mut sets| {
            sets.effective.insert(CapabilitySet::FSETID);
            set_capabilities(None, sets)
        });
        if let Err(err) = restored {
            tracing::error!(%err, "cannot regain CAP_FSETID");
        }
    }
}

//! The PID namespace that containers of a pod share.
//!
//! It lives as long as its first process, so that is one of the agent's own: it does nothing
//! but collect the orphans of the namespace. It is made for the first container that joins.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::error::AgentError;
use crate::sys;

/// The first process of the namespace.
static HOLDER: Mutex<Option<i32>> = Mutex::new(None);

/// Path of the namespace, which is made if there is none.
pub fn namespace() -> Result<PathBuf, AgentError> {
    let mut holder = HOLDER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = holder.map(path_of)
        && path.exists()
    {
        return Ok(path);
    }
    let pid = sys::hold_pid_namespace().map_err(AgentError::io("the pod's PID namespace"))?;
    *holder = Some(pid);
    Ok(path_of(pid))
}

fn path_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/pid"))
}

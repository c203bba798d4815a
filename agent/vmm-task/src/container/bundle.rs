//! A container's files and mounts in the guest, gone when dropped.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_api::rpc::Mount;
use tracing::warn;

use crate::error::AgentError;
use crate::mounts;

/// The folder below which everything of the containers lives, on tmpfs.
pub const DIR: &str = agent_api::CONTAINERS_DIR;
/// The name of the spec inside a bundle, given by the OCI runtime specification.
const CONFIG: &str = "config.json";

/// One container's folder: the OCI bundle and, beside it, the runtime's own state.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    mounts: Vec<PathBuf>,
}

impl Bundle {
    /// Makes the folder.
    pub fn create(container: &str) -> Result<Self, AgentError> {
        let dir = Path::new(DIR).join(container);
        fs::create_dir(&dir).map_err(AgentError::io(dir.display().to_string()))?;
        Ok(Self {
            dir,
            mounts: Vec::new(),
        })
    }

    /// The OCI bundle.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Where the runtime keeps its state.
    pub fn state_root(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Mounts what the container needs before it exists.
    pub fn mount(&mut self, wanted: &[Mount]) -> Result<(), AgentError> {
        for mount in wanted {
            mounts::mount(mount)?;
            self.mounts.push(PathBuf::from(&mount.target));
        }
        Ok(())
    }

    /// Writes the spec.
    pub fn write_spec(&self, spec: &impl serde::Serialize) -> Result<(), AgentError> {
        self.write(CONFIG, spec).map(|_| ())
    }

    /// Writes a file of JSON.
    pub fn write(
        &self,
        name: &str,
        content: &impl serde::Serialize,
    ) -> Result<PathBuf, AgentError> {
        let path = self.dir.join(name);
        let json = serde_json::to_vec(content).map_err(|e| AgentError::Internal(e.to_string()))?;
        fs::write(&path, json).map_err(AgentError::io(path.display().to_string()))?;
        Ok(path)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        for target in self.mounts.iter().rev() {
            if !mounts::unmount(target) {
                // Removing the folder would empty what is mounted there.
                return;
            }
        }
        if let Err(e) = fs::remove_dir_all(&self.dir)
            && e.kind() != io::ErrorKind::NotFound
        {
            warn!("{} stays: {e}", self.dir.display());
        }
    }
}

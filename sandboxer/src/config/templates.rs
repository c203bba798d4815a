//! `[templates]`: pods as clones of a guest that has booted once.

use std::path::{Path, PathBuf};

use guest_image::Cache;
use serde::{Deserialize, Serialize};

use super::{ConfigError, wrong_in};

/// `[templates]`: pods as clones of a guest that has booted once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Templates {
    /// `auto`: pods are cloned, from a template that is built when the first pod of its size
    /// needs it. `off`: each pod boots.
    pub mode: TemplateMode,
    /// Where templates are kept for the next daemon. Unset: the folder `templates` in the
    /// cache of guest images.
    pub dir: Option<PathBuf>,
    /// How many templates are kept, those used last, in memory and on disk. There is one for
    /// each size of pods.
    pub keep: usize,
    /// How many clones of each template in use wait, paused, for a pod: their agents have
    /// answered already.
    pub warm: usize,
    /// How many VMs without a guest are created ahead of time for each number of vCPUs, for
    /// pods that find no clone ready.
    pub shells: usize,
}

impl Default for Templates {
    fn default() -> Self {
        Self {
            mode: TemplateMode::Auto,
            dir: None,
            keep: 4,
            warm: 1,
            shells: 2,
        }
    }
}

impl Templates {
    pub(super) fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let wrong = |key, value: usize, fix| wrong_in(path)(key, value.to_string(), fix);
        if self.keep == 0 || self.keep > 1000 {
            return wrong("templates.keep", self.keep, "must be 1 to 1000");
        }
        for (key, value) in [
            ("templates.warm", self.warm),
            ("templates.shells", self.shells),
        ] {
            if value > 256 {
                return wrong(key, value, "must be 0 to 256");
            }
        }
        Ok(())
    }

    /// The folder of templates.
    ///
    /// # Errors
    /// None is configured and there is no cache folder either.
    pub fn folder(&self) -> Result<PathBuf, guest_image::GuestError> {
        match &self.dir {
            Some(dir) => Ok(dir.clone()),
            None => Ok(Cache::locate()?.root().join("templates")),
        }
    }
}

/// Whether pods are cloned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TemplateMode {
    /// Wherever a template can be had.
    #[default]
    Auto,
    /// Never.
    Off,
}

//! How far a build has come.

use std::fmt;

/// One stage of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Another process builds; its result will be used.
    Waiting,
    /// Hashing the kernel source, to know whether it was built before.
    Hashing,
    /// Downloading the distribution's kernel.
    Downloading,
    /// Unpacking the kernel source, or package.
    Unpacking,
    /// Applying patches.
    Patching,
    /// Making the configuration and checking that it holds what was asked for.
    Configuring,
    /// Compiling.
    Compiling,
    /// Linking the kernel.
    Linking,
    /// Writing the initramfs.
    Packing,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting for another build",
            Self::Hashing => "hashing the kernel source",
            Self::Downloading => "getting the distribution's kernel",
            Self::Unpacking => "unpacking the kernel",
            Self::Patching => "patching",
            Self::Configuring => "configuring",
            Self::Compiling => "compiling the kernel",
            Self::Linking => "linking the kernel",
            Self::Packing => "writing the initramfs",
        })
    }
}

/// A notice to whoever shows the build to a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub step: Step,
    /// Units of the step that are finished: patches, objects.
    pub done: u64,
    /// Units the step has; for compiling an estimate. `None` where a step has no parts.
    pub total: Option<u64>,
}

impl Progress {
    pub(crate) fn start(step: Step) -> Self {
        Self {
            step,
            done: 0,
            total: None,
        }
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.total {
            Some(total) => write!(f, "{} {}/{total}", self.step, self.done),
            None => write!(f, "{}", self.step),
        }
    }
}

/// Takes the notices of a build.
pub(crate) type Report<'a> = &'a mut dyn FnMut(Progress);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_parts_only_where_a_step_has_them() {
        assert_eq!(
            Progress::start(Step::Linking).to_string(),
            "linking the kernel"
        );
        let compiling = Progress {
            step: Step::Compiling,
            done: 3,
            total: Some(9),
        };
        assert_eq!(compiling.to_string(), "compiling the kernel 3/9");
    }
}

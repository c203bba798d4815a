//! What can go wrong, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::kconfig::Mismatch;
use crate::packages::MissingTool;
use crate::progress::Step;

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, GuestError>;

/// Why a guest could not be built or found.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Nowhere to keep what is built.
    #[error(
        "no cache folder: set KUASAR_CACHE_DIR (or XDG_CACHE_HOME or HOME) to a folder that can be written"
    )]
    NoCacheDir,

    /// The distribution's kernel source is not installed.
    #[error(
        "no kernel source {name} in {}: install it with `apt-get install {package}`",
        dir.display()
    )]
    SourceMissing {
        /// Name of the archive that was looked for.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
        /// Package that brings it.
        package: String,
    },

    /// Programs or headers of the kernel build are not installed.
    #[error("the kernel build needs {}: install with `apt-get install {}`", tools(.0), packages(.0))]
    MissingTools(Vec<MissingTool>),

    /// The package lists of this host have no kernel.
    #[error(
        "apt knows no package {0}: run `apt-get update` on a host of Debian or a relative, or put \
         a kernel and an initramfs with its modules into vm.kernel and vm.initramfs"
    )]
    NoDistroKernel(&'static str),

    /// A kernel's package is not laid out as known.
    #[error("{}: not what a kernel's package has there", path.display())]
    UnknownPackage {
        /// Where something is missing, or cannot be unpacked.
        path: PathBuf,
    },

    /// A step of the build failed.
    #[error("{step} failed ({status}); the end of {}:\n{tail}", log.display())]
    Build {
        /// The step.
        step: Step,
        /// How its command ended.
        status: String,
        /// Last lines of the log.
        tail: String,
        /// The whole log.
        log: PathBuf,
    },

    /// The kernel's own rules overruled options of the fragments.
    #[error(
        "the kernel configuration dropped {}: add what these options depend on to the fragment, or remove them",
        list(.0)
    )]
    ConfigDropped(Vec<Mismatch>),

    /// A line of a fragment is not configuration.
    #[error(
        "{fragment}:{line}: not a configuration line: `{text}`; write CONFIG_X=y or `# CONFIG_X is not set`"
    )]
    BadFragment {
        /// Name of the fragment.
        fragment: String,
        /// Line number, from 1.
        line: usize,
        /// The line.
        text: String,
    },

    /// Two lines set the same option.
    #[error("{fragment}:{line}: {option} is set before; keep one of the two lines")]
    DuplicateOption {
        /// Name of the fragment with the second line.
        fragment: String,
        /// Its line number, from 1.
        line: usize,
        /// The option.
        option: String,
    },

    /// The program for `/init` cannot run as the guest's first process.
    #[error("{} cannot be /init: {reason}; build the agent with `make agent`", path.display())]
    NotAnInit {
        /// The program.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// An extra file has no place in an initramfs.
    #[error("{path:?} cannot be in an initramfs: {reason}; give another path")]
    BadEntry {
        /// Path in the guest.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// Nothing was built yet.
    #[error("no guest image in {}: build one with `kuasar-ctl guest build`", .0.display())]
    NotBuilt(PathBuf),

    /// A file of the cache does not hold what it should.
    #[error("{} is damaged ({source}): remove it and run `kuasar-ctl guest build`", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        source: serde_json::Error,
    },

    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}; check that it exists, its owner and the free space", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Names the file an operation failed on.
pub(crate) trait IoContext<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| GuestError::Io {
            action,
            path: path.to_owned(),
            source,
        })
    }
}

fn list(mismatches: &[Mismatch]) -> String {
    mismatches
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

fn tools(missing: &[MissingTool]) -> String {
    missing
        .iter()
        .map(|m| m.tool)
        .collect::<Vec<_>>()
        .join(", ")
}

fn packages(missing: &[MissingTool]) -> String {
    let mut names: Vec<_> = missing.iter().map(|m| m.package).collect();
    names.sort_unstable();
    names.dedup();
    names.join(" ")
}

//! Modules of a distribution's kernel, which the initramfs brings in the order in which they
//! are to be loaded. Our own kernel has none.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::system::finit_module;
use tracing::{debug, warn};

const DIR: &str = "/lib/modules";

/// Loads them all and gives the memory of their files back.
pub fn load() {
    let files = match files() {
        Ok(files) => files,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return,
        Err(e) => return warn!("{DIR}: {e}"),
    };
    for file in files {
        if let Err(e) = load_one(&file) {
            warn!("module {}: {e}", file.display());
        }
    }
    if let Err(e) = fs::remove_dir_all(DIR) {
        debug!("{DIR}: {e}");
    }
}

/// Sorted by their names, which begin with their numbers.
fn files() -> io::Result<Vec<PathBuf>> {
    let mut files = fs::read_dir(DIR)?
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

fn load_one(path: &Path) -> io::Result<()> {
    match finit_module(File::open(path)?, c"", 0) {
        // It is there already, or the machine has nothing for it.
        Err(Errno::EXIST | Errno::NODEV) => Ok(()),
        done => Ok(done?),
    }
}

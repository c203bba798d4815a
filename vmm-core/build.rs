//! Gives the library a digest of its own sources and those of the device models: saved
//! machines are only restored by the code that saved them.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let mut hasher = DefaultHasher::new();
    env::var("CARGO_PKG_VERSION")
        .unwrap_or_default()
        .hash(&mut hasher);
    for dir in ["src", "../devices/src"] {
        println!("cargo::rerun-if-changed={dir}");
        // Outside the project's own tree only the first is there.
        if Path::new(dir).is_dir() {
            digest(Path::new(dir), &mut hasher)?;
        }
    }
    println!("cargo::rustc-env=VMM_CORE_BUILD={:016x}", hasher.finish());
    Ok(())
}

fn digest(dir: &Path, hasher: &mut DefaultHasher) -> io::Result<()> {
    let mut paths = fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        let is_test = path
            .file_stem()
            .is_some_and(|name| name == "tests" || name == "testing");
        if is_test {
            continue;
        }
        path.hash(hasher);
        if path.is_dir() {
            digest(&path, hasher)?;
        } else {
            fs::read(&path)?.hash(hasher);
        }
    }
    Ok(())
}

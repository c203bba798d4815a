//! The network namespace that CNI prepared for a pod.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use super::error::{PodError, Result};

/// Checks that `path` is a namespace and returns the names of its interfaces but loopback.
/// Blocks.
///
/// # Errors
/// `path` is missing, is not a namespace, or cannot be entered.
pub(super) fn interfaces(path: &Path) -> Result<BTreeSet<String>> {
    let invalid = |fix: String| PodError::invalid("netns_path", path.display().to_string(), fix);
    let file = File::open(path).map_err(|e| invalid(format!("cannot be opened: {e}")))?;
    let kind = fstatfs(&file)
        .map_err(|e| invalid(format!("cannot be read: {e}")))?
        .filesystem_type();
    if kind != NSFS_MAGIC {
        return Err(invalid(
            "must be a network namespace, as made by `ip netns add`".to_owned(),
        ));
    }
    // A namespace belongs to a thread: a short-lived one keeps ours as it is.
    let listed = std::thread::spawn(move || -> std::io::Result<String> {
        setns(file, CloneFlags::CLONE_NEWNET)?;
        std::fs::read_to_string("/proc/thread-self/net/dev")
    });
    let table = listed
        .join()
        .map_err(|_| invalid("cannot be entered".to_owned()))?
        .map_err(|e| invalid(format!("cannot be entered: {e}")))?;
    Ok(names(&table))
}

/// Interface names in a table like `/proc/net/dev`, without loopback.
fn names(table: &str) -> BTreeSet<String> {
    table
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim().to_owned())
        .filter(|name| name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaces_are_accepted() {
        for path in ["/etc/passwd", "/nonexistent"] {
            let error = interfaces(Path::new(path)).unwrap_err().to_string();
            assert!(
                error.contains("netns_path") && error.contains(path),
                "{error}"
            );
        }
    }

    #[test]
    fn lists_the_interfaces_of_this_namespace() {
        match interfaces(Path::new("/proc/self/ns/net")) {
            Ok(found) => {
                let table = std::fs::read_to_string("/proc/self/net/dev").unwrap();
                assert_eq!(found, names(&table));
            }
            Err(e) => println!("skipped: cannot enter a network namespace: {e}"),
        }
    }
}

//! Digests that name what was built by what it was built from.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::error::{IoContext as _, Result};

/// A digest over named fields. Every field carries its length, so no two lists
/// of fields can run together into the same bytes.
#[derive(Debug, Default)]
pub(crate) struct Fields(Sha256);

impl Fields {
    pub fn add(&mut self, name: &str, value: impl AsRef<[u8]>) -> &mut Self {
        for part in [name.as_bytes(), value.as_ref()] {
            let length = u64::try_from(part.len()).unwrap_or(u64::MAX);
            self.0.update(length.to_le_bytes());
            self.0.update(part);
        }
        self
    }

    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

/// The digest of some bytes.
pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The digest of a file's content.
pub(crate) fn of_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).context("open", path)?;
    let mut sum = Sha256::new();
    io::copy(&mut file, &mut sum).context("read", path)?;
    Ok(hex(&sum.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_run_together() {
        let mut one = Fields::default();
        one.add("a", "bc").add("d", "");
        let mut two = Fields::default();
        two.add("ab", "c").add("", "d");
        assert_ne!(one.finish(), two.finish());
    }

    #[test]
    fn file_and_bytes_agree() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "guest").unwrap();
        assert_eq!(of_file(file.path()).unwrap(), of_bytes(b"guest"));
        assert_eq!(
            of_bytes(b""),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}

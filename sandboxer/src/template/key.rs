//! What a template was made of.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

use crate::config::{self, GuestFiles};

/// Digest of everything that a clone takes over from its template.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TemplateKey(String);

impl TemplateKey {
    /// Characters of a key: lower-case hexadecimal digits.
    const LEN: usize = 32;

    /// A key as it was printed.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        (digits && text.len() == Self::LEN).then(|| Self(text.to_owned()))
    }

    /// For file names and messages.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TemplateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The parts of a key that are the same for all sizes of machines.
#[derive(Clone, Debug)]
pub struct TemplateParts(blake3::Hasher);

impl TemplateParts {
    /// Digests the guest's files and the host's fingerprint ([`vmm_core::Host::fingerprint`]).
    /// Blocks.
    ///
    /// # Errors
    /// A file of the guest cannot be read.
    pub fn new(host: &str, guest: &GuestFiles, vm: &config::Vm) -> io::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        add(&mut hasher, host.as_bytes());
        add(&mut hasher, vm.kernel_params.as_bytes());
        add(&mut hasher, format!("{:?}", vm.discovery).as_bytes());
        for file in [&guest.kernel, &guest.initramfs] {
            add(&mut hasher, digest_file(file)?.as_bytes());
        }
        Ok(Self(hasher))
    }

    /// The key of a machine of this size with these devices, in order.
    #[must_use]
    pub fn key(&self, vcpus: u32, memory_bytes: u64, devices: &str) -> TemplateKey {
        let mut hasher = self.0.clone();
        add(&mut hasher, &vcpus.to_le_bytes());
        add(&mut hasher, &memory_bytes.to_le_bytes());
        add(&mut hasher, devices.as_bytes());
        let mut hex = hasher.finalize().to_hex().to_string();
        hex.truncate(TemplateKey::LEN);
        TemplateKey(hex)
    }
}

/// With its length, so that no two lists of fields look alike.
fn add(hasher: &mut blake3::Hasher, field: &[u8]) {
    hasher.update(&(field.len() as u64).to_le_bytes());
    hasher.update(field);
}

fn digest_file(path: &Path) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(fields: &[&str]) -> TemplateParts {
        let mut hasher = blake3::Hasher::new();
        for field in fields {
            add(&mut hasher, field.as_bytes());
        }
        TemplateParts(hasher)
    }

    #[test]
    fn every_part_changes_the_key() {
        let base = parts(&["kernel", "params"]);
        let key = base.key(1, 128 << 20, "share rng vsock");
        assert_eq!(key, base.key(1, 128 << 20, "share rng vsock"));
        assert_ne!(key, base.key(2, 128 << 20, "share rng vsock"));
        assert_ne!(key, base.key(1, 256 << 20, "share rng vsock"));
        assert_ne!(key, base.key(1, 128 << 20, "share rng"));
        let other = parts(&["kernelp", "arams"]);
        assert_ne!(key, other.key(1, 128 << 20, "share rng vsock"));
    }

    #[test]
    fn printed_keys_are_read_back_and_nothing_else_is() {
        let key = parts(&["x"]).key(1, 2, "3");
        assert_eq!(TemplateKey::parse(key.as_str()), Some(key.clone()));
        for bad in ["", "..", "../../etc", "xyz", &key.as_str().to_uppercase()] {
            assert_eq!(TemplateKey::parse(bad), None, "{bad}");
        }
    }
}

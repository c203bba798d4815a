//! What a kernel is made from.

use std::process::Command;

use crate::cache::Cache;
use crate::digest::{self, Fields};
use crate::error::{GuestError, Result};
use crate::packages::missing_packages;
use crate::source::KernelSource;

/// Changes when the way of building changes the result for the same inputs.
const BUILD_VERSION: &str = "1";

/// A named text: a configuration fragment or a patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// File name.
    pub name: String,
    /// Content.
    pub text: String,
}

impl Input {
    /// A text under a name.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            text: text.into(),
        }
    }

    pub(crate) fn digest(&self) -> String {
        digest::of_bytes(self.text.as_bytes())
    }
}

/// Source, configuration fragments and patches of a guest kernel.
///
/// One kernel serves every host: what only hosts that emulate ring 0 need is
/// built in and asleep until the kernel command line asks for it.
#[derive(Clone, Debug)]
pub struct KernelRecipe {
    /// Where the source comes from.
    pub source: KernelSource,
    /// Options on top of the kernel's `tinyconfig`.
    pub fragments: Vec<Input>,
    /// Changes to the source, in order.
    pub patches: Vec<Input>,
    /// Compilers to run at the same time; not part of the digest.
    pub jobs: usize,
}

macro_rules! inputs {
    ($folder:literal: $($name:literal),* $(,)?) => {
        vec![$(Input::new($name, include_str!(concat!($folder, $name)))),*]
    };
}

impl KernelRecipe {
    /// The recipe of this crate, with the source package of this machine.
    pub fn locate() -> Result<Self> {
        Ok(Self::with_source(KernelSource::locate()?))
    }

    /// The recipe of this crate, with the given source.
    pub fn with_source(source: KernelSource) -> Self {
        Self {
            source,
            fragments: inputs!("../kernel/": "common.config", "soft-ring0.config"),
            patches: inputs!("../kernel/patches/":
                "0001-x86-add-an-option-for-hosts-that-emulate-ring-0.patch",
                "0002-x86-mm-take-system-calls-that-arrive-as-page-faults.patch",
                "0003-x86-avoid-instructions-ring-0-emulation-lacks.patch",
                "0004-x86-alternative-patch-less-and-with-less-work.patch",
                "0005-params-list-built-in-modules-in-an-initcall-of-its-own.patch",
                "0006-x86-reserve-decrypted-bss-only-where-it-is-used.patch",
                "0007-tick-let-a-tick-of-a-busy-CPU-cover-several-jiffies.patch",
            ),
            jobs: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// Names the kernel by everything it is made from: source, fragments,
    /// patches, compiler.
    pub fn kernel_digest(&self, cache: &Cache) -> Result<String> {
        Ok(self.digest_with(&self.source.digest(cache)?, &compiler()?))
    }

    fn digest_with(&self, source: &str, compiler: &str) -> String {
        let mut fields = Fields::default();
        fields
            .add("build", BUILD_VERSION)
            .add("source", source)
            .add("compiler", compiler);
        for fragment in &self.fragments {
            fields.add("fragment", &fragment.text);
        }
        for patch in &self.patches {
            fields.add("patch", &patch.text);
        }
        fields.finish()
    }
}

/// The compiler, as it names itself.
pub(crate) fn compiler() -> Result<String> {
    let output = Command::new("gcc").arg("--version").output();
    let Ok(output) = output else {
        return Err(GuestError::MissingTools(missing_packages()));
    };
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use crate::kconfig::Options;

    use super::*;

    fn recipe() -> KernelRecipe {
        KernelRecipe::with_source(KernelSource {
            tarball: "/nowhere".into(),
            package_version: "1".to_owned(),
        })
    }

    #[test]
    fn the_digest_follows_every_input_and_nothing_else() {
        let base = recipe().digest_with("source", "gcc 12");
        assert_ne!(base, recipe().digest_with("other", "gcc 12"));
        assert_ne!(base, recipe().digest_with("source", "gcc 13"));

        let mut fragment = recipe();
        fragment.fragments[0].text.push_str("CONFIG_X=y\n");
        assert_ne!(base, fragment.digest_with("source", "gcc 12"));

        let mut patch = recipe();
        patch.patches.pop();
        assert_ne!(base, patch.digest_with("source", "gcc 12"));

        let mut jobs = recipe();
        jobs.jobs += 1;
        assert_eq!(base, jobs.digest_with("source", "gcc 12"));
    }

    #[test]
    fn the_fragments_are_well_formed() {
        let options = Options::from_fragments(&recipe().fragments).unwrap();
        assert!(options.len() > 100);
    }

    #[test]
    fn each_patch_says_why_and_changes_something() {
        for patch in recipe().patches {
            let (why, what) = patch.text.split_once("\n---\n").unwrap();
            assert!(why.contains("Subject: "), "{}", patch.name);
            assert!(what.contains("\n@@ "), "{}", patch.name);
        }
    }
}

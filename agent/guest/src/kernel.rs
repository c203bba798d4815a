//! Building the kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::cache::{Cache, Scratch};
use crate::command::Log;
use crate::error::{GuestError, IoContext as _, Result};
use crate::kconfig::Options;
use crate::packages::missing_packages;
use crate::progress::{Progress, Report, Step};
use crate::recipe::{Input, KernelRecipe, compiler};

const KIND: &str = "kernel";
const FACTS: &str = "build.json";
/// Lines of output that name a compiled object; measured, for the progress shown.
const TYPICAL_OBJECTS: u64 = 2000;

/// A built kernel in the cache.
#[derive(Clone, Debug)]
pub struct KernelArtifact {
    /// The kernel, an ELF file with an entry for 64-bit Linux boot and PVH.
    pub vmlinux: PathBuf,
    /// Its complete configuration.
    pub config: PathBuf,
    /// Its symbols.
    pub system_map: PathBuf,
    /// What it was made from.
    pub facts: KernelFacts,
}

/// What a kernel was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelFacts {
    /// Digest of all inputs; the kernel's name in the cache.
    pub digest: String,
    /// What the kernel says with `uname -r`.
    pub version: String,
    /// Version of the source package.
    pub package_version: String,
    /// The compiler.
    pub compiler: String,
    /// Configuration fragments.
    pub fragments: Vec<InputFacts>,
    /// Patches.
    pub patches: Vec<InputFacts>,
    /// How many options the fragments ask for.
    pub options_requested: usize,
    /// Size of the kernel file.
    pub size_bytes: u64,
}

/// An input of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFacts {
    /// File name.
    pub name: String,
    /// SHA-256 of its content.
    pub sha256: String,
}

impl KernelArtifact {
    /// Builds the kernel of a recipe, or finds it in the cache.
    pub fn build(
        cache: &Cache,
        recipe: &KernelRecipe,
        report: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        report(Progress::start(Step::Hashing));
        let digest = recipe.kernel_digest(cache)?;
        let found = cache.find(KIND, &digest);
        let path = match found {
            Some(path) => path,
            None => build_new(cache, recipe, &digest, report)?,
        };
        Self::open(&path)
    }

    /// Reads a kernel's folder in the cache.
    fn open(folder: &Path) -> Result<Self> {
        Ok(Self {
            vmlinux: folder.join("vmlinux"),
            config: folder.join("config"),
            system_map: folder.join("System.map"),
            facts: read_facts(folder)?,
        })
    }
}

fn build_new(
    cache: &Cache,
    recipe: &KernelRecipe,
    digest: &str,
    report: Report,
) -> Result<PathBuf> {
    let missing = missing_packages();
    if !missing.is_empty() {
        return Err(GuestError::MissingTools(missing));
    }
    // Two closures report, but never at the same time.
    let report = std::cell::RefCell::new(report);
    cache.find_or_build(
        KIND,
        digest,
        || (report.borrow_mut())(Progress::start(Step::Waiting)),
        |scratch| {
            let log = cache
                .root()
                .join("log")
                .join(format!("{KIND}-{digest}.log"));
            let mut report = report.borrow_mut();
            let mut build = Build {
                recipe,
                digest,
                scratch,
                log: Log::create(log)?,
                report: &mut **report,
            };
            build.run()
        },
    )
}

struct Build<'a> {
    recipe: &'a KernelRecipe,
    digest: &'a str,
    scratch: &'a Scratch,
    log: Log,
    report: Report<'a>,
}

impl Build<'_> {
    fn run(&mut self) -> Result<()> {
        self.unpack()?;
        self.patch()?;
        let options = self.configure()?;
        self.compile()?;
        self.collect(&options)
    }

    fn source(&self) -> PathBuf {
        self.scratch.root.join("source")
    }

    fn objects(&self) -> PathBuf {
        self.scratch.root.join("objects")
    }

    fn unpack(&mut self) -> Result<()> {
        (self.report)(Progress::start(Step::Unpacking));
        for folder in [self.source(), self.objects()] {
            fs::create_dir(&folder).context("create", &folder)?;
        }
        let mut tar = Command::new("tar");
        tar.arg("--extract")
            .arg("--strip-components=1")
            .arg("--file")
            .arg(&self.recipe.source.tarball)
            .arg("--directory")
            .arg(self.source());
        self.log.run(Step::Unpacking, &mut tar, &mut |_| {})
    }

    fn patch(&mut self) -> Result<()> {
        let total = u64::try_from(self.recipe.patches.len()).ok();
        for (done, patch) in (0..).zip(&self.recipe.patches) {
            (self.report)(Progress {
                step: Step::Patching,
                done,
                total,
            });
            let file = self.scratch.root.join(&patch.name);
            fs::write(&file, &patch.text).context("write", &file)?;
            let mut command = Command::new("patch");
            command
                .args(["--strip=1", "--batch", "--forward", "--fuzz=2"])
                .arg("--directory")
                .arg(self.source())
                .arg("--input")
                .arg(&file);
            self.log.run(Step::Patching, &mut command, &mut |_| {})?;
        }
        Ok(())
    }

    /// Puts the fragments on top of `tinyconfig` and checks what came of it.
    fn configure(&mut self) -> Result<Options> {
        (self.report)(Progress::start(Step::Configuring));
        let options = Options::from_fragments(&self.recipe.fragments)?;
        self.make(Step::Configuring, "tinyconfig", &mut |_| {})?;
        let path = self.objects().join(".config");
        let tiny = fs::read_to_string(&path).context("read", &path)?;
        fs::write(&path, options.on_top_of(&tiny)).context("write", &path)?;
        self.make(Step::Configuring, "olddefconfig", &mut |_| {})?;
        let config = fs::read_to_string(&path).context("read", &path)?;
        let dropped = options.missing_from(&Options::from_config(&config));
        if dropped.is_empty() {
            Ok(options)
        } else {
            Err(GuestError::ConfigDropped(dropped))
        }
    }

    fn compile(&mut self) -> Result<()> {
        let mut command = self.make_command("vmlinux");
        let report = &mut self.report;
        let mut done = 0;
        let mut linking = false;
        let mut line = |line: &str| {
            if linking {
                return;
            }
            if line.starts_with("  LD      vmlinux.o") {
                linking = true;
                report(Progress::start(Step::Linking));
            } else if line.starts_with("  CC ") || line.starts_with("  AS ") {
                done += 1;
                report(Progress {
                    step: Step::Compiling,
                    done,
                    total: Some(TYPICAL_OBJECTS.max(done)),
                });
            }
        };
        self.log.run(Step::Compiling, &mut command, &mut line)
    }

    fn make(&mut self, step: Step, target: &str, line: &mut dyn FnMut(&str)) -> Result<()> {
        let mut command = self.make_command(target);
        self.log.run(step, &mut command, line)
    }

    /// Who built the kernel, where and when must not change the kernel.
    fn make_command(&self, target: &str) -> Command {
        let mut make = Command::new("make");
        make.arg("--directory")
            .arg(self.source())
            .arg(format!("O={}", self.objects().display()))
            .arg(format!("-j{}", self.recipe.jobs))
            .arg("ARCH=x86_64")
            .arg("LOCALVERSION=-kuasar")
            .arg("KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970")
            .arg("KBUILD_BUILD_USER=kuasar")
            .arg("KBUILD_BUILD_HOST=kuasar")
            .arg("KBUILD_BUILD_VERSION=1")
            .arg(target)
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL")
            .env("LC_ALL", "C");
        make
    }

    /// Moves what is kept into place.
    fn collect(&self, options: &Options) -> Result<()> {
        let objects = self.objects();
        for (from, to) in [
            ("vmlinux", "vmlinux"),
            ("System.map", "System.map"),
            (".config", "config"),
        ] {
            let target = self.scratch.out.join(to);
            fs::rename(objects.join(from), &target).context("create", &target)?;
        }
        let release = objects.join("include/config/kernel.release");
        let version = fs::read_to_string(&release).context("read", &release)?;
        let vmlinux = self.scratch.out.join("vmlinux");
        let facts = KernelFacts {
            digest: self.digest.to_owned(),
            version: version.trim().to_owned(),
            package_version: self.recipe.source.package_version.clone(),
            compiler: compiler()?,
            fragments: self.recipe.fragments.iter().map(facts_of).collect(),
            patches: self.recipe.patches.iter().map(facts_of).collect(),
            options_requested: options.len(),
            size_bytes: fs::metadata(&vmlinux).context("read", &vmlinux)?.len(),
        };
        write_facts(&self.scratch.out, &facts)
    }
}

/// Reads what a kernel in the cache was made from.
pub(crate) fn read_facts(folder: &Path) -> Result<KernelFacts> {
    let path = folder.join(FACTS);
    let text = fs::read(&path).context("read", &path)?;
    serde_json::from_slice(&text).map_err(|source| GuestError::Damaged { path, source })
}

/// Writes what [`read_facts`] reads.
pub(crate) fn write_facts(folder: &Path, facts: &KernelFacts) -> Result<()> {
    let path = folder.join(FACTS);
    let text = serde_json::to_vec_pretty(facts).map_err(|source| GuestError::Damaged {
        path: path.clone(),
        source,
    })?;
    fs::write(&path, text).context("write", &path)
}

fn facts_of(input: &Input) -> InputFacts {
    InputFacts {
        name: input.name.clone(),
        sha256: input.digest(),
    }
}

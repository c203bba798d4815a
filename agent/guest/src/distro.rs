//! The distribution's own kernel, as it is packaged, and the modules of it that a guest needs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use elf::ElfBytes;
use elf::endian::AnyEndian;

use crate::cache::{Cache, Scratch};
use crate::command::Log;
use crate::digest::Fields;
use crate::error::{GuestError, IoContext as _, Result};
use crate::initramfs::Initramfs;
use crate::kernel::{self, KernelFacts};
use crate::progress::{Progress, Report, Step};

const KIND: &str = "distro-kernel";
/// Changes when the way of unpacking changes the result for the same package.
const VERSION: &str = "1";
/// Names the newest kernel for virtual machines.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// Where the guest's first process looks for modules.
const GUEST_FOLDER: &str = "/lib/modules";

/// What pods need of a kernel, where it is a module: devices and file systems. Those that are
/// built in, or that a series does not have, are left out.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio_mem",
    "virtio-rng",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "overlay",
    "ext4",
    "erofs",
    "squashfs",
];

/// A packaged kernel in the cache.
#[derive(Clone, Debug)]
pub struct DistroKernel {
    /// The kernel, a bzImage.
    pub vmlinuz: PathBuf,
    /// Modules, in the order in which they can be loaded.
    pub modules: Vec<PathBuf>,
    /// What it is.
    pub facts: KernelFacts,
}

impl DistroKernel {
    /// Downloads and unpacks Debian's kernel for virtual machines, or finds it in the cache.
    /// Nothing is installed.
    pub fn fetch(cache: &Cache, report: Report) -> Result<Self> {
        let package = newest()?;
        let mut fields = Fields::default();
        fields
            .add("version", VERSION)
            .add("package", &package.name)
            .add("package version", &package.version);
        for module in MODULES {
            fields.add("module", module);
        }
        let digest = fields.finish();
        report(Progress::start(Step::Downloading));
        let folder = cache.find_or_build(
            KIND,
            &digest,
            || {},
            |scratch| {
                let log = cache.root().join("log");
                let log = Log::create(log.join(format!("{KIND}-{digest}.log")))?;
                unpack(scratch, log, &package, &digest)
            },
        )?;
        let modules = folder.join("modules");
        let mut files: Vec<_> = fs::read_dir(&modules)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .context("read", &modules)?;
        files.sort();
        Ok(Self {
            vmlinuz: folder.join("vmlinuz"),
            modules: files,
            facts: kernel::read_facts(&folder)?,
        })
    }

    /// Puts the modules into an initramfs.
    pub(crate) fn add_to(&self, initramfs: Initramfs) -> Initramfs {
        self.modules.iter().fold(initramfs, |initramfs, module| {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            initramfs.with(module, format!("{GUEST_FOLDER}/{name}"), 0o600)
        })
    }
}

/// A package of a kernel.
#[derive(Debug, PartialEq, Eq)]
struct Package {
    name: String,
    version: String,
}

/// The kernel that this host's package lists have.
fn newest() -> Result<Package> {
    let shown = Command::new("apt-cache")
        .args(["show", "--no-all-versions", META_PACKAGE])
        .env("LC_ALL", "C")
        .output();
    let text = shown.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    parse(&text.unwrap_or_default()).ok_or(GuestError::NoDistroKernel(META_PACKAGE))
}

/// The package that the meta-package depends on, in the same version.
fn parse(shown: &str) -> Option<Package> {
    let field = |name: &str| shown.lines().find_map(|line| line.strip_prefix(name));
    let depends = field("Depends: ")?.split([',', ' ']);
    Some(Package {
        name: depends
            .map(str::trim)
            .find(|word| word.starts_with("linux-image-"))?
            .to_owned(),
        version: field("Version: ")?.to_owned(),
    })
}

fn unpack(scratch: &Scratch, mut log: Log, package: &Package, digest: &str) -> Result<()> {
    let mut download = Command::new("apt-get");
    download
        .args(["--quiet", "download"])
        .arg(format!("{}={}", package.name, package.version))
        .current_dir(&scratch.root);
    log.run(Step::Downloading, &mut download, &mut |_| {})?;
    let deb = find(&scratch.root, &|name| name.ends_with(".deb"))?;
    let files = scratch.root.join("files");
    let mut extract = Command::new("dpkg-deb");
    extract.arg("--extract").arg(&deb).arg(&files);
    log.run(Step::Unpacking, &mut extract, &mut |_| {})?;

    let vmlinuz = find(&files.join("boot"), &|name| name.starts_with("vmlinuz-"))?;
    let name = vmlinuz.file_name().unwrap_or_default().to_string_lossy();
    let release = name.trim_start_matches("vmlinuz-").to_owned();
    let target = scratch.out.join("vmlinuz");
    fs::rename(&vmlinuz, &target).context("create", &target)?;

    // Since Debian 12 `/lib` is a link, and packages move to what it points to.
    let libs = [files.join("lib/modules"), files.join("usr/lib/modules")];
    let available = libs
        .iter()
        .map(|lib| lib.join(&release))
        .find(|folder| folder.is_dir())
        .unwrap_or_default();
    let mut modules = BTreeMap::new();
    collect(&available, &mut modules)?;
    let folder = scratch.out.join("modules");
    fs::create_dir(&folder).context("create", &folder)?;
    for (number, (name, content)) in in_order(MODULES, &modules)?.into_iter().enumerate() {
        let target = folder.join(format!("{number:02}-{name}.ko"));
        fs::write(&target, content).context("write", &target)?;
    }
    kernel::write_facts(
        &scratch.out,
        &KernelFacts {
            digest: digest.to_owned(),
            version: release,
            package_version: package.version.clone(),
            compiler: format!("as packaged in {}", package.name),
            fragments: Vec::new(),
            patches: Vec::new(),
            options_requested: 0,
            size_bytes: fs::metadata(&target).context("read", &target)?.len(),
        },
    )
}

fn find(folder: &Path, fits: &dyn Fn(&str) -> bool) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).context("read", folder)?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    let found = paths.find(|path| fits(&path.file_name().unwrap_or_default().to_string_lossy()));
    found.ok_or_else(|| GuestError::UnknownPackage {
        path: folder.to_owned(),
    })
}

/// Finds all modules below a folder, by name: `-` and `_` are the same there.
fn collect(folder: &Path, modules: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).context("read", folder)? {
        let path = entry.context("read", folder)?.path();
        if path.is_dir() && !path.is_symlink() {
            collect(&path, modules)?;
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && let Some((name, _)) = name.split_once(".ko")
        {
            modules.insert(canonical(name), path);
        }
    }
    Ok(())
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The contents of the wanted modules that there are, each behind those it depends on.
fn in_order(
    wanted: &[&str],
    modules: &BTreeMap<String, PathBuf>,
) -> Result<Vec<(String, Vec<u8>)>> {
    let mut ordered: Vec<(String, Vec<u8>)> = Vec::new();
    // The last one is next; with its content it follows what it depends on.
    let mut left: Vec<(String, Option<Vec<u8>>)> = wanted
        .iter()
        .rev()
        .map(|name| (canonical(name), None))
        .collect();
    let mut seen = BTreeSet::new();
    while let Some((name, content)) = left.pop() {
        if let Some(content) = content {
            ordered.push((name, content));
            continue;
        }
        let Some(path) = modules.get(&name).filter(|_| seen.insert(name.clone())) else {
            continue;
        };
        let content = read_module(path)?;
        let needed = depends(&content);
        left.push((name, Some(content)));
        left.extend(needed.into_iter().map(|name| (name, None)));
    }
    Ok(ordered)
}

/// The module, unpacked.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|ext| ext.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(path).context("read", path),
    };
    let output = Command::new(program)
        .args(["--decompress", "--stdout"])
        .arg(path)
        .output()
        .context("unpack", path)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(GuestError::UnknownPackage {
        path: path.to_owned(),
    })
}

/// What a module says it depends on: `depends=a,b` among the strings of `.modinfo`.
fn depends(module: &[u8]) -> Vec<String> {
    let info = ElfBytes::<AnyEndian>::minimal_parse(module).ok();
    let info = info.and_then(|elf| {
        let section = elf.section_header_by_name(".modinfo").ok()??;
        elf.section_data(&section).ok().map(|(data, _)| data)
    });
    info.unwrap_or_default()
        .split(|byte| *byte == 0)
        .filter_map(|field| field.strip_prefix(b"depends="))
        .flat_map(|names| names.split(|byte| *byte == b','))
        .filter(|name| !name.is_empty())
        .map(|name| canonical(&String::from_utf8_lossy(name)))
        .collect()
}

#[cfg(test)]
#[path = "distro_tests.rs"]
mod tests;

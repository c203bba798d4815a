//! The root file system of a container and what its image says about the process.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use containerd_shim_protos::api::Mount;

use super::args::RunArgs;
use super::client::rootfs_mount;
use super::disk::file_system;
use super::error::{CliError, Doing, Result};
use super::output::Steps;
use super::signals::{Signals, exit_code};
use super::store::PodFolder;
use super::values::Volume;
use crate::image::{
    Identity, ImageStore, Limits, Progress, RootDir, UnpackControl, UnpackedImage, UserSpec,
};

/// Characters that separate fields in the options of an overlay mount.
const SEPARATORS: [char; 3] = [',', ':', '\\'];

/// Where a container's files come from.
#[derive(Debug)]
pub(super) enum Root {
    /// A cached image, with a writable layer per container.
    Image(Box<UnpackedImage>),
    /// A folder of the user's, written to directly.
    Folder(PathBuf),
    /// A disk of the user's with this file system, written to directly.
    Disk(PathBuf, &'static str),
    /// A WebAssembly program of the user's, alone in an empty root.
    Program(PathBuf),
}

/// What ends the names of WebAssembly programs.
const PROGRAMS: [&str; 2] = ["wasm", "wat"];

/// Whether `name` is that of a WebAssembly program.
pub(super) fn is_wasm(name: &str) -> bool {
    Path::new(name)
        .extension()
        .is_some_and(|end| PROGRAMS.iter().any(|known| end == *known))
}

/// What an image says about its process; nothing for a plain folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ImageDefaults {
    pub(super) entrypoint: Vec<String>,
    pub(super) cmd: Vec<String>,
    pub(super) env: Vec<String>,
    pub(super) workdir: String,
    pub(super) user: String,
    pub(super) stop_signal: String,
}

impl Root {
    /// Checks the folder or unpacks the image that the user named.
    pub(super) async fn prepare(
        args: &RunArgs,
        signals: &mut Signals,
        steps: &Arc<Steps>,
    ) -> Result<Self> {
        if let Some(folder) = &args.rootfs {
            return folder_root(folder);
        }
        let reference = args.image.clone().unwrap_or_default();
        if is_wasm(&reference) && Path::new(&reference).is_file() {
            let path = fs::canonicalize(&reference).doing(|| format!("find {reference}"))?;
            return Ok(Self::Program(path));
        }
        steps.step(&format!("unpacking {reference}"));
        let image = unpack(reference, signals, Arc::clone(steps)).await?;
        Ok(Self::Image(Box::new(image)))
    }

    pub(super) fn defaults(&self) -> ImageDefaults {
        let image = match self {
            Self::Image(image) => image,
            Self::Folder(_) | Self::Disk(..) => return ImageDefaults::default(),
            Self::Program(path) => {
                return ImageDefaults {
                    entrypoint: vec![in_container(path)],
                    ..ImageDefaults::default()
                };
            }
        };
        let Some(config) = image.config.config() else {
            return ImageDefaults::default();
        };
        ImageDefaults {
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            cmd: config.cmd().clone().unwrap_or_default(),
            env: config.env().clone().unwrap_or_default(),
            workdir: config.working_dir().clone().unwrap_or_default(),
            user: config.user().clone().unwrap_or_default(),
            stop_signal: config.stop_signal().clone().unwrap_or_default(),
        }
    }

    /// The folders that hold the container's files, topmost first.
    pub(super) fn layers(&self) -> Vec<PathBuf> {
        match self {
            Self::Image(image) => vec![image.rootfs.clone()],
            Self::Folder(folder) => vec![folder.clone()],
            // Only the guest sees its files.
            Self::Disk(..) | Self::Program(_) => Vec::new(),
        }
    }

    /// What else the container sees of the host.
    pub(super) fn volumes(&self) -> Vec<Volume> {
        match self {
            Self::Program(path) => vec![Volume {
                source: path.clone(),
                destination: in_container(path).into(),
                read_only: true,
            }],
            _ => Vec::new(),
        }
    }

    /// What the daemon has to mount, with a writable layer in the pod's folder.
    pub(super) fn mounts(&self, folder: &PodFolder) -> Result<Vec<Mount>> {
        match self {
            Self::Folder(path) => Ok(vec![bind_mount(path)]),
            Self::Disk(path, fstype) => {
                let options = vec!["loop".to_owned()];
                Ok(vec![rootfs_mount(fstype, &path.to_string_lossy(), options)])
            }
            Self::Program(_) => Ok(vec![bind_mount(&folder.sub_dir(&folder.data, "root")?)]),
            Self::Image(image) => {
                let upper = folder.sub_dir(&folder.data, "upper")?;
                let work = folder.sub_dir(&folder.data, "work")?;
                // The container sees the permissions of the topmost folder as its own root's.
                let permissions = fs::metadata(&image.rootfs)
                    .doing(|| format!("read {}", image.rootfs.display()))?
                    .permissions();
                fs::set_permissions(&upper, permissions)
                    .doing(|| format!("set up {}", upper.display()))?;
                Ok(vec![rootfs_mount(
                    "overlay",
                    "overlay",
                    vec![
                        option("lowerdir", &image.rootfs)?,
                        option("upperdir", &upper)?,
                        option("workdir", &work)?,
                    ],
                )])
            }
        }
    }
}

fn bind_mount(path: &Path) -> Mount {
    let options = vec!["rbind".to_owned(), "rw".to_owned()];
    rootfs_mount("bind", &path.to_string_lossy(), options)
}

/// Where the container has a program of the host.
fn in_container(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    format!("/{}", name.to_string_lossy())
}

fn option(name: &str, path: &Path) -> Result<String> {
    match path.to_str().filter(|p| !p.contains(SEPARATORS)) {
        Some(path) => Ok(format!("{name}={path}")),
        None => Err(CliError::new(format!(
            "the cache folder {} has a comma, colon or backslash in its name, which overlay \
             mounts cannot have",
            path.display()
        ))
        .next("set KUASAR_CACHE_DIR to a folder with a plain name")),
    }
}

fn folder_root(folder: &Path) -> Result<Root> {
    let path = fs::canonicalize(folder).map_err(|e| {
        CliError::caused(format!("--rootfs {}", folder.display()), &e)
            .next("give an existing folder that holds a root file system")
    })?;
    if path.is_dir() {
        return Ok(Root::Folder(path));
    }
    match file_system(&path) {
        Ok(Some(fstype)) => Ok(Root::Disk(path, fstype)),
        Ok(None) => Err(CliError::new(format!(
            "--rootfs {} is neither a folder nor a disk with a file system that guests can mount",
            folder.display()
        ))
        .next("for an image in a file leave --rootfs out: `kuasar-ctl run FILE -- ...`")),
        Err(e) => Err(CliError::new(format!("--rootfs {e}"))),
    }
}

/// Unpacks in the background, so that a signal can end it.
async fn unpack(
    reference: String,
    signals: &mut Signals,
    steps: Arc<Steps>,
) -> Result<UnpackedImage> {
    let cancelled = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&cancelled);
    let mut work = tokio::task::spawn_blocking(move || {
        let progress = |progress| match progress {
            Progress::WaitingForLock => steps.step("waiting for another process to unpack it"),
            Progress::Layer { number, of, .. } => {
                steps.step(&format!("unpacking layer {number} of {of}"));
            }
        };
        let store = ImageStore::open(&ImageStore::default_cache(), Limits::default())?;
        store.unpack(&reference, &UnpackControl::new(&flag, &progress))
    });
    let (result, signal) = tokio::select! {
        result = &mut work => (result, None),
        signal = signals.next_ending() => {
            cancelled.store(true, Ordering::Relaxed);
            (work.await, Some(signal))
        }
    };
    let result = result.map_err(|e| CliError::caused("unpacking the image failed", &e))?;
    match (result, signal) {
        (Ok(_), Some(signal)) => Err(CliError::new("interrupted").code(exit_code(signal))),
        (Err(e), Some(signal)) => Err(CliError::from(e).code(exit_code(signal))),
        (result, None) => Ok(result?),
    }
}

/// Looks a user up in the topmost of `layers` that has account files.
pub(super) fn resolve_user(user: &UserSpec, layers: &[PathBuf]) -> Result<Identity> {
    let roots = layers
        .iter()
        .map(|layer| RootDir::open(layer).doing(|| format!("open {}", layer.display())))
        .collect::<Result<Vec<_>>>()?;
    Ok(user.resolve(&roots)?)
}

/// The program and its arguments.
pub(super) fn arguments(args: &RunArgs, image: &ImageDefaults) -> Result<Vec<String>> {
    let mut all = match &args.entrypoint {
        Some(program) => vec![program.clone()],
        None => image.entrypoint.clone(),
    };
    if args.command.is_empty() {
        // The image's arguments belong to the image's own entry point.
        if args.entrypoint.is_none() {
            all.extend(image.cmd.iter().cloned());
        }
    } else {
        all.extend(args.command.iter().cloned());
    }
    match all.first() {
        Some(program) if !program.is_empty() => Ok(all),
        _ => {
            let what = match args.rootfs {
                Some(_) => "a folder has no command of its own",
                None => "the image has no command",
            };
            Err(CliError::new(what).next("pass one after --, for instance `-- /bin/sh`"))
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::args::{Cli, Command};
    use super::*;

    fn run(line: &str) -> RunArgs {
        let words = std::iter::once("kuasar-ctl").chain(line.split_whitespace());
        match Cli::try_parse_from(words).unwrap().command {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn image() -> ImageDefaults {
        ImageDefaults {
            entrypoint: vec!["/entry".to_owned(), "-x".to_owned()],
            cmd: vec!["default".to_owned()],
            ..ImageDefaults::default()
        }
    }

    #[test]
    fn entry_point_and_command_combine() {
        let of = |line: &str| arguments(&run(line), &image()).unwrap();
        assert_eq!(of("run i"), ["/entry", "-x", "default"]);
        assert_eq!(of("run i -- given"), ["/entry", "-x", "given"]);
        assert_eq!(of("run --entrypoint /other i"), ["/other"]);
        assert_eq!(of("run --entrypoint /other i -- a"), ["/other", "a"]);
    }

    #[test]
    fn no_command_is_an_error_that_says_where_to_put_one() {
        for line in ["run i", "run --rootfs /r"] {
            let error = arguments(&run(line), &ImageDefaults::default()).unwrap_err();
            assert!(error.next.unwrap().contains("after --"));
        }
    }

    #[test]
    fn a_root_must_be_a_folder_or_have_a_file_system() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = folder_root(file.path()).unwrap_err();
        assert!(error.what.contains("neither"), "{}", error.what);
        let mut erofs = vec![0; 4096];
        erofs[1024..1028].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
        fs::write(file.path(), erofs).unwrap();
        let root = folder_root(file.path()).unwrap();
        assert!(matches!(root, Root::Disk(_, "erofs")), "{root:?}");
        let error = folder_root(Path::new("/no/such/folder")).unwrap_err();
        assert!(error.what.contains("/no/such/folder"), "{}", error.what);
    }

    #[test]
    fn overlay_paths_must_be_plain() {
        assert_eq!(option("lowerdir", Path::new("/a")).unwrap(), "lowerdir=/a");
        option("lowerdir", Path::new("/a,b")).unwrap_err();
    }
}

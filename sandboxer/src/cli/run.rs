//! `kuasar-ctl run`: a pod for one container, from nothing to nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::Mount;
use nix::sys::signal::Signal;

use super::args::{Global, ProcessArgs, RunArgs};
use super::attend::Attended;
use super::client::{Controller, ProcessName, StdioNames};
use super::daemon::{Daemon, Kind, Wanted};
use super::error::{CliError, Doing, KILLED, Result};
use super::output::{self, Steps, note};
use super::pods::{Found, PodRef};
use super::root::{ImageDefaults, Root, arguments, is_wasm, resolve_user};
use super::signals::{Signals, exit_code};
use super::spec::{ContainerSpec, ProcessSpec};
use super::stdio::Fifos;
use super::store::{PodFolder, PodRecord, PodStore};
use super::terminal;
use super::values::{CPU_PERIOD_US, env_file, merge_env, signal};
use crate::image::UserSpec;
use crate::rpc::cri;

/// Longest id; pods appear in socket paths, which are short.
const ID_CHARS: usize = 12;

/// Runs a container: the exit code for this process.
pub(super) async fn run(global: &Global, args: RunArgs) -> Result<u8> {
    terminal::check(args.process.interactive, args.process.tty)?;
    let mut signals = Signals::new()?;
    let steps = Arc::new(Steps::new(global.verbose));
    let root = Root::prepare(&args, &mut signals, &steps).await?;
    let spec = container_spec(&args, &root)?;
    let kind = match spec.process.args.first() {
        Some(program) if is_wasm(program) => Kind::Wasm,
        _ => Kind::Vmm,
    };
    let wanted = Wanted::new(kind, &global.address);
    let daemon = interruptible(
        &mut signals,
        Daemon::reach(
            &wanted,
            args.config.as_deref(),
            args.overrides.clone(),
            args.detach,
            &steps,
        ),
    )
    .await?;
    let result = match Pod::new(&args, &root, spec, daemon.controller.clone()) {
        Ok(pod) => pod.run(&args, &mut signals, &steps).await,
        Err(e) => Err(e),
    };
    tokio::select! {
        () = daemon.end() => {}
        signal = next_interrupt(&mut signals) => {
            note(&format!("{signal}: not waiting for the daemon in this process to end"));
        }
    }
    result
}

/// Ends early, with the shell's exit code, when a signal asks for it.
async fn interruptible<T>(
    signals: &mut Signals,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        result = work => result,
        signal = signals.next_ending() => {
            Err(CliError::new(format!("interrupted by {signal}")).code(exit_code(signal)))
        }
    }
}

/// A pod that this process made and cleans up.
struct Pod {
    controller: Controller,
    record: PodRecord,
    folder: PodFolder,
    spec: ContainerSpec,
    mounts: Vec<Mount>,
    bundle: PathBuf,
}

impl Pod {
    /// Everything on disk that the pod needs.
    fn new(
        args: &RunArgs,
        root: &Root,
        spec: ContainerSpec,
        controller: Controller,
    ) -> Result<Self> {
        let mut record = PodRecord {
            id: new_id(),
            name: args.name.clone(),
            image: match (&args.image, &args.rootfs) {
                (Some(image), _) => image.clone(),
                (None, folder) => folder
                    .as_deref()
                    .unwrap_or_else(|| Path::new(""))
                    .display()
                    .to_string(),
            },
            command: spec.process.args.clone(),
            roots: root.layers(),
            data: PathBuf::new(),
            stop_signal: stop_signal(args, &root.defaults())?,
            address: controller.address().to_owned(),
            detached: args.detach,
            created_at_ns: now_ns(),
        };
        let folder = PodStore::open().create(&mut record)?;
        let bundle = folder.sub_dir(&folder.state, "bundle")?;
        folder.sub_dir(&bundle, "rootfs")?;
        let config = bundle.join("config.json");
        fs::write(&config, spec.to_json().to_string())
            .doing(|| format!("write {}", config.display()))?;
        let mounts = root.mounts(&folder)?;
        Ok(Self {
            controller,
            record,
            folder,
            spec,
            mounts,
            bundle,
        })
    }

    async fn run(self, args: &RunArgs, signals: &mut Signals, steps: &Steps) -> Result<u8> {
        let ended = self.drive(args, signals, steps).await;
        if args.detach && ended.is_ok() {
            output::line(&self.record.id)?;
            self.folder.keep();
            return ended;
        }
        steps.step("removing the pod");
        let cleaned = self.clean(signals).await;
        steps.done();
        match (ended, cleaned) {
            (Err(e), _) => Err(e),
            (Ok(code), Ok(())) => Ok(code),
            (Ok(code), Err(e)) => {
                // The container's own exit code matters more to whoever called us.
                output::error(&e);
                Ok(code)
            }
        }
    }

    async fn drive(&self, args: &RunArgs, signals: &mut Signals, steps: &Steps) -> Result<u8> {
        let id = &self.record.id;
        let name = self.process();
        let (fifos, stdio) = self.stdio(&args.process, args.detach)?;
        let prepare = async {
            steps.step("creating the pod");
            let netns = match &args.netns {
                // The daemon has a folder of its own.
                Some(path) => {
                    Some(std::path::absolute(path).doing(|| format!("find {}", path.display()))?)
                }
                None => None,
            };
            self.controller
                .create(id, netns.as_deref(), &self.pod_config(args))
                .await?;
            steps.step("starting the pod");
            let task = self.controller.start(id).await?;
            steps.step("creating the container");
            task.create(id, &self.bundle, self.mounts.clone(), &stdio)
                .await?;
            Ok(task)
        };
        let task = interruptible(signals, prepare).await?;
        let program = self.spec.process.args.first().map_or("", String::as_str);
        let attended = Attended {
            task: &task,
            name: &name,
            program,
            tty: args.process.tty,
            interactive: args.process.interactive,
            timeout: args.process.timeout,
        };
        match fifos {
            Some(fifos) => match attended.run(fifos, signals, steps).await {
                Ok(KILLED) => self.killed().await,
                other => other,
            },
            None => interruptible(signals, attended.start()).await.map(|()| 0),
        }
    }

    /// Tells a process that was killed from one whose pod ended under it.
    async fn killed(&self) -> Result<u8> {
        let pod = PodRef {
            id: self.record.id.clone(),
            record: None,
            controller: Some(self.controller.clone()),
        };
        match Found::load(pod).await?.failed() {
            Some(reason) => Err(CliError::new(format!("the pod ended: {reason}"))
                .next("run it with --verbose to see the daemon's log")),
            None => Ok(KILLED),
        }
    }

    /// Fifos to us, or for a detached container log files.
    fn stdio(&self, process: &ProcessArgs, detach: bool) -> Result<(Option<Fifos>, StdioNames)> {
        if detach {
            let log = |name: &str| format!("file://{}", self.folder.data.join(name).display());
            return Ok((
                None,
                StdioNames {
                    stdout: log("stdout.log"),
                    stderr: log("stderr.log"),
                    ..StdioNames::default()
                },
            ));
        }
        let fifos = Fifos::create(&self.folder.state, process.interactive, process.tty)?;
        let names = fifos.names().clone();
        Ok((Some(fifos), names))
    }

    fn process(&self) -> ProcessName {
        ProcessName {
            container: self.record.id.clone(),
            exec: String::new(),
        }
    }

    /// Ends the pod with everything in it, the container first. A signal meanwhile gives up waiting for that.
    async fn clean(self, signals: &mut Signals) -> Result<()> {
        let id = &self.record.id;
        tokio::select! {
            result = self.controller.shutdown(id) => result,
            signal = next_interrupt(signals) => {
                note(&format!("{signal}: not waiting for pod {id} to be removed"));
                Ok(())
            }
        }
    }

    fn pod_config(&self, args: &RunArgs) -> cri::PodSandboxConfig {
        let name = self.record.name.as_ref().unwrap_or(&self.record.id);
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.clone(),
                uid: self.record.id.clone(),
                namespace: "kuasar-ctl".to_owned(),
                attempt: 0,
            }),
            hostname: args.hostname.clone().unwrap_or_default(),
            linux: Some(cri::LinuxPodSandboxConfig {
                resources: Some(cri::LinuxContainerResources {
                    cpu_period: args.cpus.map_or(0, |_| signed(CPU_PERIOD_US)),
                    cpu_quota: args.cpus.map_or(0, |cpus| signed(cpus.quota_us)),
                    memory_limit_in_bytes: args.memory.map_or(0, |m| signed(m.as_u64())),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

async fn next_interrupt(signals: &mut Signals) -> Signal {
    loop {
        let signal = signals.next_ending().await;
        if signal != Signal::SIGHUP {
            return signal;
        }
    }
}

/// The container that the arguments and the image describe.
fn container_spec(args: &RunArgs, root: &Root) -> Result<ContainerSpec> {
    let image = root.defaults();
    Ok(ContainerSpec {
        process: ProcessSpec {
            args: arguments(args, &image)?,
            env: environment(&args.process, image.env.clone())?,
            cwd: args
                .process
                .workdir
                .clone()
                .unwrap_or_else(|| image.workdir.clone()),
            user: resolve_user(&user(args, &image)?, &root.layers())?,
            tty: args.process.tty,
            privileged: args.privileged,
        },
        read_only: args.read_only,
        volumes: args.volumes.iter().cloned().chain(root.volumes()).collect(),
        disks: args.disks.clone(),
        cpus: args.cpus,
        memory: args.memory,
    })
}

/// The option, else what the image says, else TERM.
fn stop_signal(args: &RunArgs, image: &ImageDefaults) -> Result<i32> {
    match (args.stop_signal, image.stop_signal.as_str()) {
        (Some(number), _) => Ok(number),
        (None, "") => Ok(Signal::SIGTERM as i32),
        (None, text) => signal(text).map_err(|e| {
            CliError::new(format!("the image's stop signal: {e}"))
                .next("choose another one with --stop-signal")
        }),
    }
}

fn user(args: &RunArgs, image: &ImageDefaults) -> Result<UserSpec> {
    if let Some(user) = &args.process.user {
        return Ok(user.clone());
    }
    let text = match image.user.as_str() {
        "" => "0",
        user => user,
    };
    Ok(text.parse::<UserSpec>()?)
}

/// `base`, then the files, then the options: later ones win.
pub(super) fn environment(args: &ProcessArgs, base: Vec<String>) -> Result<Vec<String>> {
    let mut settings = base;
    for file in &args.env_files {
        let read = env_file(file).map_err(|e| CliError::new(format!("--env-file {e}")))?;
        settings.extend(read);
    }
    settings.extend(args.env.iter().cloned());
    Ok(merge_env(settings, |name| std::env::var(name).ok()))
}

/// A random id, short enough to type.
pub(super) fn new_id() -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    id.chars().take(ID_CHARS).collect()
}

fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

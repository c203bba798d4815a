//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::debug_console::DebugConsoleArgs;
use super::disk::DiskArg;
use super::update::UpdateArgs;
use super::values::{self, Cpus, Volume};
use crate::config::Overrides;
use crate::image::UserSpec;
use crate::server::{DEFAULT_DIR, DEFAULT_LISTEN};

const EXIT_CODES: &str = "\
Exit codes:
  0-255  of run and exec: what the container's process returned, 128 + N when signal N ended it
  124    --timeout passed
  125    kuasar-ctl itself failed, for instance on a wrong argument or without KVM
  126    the container's command cannot be executed
  127    the container's command was not found";

/// Runs and manages containers in microVMs.
#[derive(Debug, Parser)]
#[command(name = "kuasar-ctl", version, max_term_width = 100, after_help = EXIT_CODES)]
#[command(arg_required_else_help = true, subcommand_required = true)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub(super) struct Global {
    /// Socket of the running daemon
    #[arg(
        long,
        global = true,
        value_name = "SOCKET",
        env = "KUASAR_ADDRESS",
        default_value = DEFAULT_LISTEN
    )]
    pub(super) address: PathBuf,
    /// State folder of the running daemon
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "KUASAR_STATE_DIR",
        default_value = DEFAULT_DIR
    )]
    pub(super) dir: PathBuf,
    /// Say on stderr what is being done, and show the log
    #[arg(long, global = true)]
    pub(super) verbose: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Run(Box<RunArgs>),
    Exec(Box<ExecArgs>),
    DebugConsole(DebugConsoleArgs),
    Ps(PsArgs),
    Inspect(InspectArgs),
    Logs(LogsArgs),
    Stop(StopArgs),
    Rm(RmArgs),
    /// Stops a pod's virtual CPUs: everything in it stands still, in memory
    Pause(FreezeArgs),
    /// Lets a paused pod run again
    Resume(FreezeArgs),
    Update(UpdateArgs),
    Snapshot(SnapshotArgs),
    Restore(RestoreArgs),
    Check(CheckArgs),
    Guest(GuestArgs),
    Template(TemplateArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
}

/// Runs a container in a fresh microVM and passes its streams, signals and exit code through
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kuasar-ctl run ./busybox.tar -- echo hello
  kuasar-ctl run -it ./layout:3.20 -- /bin/sh
  kuasar-ctl run --rootfs ./rootfs --cpus 2 --memory 256MiB -- /bin/make test
  kuasar-ctl run -d --name web -v \"$PWD/site:/srv:ro\" ./nginx.tar
  echo 6*7 | kuasar-ctl run -i --rootfs ./rootfs -- /usr/bin/bc
  kuasar-ctl run -v \"$PWD:/data\" ./app.wasm -- list /data

Programs whose name ends in .wasm or .wat run in wasm-sandboxer instead of a microVM.
Without a running daemon one is started inside this process, for this container only.
Ctrl-C is passed to the container; a second one kills it.")]
pub(super) struct RunArgs {
    /// OCI image layout, OCI archive or docker archive, as PATH, PATH:TAG or PATH@DIGEST; or a
    /// WebAssembly program, PATH.wasm or PATH.wat
    #[arg(required_unless_present = "rootfs", conflicts_with = "rootfs")]
    pub(super) image: Option<String>,
    /// Folder, block device or disk image with a file system to use as root file system instead
    /// of an image; the container writes to it
    #[arg(long, value_name = "DIR|FILE")]
    pub(super) rootfs: Option<PathBuf>,
    /// Name for ps, exec, logs, stop and rm
    #[arg(long, value_parser = values::name)]
    pub(super) name: Option<String>,
    /// CPUs, for instance 2 or 0.5; the VM gets as many vCPUs, rounded up
    #[arg(long, value_name = "N")]
    pub(super) cpus: Option<Cpus>,
    /// Memory of the container, for instance 256MiB; the VM gets some more for its kernel
    #[arg(long, value_name = "SIZE", value_parser = values::memory)]
    pub(super) memory: Option<ByteSize>,
    #[command(flatten)]
    pub(super) process: ProcessArgs,
    /// Share a file or folder with the container
    #[arg(long = "volume", short = 'v', value_name = "HOST:GUEST[:ro]")]
    pub(super) volumes: Vec<Volume>,
    /// Give the container a block device or disk image of the host: mounted, if it has an ext4,
    /// erofs or squashfs file system [default: on /mnt/NAME], else as a device below /dev
    /// [default: /dev/NAME]
    #[arg(long = "disk", value_name = "PATH[:GUEST_PATH][:ro]")]
    pub(super) disks: Vec<DiskArg>,
    /// Host name inside the pod [default: the pod's id]
    #[arg(long, value_parser = values::hostname)]
    pub(super) hostname: Option<String>,
    /// Network namespace whose interfaces the pod takes over, as made by `ip netns add`; without
    /// one the pod has loopback only
    #[arg(long, value_name = "FILE")]
    pub(super) netns: Option<PathBuf>,
    /// Replace the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    pub(super) entrypoint: Option<String>,
    /// What `stop` asks the container to end with, instead of what the image says, or TERM
    #[arg(long, value_name = "SIGNAL", value_parser = values::signal)]
    pub(super) stop_signal: Option<i32>,
    /// Make the root file system read-only
    #[arg(long)]
    pub(super) read_only: bool,
    /// Give every capability and unmask /proc and /sys of the guest; nothing of the host
    #[arg(long)]
    pub(super) privileged: bool,
    /// Leave the container running and print the pod's id
    #[arg(long, short, conflicts_with_all = ["interactive", "tty", "timeout"])]
    pub(super) detach: bool,
    /// Remove the pod when the container ends; always so without --detach
    #[arg(long, conflicts_with = "detach")]
    pub(super) rm: bool,
    /// Configuration file for a daemon inside this process [default: the daemon's own]
    #[arg(long, value_name = "FILE", env = "KUASAR_CONFIG")]
    pub(super) config: Option<PathBuf>,
    #[command(flatten)]
    pub(super) overrides: Overrides,
    /// Command and its arguments; with an image, in place of its own
    #[arg(last = true, value_name = "COMMAND")]
    pub(super) command: Vec<String>,
}

/// What `run` and `exec` have in common.
#[derive(Debug, Default, Args)]
pub(super) struct ProcessArgs {
    /// Set an environment variable; a bare NAME passes this shell's value on
    #[arg(long = "env", short, value_name = "NAME=VALUE", value_parser = values::env)]
    pub(super) env: Vec<String>,
    /// Read environment variables from a file, one NAME=VALUE per line
    #[arg(long = "env-file", value_name = "FILE")]
    pub(super) env_files: Vec<PathBuf>,
    /// Working folder inside the container
    #[arg(long, short, value_name = "DIR")]
    pub(super) workdir: Option<String>,
    /// User and group, by name or number
    #[arg(long, short, value_name = "USER[:GROUP]")]
    pub(super) user: Option<UserSpec>,
    /// Pass this terminal's or pipe's input to the process
    #[arg(long, short)]
    pub(super) interactive: bool,
    /// Give the process a terminal
    #[arg(long, short)]
    pub(super) tty: bool,
    /// End the process after this time, with exit code 124: TERM first, KILL 10 s later
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(super) timeout: Option<Duration>,
}

/// Runs another process in a running container
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kuasar-ctl exec -it web -- /bin/sh
  kuasar-ctl exec --user nobody --timeout 5s web -- cat /proc/loadavg")]
pub(super) struct ExecArgs {
    /// Name or id of the pod, or the beginning of an id
    pub(super) pod: String,
    /// Container, where the pod has several
    #[arg(long, short, value_name = "ID")]
    pub(super) container: Option<String>,
    #[command(flatten)]
    pub(super) process: ProcessArgs,
    /// Command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(super) command: Vec<String>,
}

/// Lists pods and their containers
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kuasar-ctl ps\n  kuasar-ctl ps --json | jq '.[].name'")]
pub(super) struct PsArgs {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Print ids only
    #[arg(long, short, conflicts_with = "json")]
    pub(super) quiet: bool,
}

/// Shows everything known about a pod
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kuasar-ctl inspect web\n  kuasar-ctl inspect --json web")]
pub(super) struct InspectArgs {
    /// Name or id of the pod, or the beginning of an id
    pub(super) pod: String,
    /// Print JSON on one line
    #[arg(long)]
    pub(super) json: bool,
}

/// Shows the output of a detached container, or the guest's console
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kuasar-ctl logs web
  kuasar-ctl logs -f web
  kuasar-ctl logs --console web")]
pub(super) struct LogsArgs {
    /// Name or id of the pod, or the beginning of an id
    pub(super) pod: String,
    /// Show the serial console of the guest's kernel instead
    #[arg(long)]
    pub(super) console: bool,
    /// Go on until the container ends
    #[arg(long, short)]
    pub(super) follow: bool,
}

/// Ends the containers of pods, then the pods
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kuasar-ctl stop web\n  kuasar-ctl stop --time 30s web db")]
pub(super) struct StopArgs {
    /// Names or ids, or beginnings of ids
    #[arg(required = true)]
    pub(super) pods: Vec<String>,
    /// How long a container may take after its stop signal (TERM) before it is killed
    #[arg(long, short, value_parser = values::duration, default_value = "10s")]
    pub(super) time: Duration,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// One pod that stops or goes on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kuasar-ctl pause web\n  kuasar-ctl resume web")]
pub(super) struct FreezeArgs {
    /// Name or id, or the beginning of an id
    pub(super) pod: String,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Writes a running pod with its containers to disk and removes it from the daemon
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kuasar-ctl snapshot web
  kuasar-ctl snapshot --keep-running --to /backup/web web
  kuasar-ctl snapshot --keep-running --to /backup/web-2 --base /backup/web web

Afterwards the daemon may end; `kuasar-ctl restore` lets the pod go on from where it was, on
the same host and with the same release. The root file system and the volumes are not copied:
they have to be there again.")]
pub(super) struct SnapshotArgs {
    /// Name or id, or the beginning of an id
    pub(super) pod: String,
    /// Empty or new folder to write to [default: one of the pod's own]
    #[arg(long, value_name = "DIR")]
    pub(super) to: Option<PathBuf>,
    /// Earlier snapshot of this pod, kept where it is: write only what differs from it
    #[arg(long, value_name = "DIR")]
    pub(super) base: Option<PathBuf>,
    /// Let the pod run on afterwards
    #[arg(long)]
    pub(super) keep_running: bool,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Lets a pod that was written to disk go on from where it was
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kuasar-ctl restore web")]
pub(super) struct RestoreArgs {
    /// Name or id, or the beginning of an id
    pub(super) pod: String,
    /// Folder to read, which stays [default: the pod's own, which goes]
    #[arg(long, value_name = "DIR")]
    pub(super) from: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Removes stopped pods with everything they had
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kuasar-ctl rm web\n  kuasar-ctl rm --force web db")]
pub(super) struct RmArgs {
    /// Names or ids, or beginnings of ids
    #[arg(required = true)]
    pub(super) pods: Vec<String>,
    /// Kill what still runs
    #[arg(long, short)]
    pub(super) force: bool,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Tells whether this host can run pods, and what to do if not
#[derive(Debug, Args)]
#[command(after_help = "Exits with 0 only when a pod can run.\n\nExamples:\n  kuasar-ctl check")]
pub(super) struct CheckArgs {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Builds and describes the guest's kernel and initramfs
#[derive(Debug, Args)]
pub(super) struct GuestArgs {
    #[command(subcommand)]
    pub(super) command: GuestCommand,
}

/// Where the guest's kernel comes from.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(super) enum GuestKernel {
    /// Built from the distribution's source, with our configuration and patches
    #[default]
    Built,
    /// Debian's kernel for virtual machines as packaged, with modules in the initramfs; it does
    /// not boot where KVM emulates guest kernels, but in QEMU without KVM
    Distro,
}

#[derive(Debug, Subcommand)]
pub(super) enum GuestCommand {
    /// Builds the guest from the distribution's kernel source, or finds it in the cache
    #[command(after_help = "\
Examples:
  kuasar-ctl guest build --agent target/release/vmm-task
  kuasar-ctl guest build --kernel distro

The first build takes about five minutes on two cores; later ones find it in the cache.")]
    Build {
        /// Which kernel pods boot from now on
        #[arg(long, value_enum, default_value_t)]
        kernel: GuestKernel,
        /// Leave what pods boot as it is; `KUASAR_KERNEL` and `KUASAR_INITRAMFS` can name the result
        #[arg(long)]
        keep_current: bool,
        /// The static agent that becomes the guest's /init [default: vmm-task beside this
        /// program]
        #[arg(long, value_name = "FILE")]
        agent: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows the guest that pods boot
    Info {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Prints a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kuasar-ctl completions bash > /etc/bash_completion.d/kuasar-ctl
  kuasar-ctl completions zsh > ~/.zfunc/_kuasar-ctl")]
pub(super) struct CompletionsArgs {
    /// The shell
    pub(super) shell: clap_complete::Shell,
}

/// Builds, lists, removes and checks the guests that pods are cloned from
#[derive(Debug, Args)]
#[command(arg_required_else_help = true, subcommand_required = true)]
pub(super) struct TemplateArgs {
    /// Configuration file of the daemon [default: the daemon's own]
    #[arg(long, global = true, value_name = "FILE", env = "KUASAR_CONFIG")]
    pub(super) config: Option<PathBuf>,
    #[command(subcommand)]
    pub(super) command: TemplateCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum TemplateCommand {
    /// Boots a guest and saves it, so that no pod has to wait for that
    #[command(after_help = "\
Examples:
  kuasar-ctl template build
  kuasar-ctl template build --cpus 2 --memory 512MiB

The daemon builds templates by itself when a pod needs one; this is for doing it before, for
instance when a node is set up.")]
    Build {
        /// vCPUs of the machine [default: vm.vcpus of the configuration]
        #[arg(long, value_name = "N")]
        cpus: Option<u32>,
        /// Memory of the machine [default: vm.memory of the configuration]
        #[arg(long, value_name = "SIZE", value_parser = values::memory)]
        memory: Option<ByteSize>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Lists the templates on disk, the one used last first
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Removes templates; pods that were cloned from them go on
    Rm {
        /// Keys, or how they begin
        #[arg(value_name = "KEY", required_unless_present = "all")]
        keys: Vec<String>,
        /// Every template
        #[arg(long, conflicts_with = "keys")]
        all: bool,
    },
    /// Reads templates whole and compares them with their digests; exit code 1 if one is damaged
    Verify {
        /// Keys, or how they begin [default: all]
        #[arg(value_name = "KEY")]
        keys: Vec<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Writes the manual pages into a folder
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kuasar-ctl man /usr/local/share/man/man1")]
pub(super) struct ManArgs {
    /// An existing folder
    pub(super) dir: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("kuasar-ctl").chain(line.split_whitespace()))
    }

    fn run(line: &str) -> RunArgs {
        match parse(line).unwrap().command {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_an_image_or_a_folder() {
        let args = run("run --cpus 2 -it image.tar -- echo hello -x");
        assert_eq!(args.image.as_deref(), Some("image.tar"));
        assert!(args.process.interactive && args.process.tty);
        assert_eq!(args.command, ["echo", "hello", "-x"]);
        let args = run("run --rootfs /r -e A=1 -e B -- /bin/sh");
        assert_eq!((args.image, args.rootfs), (None, Some("/r".into())));
        assert_eq!(args.process.env, ["A=1", "B"]);
        for bad in [
            "run",
            "run -- x",
            "run --rootfs /r image -- x",
            "run image echo",
            "run -d -t image",
            "run -d --rm image",
            "run --cpus 0 image",
            "run --cpus 1000 image",
            "run --memory 0 image",
            "run --timeout 0s image",
            "run --user a:b:c image",
        ] {
            parse(bad).unwrap_err();
        }
    }

    #[test]
    fn global_options_stand_anywhere() {
        for line in ["--address /a ps", "ps --address /a"] {
            assert_eq!(parse(line).unwrap().global.address, PathBuf::from("/a"));
        }
    }

    #[test]
    fn exec_needs_a_command() {
        parse("exec pod").unwrap_err();
        parse("exec pod ls").unwrap_err();
        parse("exec pod -- ls -l").unwrap();
    }
}

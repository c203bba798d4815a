//! What the supervisor's process does.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use command_fds::{CommandFdExt, FdMapping};
use devices::event_loop::{EventLoop, Threads};
use devices::legacy::{ConsoleOptions, ConsoleOutput};
use devices::transport::vhost_user::VhostUserServer;
use devices::virtio::VirtioDevice;
use devices::virtio::fs::{Fs, FsConfig};
use devices::virtio::vsock::{Vsock, VsockConfig};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, umask};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::bridge::Bridge;
use super::{EXIT_FILE, Ended, Job, LIFELINE_FD, READY_FD, Ready, STDERR_BYTES, VsockJob};
use crate::process::ProcessId;

/// High priority and one request queue.
const FS_QUEUES: usize = 2;
/// Receive and transmit; VMMs keep the event queue.
const VSOCK_QUEUES: usize = 2;

/// Runs the job in the file at `path` until its VMM has ended.
///
/// # Errors
/// The job cannot be read or done. Whoever waits for the VMM has been told.
pub fn run(path: &Path) -> io::Result<()> {
    let mut ready = File::from(inherited(READY_FD)?);
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    // Signals of a terminal are for the daemon.
    nix::unistd::setsid()?;
    let started = Supervised::start(path);
    let mut supervised = match started {
        Ok(supervised) => supervised,
        Err(err) => {
            let _ = tell(&mut ready, &Ready::Failed(err.to_string()));
            return Err(err);
        }
    };
    tell(&mut ready, &Ready::Running(supervised.id))?;
    drop(ready);
    supervised.wait()?;
    supervised.finish()
}

/// An fd that the daemon passed, which the VMM gets only if it is mapped.
fn inherited(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: the daemon passes this fd for us to own, and each is taken once.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

fn tell(ready: &mut File, message: &Ready) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    ready.write_all(&line)
}

/// Threads of the devices; a failure ends the VM.
#[derive(Debug)]
struct DeviceThreads {
    failure: Mutex<Option<String>>,
    told: io::PipeWriter,
}

#[derive(Debug)]
struct SharedThreads(Arc<DeviceThreads>);

impl DeviceThreads {
    fn report(&self, what: String) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(what);
        let _ = (&self.told).write(&[1]);
    }
}

impl Threads for SharedThreads {
    fn spawn(&self, name: &str, work: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        let threads = Arc::clone(&self.0);
        let label = name.to_owned();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            let work = std::panic::AssertUnwindSafe(work);
            if std::panic::catch_unwind(work).is_err() {
                threads.report(format!("device thread {label} panicked"));
            }
        })
    }

    fn failed(&self, what: String) {
        self.0.report(what);
    }
}

/// A VMM and what is served to it.
struct Supervised {
    job: Job,
    child: Child,
    id: ProcessId,
    signals: SignalFd,
    lifeline: Option<OwnedFd>,
    console: JoinHandle<()>,
    stderr: JoinHandle<Vec<u8>>,
    threads: Arc<DeviceThreads>,
    device_failed: io::PipeReader,
    // In this order: servers use the loop.
    servers: Vec<VhostUserServer>,
    event_loop: EventLoop,
    _bridge: Option<Bridge>,
}

impl Supervised {
    fn start(path: &Path) -> io::Result<Self> {
        let job: Job = serde_json::from_slice(&fs::read(path)?)?;
        let signals = watch_signals()?;
        let lifeline = job.lifeline.then(|| inherited(LIFELINE_FD)).transpose()?;
        let (device_failed, told) = io::pipe()?;
        let threads = Arc::new(DeviceThreads {
            failure: Mutex::new(None),
            told,
        });
        let event_loop =
            EventLoop::start("devices", Arc::new(SharedThreads(Arc::clone(&threads))))?;
        let servers = serve(&job, &event_loop)?;
        let bridge = match &job.vsock {
            Some(VsockJob::Kernel {
                uds,
                guest_cid,
                control_port,
            }) => Some(Bridge::start(uds, *guest_cid, *control_port)?),
            _ => None,
        };
        let mut console = ConsoleOutput::new(ConsoleOptions {
            path: Some(job.console.clone()),
            cap_bytes: job.console_cap_bytes,
            echo: false,
        })?;
        let mut child = spawn(&job)?;
        let id = ProcessId::of(child.id())?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let console = thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || {
                if let Some(mut stdout) = stdout {
                    let _ = io::copy(&mut stdout, &mut console);
                }
            })?;
        let stderr = thread::Builder::new()
            .name("stderr".to_owned())
            .spawn(move || stderr.map(keep_end).unwrap_or_default())?;
        Ok(Self {
            job,
            child,
            id,
            signals,
            lifeline,
            console,
            stderr,
            threads,
            device_failed,
            servers,
            event_loop,
            _bridge: bridge,
        })
    }

    /// Waits until the VMM ends, or has to.
    fn wait(&mut self) -> io::Result<()> {
        let pid = i32::try_from(self.id.pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        let ended = pidfd_open(pid, PidfdFlags::empty())?;
        let mut fds = vec![
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.device_failed.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(lifeline) = &self.lifeline {
            fds.push(PollFd::new(lifeline.as_fd(), PollFlags::POLLIN));
        }
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }

    /// Ends the VMM, and says how it ended.
    fn finish(mut self) -> io::Result<()> {
        // Not an error when it has ended.
        let _ = self.child.kill();
        let status = self.child.wait()?;
        // The VMM was the only one that held the other ends.
        let _ = self.console.join();
        let stderr = self.stderr.join().unwrap_or_default();
        drop(self.servers);
        self.event_loop.shutdown();
        let failure = self.threads.failure.lock();
        let failure = failure.unwrap_or_else(PoisonError::into_inner).take();
        let ended = ended(status, failure, &stderr);
        let text = serde_json::to_vec_pretty(&ended)?;
        replace(&self.job.dir.join(EXIT_FILE), &text)
    }
}

fn ended(status: ExitStatus, failure: Option<String>, stderr: &[u8]) -> Ended {
    Ended {
        code: status.code(),
        signal: status.signal(),
        failure,
        stderr: String::from_utf8_lossy(stderr).into_owned(),
    }
}

/// Writes a file as a whole, or not at all.
pub(crate) fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let aside = path.with_extension("new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&aside, path)
}

/// The signals that ask for the VM's end; our threads inherit that they are blocked.
fn watch_signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?)
}

fn serve(job: &Job, event_loop: &EventLoop) -> io::Result<Vec<VhostUserServer>> {
    let mut servers = Vec::new();
    let mut add = |device: Box<dyn VirtioDevice>, queues, socket: &Path| {
        let listener = UnixListener::bind(socket)?;
        let server = VhostUserServer::serve(device, queues, listener, event_loop.runner())?;
        servers.push(server);
        io::Result::Ok(())
    };
    if let Some(share) = &job.share {
        let mut config = FsConfig::new(&share.tag, share.root.clone());
        config.workers = share.workers;
        config.cache = share.cache.into();
        let device = Fs::new(config).map_err(io::Error::other)?;
        add(Box::new(device), FS_QUEUES, &share.socket)?;
    }
    if let Some(VsockJob::Device {
        socket,
        uds,
        guest_cid,
    }) = &job.vsock
    {
        let mut config = VsockConfig::new(*guest_cid);
        config.uds_path = Some(uds.clone());
        let (device, _) = Vsock::new(config)?;
        add(Box::new(device), VSOCK_QUEUES, socket)?;
    }
    Ok(servers)
}

fn spawn(job: &Job) -> io::Result<Child> {
    let mut mappings = Vec::new();
    for fd in &job.fds {
        mappings.push(FdMapping {
            parent_fd: inherited(*fd)?,
            child_fd: *fd,
        });
    }
    for listen in &job.listens {
        mappings.push(FdMapping {
            parent_fd: UnixListener::bind(&listen.path)?.into(),
            child_fd: listen.fd,
        });
    }
    let mut command = Command::new(&job.program);
    command
        .args(&job.args)
        .current_dir(&job.dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .fd_mappings(mappings)
        .map_err(io::Error::other)?;
    // SAFETY: prctl and pthread_sigmask are plain system calls that touch no memory of ours.
    unsafe {
        command.pre_exec(|| {
            // The signals that we block are the VMM's again.
            SigSet::empty().thread_set_mask()?;
            // Our main thread, whose child it is, lives as long as our process.
            match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
    command
        .spawn()
        .map_err(|err| io::Error::new(err.kind(), format!("{}: {err}", job.program.display())))
}

/// Reads to the end and keeps the last bytes.
fn keep_end(mut from: impl Read) -> Vec<u8> {
    let mut kept = VecDeque::new();
    let mut piece = [0; 1024];
    while let Ok(n) = from.read(&mut piece) {
        if n == 0 {
            break;
        }
        kept.extend(piece.iter().take(n));
        let over = kept.len().saturating_sub(STDERR_BYTES);
        kept.drain(..over);
    }
    kept.into()
}

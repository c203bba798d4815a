//! Runs `kuasar-ctl` as a user would.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::daemon::Daemon;
use crate::{eventually, program};

/// What a finished `kuasar-ctl` printed and returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output, bytes that are not UTF-8 replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
}

impl Output {
    /// Fails the test unless the exit code is `code`.
    ///
    /// # Panics
    /// When it is another; the message holds the output.
    #[track_caller]
    pub fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(
            self.code,
            Some(code),
            "stdout: {}\nstderr: {}",
            self.stdout,
            self.stderr
        );
        self
    }
}

/// Builds `kuasar-ctl` command lines against one daemon.
#[derive(Clone, Debug)]
pub struct Ctl {
    address: PathBuf,
    dir: PathBuf,
    limit: Duration,
    env: Vec<(String, PathBuf)>,
}

impl Ctl {
    /// A CLI that talks to `daemon`.
    #[must_use]
    pub fn new(daemon: &Daemon) -> Self {
        Self {
            address: daemon.address(),
            dir: daemon.state_dir(),
            limit: Duration::from_secs(900),
            env: Vec::new(),
        }
    }

    /// Sets an environment variable for every command, a path in most cases.
    #[must_use]
    pub fn env(mut self, name: &str, value: PathBuf) -> Self {
        self.env.push((name.to_owned(), value));
        self
    }

    /// The command, with stdio not yet set.
    pub fn command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = program("kuasar-ctl");
        command
            .arg("--address")
            .arg(&self.address)
            .arg("--dir")
            .arg(&self.dir)
            .args(args)
            .envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs to the end, with empty stdin.
    pub fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Output {
        self.run_with_stdin(args, b"")
    }

    /// Runs to the end with `stdin` as its input.
    ///
    /// # Panics
    /// When the CLI cannot be started or does not end in time.
    pub fn run_with_stdin<A: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = A>,
        stdin: &[u8],
    ) -> Output {
        let child = self.spawn(args);
        self.finish(child, stdin)
    }

    /// Starts the CLI with all three streams piped.
    ///
    /// # Panics
    /// When the CLI cannot be started.
    pub fn spawn<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Child {
        self.command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start kuasar-ctl (was it built?)")
    }

    /// Feeds `stdin`, collects the output and waits for the end.
    ///
    /// # Panics
    /// When the CLI does not end in time.
    pub fn finish(&self, mut child: Child, stdin: &[u8]) -> Output {
        let mut to_child = child.stdin.take().expect("stdin is piped");
        let mut from_stdout = child.stdout.take().expect("stdout is piped");
        let mut from_stderr = child.stderr.take().expect("stderr is piped");
        let (stdout, stderr, status) = std::thread::scope(|scope| {
            let out = scope.spawn(move || read_all(&mut from_stdout));
            let err = scope.spawn(move || read_all(&mut from_stderr));
            scope.spawn(move || {
                // The process may end without reading its input.
                let _ = to_child.write_all(stdin);
            });
            let status = eventually("the end of kuasar-ctl", self.limit, || {
                child.try_wait().expect("wait for kuasar-ctl")
            });
            (
                out.join().expect("stdout reader"),
                err.join().expect("stderr reader"),
                status,
            )
        });
        Output {
            code: status.code(),
            stdout,
            stderr,
        }
    }
}

fn read_all(from: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = from.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

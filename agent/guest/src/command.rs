//! Commands whose output goes to a log.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{GuestError, IoContext as _, Result};
use crate::progress::Step;

/// Lines of the log an error quotes.
const TAIL_LINES: usize = 25;

/// The log of a build. A later build of the same digest overwrites it.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    pub fn create(path: PathBuf) -> Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).context("create", folder)?;
        }
        let file = File::create(&path).context("create", &path)?;
        Ok(Self { path, file })
    }

    /// Runs a command to its end, each line of its output into the log and to `line`.
    pub fn run(
        &mut self,
        step: Step,
        command: &mut Command,
        line: &mut dyn FnMut(&str),
    ) -> Result<()> {
        writeln!(self.file, "+ {command:?}").context("write", &self.path)?;
        let mut tail = VecDeque::with_capacity(TAIL_LINES);
        let status = {
            let mut keep = |text: &str| {
                if tail.len() == TAIL_LINES {
                    tail.pop_front();
                }
                tail.push_back(text.to_owned());
                line(text);
            };
            stream(command, &mut self.file, &mut keep)
        };
        let status = match status {
            Ok(status) if status.success() => return Ok(()),
            Ok(status) => status.to_string(),
            Err(e) => format!("{}: {e}", Path::new(command.get_program()).display()),
        };
        Err(GuestError::Build {
            step,
            status,
            tail: Vec::from(tail).join("\n"),
            log: self.path.clone(),
        })
    }
}

fn stream(
    command: &mut Command,
    log: &mut File,
    line: &mut dyn FnMut(&str),
) -> io::Result<std::process::ExitStatus> {
    let (reader, writer) = io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let child = command.spawn();
    // The command keeps the writing end; while it does, reading does not end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = child?;
    let mut reader = BufReader::new(reader);
    let mut bytes = Vec::new();
    while reader.read_until(b'\n', &mut bytes)? > 0 {
        log.write_all(&bytes)?;
        line(String::from_utf8_lossy(&bytes).trim_end());
        bytes.clear();
    }
    child.wait()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn both_outputs_reach_the_log_and_the_caller() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log/build.log");
        let mut log = Log::create(path.clone()).unwrap();
        let mut lines = Vec::new();
        log.run(
            Step::Compiling,
            &mut shell("echo one; echo two >&2"),
            &mut |l| {
                lines.push(l.to_owned());
            },
        )
        .unwrap();
        assert_eq!(lines, ["one", "two"]);
        assert!(fs::read_to_string(path).unwrap().ends_with("one\ntwo\n"));
    }

    #[test]
    fn a_failure_quotes_the_end_and_names_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("build.log");
        let mut log = Log::create(path.clone()).unwrap();
        let error = log
            .run(Step::Linking, &mut shell("seq 100; exit 3"), &mut |_| {})
            .unwrap_err();
        let GuestError::Build {
            step,
            status,
            tail,
            log,
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((step, log), (Step::Linking, path));
        assert_eq!(status, "exit status: 3");
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.ends_with("100"));
    }

    #[test]
    fn a_missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::create(dir.path().join("build.log")).unwrap();
        let error = log
            .run(
                Step::Patching,
                &mut Command::new("no-such-program"),
                &mut |_| {},
            )
            .unwrap_err();
        assert!(error.to_string().contains("no-such-program"), "{error}");
    }
}

//! Where a guest's console output goes: bounded, whatever the guest writes.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of the newest output kept in memory.
const TAIL_BYTES: usize = 8 << 10;
/// A line is written to the file when it ends or reaches this length.
const LINE_BYTES: usize = 512;

/// What is kept besides the tail in memory.
#[derive(Clone, Debug, Default)]
pub struct ConsoleOptions {
    /// Log file; the older half is in a second file with `.1` appended.
    pub path: Option<PathBuf>,
    /// Most bytes in both files.
    pub cap_bytes: u64,
    /// Copy to standard output.
    pub echo: bool,
}

/// The sink of a console; clones share it.
#[derive(Clone, Debug)]
pub struct ConsoleOutput {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    tail: VecDeque<u8>,
    line: Vec<u8>,
    log: Option<RotatingFile>,
    echo: bool,
}

impl ConsoleOutput {
    /// Opens the log file, if any, with mode 0600.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn new(options: ConsoleOptions) -> io::Result<Self> {
        let log = options
            .path
            .map(|path| RotatingFile::create(path, options.cap_bytes))
            .transpose()?;
        Ok(Self {
            state: Arc::new(Mutex::new(State {
                tail: VecDeque::with_capacity(TAIL_BYTES),
                line: Vec::with_capacity(LINE_BYTES),
                log,
                echo: options.echo,
            })),
        })
    }

    /// Writes further lines to a log file at `path`, with mode 0600 and at most `cap_bytes`.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn log_to(&self, path: PathBuf, cap_bytes: u64) -> io::Result<()> {
        let log = RotatingFile::create(path, cap_bytes)?;
        self.lock().log = Some(log);
        Ok(())
    }

    /// The newest output, a few KiB, with what is not UTF-8 replaced.
    #[must_use]
    pub fn tail(&self) -> String {
        let mut state = self.lock();
        String::from_utf8_lossy(state.tail.make_contiguous()).into_owned()
    }

    /// Writes out a last line that has no end yet.
    pub fn finish(&self) {
        let mut state = self.lock();
        if !state.line.is_empty() {
            state.flush();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        for byte in bytes {
            if state.tail.len() >= TAIL_BYTES {
                state.tail.pop_front();
            }
            state.tail.push_back(*byte);
            state.line.push(*byte);
            if *byte == b'\n' || state.line.len() >= LINE_BYTES {
                state.flush();
            }
        }
        Ok(bytes.len())
    }

    /// Does nothing: lines are written as they end, the rest when the console is dropped.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl State {
    fn flush(&mut self) {
        if let Some(log) = &mut self.log
            && let Err(err) = log.write(&self.line)
        {
            // A full disk must not stop the guest.
            tracing::warn!(path = %log.path.display(), %err, "console log ends here");
            self.log = None;
        }
        if self.echo {
            let mut out = io::stdout().lock();
            let _ = out.write_all(&self.line).and_then(|()| out.flush());
        }
        self.line.clear();
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.flush();
        }
    }
}

/// A log in two files of half the cap each: the newer one and, once that was full, the
/// one before.
#[derive(Debug)]
struct RotatingFile {
    path: PathBuf,
    file: File,
    written: u64,
    half_bytes: u64,
}

impl RotatingFile {
    fn create(path: PathBuf, cap_bytes: u64) -> io::Result<Self> {
        Ok(Self {
            file: Self::open(&path)?,
            path,
            written: 0,
            half_bytes: (cap_bytes / 2).max(1),
        })
    }

    fn open(path: &PathBuf) -> io::Result<File> {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.written > 0 && self.written.saturating_add(len) > self.half_bytes {
            let mut older = OsString::from(&self.path);
            older.push(".1");
            fs::rename(&self.path, older)?;
            self.file = Self::open(&self.path)?;
            self.written = 0;
        }
        self.file.write_all(bytes)?;
        self.written = self.written.saturating_add(len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut console = ConsoleOutput::new(ConsoleOptions {
            path: Some(path.clone()),
            cap_bytes: 4096,
            echo: false,
        })
        .unwrap();
        for line in 0..1000 {
            writeln!(console, "line {line}").unwrap();
        }
        console.write_all(b"no end of line").unwrap();
        assert!(console.tail().ends_with("line 999\nno end of line"));
        drop(console);
        let newer = fs::read_to_string(&path).unwrap();
        let older = fs::read_to_string(dir.path().join("console.log.1")).unwrap();
        assert!(newer.len() + older.len() <= 4096 + LINE_BYTES);
        assert!(newer.ends_with("line 999\nno end of line"));
        assert!(!older.contains("line 0\n"));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn the_tail_is_bounded_without_line_ends() {
        let mut console = ConsoleOutput::new(ConsoleOptions::default()).unwrap();
        for _ in 0..100 {
            console.write_all(&[b'x'; 1000]).unwrap();
        }
        assert_eq!(console.tail().len(), TAIL_BYTES);
        assert!(console.lock().line.len() < LINE_BYTES);
    }
}

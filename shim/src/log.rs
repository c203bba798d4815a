//! The shim's log: the fifo `log` in its bundle, which containerd copies into its own.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use nix::fcntl::OFlag;

/// Writes lines; a reader that does not keep up, or has gone, loses some.
#[derive(Debug)]
pub(crate) struct Log {
    fifo: Option<Mutex<File>>,
    pod: String,
    debug: bool,
}

impl Log {
    /// Opens the fifo in `bundle`, if there is one.
    pub(crate) fn open(bundle: &Path, pod: &str, debug: bool) -> Self {
        // Opened for reading, too: it neither waits for a reader nor ends when containerd does.
        let fifo = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits() | OFlag::O_CLOEXEC.bits())
            .open(bundle.join("log"));
        Self {
            fifo: fifo.ok().map(Mutex::new),
            pod: pod.to_owned(),
            debug,
        }
    }

    /// Something that went wrong.
    pub(crate) fn warn(&self, message: &str) {
        self.write("warning", message);
    }

    /// A step in the pod's life.
    pub(crate) fn info(&self, message: &str) {
        self.write("info", message);
    }

    /// Seen with `-debug` only.
    pub(crate) fn debug(&self, message: &str) {
        if self.debug {
            self.write("debug", message);
        }
    }

    fn write(&self, level: &str, message: &str) {
        if let Some(fifo) = &self.fifo
            && let Ok(mut fifo) = fifo.lock()
        {
            let line = format!("level={level} sandbox={} msg={message:?}\n", self.pod);
            let _ = fifo.write_all(line.as_bytes());
        }
    }
}

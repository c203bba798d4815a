//! The peer of a clone: QEMU restoring the same guest from its own migration file.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::millis;
use crate::peer::{Guest, MARKER, QEMU, first_line, qemu_kvm, which};

/// No step may take longer.
const LIMIT: Duration = Duration::from_secs(300);

/// What was measured.
#[derive(Clone, Debug)]
pub struct Restored {
    /// First line of `--version`.
    pub version: String,
    /// From the process's start to the guest running, in milliseconds.
    pub samples: Vec<f64>,
}

/// Boots the guest once in QEMU, saves it, and restores it `runs` times.
///
/// # Errors
/// QEMU is missing, or says no; the text tells.
pub fn measure(guest: &Guest, runs: usize) -> Result<Restored, String> {
    let program = which(QEMU).ok_or_else(|| format!("{QEMU} is not on the PATH"))?;
    let scratch = tempfile::tempdir().map_err(|e| e.to_string())?;
    let args = qemu_kvm(guest, scratch.path());
    let saved = scratch.path().join("saved");
    save(&args, scratch.path(), &saved)?;
    let mut samples = Vec::new();
    for _ in 0..runs {
        samples.push(restore(&args, scratch.path(), &saved)?);
    }
    Ok(Restored {
        version: first_line(&program),
        samples,
    })
}

fn save(args: &[String], dir: &Path, to: &Path) -> Result<(), String> {
    let mut vmm = Qemu::start(args, dir, &[])?;
    vmm.wait_for_console(MARKER)?;
    vmm.qmp("stop", &Value::Null)?;
    vmm.qmp(
        "migrate",
        &json!({ "uri": format!("exec:cat > {}", to.display()) }),
    )?;
    let end = Instant::now() + LIMIT;
    loop {
        let state = vmm.qmp("query-migrate", &Value::Null)?;
        match status(&state) {
            Some("completed") => return Ok(()),
            Some("failed") => return Err(format!("migration failed: {state}")),
            _ if Instant::now() > end => return Err("migration takes too long".to_owned()),
            _ => std::thread::yield_now(),
        }
    }
}

fn restore(args: &[String], dir: &Path, from: &Path) -> Result<f64, String> {
    let begin = Instant::now();
    let incoming = format!("exec:cat {}", from.display());
    let mut vmm = Qemu::start(args, dir, &["-incoming", &incoming])?;
    // Saved while stopped: it has to be told to run.
    let end = Instant::now() + LIMIT;
    loop {
        let state = vmm.qmp("query-status", &Value::Null)?;
        if status(&state) == Some("paused") {
            break;
        }
        if Instant::now() > end {
            return Err(format!("not restored: {state}"));
        }
    }
    vmm.qmp("cont", &Value::Null)?;
    Ok(millis(begin.elapsed()))
}

/// The status in an answer.
fn status(answer: &Value) -> Option<&str> {
    answer.pointer("/return/status").and_then(Value::as_str)
}

/// A running QEMU and its control connection; killed on drop.
struct Qemu {
    child: Child,
    control: BufReader<UnixStream>,
}

impl Qemu {
    fn start(args: &[String], dir: &Path, more: &[&str]) -> Result<Self, String> {
        let socket = dir.join("qmp.sock");
        let _ = std::fs::remove_file(&socket);
        let mut child = Command::new(QEMU)
            .args(args)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        let end = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(err) if Instant::now() > end => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(format!("no QMP socket: {err}"));
                }
                Err(_) => std::thread::yield_now(),
            }
        };
        stream
            .set_read_timeout(Some(LIMIT))
            .map_err(|e| e.to_string())?;
        let mut vmm = Self {
            child,
            control: BufReader::new(stream),
        };
        vmm.line()?;
        vmm.qmp("qmp_capabilities", &Value::Null)?;
        Ok(vmm)
    }

    fn line(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        let read = self.control.read_line(&mut line);
        read.map_err(|e| e.to_string())?;
        serde_json::from_str(&line).map_err(|e| format!("QMP: {e}: {line}"))
    }

    /// Runs a command; events on the way are skipped.
    fn qmp(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let request = if arguments.is_null() {
            json!({ "execute": command })
        } else {
            json!({ "execute": command, "arguments": arguments })
        };
        writeln!(self.control.get_mut(), "{request}").map_err(|e| e.to_string())?;
        loop {
            let answer = self.line()?;
            if answer.get("error").is_some() {
                return Err(format!("QMP {command}: {answer}"));
            }
            if answer.get("return").is_some() {
                return Ok(answer);
            }
        }
    }

    fn wait_for_console(&mut self, marker: &str) -> Result<(), String> {
        let out = self.child.stdout.take().ok_or("no console")?;
        let mut lines = BufReader::new(out).split(b'\n').map_while(Result::ok);
        lines
            .find(|line| String::from_utf8_lossy(line).contains(marker))
            .map(drop)
            .ok_or_else(|| format!("the guest did not print {marker:?}"))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

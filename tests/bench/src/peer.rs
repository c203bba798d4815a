//! Other VMMs that boot the same guest in the same run.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use vmm_core::Host;

/// The guest every VMM boots.
#[derive(Clone, Debug)]
pub struct Guest {
    /// ELF kernel.
    pub kernel: PathBuf,
    /// Initramfs with the agent as `/init`.
    pub initramfs: PathBuf,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Kernel parameters without the ones a particular VMM adds.
    pub cmdline: String,
}

impl Guest {
    /// One that tells on its console how far it is, with the machine that every VMM has.
    #[must_use]
    pub fn new(host: &Host, kernel: &Path, initramfs: &Path) -> Self {
        let mut words = vec!["console=ttyS0", "reboot=k", "panic=-1", "acpi=off"];
        let own = host.kernel_parameters().iter();
        words.extend(own.filter(|word| **word != "quiet"));
        words.push("loglevel=7");
        Self {
            kernel: kernel.to_owned(),
            initramfs: initramfs.to_owned(),
            memory_mib: 128,
            cmdline: words.join(" "),
        }
    }
}

/// The last thing every kernel says before it hands over to the agent.
pub const MARKER: &str = "Run /init as init process";

/// The program of both QEMUs.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// How long a boot took.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// Since the VMM was started.
    pub took: Duration,
    /// CPU time of the VMM, its guest included. Other work on the host hardly changes it.
    pub cpu: Duration,
}

/// Builds a VMM's arguments for a guest; the folder is for files it wants written.
type Arguments = fn(&Guest, &Path) -> Vec<String>;

/// A VMM found on this host.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Name in the table.
    pub name: &'static str,
    /// First line of its `--version`.
    pub version: String,
    program: PathBuf,
    args: Arguments,
}

impl Peer {
    /// Our own VMM as a process like the others: the `boot` example of `vmm-core`.
    #[must_use]
    pub fn ours(name: &'static str, program: PathBuf) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self {
            name,
            version,
            program,
            args: boot_example,
        }
    }

    /// Every peer whose program is on the PATH, and a reason for each that is not.
    #[must_use]
    pub fn find() -> (Vec<Self>, Vec<String>) {
        let known: [(&'static str, &str, Arguments); 4] = [
            ("qemu kvm", QEMU, qemu_kvm),
            ("qemu tcg", QEMU, qemu_tcg),
            ("cloud-hypervisor", "cloud-hypervisor", cloud_hypervisor),
            ("firecracker", "firecracker", firecracker),
        ];
        let (mut found, mut missing) = (Vec::new(), Vec::new());
        for (name, program, args) in known {
            match which(program) {
                Some(path) => {
                    let version = first_line(&path);
                    found.push(Self {
                        name,
                        version,
                        program: path,
                        args,
                    });
                }
                None => missing.push(format!("{name}: {program} is not on the PATH")),
            }
        }
        (found, missing)
    }

    /// Boots the guest until its console shows `marker`.
    ///
    /// # Errors
    /// Says why when the marker was not shown within `limit`, with the console's last lines.
    pub fn boot(&self, guest: &Guest, marker: &str, limit: Duration) -> Result<Boot, String> {
        let scratch = tempfile::tempdir().map_err(|e| e.to_string())?;
        let start = Instant::now();
        let child = Command::new(&self.program)
            .args((self.args)(guest, scratch.path()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("{} cannot be started: {e}", self.program.display()))?;
        let mut vmm = Killed(child);
        let (sender, lines) = mpsc::channel();
        let out = vmm
            .0
            .stdout
            .take()
            .into_iter()
            .map(|o| Box::new(o) as Box<dyn std::io::Read + Send>);
        let err = vmm
            .0
            .stderr
            .take()
            .into_iter()
            .map(|e| Box::new(e) as Box<dyn std::io::Read + Send>);
        for stream in out.chain(err) {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                    if sender
                        .send(String::from_utf8_lossy(&line).into_owned())
                        .is_err()
                    {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let mut tail = Vec::new();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            match lines.recv_timeout(left) {
                Ok(line) if line.contains(marker) => {
                    let took = start.elapsed();
                    let cpu = cpu_time(vmm.0.id()).map_err(|e| format!("CPU time: {e}"))?;
                    return Ok(Boot { took, cpu });
                }
                Ok(line) => tail.push(line),
                Err(why) => {
                    let why = match why {
                        mpsc::RecvTimeoutError::Timeout => format!("not within {limit:?}"),
                        mpsc::RecvTimeoutError::Disconnected => "it ended before".to_owned(),
                    };
                    let from = tail.len().saturating_sub(5);
                    let shown = tail.get(from..).unwrap_or_default().join(" | ");
                    return Err(format!("no {marker:?}, {why}: {shown}"));
                }
            }
        }
    }
}

/// A process that does not outlive its value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// CPU time of a process, all threads together.
///
/// # Errors
/// When the process is gone.
pub fn cpu_time(pid: u32) -> std::io::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_cpu_time(&stat).ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}

/// proc(5): utime and stime are fields 14 and 15, in ticks of a hundredth of a second. The
/// second field, the name, may hold anything but ends with the last parenthesis.
fn parse_cpu_time(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let sum = ticks()?.checked_add(ticks()?)?;
    Some(Duration::from_millis(sum.checked_mul(10)?))
}

pub(crate) fn which(program: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH")?;
    std::env::split_paths(&paths)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

pub(crate) fn first_line(program: &Path) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output
        .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
        .unwrap_or_default();
    text.lines().next().unwrap_or("unknown version").to_owned()
}

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|a| (*a).to_owned()).collect()
}

fn boot_example(guest: &Guest, _: &Path) -> Vec<String> {
    let mut args = vec![
        guest.kernel.display().to_string(),
        guest.initramfs.display().to_string(),
        "1".to_owned(),
        guest.memory_mib.to_string(),
    ];
    // It adds what the host needs by itself; what comes last wins.
    args.extend(strings(&["loglevel=7"]));
    args
}

fn qemu(guest: &Guest, accel: &[&str], machine: &str, extra: &str) -> Vec<String> {
    let mut args = strings(accel);
    args.extend(strings(&[
        "-M",
        machine,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ]));
    args.extend(strings(&[
        "-display", "none", "-serial", "stdio", "-smp", "1",
    ]));
    args.extend(["-m".to_owned(), guest.memory_mib.to_string()]);
    args.extend(["-kernel".to_owned(), guest.kernel.display().to_string()]);
    args.extend(["-initrd".to_owned(), guest.initramfs.display().to_string()]);
    args.extend(["-append".to_owned(), format!("{} {extra}", guest.cmdline)]);
    args
}

pub(crate) fn qemu_kvm(guest: &Guest, _: &Path) -> Vec<String> {
    let cpu = &["-accel", "kvm", "-cpu", "host,-arch-capabilities"];
    qemu(guest, cpu, "microvm,acpi=off,pit=on,pic=on,rtc=on", "")
}

fn qemu_tcg(guest: &Guest, _: &Path) -> Vec<String> {
    qemu(
        guest,
        &["-accel", "tcg", "-cpu", "max"],
        "microvm,acpi=off,pit=on,pic=on,rtc=on",
        "",
    )
}

fn cloud_hypervisor(guest: &Guest, _: &Path) -> Vec<String> {
    let mut args = strings(&["--cpus", "boot=1", "--serial", "tty", "--console", "off"]);
    args.extend(["--memory".to_owned(), format!("size={}M", guest.memory_mib)]);
    args.extend(["--kernel".to_owned(), guest.kernel.display().to_string()]);
    args.extend([
        "--initramfs".to_owned(),
        guest.initramfs.display().to_string(),
    ]);
    // It offers ACPI and PCI only.
    let cmdline = guest.cmdline.replace("acpi=off", "").replace("pci=off", "");
    args.extend(["--cmdline".to_owned(), cmdline]);
    args
}

fn firecracker(guest: &Guest, scratch: &Path) -> Vec<String> {
    let config = serde_json::json!({
        "boot-source": {
            "kernel_image_path": guest.kernel,
            "initrd_path": guest.initramfs,
            "boot_args": guest.cmdline,
        },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": guest.memory_mib },
    });
    let path = scratch.join("vm.json");
    // A failed write shows as Firecracker's own error about the missing file.
    let _ = std::fs::write(&path, config.to_string());
    let mut args = strings(&["--no-api", "--config-file"]);
    args.push(path.display().to_string());
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_user_and_system_time() {
        let stat = "7 (a ) b) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1 0 99";
        assert_eq!(parse_cpu_time(stat), Some(Duration::from_secs(3)));
        assert_eq!(parse_cpu_time("7 (x) S 1"), None);
    }
}

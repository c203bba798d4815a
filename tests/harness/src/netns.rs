//! Network namespaces of the test's own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace with loopback up, bound to a file; removed on drop.
#[derive(Debug)]
pub struct NetNs {
    dir: tempfile::TempDir,
}

impl NetNs {
    /// Why there can be none here, or `None` when there can.
    #[must_use]
    pub fn missing() -> Option<String> {
        if !nix::unistd::geteuid().is_root() {
            return Some("network namespaces need root".to_owned());
        }
        if !Path::new("/proc/self/ns/net").exists() {
            return Some("the kernel has no network namespaces".to_owned());
        }
        match Command::new("ip").arg("-V").output() {
            Ok(_) => None,
            Err(e) => Some(format!("`ip` cannot be run: {e}")),
        }
    }

    /// A new one.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("kuasar-netns-")
            .tempdir()
            .expect("temporary dir");
        let file = dir.path().join("net");
        fs::write(&file, "").expect("create a file");
        // A namespace belongs to a thread: one that ends right away.
        let made = std::thread::spawn(move || -> nix::Result<()> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(
                Some("/proc/thread-self/ns/net"),
                &file,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
        });
        made.join()
            .expect("the thread of a new namespace")
            .expect("make a network namespace");
        let netns = Self { dir };
        netns.ip("link set lo up");
        netns
    }

    /// The file it is bound to.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("net")
    }

    /// The namespace itself.
    ///
    /// # Panics
    /// When it has gone.
    #[must_use]
    pub fn open(&self) -> File {
        File::open(self.path()).expect("open the namespace")
    }

    /// Runs `work` on a thread in the namespace.
    ///
    /// # Panics
    /// When the namespace cannot be entered, or `work` panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = self.open();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(&namespace, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                work()
            });
            match thread.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs `ip ARGS` in the namespace and returns what it printed.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn ip(&self, args: &str) -> String {
        let out = self.run(|| {
            Command::new("ip")
                .args(args.split(' '))
                .output()
                .expect("run ip")
        });
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "ip {args}: {out:?}");
        text
    }

    /// Whether `address` answers to pings from the namespace, of which it may miss one. Packets
    /// are handled by an emulated kernel on some hosts: each has 20 s.
    ///
    /// # Panics
    /// When there is no busybox.
    #[must_use]
    pub fn pings(&self, address: &str) -> bool {
        self.run(|| {
            let ping = Command::new("/bin/busybox")
                .args(["ping", "-c", "2", "-W", "20", address])
                .output();
            ping.expect("run busybox").status.success()
        })
    }

    /// Takes the namespace's file away, as CNI does; it lives on while somebody is in it.
    pub fn unbind(&self) {
        let _ = umount2(&self.path(), MntFlags::MNT_DETACH);
    }
}

impl Default for NetNs {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        self.unbind();
    }
}

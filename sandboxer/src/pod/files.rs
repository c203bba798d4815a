//! `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf` of a pod.

use std::fmt::Write as _;
use std::path::Path;

use super::error::{PodError, Result};
use super::oci::PodFile;
use crate::config::DEBUG_SHELL;
use crate::rpc::cri::DnsConfig;

/// Entry of the pod's share that holds the files.
const FOLDER: &str = "etc";

/// What the files are made from.
#[derive(Debug)]
pub(super) struct PodFiles<'a> {
    /// Name of the pod's machine.
    pub(super) hostname: &'a str,
    /// What the pod asks for; otherwise the host's own is copied.
    pub(super) dns: Option<&'a DnsConfig>,
    /// The shell of the debug console, if there is one.
    pub(super) debug_shell: Option<&'a Path>,
}

impl PodFiles<'_> {
    /// Writes the files into `share`. Blocks.
    pub(super) fn write(&self, share: &Path) -> Result<Vec<PodFile>> {
        let folder = share.join(FOLDER);
        let failed = |what: &Path| PodError::io(format!("writing {}", what.display()));
        std::fs::create_dir(&folder).map_err(failed(&folder))?;
        let files = [
            ("hosts", self.hosts()),
            ("hostname", format!("{}\n", self.hostname)),
            ("resolv.conf", self.resolv_conf()),
        ];
        for (name, content) in files {
            let path = folder.join(name);
            std::fs::write(&path, content).map_err(failed(&path))?;
        }
        if let Some(shell) = self.debug_shell {
            // A copy: the guest can write to what it is given.
            let path = share.join(DEBUG_SHELL);
            std::fs::copy(shell, &path).map_err(failed(&path))?;
        }
        Ok(Self::written())
    }

    /// The files that [`PodFiles::write`] wrote.
    pub(super) fn written() -> Vec<PodFile> {
        let file = |destination, name| PodFile {
            destination,
            guest_path: format!("{}/{FOLDER}/{name}", agent_api::SHARE_DIR),
        };
        vec![
            file("/etc/hosts", "hosts"),
            file("/etc/hostname", "hostname"),
            file("/etc/resolv.conf", "resolv.conf"),
        ]
    }

    fn hosts(&self) -> String {
        format!(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{}\n",
            self.hostname
        )
    }

    pub(super) fn resolv_conf(&self) -> String {
        let Some(dns) = self.dns else {
            return std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        };
        let mut text = String::new();
        if !dns.searches.is_empty() {
            let _ = writeln!(text, "search {}", dns.searches.join(" "));
        }
        for server in &dns.servers {
            let _ = writeln!(text, "nameserver {server}");
        }
        if !dns.options.is_empty() {
            let _ = writeln!(text, "options {}", dns.options.join(" "));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dns_of_the_pod_is_written_as_resolv_conf() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()],
            searches: vec!["a.local".to_owned(), "b.local".to_owned()],
            options: vec!["ndots:5".to_owned()],
        };
        let share = tempfile::tempdir().unwrap();
        let files = PodFiles {
            hostname: "pod-1",
            dns: Some(&dns),
            debug_shell: None,
        };
        let written = files.write(share.path()).unwrap();
        let read = |name: &str| std::fs::read_to_string(share.path().join("etc").join(name));
        assert_eq!(
            read("resolv.conf").unwrap(),
            "search a.local b.local\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        assert_eq!(read("hostname").unwrap(), "pod-1\n");
        assert!(read("hosts").unwrap().contains("pod-1"));
        assert_eq!(written.len(), 3);
        assert_eq!(written[0].guest_path, "/run/kuasar/state/etc/hosts");
    }
}

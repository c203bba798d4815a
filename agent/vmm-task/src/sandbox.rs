//! What the pod needs of the guest before its first container.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use agent_api::rpc::{self, SetupSandboxRequest};
use nix::unistd::sethostname;
use tracing::warn;

use crate::clock;
use crate::error::AgentError;
use crate::mounts;
use crate::network::Network;
use crate::sys;

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The pod's settings, once applied.
#[derive(Debug)]
pub struct Sandbox {
    /// Without network, time and entropy, which may change.
    request: SetupSandboxRequest,
    network: Network,
}

/// Mounts that go away unless the set-up succeeds.
struct Mounted(Vec<PathBuf>);

impl Drop for Mounted {
    fn drop(&mut self) {
        for target in self.0.iter().rev() {
            mounts::unmount(target);
        }
    }
}

impl Sandbox {
    /// Applies the settings; mounts stay only when all of it succeeds.
    pub fn setup(request: &SetupSandboxRequest) -> Result<Self, AgentError> {
        refresh(request)?;
        if !request.hostname.is_empty() {
            sethostname(&request.hostname).map_err(|e| {
                AgentError::io(format!("hostname {:?}", request.hostname))(e.into())
            })?;
        }
        let mut mounted = Mounted(Vec::new());
        for mount in &request.mounts {
            mounts::mount(mount)?;
            mounted.0.push(PathBuf::from(&mount.target));
        }
        for (key, value) in &request.sysctls {
            set_sysctl(key, value)?;
        }
        let mut network = Network::default();
        network.apply(request.network.get_or_default())?;
        if !request.resolv_conf.is_empty() {
            fs::create_dir_all("/etc")
                .and_then(|()| fs::write(RESOLV_CONF, &request.resolv_conf))
                .map_err(AgentError::io(RESOLV_CONF))?;
        }
        if let Some(name) = request
            .environment
            .keys()
            .find(|n| n.is_empty() || n.contains(['=', '\0']))
        {
            return Err(AgentError::invalid(
                "environment",
                format!("{name:?} cannot be a variable's name"),
            ));
        }
        mounted.0.clear();
        Ok(Self {
            request: lasting(request),
            network,
        })
    }

    /// Answers a repeated request: the same settings are fine, others are not. Time,
    /// entropy and network may differ, and take effect.
    pub fn repeat(&mut self, request: &SetupSandboxRequest) -> Result<(), AgentError> {
        if lasting(request) != self.request {
            return Err(AgentError::State {
                what: "the sandbox".to_owned(),
                is: "set up with other settings",
                needs: "new",
            });
        }
        refresh(request)?;
        self.update_network(request.network.get_or_default())
    }

    /// Makes the pod's network what `wanted` says.
    pub fn update_network(&mut self, wanted: &rpc::Network) -> Result<(), AgentError> {
        self.network.apply(wanted)
    }

    /// Variables for every process of the pod.
    pub fn environment(&self) -> BTreeMap<String, String> {
        let vars = self.request.environment.iter();
        vars.map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

/// What of a request cannot change afterwards.
fn lasting(request: &SetupSandboxRequest) -> SetupSandboxRequest {
    SetupSandboxRequest {
        time_ns: 0,
        entropy: Vec::new(),
        network: None.into(),
        ..request.clone()
    }
}

/// Sets the clock and feeds the entropy pool.
fn refresh(request: &SetupSandboxRequest) -> Result<(), AgentError> {
    if request.time_ns > 0 {
        clock::set_ns(request.time_ns).map_err(AgentError::io("setting the clock"))?;
    }
    if !request.entropy.is_empty() {
        let opened = fs::OpenOptions::new().write(true).open("/dev/urandom");
        let random = opened.map_err(AgentError::io("/dev/urandom"))?;
        if let Err(e) = sys::add_entropy(&random, &request.entropy) {
            warn!("entropy was not credited: {e}");
        }
    }
    Ok(())
}

/// Writes a kernel setting, its key given with dots (slashes stand for dots in a name, as
/// sysctl(8) has it).
pub fn set_sysctl(key: &str, value: &str) -> Result<(), AgentError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    let bad = key.is_empty() || !key.chars().all(allowed) || key.split('.').any(str::is_empty);
    if bad || key.contains("..") || key.starts_with('/') {
        return Err(AgentError::invalid(
            "sysctls",
            format!("{key:?} is not a kernel setting"),
        ));
    }
    let swapped: String = key
        .chars()
        .map(|c| match c {
            '.' => '/',
            '/' => '.',
            c => c,
        })
        .collect();
    if swapped
        .split('/')
        .any(|part| part.is_empty() || part == ".." || part == ".")
    {
        return Err(AgentError::invalid(
            "sysctls",
            format!("{key:?} is not a kernel setting"),
        ));
    }
    let path = format!("/proc/sys/{swapped}");
    // Opened without O_CREAT: a missing setting is an error, not a new file.
    let result = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut f| {
            use std::io::Write;
            f.write_all(value.as_bytes())
        });
    result.map_err(AgentError::io(format!("sysctl {key}={value}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_outside_proc_sys_are_refused() {
        for key in [
            "",
            "..",
            "a..b",
            ".a",
            "a.",
            "/etc/passwd",
            "a/../b",
            "net ipv4",
            "..//..//etc",
            "a.//.//.b",
        ] {
            let e = set_sysctl(key, "1").unwrap_err();
            assert!(matches!(e, AgentError::Invalid { .. }), "{key:?}: {e}");
        }
        assert!(matches!(
            set_sysctl("kernel.no_such_setting", "1"),
            Err(AgentError::Io { .. })
        ));
    }

    #[test]
    fn repeating_is_fine_unless_it_differs() {
        let request = SetupSandboxRequest {
            environment: [("A".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        let mut sandbox = Sandbox::setup(&request).unwrap();
        sandbox.repeat(&request).unwrap();
        let mut other = request;
        other.hostname = "elsewhere".into();
        assert!(matches!(
            sandbox.repeat(&other),
            Err(AgentError::State { .. })
        ));
    }

    #[test]
    fn a_variable_needs_a_name() {
        let request = SetupSandboxRequest {
            environment: [("A=B".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        Sandbox::setup(&request).unwrap_err();
    }
}

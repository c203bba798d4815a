//! What a caller asks a pod to be, checked.

use std::path::PathBuf;

use crate::rpc::cri::{NamespaceMode, PodSandboxConfig};

use super::error::{PodError, Result};

/// Longest host name Linux accepts, in bytes.
const MAX_HOSTNAME_BYTES: usize = 64;

/// Annotation of Create by which a shim says where its containerd takes events.
pub const EVENTS_ANNOTATION: &str = "io.kuasar.containerd.ttrpc-address";

/// A pod as it is to be.
#[derive(Clone, Debug)]
pub struct PodRequest {
    /// Names the pod; also the name of its folder.
    pub id: String,
    /// The network namespace CNI prepared.
    pub netns: Option<PathBuf>,
    /// What CRI says of the pod; empty for callers that send none.
    pub config: PodSandboxConfig,
    /// containerd's ttrpc socket, where the caller names the one it has.
    pub events: Option<PathBuf>,
}

impl PodRequest {
    /// Checks what a caller sent.
    ///
    /// # Errors
    /// Names the field that cannot be used.
    pub fn new(id: &str, netns_path: &str, config: PodSandboxConfig) -> Result<Self> {
        check_id("sandbox_id", id)?;
        check_host_namespaces(&config)?;
        if config.hostname.len() > MAX_HOSTNAME_BYTES
            || config
                .hostname
                .contains(|c: char| c.is_control() || c == '/')
        {
            return Err(PodError::invalid(
                "hostname",
                config.hostname,
                format!("must be a host name of up to {MAX_HOSTNAME_BYTES} bytes"),
            ));
        }
        let netns = match netns_path {
            "" => None,
            path if path.starts_with('/') => Some(PathBuf::from(path)),
            path => {
                return Err(PodError::invalid(
                    "netns_path",
                    path,
                    "must be an absolute path, or empty for a pod without network",
                ));
            }
        };
        Ok(Self {
            id: id.to_owned(),
            netns,
            config,
            events: None,
        })
    }

    /// Has events of the pod's containers go to containerd's ttrpc socket `address`, whatever
    /// the daemon's configuration says. Empty: nothing changes.
    ///
    /// # Errors
    /// Not an absolute path.
    pub fn with_events(mut self, address: &str) -> Result<Self> {
        if address.is_empty() {
            return Ok(self);
        }
        let path = PathBuf::from(address);
        if !path.is_absolute() {
            return Err(PodError::invalid(
                "annotations",
                format!("{EVENTS_ANNOTATION}: {address}"),
                "must be the absolute path of containerd's ttrpc socket",
            ));
        }
        self.events = Some(path);
        Ok(self)
    }

    /// Whether containers of the pod may be privileged.
    #[must_use]
    pub fn is_privileged(&self) -> bool {
        let linux = self.config.linux.as_ref();
        let context = linux.and_then(|linux| linux.security_context.as_ref());
        context.is_some_and(|context| context.privileged)
    }

    /// The name of the pod's machine: what the caller wants, else the pod's id, cut to what
    /// Linux accepts.
    #[must_use]
    pub fn hostname(&self) -> &str {
        if self.config.hostname.is_empty() {
            // Ids are ASCII, so any cut is a character boundary.
            self.id.get(..MAX_HOSTNAME_BYTES).unwrap_or(&self.id)
        } else {
            &self.config.hostname
        }
    }
}

/// Checks an id that becomes a file name.
///
/// # Errors
/// `id` has a character outside `A-Z a-z 0-9 _ - . +`, is too long, empty, `.` or `..`.
pub(crate) fn check_id(field: &'static str, id: &str) -> Result<()> {
    if agent_api::stream::valid_id(id) {
        return Ok(());
    }
    Err(PodError::invalid(
        field,
        id,
        "must be 1 to 256 characters of A-Z a-z 0-9 _ - . + and neither `.` nor `..`",
    ))
}

/// A VM cannot share namespaces of the host.
fn check_host_namespaces(config: &PodSandboxConfig) -> Result<()> {
    let Some(options) = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|context| context.namespace_options.as_ref())
    else {
        return Ok(());
    };
    let own_users = options.userns_options.as_ref();
    if own_users.is_some_and(|users| users.mode != NamespaceMode::Node as i32) {
        return Err(PodError::invalid(
            "linux.security_context.namespace_options",
            "userns_options",
            "a pod in a VM has no user namespace of the host, and needs none to be kept apart \
             from it: set hostUsers, or leave it out",
        ));
    }
    for (name, mode) in [
        ("hostNetwork", options.network),
        ("hostPID", options.pid),
        ("hostIPC", options.ipc),
    ] {
        if mode == NamespaceMode::Node as i32 {
            return Err(PodError::invalid(
                "linux.security_context.namespace_options",
                name,
                "a pod in a VM has no access to namespaces of the host: remove it, or use a \
                 runtime class without VM for this pod",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::cri::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption};

    #[test]
    fn ids_that_could_leave_the_folder_are_refused() {
        for id in ["", ".", "..", "../x", "a/b", "a\0b", &"x".repeat(300)] {
            let error = PodRequest::new(id, "", PodSandboxConfig::default()).unwrap_err();
            assert!(error.to_string().starts_with("sandbox_id = "), "{error}");
        }
    }

    #[test]
    fn namespaces_of_the_host_are_refused_by_name() {
        let config = PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption {
                        pid: NamespaceMode::Node as i32,
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let error = PodRequest::new("p", "", config).unwrap_err().to_string();
        assert!(error.contains("hostPID"), "{error}");
    }

    #[test]
    fn the_hostname_defaults_to_the_id() {
        let id = "a".repeat(100);
        let request = PodRequest::new(&id, "", PodSandboxConfig::default()).unwrap();
        assert_eq!(request.hostname(), "a".repeat(64));
    }
}

//! Fits the host's OCI spec to this guest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::pod_pids;
use super::privileges::Privileges;
use super::seccomp::Filters;
use crate::error::AgentError;

/// Used when the spec has no `PATH`.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A spec ready for the runtime.
#[derive(Debug)]
pub struct Prepared {
    /// The rewritten spec.
    pub spec: Spec,
    /// Whether `HOME` is to be looked up in the container.
    pub find_home: bool,
    /// Taken out of the spec, for the executor.
    pub privileges: Privileges,
    /// Seccomp filters, for the execs to come.
    pub filters: Filters,
}

/// Parses and rewrites the spec of a new container.
///
/// - the cgroup is ours, whatever path the host's names;
/// - a network namespace without a path is dropped: the pod's network is the guest's own;
/// - the pod's environment is added, see [`prepare_process`].
pub fn prepare(
    json: &[u8],
    cgroup: PathBuf,
    terminal: bool,
    env: &BTreeMap<String, String>,
) -> Result<Prepared, AgentError> {
    let mut spec: Spec = parse("spec_json", json)?;
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| AgentError::invalid("root", "is missing"))?;
    if !root.path().is_absolute() {
        let why = format!("{} must be an absolute path", root.path().display());
        return Err(AgentError::invalid("root.path", why));
    }
    let process = spec
        .process_mut()
        .as_mut()
        .ok_or_else(|| AgentError::invalid("process", "is missing"))?;
    let find_home = prepare_process(process, terminal, env)?;
    // Left to the runtime, the last container's value would stay the agent's.
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(Some(0));
    }
    let linux = spec
        .linux_mut()
        .as_mut()
        .ok_or_else(|| AgentError::invalid("linux", "is missing"))?;
    linux.set_cgroups_path(Some(cgroup));
    let filters = linux
        .seccomp()
        .as_ref()
        .map(Filters::compile)
        .transpose()?
        .unwrap_or_default();
    // Enforced by the executor; the runtime would only warn that it cannot.
    linux.set_seccomp(None);
    let namespaces = linux.namespaces_mut().get_or_insert_default();
    namespaces.retain(|n| n.typ() != LinuxNamespaceType::Network || n.path().is_some());
    for namespace in namespaces.iter_mut() {
        if namespace.path().as_deref() == Some(Path::new(agent_api::POD_PID_NAMESPACE)) {
            namespace.set_path(Some(pod_pids::namespace()?));
        }
        if let Some(path) = namespace.path()
            && !path.exists()
        {
            let why = format!("{} does not exist in the guest", path.display());
            return Err(AgentError::invalid(
                format!("linux.namespaces[{}].path", namespace.typ()),
                why,
            ));
        }
    }
    if !namespaces
        .iter()
        .any(|n| n.typ() == LinuxNamespaceType::Mount)
    {
        return Err(AgentError::invalid(
            "linux.namespaces",
            "a mount namespace is needed",
        ));
    }
    let process = spec.process_mut().as_mut();
    let privileges = process
        .map(|p| Privileges::take(p, filters.clone()))
        .unwrap_or_default();
    Ok(Prepared {
        spec,
        find_home,
        privileges,
        filters,
    })
}

/// Parses and rewrites the `Process` of an exec.
pub fn prepare_exec(
    json: &[u8],
    terminal: bool,
    env: &BTreeMap<String, String>,
    filters: &Filters,
) -> Result<(Process, bool, Privileges), AgentError> {
    let mut process: Process = parse("process_json", json)?;
    let find_home = prepare_process(&mut process, terminal, env)?;
    let privileges = Privileges::take(&mut process, filters.clone());
    Ok((process, find_home, privileges))
}

fn parse<T: serde::de::DeserializeOwned>(
    field: &'static str,
    json: &[u8],
) -> Result<T, AgentError> {
    serde_json::from_slice(json).map_err(|e| AgentError::invalid(field, e))
}

/// Sets the terminal flag, and the variables the process does not set itself: `PATH`, those
/// of the pod and a place for `HOME`. Says whether `HOME` is to be looked up.
fn prepare_process(
    process: &mut Process,
    terminal: bool,
    pod: &BTreeMap<String, String>,
) -> Result<bool, AgentError> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(AgentError::invalid("process.args", "is empty"));
    }
    if !process.cwd().is_absolute() {
        let why = format!("{:?} must be an absolute path", process.cwd());
        return Err(AgentError::invalid("process.cwd", why));
    }
    process.set_terminal(Some(terminal));
    let env = process.env_mut().get_or_insert_default();
    let unset = |env: &[String], name: &str| {
        !env.iter()
            .any(|e| e.split_once('=').is_some_and(|(n, _)| n == name))
    };
    for (name, value) in pod {
        if unset(env, name) {
            env.push(format!("{name}={value}"));
        }
    }
    if unset(env, "PATH") {
        env.push(DEFAULT_PATH.to_owned());
    }
    let find_home = unset(env, "HOME");
    if find_home {
        // With a value here the runtime does not call getpwuid(3), which may load libraries
        // of the container's choice into a process that still is a copy of the agent.
        env.push("HOME=/".to_owned());
    }
    Ok(find_home)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str, process: &str) -> Vec<u8> {
        format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"/rootfs"}},
                "process":{{"cwd":"/","user":{{"uid":0,"gid":0}},"args":["sh"]{process}}},
                "linux":{linux}}}"#
        )
        .into_bytes()
    }

    fn run(json: &[u8]) -> Result<Prepared, AgentError> {
        let env = BTreeMap::from([
            ("A".to_owned(), "pod".to_owned()),
            ("B".to_owned(), "pod".to_owned()),
        ]);
        prepare(json, "/container-x".into(), false, &env)
    }

    fn message(json: &[u8]) -> String {
        run(json).unwrap_err().to_string()
    }

    const MOUNT_NS: &str = r#"{"namespaces":[{"type":"mount"},{"type":"network"}]}"#;

    #[test]
    fn the_pod_fills_in_what_the_process_leaves_open() {
        let p = run(&spec(MOUNT_NS, r#","env":["A=own","HOME=/h"]"#)).unwrap();
        let env = p.spec.process().as_ref().unwrap().env().clone().unwrap();
        assert_eq!(env, ["A=own", "HOME=/h", "B=pod", DEFAULT_PATH]);
        assert!(!p.find_home);
        let p = run(&spec(MOUNT_NS, "")).unwrap();
        assert!(p.find_home);
    }

    #[test]
    fn the_network_is_the_guests_and_the_cgroup_ours() {
        let p = run(&spec(MOUNT_NS, "")).unwrap();
        let linux = p.spec.linux().clone().unwrap();
        assert_eq!(
            linux.cgroups_path().clone().unwrap(),
            PathBuf::from("/container-x")
        );
        let kinds: Vec<_> = linux
            .namespaces()
            .clone()
            .unwrap()
            .iter()
            .map(|n| n.typ())
            .collect();
        assert_eq!(kinds, [LinuxNamespaceType::Mount]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(message(b"{").contains("spec_json"));
        assert!(message(&spec("{}", "")).contains("mount namespace"));
        let ns = r#"{"namespaces":[{"type":"mount"},{"type":"ipc","path":"/run/gone"}]}"#;
        let m = message(&spec(ns, ""));
        assert!(m.contains("/run/gone") && m.contains("ipc"), "{m}");
        assert!(message(&spec(MOUNT_NS, r#","args":[]"#)).contains("args"));
        assert!(message(br#"{"ociVersion":"1.0.2"}"#).contains("root"));
    }

    #[test]
    fn an_exec_is_checked_too() {
        let env = BTreeMap::new();
        prepare_exec(b"{}", false, &env, &Filters::default()).unwrap_err();
        let ok = br#"{"cwd":"/","user":{"uid":1,"gid":2},"args":["id"]}"#;
        let (p, find_home, _) = prepare_exec(ok, true, &env, &Filters::default()).unwrap();
        assert_eq!(p.terminal(), Some(true));
        assert!(find_home);
    }
}

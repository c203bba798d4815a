//! What the kubelet does with a container runtime, in the words of a test.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::Status;

use crate::cri::{Cri, v1};
use crate::eventually;

/// A container's state may reach CRI a moment after the fact.
pub const SOON: Duration = Duration::from_secs(30);

/// A user of one runtime handler.
#[derive(Debug)]
pub struct Kubelet {
    /// The runtime.
    pub cri: Cri,
    /// The runtime handler of all pods.
    pub handler: String,
    /// The image of all containers; it has a shell and the tools of busybox.
    pub image: String,
    /// Where CRI writes the logs of containers.
    pub logs: PathBuf,
}

impl Kubelet {
    /// What the pod `name` is asked to be.
    #[must_use]
    pub fn pod_config(&self, name: &str) -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.logs.to_string_lossy().into_owned(),
            dns_config: Some(v1::DnsConfig {
                servers: vec!["10.96.0.10".to_owned()],
                searches: vec!["svc.local".to_owned()],
                options: vec![],
            }),
            labels: [("app".to_owned(), name.to_owned())].into(),
            ..Default::default()
        }
    }

    /// A pod, started.
    ///
    /// # Panics
    /// When CRI refuses.
    #[must_use]
    pub fn run_pod(&self, name: &str) -> Pod<'_> {
        self.run_pod_of(self.pod_config(name))
    }

    /// A pod of that configuration, started.
    ///
    /// # Panics
    /// When CRI refuses.
    #[must_use]
    pub fn run_pod_of(&self, config: v1::PodSandboxConfig) -> Pod<'_> {
        self.try_run_pod(config).unwrap()
    }

    /// A pod of that configuration, if CRI lets it start.
    ///
    /// # Errors
    /// Why not.
    pub fn try_run_pod(&self, config: v1::PodSandboxConfig) -> Result<Pod<'_>, Status> {
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: self.handler.clone(),
        };
        let id = self.cri.run_pod_sandbox(request)?;
        Ok(self.pod(id.pod_sandbox_id, config))
    }

    /// A pod that was started before.
    #[must_use]
    pub const fn pod(&self, id: String, config: v1::PodSandboxConfig) -> Pod<'_> {
        Pod {
            node: self,
            id,
            config,
        }
    }

    /// All pods.
    ///
    /// # Panics
    /// When CRI refuses.
    #[must_use]
    pub fn pods(&self) -> Vec<v1::PodSandbox> {
        let request = v1::ListPodSandboxRequest::default();
        self.cri.list_pod_sandbox(request).unwrap().items
    }

    /// The state of a pod.
    ///
    /// # Panics
    /// When CRI does not say.
    #[must_use]
    pub fn pod_state(&self, id: &str) -> v1::PodSandboxState {
        // containerd may still wait before it dials a new daemon.
        eventually("the pod's status", SOON, || {
            Some(self.try_pod_status(id).ok()?.status?.state())
        })
    }

    /// The verbose status of a pod.
    ///
    /// # Errors
    /// CRI does not say.
    pub fn try_pod_status(&self, id: &str) -> Result<v1::PodSandboxStatusResponse, Status> {
        self.cri.pod_sandbox_status(v1::PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: true,
        })
    }

    /// The addresses of a pod.
    ///
    /// # Panics
    /// When CRI does not say.
    #[must_use]
    pub fn addresses(&self, id: &str) -> Vec<String> {
        let status = self.try_pod_status(id).unwrap().status.unwrap();
        let network = status.network.unwrap_or_default();
        let mut all = vec![network.ip];
        all.extend(network.additional_ips.into_iter().map(|more| more.ip));
        all.retain(|address| !address.is_empty());
        all
    }

    /// The status of a container.
    ///
    /// # Panics
    /// When CRI does not say.
    #[must_use]
    pub fn status(&self, container: &str) -> v1::ContainerStatus {
        let request = v1::ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        let status = self.cri.container_status(request).unwrap();
        status.status.unwrap()
    }

    /// The status of a container once it has ended.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn exited(&self, container: &str) -> v1::ContainerStatus {
        eventually("the container's end", SOON * 2, || {
            let status = self.status(container);
            (status.state() == v1::ContainerState::ContainerExited).then_some(status)
        })
    }

    /// Runs a shell script in a container: stdout, stderr, exit code.
    ///
    /// # Panics
    /// When CRI refuses.
    #[must_use]
    pub fn exec(&self, container: &str, script: &str) -> (String, String, i32) {
        let done = self.try_exec(container, script, 120).unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (text(done.stdout), text(done.stderr), done.exit_code)
    }

    /// Runs a shell script in a container, which has `seconds` for it.
    ///
    /// # Errors
    /// CRI refuses.
    pub fn try_exec(
        &self,
        container: &str,
        script: &str,
        seconds: i64,
    ) -> Result<v1::ExecSyncResponse, Status> {
        self.cri.exec_sync(v1::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: ["/bin/sh", "-c", script].map(str::to_owned).into(),
            timeout: seconds,
        })
    }

    /// What a shell script that has to succeed prints.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    #[must_use]
    pub fn output(&self, container: &str, script: &str) -> String {
        let (stdout, stderr, code) = self.exec(container, script);
        assert_eq!(code, 0, "{script}: {stdout}{stderr}");
        stdout
    }

    /// The log of the container `name`.
    #[must_use]
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.log_path(name)).unwrap_or_default()
    }

    /// Where the log of the container `name` is.
    #[must_use]
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// Waits until the log of the container `name` has `text`.
    ///
    /// # Panics
    /// When it does not get it.
    #[track_caller]
    pub fn await_log(&self, name: &str, text: &str) {
        eventually(&format!("{text:?} in the log of {name}"), SOON, || {
            self.log(name).contains(text).then_some(())
        });
    }

    /// Stops a container; it has `seconds` to answer TERM.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn stop_container(&self, id: &str, seconds: i64) {
        let request = v1::StopContainerRequest {
            container_id: id.to_owned(),
            timeout: seconds,
        };
        self.cri.stop_container(request).unwrap();
    }

    /// Removes a container.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn remove_container(&self, id: &str) {
        let request = v1::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.cri.remove_container(request).unwrap();
    }

    /// Stops a pod.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn stop_pod(&self, id: &str) {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.cri.stop_pod_sandbox(request).unwrap();
    }

    /// Removes a pod.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn remove_pod(&self, id: &str) {
        let request = v1::RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.cri.remove_pod_sandbox(request).unwrap();
    }

    /// What the container `name` is asked to be, with the shell script that it runs.
    #[must_use]
    pub fn container_config(&self, name: &str, script: &str) -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(v1::ImageSpec {
                image: self.image.clone(),
                ..Default::default()
            }),
            command: ["/bin/sh", "-c", script].map(str::to_owned).into(),
            envs: vec![v1::KeyValue {
                key: "GIVEN".to_owned(),
                value: "too".to_owned(),
            }],
            log_path: format!("{name}.log"),
            linux: Some(v1::LinuxContainerConfig::default()),
            ..Default::default()
        }
    }
}

/// A bind of `host` on `container`.
#[must_use]
pub fn bind(host: &Path, container: &str) -> v1::Mount {
    v1::Mount {
        container_path: container.to_owned(),
        host_path: host.to_string_lossy().into_owned(),
        ..Default::default()
    }
}

/// A pod, started.
#[derive(Debug)]
pub struct Pod<'a> {
    node: &'a Kubelet,
    /// Its id.
    pub id: String,
    config: v1::PodSandboxConfig,
}

impl Pod<'_> {
    /// A container that runs a shell script, created and not started.
    ///
    /// # Panics
    /// When CRI refuses.
    #[must_use]
    pub fn create(&self, name: &str, script: &str) -> String {
        self.create_of(self.node.container_config(name, script))
    }

    /// A container of that configuration, created and not started.
    ///
    /// # Panics
    /// When CRI refuses.
    #[must_use]
    pub fn create_of(&self, config: v1::ContainerConfig) -> String {
        self.try_create(config).unwrap()
    }

    /// A container of that configuration, if CRI lets it be created.
    ///
    /// # Errors
    /// Why not.
    pub fn try_create(&self, config: v1::ContainerConfig) -> Result<String, Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let created = self.node.cri.create_container(request)?;
        Ok(created.container_id)
    }

    /// A container that runs a shell script, started.
    ///
    /// # Panics
    /// When CRI refuses.
    #[must_use]
    pub fn run(&self, name: &str, script: &str) -> String {
        self.run_of(self.node.container_config(name, script))
    }

    /// As [`Pod::run`], with a limit of memory in bytes.
    ///
    /// # Panics
    /// When CRI refuses.
    #[must_use]
    pub fn run_limited(&self, name: &str, script: &str, memory: i64) -> String {
        let mut config = self.node.container_config(name, script);
        config.linux.get_or_insert_default().resources = Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            ..Default::default()
        });
        self.run_of(config)
    }

    /// A container of that configuration, started.
    ///
    /// # Panics
    /// When CRI refuses.
    #[must_use]
    pub fn run_of(&self, config: v1::ContainerConfig) -> String {
        self.try_run(config).unwrap()
    }

    /// A container of that configuration, if CRI lets it start.
    ///
    /// # Errors
    /// Why not. A container that was created is removed.
    pub fn try_run(&self, config: v1::ContainerConfig) -> Result<String, Status> {
        let container_id = self.try_create(config)?;
        let request = v1::StartContainerRequest {
            container_id: container_id.clone(),
        };
        match self.node.cri.start_container(request) {
            Ok(_) => Ok(container_id),
            Err(why) => {
                self.node.remove_container(&container_id);
                Err(why)
            }
        }
    }

    /// Runs a container to its end and removes it: its status and its log.
    ///
    /// # Panics
    /// When CRI refuses.
    #[must_use]
    pub fn finish(&self, config: v1::ContainerConfig) -> (v1::ContainerStatus, String) {
        let name = config.log_path.trim_end_matches(".log").to_owned();
        let id = self.run_of(config);
        let status = self.node.exited(&id);
        let log = self.node.log(&name);
        self.node.remove_container(&id);
        let _ = std::fs::remove_file(self.node.log_path(&name));
        (status, log)
    }
}

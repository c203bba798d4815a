//! A node: containerd with our daemon as its sandboxer, used as the kubelet does.

use std::path::PathBuf;
use std::time::Duration;

use crate::World;
use harness::containerd::{Containerd, HANDLER, Options};
use harness::cri::v1;
use harness::eventually;
use harness::image::{Image, Layer};
use serde_json::json;

const IMAGE: &str = "docker.io/library/box:1";

/// A container's state may reach CRI a moment after the fact.
pub const SOON: Duration = Duration::from_secs(30);

/// containerd beside the daemon of a [`World`], with an image.
#[derive(Debug)]
pub struct Node {
    /// containerd, with everything of its pods.
    pub containerd: Containerd,
    /// The daemon.
    pub world: World,
}

impl Node {
    /// With the daemon's default configuration.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn new(options: &Options) -> Self {
        Self::with_config("", options)
    }

    /// With `config` as the daemon's TOML file.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn with_config(config: &str, options: &Options) -> Self {
        let world = World::with_config(config);
        let containerd = Containerd::start(&world.daemon, options);
        let layer = Layer::new().tree(&world.rootfs, "".as_ref());
        let config = json!({"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Cmd": ["/bin/sleep", "7"]});
        let archive = world.scratch().join("box.tar");
        let archive = Image::new([layer], &config).docker_archive(&archive, IMAGE);
        containerd.import(&archive, IMAGE);
        Self { containerd, world }
    }

    /// What the pod `name` is asked to be.
    pub fn pod_config(&self, name: &str) -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.logs().to_string_lossy().into_owned(),
            dns_config: Some(v1::DnsConfig {
                servers: vec!["10.96.0.10".to_owned()],
                searches: vec!["svc.local".to_owned()],
                options: vec![],
            }),
            labels: [("app".to_owned(), name.to_owned())].into(),
            ..Default::default()
        }
    }

    /// Where CRI writes the logs of containers.
    pub fn logs(&self) -> PathBuf {
        self.world.scratch().join("logs")
    }

    /// A pod, started.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn run_pod(&self, name: &str) -> Pod<'_> {
        self.run_pod_of(self.pod_config(name))
    }

    /// A pod of that configuration, started.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn run_pod_of(&self, config: v1::PodSandboxConfig) -> Pod<'_> {
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: HANDLER.to_owned(),
        };
        let id = self.containerd.cri.run_pod_sandbox(request).unwrap();
        Pod {
            node: self,
            id: id.pod_sandbox_id,
            config,
        }
    }

    /// All pods.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn pods(&self) -> Vec<v1::PodSandbox> {
        let request = v1::ListPodSandboxRequest::default();
        self.containerd.cri.list_pod_sandbox(request).unwrap().items
    }

    /// The state of a pod.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn pod_state(&self, id: &str) -> v1::PodSandboxState {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: false,
        };
        // containerd may still wait before it dials a new daemon.
        eventually("the pod's status", SOON, || {
            let status = self.containerd.cri.pod_sandbox_status(request.clone());
            Some(status.ok()?.status?.state())
        })
    }

    /// The status of a container.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn status(&self, container: &str) -> v1::ContainerStatus {
        let request = v1::ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        let status = self.containerd.cri.container_status(request).unwrap();
        status.status.unwrap()
    }

    /// The status of a container once it has ended.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn exited(&self, container: &str) -> v1::ContainerStatus {
        eventually("the container's end", SOON, || {
            let status = self.status(container);
            (status.state() == v1::ContainerState::ContainerExited).then_some(status)
        })
    }

    /// Runs a shell script in a container: stdout, stderr, exit code.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn exec(&self, container: &str, script: &str) -> (String, String, i32) {
        let request = v1::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: ["/bin/sh", "-c", script].map(str::to_owned).into(),
            timeout: 120,
        };
        let done = self.containerd.cri.exec_sync(request).unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (text(done.stdout), text(done.stderr), done.exit_code)
    }

    /// The log of the container `name`.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.logs().join(format!("{name}.log"))).unwrap_or_default()
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
        self.containerd.cri.stop_container(request).unwrap();
    }

    /// Removes a container.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn remove_container(&self, id: &str) {
        let request = v1::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.containerd.cri.remove_container(request).unwrap();
    }

    /// Stops a pod.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn stop_pod(&self, id: &str) {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.containerd.cri.stop_pod_sandbox(request).unwrap();
    }

    /// Removes a pod.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn remove_pod(&self, id: &str) {
        let request = v1::RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.containerd.cri.remove_pod_sandbox(request).unwrap();
    }

    /// Nothing of any pod is left, around containerd and in the daemon.
    pub fn assert_nothing_left(self) {
        assert_eq!(self.pods(), []);
        assert_eq!(self.containerd.leftovers(), [""; 0]);
        let links = self.containerd.netns().ip("-o link");
        assert!(!links.contains("veth"), "{links}");
        // Its connections to the daemon end with it.
        drop(self.containerd);
        self.world.assert_nothing_left();
    }
}

/// A pod, started.
#[derive(Debug)]
pub struct Pod<'a> {
    node: &'a Node,
    /// Its id.
    pub id: String,
    config: v1::PodSandboxConfig,
}

impl Pod<'_> {
    /// A container that runs a shell script, created and not started.
    pub fn create(&self, name: &str, script: &str) -> String {
        self.create_limited(name, script, 0)
    }

    /// As [`Pod::create`], with a limit of memory in bytes.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn create_limited(&self, name: &str, script: &str, memory: i64) -> String {
        let resources = v1::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            ..Default::default()
        };
        let config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(v1::ImageSpec {
                image: IMAGE.to_owned(),
                ..Default::default()
            }),
            command: ["/bin/sh", "-c", script].map(str::to_owned).into(),
            envs: vec![v1::KeyValue {
                key: "GIVEN".to_owned(),
                value: "too".to_owned(),
            }],
            log_path: format!("{name}.log"),
            linux: Some(v1::LinuxContainerConfig {
                resources: Some(resources),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let cri = &self.node.containerd.cri;
        cri.create_container(request).unwrap().container_id
    }

    /// A container that runs a shell script, started.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn run(&self, name: &str, script: &str) -> String {
        self.run_limited(name, script, 0)
    }

    /// As [`Pod::run`], with a limit of memory in bytes.
    ///
    /// # Panics
    /// When CRI refuses.
    pub fn run_limited(&self, name: &str, script: &str, memory: i64) -> String {
        let container_id = self.create_limited(name, script, memory);
        let request = v1::StartContainerRequest {
            container_id: container_id.clone(),
        };
        self.node.containerd.cri.start_container(request).unwrap();
        container_id
    }
}

//! containerd with `wasm-sandboxer` as its sandboxer, used through CRI as the kubelet uses it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;

use harness::containerd::{Containerd, Line, Mode, Options, WASM_HANDLER};
use harness::cri::v1;
use harness::image::{Image, Layer};
use harness::{eventually, skip_if, wasm};
use nix::sys::signal::Signal;
use serde_json::json;

use super::{SOON, World, missing};

const IMAGE: &str = "docker.io/library/programs:1";

/// containerd, and the one pod of a test.
struct Node {
    containerd: Containerd,
    world: World,
    pod: String,
    config: v1::PodSandboxConfig,
}

impl Node {
    fn new(options: &Options) -> Self {
        let world = World::new("");
        let containerd = Containerd::start(&world.daemon, options);
        let layer = Layer::new()
            .file("suite.wasm", 0o644, &wasm::suite())
            .file("echo.wasm", 0o644, &wasm::echo())
            .file("proxy.wasm", 0o644, &wasm::proxy())
            .file("bin/linux", 0o755, b"\x7fELF\x02\x01\x01");
        let archive = world.scratch.path().join("programs.tar");
        let image = Image::new([layer], &json!({"Env": ["FROM_IMAGE=yes"]}));
        containerd.import(&image.docker_archive(&archive, IMAGE), IMAGE);
        let config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "wasm".to_owned(),
                uid: "uid-wasm".to_owned(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: "wasm".to_owned(),
            log_directory: world
                .scratch
                .path()
                .join("logs")
                .to_string_lossy()
                .into_owned(),
            ..Default::default()
        };
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: WASM_HANDLER.to_owned(),
        };
        let pod = containerd
            .cri
            .run_pod_sandbox(request)
            .unwrap()
            .pod_sandbox_id;
        Self {
            containerd,
            world,
            pod,
            config,
        }
    }

    fn create(&self, name: &str, command: &[&str], memory: i64) -> String {
        let config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(v1::ImageSpec {
                image: IMAGE.to_owned(),
                ..Default::default()
            }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(v1::LinuxContainerConfig {
                resources: Some(v1::LinuxContainerResources {
                    memory_limit_in_bytes: memory,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: self.pod.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        self.containerd
            .cri
            .create_container(request)
            .unwrap()
            .container_id
    }

    fn run(&self, name: &str, command: &[&str]) -> String {
        let container_id = self.create(name, command, 0);
        let request = v1::StartContainerRequest {
            container_id: container_id.clone(),
        };
        self.containerd.cri.start_container(request).unwrap();
        container_id
    }

    fn exited(&self, container: &str) -> v1::ContainerStatus {
        eventually("the container's end", SOON, || {
            let request = v1::ContainerStatusRequest {
                container_id: container.to_owned(),
                verbose: false,
            };
            let status = self.containerd.cri.container_status(request).ok()?.status?;
            (status.state() == v1::ContainerState::ContainerExited).then_some(status)
        })
    }

    fn log(&self, name: &str) -> String {
        let path: PathBuf = self
            .world
            .scratch
            .path()
            .join("logs")
            .join(format!("{name}.log"));
        std::fs::read_to_string(path).unwrap_or_default()
    }

    fn address(&self, port: u16) -> SocketAddr {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: self.pod.clone(),
            verbose: false,
        };
        let status = self.containerd.cri.pod_sandbox_status(request).unwrap();
        let ip = status.status.unwrap().network.unwrap().ip;
        SocketAddr::new(ip.parse().unwrap(), port)
    }

    /// Sends `text` to a port of the pod from the node's network; what comes back.
    fn ask(&self, port: u16, text: &str) -> String {
        let address = self.address(port);
        self.containerd.netns().run(|| {
            let mut stream = eventually("the program's socket", SOON, || {
                TcpStream::connect_timeout(&address, SOON).ok()
            });
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream.write_all(text.as_bytes()).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut back = String::new();
            stream.read_to_string(&mut back).unwrap();
            back
        })
    }
}

fn life_of_a_pod(options: &Options) {
    let mut node = Node::new(options);
    let shims = node.containerd.shims();
    let expected = usize::from(options.mode == Mode::Shim);
    assert_eq!(shims.len(), expected, "one for the pod: {shims:?}");
    let say = node.run("say", &["/suite.wasm", "say", "to stdout", "to stderr"]);
    assert_eq!(node.exited(&say).exit_code, 0);
    let log = node.log("say");
    assert!(log.contains(" stdout F to stdout\n"), "{log}");
    assert!(log.contains(" stderr F to stderr\n"), "{log}");
    let fail = node.run("fail", &["/suite.wasm", "exit", "42"]);
    let ended = node.exited(&fail);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (42, "Error"));

    // Servers in the pod's own network, at its address.
    let echo = node.run("echo", &["/echo.wasm", "7007"]);
    assert_eq!(node.ask(7007, "to a pod and back"), "to a pod and back");
    let web = node.run("web", &["/proxy.wasm"]);
    let answer = node.ask(
        8080,
        "GET / HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n",
    );
    assert!(answer.contains("Hello from a component"), "{answer}");

    // What it uses is measured, also for a containerd that was killed and came back.
    node.containerd.restart(Signal::SIGKILL);
    assert_eq!(node.containerd.shims(), shims, "they stay as they are");
    let cri = &node.containerd.cri;
    let request = v1::ContainerStatsRequest {
        container_id: echo.clone(),
    };
    let used = cri.container_stats(request).unwrap().stats.unwrap();
    let memory = used.memory.unwrap().working_set_bytes.unwrap().value;
    assert!(memory >= 64 << 10, "a page at least: {memory}");
    assert!(used.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    assert_eq!(node.ask(7007, "still here"), "still here");

    // Another program beside one that runs.
    let done = cri
        .exec_sync(v1::ExecSyncRequest {
            container_id: echo.clone(),
            cmd: ["/suite.wasm", "env"].map(str::to_owned).into(),
            timeout: 60,
        })
        .unwrap();
    assert_eq!(done.exit_code, 0);
    assert!(String::from_utf8_lossy(&done.stdout).contains("FROM_IMAGE=yes"));

    // A program of Linux has no place here, and says so.
    let linux = node.create("linux", &["/bin/linux"], 0);
    let request = v1::StartContainerRequest {
        container_id: linux,
    };
    let refused = cri.start_container(request).unwrap_err();
    assert!(
        refused.message().contains("a Linux program (ELF)"),
        "{refused}"
    );

    // TERM ends a program; one that serves HTTP first finishes what it has.
    for (container, code) in [(echo, 143), (web, 0)] {
        let request = v1::StopContainerRequest {
            container_id: container.clone(),
            timeout: 30,
        };
        cri.stop_container(request).unwrap();
        assert_eq!(node.exited(&container).exit_code, code);
    }
    let request = v1::StopPodSandboxRequest {
        pod_sandbox_id: node.pod.clone(),
    };
    cri.stop_pod_sandbox(request).unwrap();
    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: node.pod.clone(),
    };
    cri.remove_pod_sandbox(request).unwrap();
    eventually("the end of the pod's shim", SOON, || {
        node.containerd.shims().is_empty().then_some(())
    });
    assert_eq!(node.containerd.leftovers(), [""; 0]);
    drop(node.containerd);
    node.world.before.assert_back(&node.world.daemon);
}

#[test]
fn a_pod_of_the_kubelet_runs_programs_and_leaves_nothing() {
    pod_by(Line::V2, Mode::Proxy, "fifo");
}

#[test]
fn streams_take_the_place_of_fifos() {
    pod_by(Line::V2, Mode::Proxy, "streaming");
}

#[test]
fn containerd_2_runs_programs_through_shims() {
    pod_by(Line::V2, Mode::Shim, "fifo");
}

#[test]
fn containerd_1_7_runs_programs_through_shims() {
    pod_by(Line::V1_7, Mode::Shim, "fifo");
}

fn pod_by(line: Line, mode: Mode, io_type: &'static str) {
    skip_if!(missing());
    skip_if!(line.missing());
    life_of_a_pod(&Options {
        handler: WASM_HANDLER,
        line,
        mode,
        io_type,
        ..Options::default()
    });
}

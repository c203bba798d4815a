//! containerd with `quark-sandboxer` as its sandboxer, used through CRI as the kubelet uses it.

use harness::containerd::{Containerd, Line, Mode, Options, QUARK_HANDLER};
use harness::image::{Image, Layer};
use harness::kubelet::{Kubelet, SOON};
use harness::{eventually, skip_if};
use nix::sys::signal::Signal;
use serde_json::json;

use super::{World, missing};

const IMAGE: &str = "docker.io/library/box:1";

fn life_of_a_pod(options: &Options) {
    let world = World::new();
    let mut containerd = Containerd::start(&world.daemon, options);
    let layer = Layer::new().tree(&world.rootfs, "".as_ref());
    let config = json!({"Env": ["PATH=/bin", "FROM_IMAGE=yes"]});
    let archive = world.scratch.path().join("box.tar");
    containerd.import(
        &Image::new([layer], &config).docker_archive(&archive, IMAGE),
        IMAGE,
    );
    let kubelet = Kubelet {
        cri: containerd.cri(),
        handler: QUARK_HANDLER.to_owned(),
        image: IMAGE.to_owned(),
        logs: world.scratch.path().join("logs"),
    };
    let pod = kubelet.run_pod("first");
    let script = "trap 'echo got TERM; exit 3' TERM; echo $FROM_IMAGE $(hostname); \
                  while :; do sleep 1; done";
    let main = pod.run("main", script);
    kubelet.await_log("main", " stdout F yes first\n");
    let side = pod.run("side", "test -s /etc/hosts && echo failing >&2 && exit 4");
    assert_eq!(kubelet.exited(&side).exit_code, 4);
    kubelet.await_log("side", " stderr F failing\n");
    kubelet.remove_container(&side);

    containerd.restart(Signal::SIGKILL);
    let (stdout, stderr, code) = kubelet.exec(&main, "cat /etc/hostname /etc/resolv.conf; exit 9");
    assert_eq!(
        (stdout.as_str(), code),
        ("first\nsearch svc.local\nnameserver 10.96.0.10\n", 9),
        "{stderr}"
    );
    kubelet.stop_container(&main, 30);
    kubelet.await_log("main", " stdout F got TERM\n");
    assert_eq!(kubelet.exited(&main).exit_code, 3);
    kubelet.stop_pod(&pod.id);
    kubelet.remove_pod(&pod.id);
    eventually("the end of the pod's shim", SOON, || {
        containerd.shims().is_empty().then_some(())
    });
    assert_eq!(containerd.leftovers(), [""; 0]);
    drop(containerd);
    world.before.assert_back(&world.daemon);
}

fn pod_by(line: Line, mode: Mode, io_type: &'static str) {
    skip_if!(missing());
    skip_if!(line.missing());
    life_of_a_pod(&Options {
        handler: QUARK_HANDLER,
        line,
        mode,
        io_type,
        ..Options::default()
    });
}

#[test]
fn a_pod_of_the_kubelet_lives_in_quark_and_leaves_nothing() {
    pod_by(Line::V2, Mode::Proxy, "fifo");
}

#[test]
fn streams_take_the_place_of_fifos() {
    pod_by(Line::V2, Mode::Proxy, "streaming");
}

#[test]
fn containerd_1_7_reaches_quark_through_shims() {
    pod_by(Line::V1_7, Mode::Shim, "fifo");
}

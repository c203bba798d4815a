//! A node: containerd with our daemon as its sandboxer, used as the kubelet does.

use std::ops::Deref;

use harness::containerd::{Containerd, HANDLER, Options};
use harness::image::{Image, Layer};
pub use harness::kubelet::{Kubelet, Pod, SOON};
use serde_json::json;

use crate::World;

const IMAGE: &str = "docker.io/library/box:1";

/// containerd beside the daemon of a [`World`], with an image.
#[derive(Debug)]
pub struct Node {
    /// Who uses it.
    pub kubelet: Kubelet,
    /// containerd, with everything of its pods.
    pub containerd: Containerd,
    /// The daemon.
    pub world: World,
}

impl Deref for Node {
    type Target = Kubelet;

    fn deref(&self) -> &Kubelet {
        &self.kubelet
    }
}

impl Node {
    /// With the daemon's default configuration.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        Self::with_config("", options)
    }

    /// With `config` as the daemon's TOML file.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn with_config(config: &str, options: &Options) -> Self {
        let world = World::with_config(config);
        let containerd = Containerd::start(&world.daemon, options);
        let layer = Layer::new().tree(&world.rootfs, "".as_ref());
        let config = json!({"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Cmd": ["/bin/sleep", "7"]});
        let archive = world.scratch().join("box.tar");
        let archive = Image::new([layer], &config).docker_archive(&archive, IMAGE);
        containerd.import(&archive, IMAGE);
        let kubelet = Kubelet {
            cri: containerd.cri(),
            handler: HANDLER.to_owned(),
            image: IMAGE.to_owned(),
            logs: world.scratch().join("logs"),
        };
        Self {
            kubelet,
            containerd,
            world,
        }
    }

    /// Nothing of any pod is left, around containerd and in the daemon.
    ///
    /// # Panics
    /// When something is.
    #[track_caller]
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

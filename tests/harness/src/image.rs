//! Container images in each form that the CLI reads.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A layer in the making. The same entries make the same bytes.
pub struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layer").finish_non_exhaustive()
    }
}

impl Default for Layer {
    fn default() -> Self {
        Self::new()
    }
}

impl Layer {
    /// A layer without entries.
    #[must_use]
    pub fn new() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
        }
    }

    /// Adds a folder that `uid` owns.
    #[must_use]
    pub fn dir(mut self, name: &str, mode: u32, uid: u64) -> Self {
        let mut header = header(tar::EntryType::Directory, mode, uid);
        let added = self.tar.append_data(&mut header, name, &[][..]);
        added.expect("write to memory");
        self
    }

    /// Adds a file.
    #[must_use]
    pub fn file(mut self, name: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = header(tar::EntryType::Regular, mode, 0);
        header.set_size(content.len() as u64);
        let added = self.tar.append_data(&mut header, name, content);
        added.expect("write to memory");
        self
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn symlink(mut self, name: &str, to: &str) -> Self {
        let mut header = header(tar::EntryType::Symlink, 0o777, 0);
        let added = self.tar.append_link(&mut header, name, to);
        added.expect("write to memory");
        self
    }

    /// Hides what a lower layer has at `dir/name` (OCI image spec, whiteouts).
    #[must_use]
    pub fn whiteout(self, dir: &str, name: &str) -> Self {
        self.file(&format!("{dir}/.wh.{name}"), 0o644, b"")
    }

    /// Adds what is in a folder of the host: folders, files and symbolic links.
    ///
    /// # Panics
    /// When something there cannot be read.
    #[must_use]
    pub fn tree(mut self, top: &Path, below: &Path) -> Self {
        let mut entries: Vec<_> = fs::read_dir(top.join(below))
            .expect("read the folder")
            .map(|entry| entry.expect("read the folder"))
            .collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = below.join(entry.file_name());
            let name = path.to_str().expect("a name in UTF-8");
            let kind = entry.file_type().expect("type of a file");
            let mode = std::os::unix::fs::MetadataExt::mode(&entry.metadata().expect("metadata"));
            self = if kind.is_dir() {
                self.dir(name, mode & 0o7777, 0).tree(top, &path)
            } else if kind.is_symlink() {
                let to = fs::read_link(entry.path()).expect("read a link");
                self.symlink(name, to.to_str().expect("a link in UTF-8"))
            } else {
                self.file(
                    name,
                    mode & 0o7777,
                    &fs::read(entry.path()).expect("read a file"),
                )
            };
        }
        self
    }
}

fn header(kind: tar::EntryType, mode: u32, uid: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(uid);
    header.set_gid(uid);
    header.set_mtime(1_000_000);
    header.set_size(0);
    header
}

/// An image for this machine.
#[derive(Debug)]
pub struct Image {
    layers: Vec<Vec<u8>>,
    config: Vec<u8>,
}

impl Image {
    /// An image of `layers`, lowest first, whose `config` says how to run it.
    ///
    /// # Panics
    /// Never: the layers are in memory.
    #[must_use]
    pub fn new(layers: impl IntoIterator<Item = Layer>, config: &Value) -> Self {
        let layers: Vec<Vec<u8>> = layers
            .into_iter()
            .map(|layer| layer.tar.into_inner().expect("finish the tar"))
            .collect();
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let config = json!({
            "os": "linux",
            "architecture": architecture,
            "config": config,
            "rootfs": {
                "type": "layers",
                "diff_ids": layers.iter().map(|layer| digest(layer)).collect::<Vec<_>>(),
            },
        });
        Self {
            layers,
            config: config.to_string().into_bytes(),
        }
    }

    /// Writes an OCI layout into the folder `to`.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn layout(&self, to: &Path) -> PathBuf {
        fs::create_dir_all(to.join("blobs/sha256")).expect("create the layout");
        let write = |name: &str, content: &[u8]| {
            fs::write(to.join(name), content).expect("write the layout");
        };
        let blob = |media_type: &str, content: &[u8]| {
            let digest = digest(content);
            write(&format!("blobs/{}", digest.replace(':', "/")), content);
            json!({"mediaType": media_type, "digest": digest, "size": content.len()})
        };
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": blob(CONFIG, &self.config),
            "layers": self.layers.iter().map(|layer| blob(LAYER, layer)).collect::<Vec<_>>(),
        });
        let manifest = blob(MANIFEST, manifest.to_string().as_bytes());
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        write("index.json", index.to_string().as_bytes());
        write("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        to.to_owned()
    }

    /// Writes the layout as a tar.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn oci_archive(&self, to: &Path) -> PathBuf {
        let layout = self.layout(&to.with_extension("layout"));
        let mut tar = tar::Builder::new(File::create(to).expect("create the archive"));
        tar.append_dir_all(".", &layout).expect("write the archive");
        tar.finish().expect("write the archive");
        to.to_owned()
    }

    /// Writes what `docker save` wrote before it wrote layouts.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn docker_archive(&self, to: &Path, tag: &str) -> PathBuf {
        let mut tar = tar::Builder::new(File::create(to).expect("create the archive"));
        let mut add = |name: &str, content: &[u8]| {
            let mut header = header(tar::EntryType::Regular, 0o644, 0);
            header.set_size(content.len() as u64);
            let added = tar.append_data(&mut header, name, content);
            added.expect("write the archive");
        };
        let config = format!("{}.json", digest(&self.config).replace("sha256:", ""));
        add(&config, &self.config);
        let mut names = Vec::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let name = format!("layer{number}/layer.tar");
            add(&name, layer);
            names.push(name);
        }
        let manifest = json!([{"Config": config, "RepoTags": [tag], "Layers": names}]);
        add("manifest.json", manifest.to_string().as_bytes());
        tar.finish().expect("write the archive");
        to.to_owned()
    }
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

//! Builds images in memory for tests, hostile ones included.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tar::EntryType;

use super::blob::sha256;
use super::source::host_platform;

/// A layer as a plain tar.
pub(super) struct Layer {
    builder: tar::Builder<Vec<u8>>,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: u64,
}

impl Layer {
    pub(super) fn new() -> Self {
        Self {
            builder: tar::Builder::new(Vec::new()),
            uid: 0,
            gid: 0,
            mtime: 1_000_000,
        }
    }

    fn header(&self, kind: EntryType, mode: u32, size: usize) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(self.uid);
        header.set_gid(self.gid);
        header.set_mtime(self.mtime);
        header.set_size(size as u64);
        header
    }

    /// Any entry, its name taken as it is: the tar library refuses bad ones when writing.
    pub(super) fn raw(mut self, kind: EntryType, name: &str, link: &str, content: &[u8]) -> Self {
        let mut header = self.header(kind, 0o644, content.len());
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.builder.append(&header, content).unwrap();
        self
    }

    pub(super) fn dir(mut self, name: &str, mode: u32) -> Self {
        let mut header = self.header(EntryType::Directory, mode, 0);
        self.builder
            .append_data(&mut header, name, &[][..])
            .unwrap();
        self
    }

    pub(super) fn file(self, name: &str, content: &[u8]) -> Self {
        self.file_mode(name, content, 0o644)
    }

    pub(super) fn file_mode(mut self, name: &str, content: &[u8], mode: u32) -> Self {
        let mut header = self.header(EntryType::Regular, mode, content.len());
        self.builder
            .append_data(&mut header, name, content)
            .unwrap();
        self
    }

    pub(super) fn symlink(mut self, name: &str, target: &str) -> Self {
        let mut header = self.header(EntryType::Symlink, 0o777, 0);
        self.builder.append_link(&mut header, name, target).unwrap();
        self
    }

    pub(super) fn hard_link(mut self, name: &str, target: &str) -> Self {
        let mut header = self.header(EntryType::Link, 0o644, 0);
        self.builder.append_link(&mut header, name, target).unwrap();
        self
    }

    pub(super) fn node(mut self, kind: EntryType, name: &str, major: u32, minor: u32) -> Self {
        let mut header = self.header(kind, 0o620, 0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        self.builder
            .append_data(&mut header, name, &[][..])
            .unwrap();
        self
    }

    /// Extended attributes and other pax records for the next entry.
    pub(super) fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.builder
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        self
    }

    pub(super) fn tar(self) -> Vec<u8> {
        self.builder.into_inner().unwrap()
    }
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

pub(super) fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// An OCI layout in a folder.
pub(super) struct Layout {
    pub(super) dir: PathBuf,
    manifests: Vec<Value>,
}

impl Layout {
    pub(super) fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self {
            dir: dir.to_owned(),
            manifests: Vec::new(),
        }
    }

    pub(super) fn blob_path(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs").join(digest.replace(':', "/"))
    }

    /// Stores a blob; its descriptor.
    pub(super) fn blob(&self, media_type: &str, content: &[u8]) -> Value {
        let digest = sha256(content);
        fs::write(self.blob_path(&digest), content).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": content.len()})
    }

    pub(super) fn config(layers: &[Vec<u8>], architecture: &str, config: &Value) -> Vec<u8> {
        serde_json::to_vec(&json!({
            "os": "linux", "architecture": architecture, "config": config,
            "rootfs": {
                "type": "layers",
                "diff_ids": layers.iter().map(|l| sha256(l)).collect::<Vec<_>>(),
            },
        }))
        .unwrap()
    }

    /// Stores an image of plain layers, each stored as `compress` makes it; its descriptor.
    pub(super) fn image_with(
        &self,
        layers: &[Vec<u8>],
        architecture: &str,
        compress: fn(&[u8]) -> Vec<u8>,
        config: &Value,
    ) -> Value {
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            &Self::config(layers, architecture, config),
        );
        let layers: Vec<Value> = layers
            .iter()
            .map(|l| self.blob("application/vnd.oci.image.layer.v1.tar", &compress(l)))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": layers,
        });
        self.blob(
            "application/vnd.oci.image.manifest.v1+json",
            &serde_json::to_vec(&manifest).unwrap(),
        )
    }

    pub(super) fn image(&self, layers: &[Vec<u8>]) -> Value {
        let config = json!({"Cmd": ["/bin/sh"]});
        self.image_with(layers, host_platform().1, <[u8]>::to_vec, &config)
    }

    pub(super) fn index(&self, manifests: &[Value]) -> Value {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        self.blob(
            "application/vnd.oci.image.index.v1+json",
            &serde_json::to_vec(&index).unwrap(),
        )
    }

    /// Adds a descriptor to `index.json`.
    pub(super) fn add(&mut self, mut descriptor: Value, name: Option<&str>) {
        if let Some(name) = name {
            descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        }
        self.manifests.push(descriptor);
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(self.dir.join("index.json"), index.to_string()).unwrap();
    }

    pub(super) fn reference(&self) -> String {
        self.dir.to_str().unwrap().to_owned()
    }

    /// The layout as an OCI archive.
    pub(super) fn archive(&self, to: &Path) {
        let mut builder = tar::Builder::new(fs::File::create(to).unwrap());
        builder.append_dir_all(".", &self.dir).unwrap();
        builder.finish().unwrap();
    }
}

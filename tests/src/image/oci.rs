//! An OCI image layout in one tar file.

use std::io::{Cursor, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, Header};

use crate::error::{Failure, Result, file};

/// An image: its local name, its layers (plain tar, lowest first) and what it
/// runs when nothing else is said.
pub struct Image {
    /// Full reference; `casemate.test/…` so that it can't be mistaken for a
    /// registry's.
    pub name: String,
    /// Uncompressed layers.
    pub layers: Vec<Vec<u8>>,
    /// Default command.
    pub cmd: Vec<String>,
}

/// Lower-case hex of SHA-256.
pub fn sha256(data: &[u8]) -> String {
    Sha256::digest(data)
        .iter()
        .fold(String::new(), |mut text, byte| {
            text.push_str(&format!("{byte:02x}"));
            text
        })
}

struct Layout {
    tar: Builder<Vec<u8>>,
}

impl Layout {
    fn file(&mut self, path: &str, data: &[u8]) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        self.tar
            .append_data(&mut header, path, Cursor::new(data))
            .map_err(file("add to image layout", Path::new(path)))
    }

    /// Stores a blob once and returns its descriptor (image-spec `descriptor.md`).
    fn blob(&mut self, media_type: &str, data: &[u8]) -> Result<Value> {
        let digest = sha256(data);
        self.file(&format!("blobs/sha256/{digest}"), data)?;
        Ok(json!({
            "mediaType": media_type,
            "digest": format!("sha256:{digest}"),
            "size": data.len()
        }))
    }
}

fn gzip(data: &[u8]) -> Result<Vec<u8>> {
    let failed = |e| Failure::Unexpected(format!("compress layer: {e}"));
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).map_err(failed)?;
    encoder.finish().map_err(failed)
}

impl Image {
    /// The whole layout as a tar stream.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let mut layout = Layout {
            tar: Builder::new(Vec::new()),
        };
        layout.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let mut layers = Vec::new();
        let mut ids = Vec::new();
        for layer in &self.layers {
            ids.push(format!("sha256:{}", sha256(layer)));
            let packed = gzip(layer)?;
            layers.push(layout.blob("application/vnd.oci.image.layer.v1.tar+gzip", &packed)?);
        }
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": {
                "Cmd": self.cmd,
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
            },
            "rootfs": {"type": "layers", "diff_ids": ids}
        });
        let config = layout.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        )?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers
        });
        let mut manifest = layout.blob(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.to_string().as_bytes(),
        )?;
        manifest["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": "latest"
        });
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        layout.file("index.json", index.to_string().as_bytes())?;
        layout
            .tar
            .into_inner()
            .map_err(|e| Failure::Unexpected(format!("finish image {}: {e}", self.name)))
    }
}

//! An OCI image layout, as files or in one tar file.

use std::collections::BTreeMap;
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
    /// What the command is given to.
    pub entrypoint: Vec<String>,
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

/// Paths of an image layout, with what is there (image-spec `image-layout.md`).
#[derive(Default)]
struct Layout(BTreeMap<String, Vec<u8>>);

impl Layout {
    /// Stores a blob once and returns its descriptor (image-spec `descriptor.md`).
    fn blob(&mut self, media_type: &str, data: Vec<u8>) -> Value {
        let digest = sha256(&data);
        let size = data.len();
        self.0.insert(format!("blobs/sha256/{digest}"), data);
        json!({
            "mediaType": media_type,
            "digest": format!("sha256:{digest}"),
            "size": size
        })
    }
}

fn gzip(data: &[u8]) -> Result<Vec<u8>> {
    let failed = |e| Failure::Unexpected(format!("compress layer: {e}"));
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).map_err(failed)?;
    encoder.finish().map_err(failed)
}

impl Image {
    /// The files of its layout. The same image is the same bytes: nothing in them is of
    /// the time or the place at which they were made.
    ///
    /// # Errors
    /// A layer can't be compressed.
    pub fn layout(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut layout = Layout::default();
        let mut layers = Vec::new();
        let mut ids = Vec::new();
        for layer in &self.layers {
            ids.push(format!("sha256:{}", sha256(layer)));
            let packed = gzip(layer)?;
            layers.push(layout.blob("application/vnd.oci.image.layer.v1.tar+gzip", packed));
        }
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let mut run = json!({
            "Cmd": self.cmd,
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        });
        if !self.entrypoint.is_empty() {
            run["Entrypoint"] = json!(self.entrypoint);
        }
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": run,
            "rootfs": {"type": "layers", "diff_ids": ids}
        });
        let config = layout.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().into_bytes(),
        );
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers
        });
        let mut manifest = layout.blob(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.to_string().into_bytes(),
        );
        let (_, tag) = self.name.rsplit_once(':').unwrap_or(("", "latest"));
        manifest["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": tag
        });
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        let mut files = layout.0;
        files.insert("index.json".to_owned(), index.to_string().into_bytes());
        let mark = br#"{"imageLayoutVersion":"1.0.0"}"#;
        files.insert("oci-layout".to_owned(), mark.to_vec());
        Ok(files)
    }

    /// The whole layout as a tar stream.
    ///
    /// # Errors
    /// It can't be packed.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let mut tar = Builder::new(Vec::new());
        for (path, data) in self.layout()? {
            let mut header = Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(data.len() as u64);
            tar.append_data(&mut header, &path, Cursor::new(data))
                .map_err(file("add to image layout", Path::new(&path)))?;
        }
        tar.into_inner()
            .map_err(|e| Failure::Unexpected(format!("finish image {}: {e}", self.name)))
    }
}

//! One image layer as an uncompressed tar stream (image-spec `layer.md`).

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;

use tar::{Builder, EntryType, Header};

use crate::error::{Failure, Result, file};

/// Seconds since the epoch on every file, so that equal layers have equal digests.
const MTIME: u64 = 1_700_000_000;

/// A layer under construction.
pub struct Layer {
    tar: Builder<Vec<u8>>,
    mtime: u64,
}

impl Default for Layer {
    fn default() -> Self {
        Self {
            tar: Builder::new(Vec::new()),
            mtime: MTIME,
        }
    }
}

/// Owner and mode of a file.
#[derive(Clone, Copy)]
pub struct Meta {
    /// Mode bits, setuid and the like included.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
}

/// Owned by root, with this mode.
pub fn mode(mode: u32) -> Meta {
    Meta {
        mode,
        uid: 0,
        gid: 0,
    }
}

impl Layer {
    /// With another time on every file, in seconds since the epoch.
    #[must_use]
    pub fn at(mut self, mtime: u64) -> Self {
        self.mtime = mtime;
        self
    }

    fn header(&self, kind: EntryType, meta: Meta, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(meta.mode);
        header.set_uid(meta.uid);
        header.set_gid(meta.gid);
        header.set_mtime(self.mtime);
        header.set_size(size);
        header
    }

    fn put(&mut self, path: &str, mut header: Header, data: &[u8]) -> Result<()> {
        self.tar
            .append_data(&mut header, path, Cursor::new(data))
            .map_err(file("add to layer", Path::new(path)))
    }

    /// A directory.
    pub fn dir(&mut self, path: &str, meta: Meta) -> Result<&mut Self> {
        let header = self.header(EntryType::Directory, meta, 0);
        self.put(path, header, &[])?;
        Ok(self)
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, meta: Meta, data: &[u8]) -> Result<&mut Self> {
        let header = self.header(EntryType::Regular, meta, data.len() as u64);
        self.put(path, header, data)?;
        Ok(self)
    }

    /// A regular file with extended attributes (pax `SCHILY.xattr.*` records).
    pub fn file_with_xattrs(
        &mut self,
        path: &str,
        meta: Meta,
        data: &[u8],
        xattrs: &BTreeMap<&str, Vec<u8>>,
    ) -> Result<&mut Self> {
        let named: Vec<(String, &[u8])> = xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.as_slice()))
            .collect();
        self.tar
            .append_pax_extensions(named.iter().map(|(name, value)| (name.as_str(), *value)))
            .map_err(file("add attributes to layer", Path::new(path)))?;
        self.file(path, meta, data)
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        self.link(EntryType::Symlink, path, target)
    }

    /// A hard link to a file that is in this layer already.
    pub fn hard_link(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        self.link(EntryType::Link, path, target)
    }

    fn link(&mut self, kind: EntryType, path: &str, target: &str) -> Result<&mut Self> {
        let mut header = self.header(kind, mode(0o777), 0);
        self.tar
            .append_link(&mut header, path, target)
            .map_err(file("add link to layer", Path::new(path)))?;
        Ok(self)
    }

    /// Marks `dir/name` of lower layers as deleted.
    pub fn whiteout(&mut self, dir: &str, name: &str) -> Result<&mut Self> {
        self.file(&format!("{dir}/.wh.{name}"), mode(0o644), &[])
    }

    /// Hides all that lower layers have in `dir`.
    pub fn opaque(&mut self, dir: &str) -> Result<&mut Self> {
        self.file(&format!("{dir}/.wh..wh..opq"), mode(0o644), &[])
    }

    /// The finished tar stream.
    pub fn finish(self) -> Result<Vec<u8>> {
        self.tar
            .into_inner()
            .map_err(|e| Failure::Unexpected(format!("finish layer: {e}")))
    }
}

/// Unpacks one layer without whiteouts into `dir`, owners and attributes kept.
pub fn unpack(layer: &[u8], dir: &Path) -> Result<()> {
    let mut archive = tar::Archive::new(Cursor::new(layer));
    archive.set_preserve_ownerships(true);
    archive.set_preserve_permissions(true);
    archive.set_unpack_xattrs(true);
    archive.unpack(dir).map_err(file("unpack layer into", dir))
}

//! containerd as it is on this node, for who only looks.

use std::path::PathBuf;

use super::Node;
use super::containerd::{self, Release};
use super::effective::Effective;
use super::layout::{ConfigFile, Layout};
use crate::error::RunError;

/// What is known of it.
pub struct Facts {
    /// Its program.
    pub program: PathBuf,
    /// Which release that is.
    pub release: Release,
    /// Its socket.
    pub address: PathBuf,
    /// Its configuration's file, which may not exist.
    pub config: PathBuf,
    /// What that comes to.
    pub effective: Result<Effective, RunError>,
}

/// Where to look, if not at the usual places.
#[derive(Debug, Default)]
pub struct Places {
    /// containerd's program.
    pub program: Option<PathBuf>,
    /// Its configuration.
    pub config: Option<PathBuf>,
    /// Its socket.
    pub address: Option<PathBuf>,
}

/// Looks; an error if there is none, or none that will do.
pub fn facts(places: Places, handler: &str) -> Result<Facts, RunError> {
    let layout = Layout::new(&Node {
        root: None,
        host_root: None,
        machine_id: None,
        prefix: None,
        state: None,
        links: None,
        containerd: places.program,
        config: places.config,
        address: places.address,
        handler: handler.to_owned(),
    })?;
    let config = match layout.config {
        ConfigFile::Plain(path) => path,
        ConfigFile::Template(dir) => dir.join("config.toml"),
    };
    let release = containerd::release(&layout.containerd)?;
    let path = config.exists().then_some(config.as_path());
    let effective =
        containerd::effective(&layout.containerd, path).and_then(|text| Effective::parse(&text));
    Ok(Facts {
        program: layout.containerd,
        release,
        address: layout.address,
        config,
        effective,
    })
}

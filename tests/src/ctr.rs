//! `ctr`, the client that comes with containerd.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::error::{Result, file};
use crate::image::Image;
use crate::run::{Output, run};

/// `ctr` bound to one daemon and one namespace.
#[derive(Clone)]
pub struct Ctr {
    address: PathBuf,
    namespace: String,
    path: Option<String>,
}

impl Ctr {
    /// For the daemon at `address`.
    pub fn new(address: &Path, namespace: &str) -> Self {
        Self {
            address: address.to_owned(),
            namespace: namespace.to_owned(),
            path: None,
        }
    }

    /// The `ctr` that this PATH leads to: the daemon's own.
    pub fn with_path(mut self, path: &str) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    /// The program: resolved here, as spawning looks at our own PATH.
    fn program(&self) -> PathBuf {
        self.path
            .as_deref()
            .unwrap_or_default()
            .split(':')
            .map(|dir| Path::new(dir).join("ctr"))
            .find(|path| path.exists())
            .unwrap_or_else(|| PathBuf::from("ctr"))
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The command `ctr …args`, not started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.program());
        command
            .arg("-a")
            .arg(&self.address)
            .args(["-n", &self.namespace])
            .args(args);
        command
    }

    /// Runs `ctr …args`.
    pub fn run(&self, args: &[&str], limit: Duration) -> Result<Output> {
        run(&mut self.command(args), &[], limit)
    }

    /// `ctr run --rm` of `image` with the runtime `runtime`.
    pub fn run_task(
        &self,
        runtime: &str,
        flags: &[&str],
        image: &str,
        id: &str,
        args: &[&str],
        limit: Duration,
    ) -> Result<Output> {
        let mut all = vec!["run", "--rm", "--runtime", runtime];
        all.extend(flags);
        all.extend([image, id]);
        all.extend(args);
        self.run(&all, limit)
    }

    /// Imports an image from memory, by way of a file in `scratch`.
    pub fn import(&self, image: &Image, scratch: &Path) -> Result<()> {
        let safe = image.name.replace(['/', ':'], "_");
        let path = scratch.join(format!("{safe}.tar"));
        std::fs::write(&path, image.archive()?).map_err(file("write", &path))?;
        let shown = path.display().to_string();
        let done = self
            .run(
                &["image", "import", "--all-platforms", &shown],
                Duration::from_secs(120),
            )?
            .ok();
        let _ = std::fs::remove_file(&path);
        done.map(|_| ())
    }

    /// Kills and removes every task and container of the namespace.
    pub fn clear(&self) {
        let limit = Duration::from_secs(10);
        let list = |args: &[&str]| self.run(args, limit).map(|o| o.out()).unwrap_or_default();
        for id in list(&["task", "ls", "-q"]).lines() {
            let _ = self.run(&["task", "kill", "-s", "SIGKILL", id], limit);
            let _ = self.run(&["task", "delete", "-f", id], limit);
        }
        for id in list(&["container", "ls", "-q"]).lines() {
            let _ = self.run(&["container", "delete", id], limit);
        }
    }
}

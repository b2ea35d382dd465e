//! `ctr`, the client that comes with containerd.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::error::{Failure, Result, file};
use crate::image::Image;
use crate::run::{Output, run, until};
use crate::{leaks, operator};

/// For what takes its time on a busy machine.
const LONG: Duration = Duration::from_secs(60);

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
        // Two trials may import the same image at a time.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let safe = image.name.replace(['/', ':'], "_");
        let path = scratch.join(format!("{safe}-{n}.tar"));
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

/// A task that `ctr run -d` has made; it runs until it is removed.
pub struct Detached {
    ctr: Ctr,
    /// Its id.
    pub id: String,
    /// [`Detached::remove`] fails if its pod isn't as its shim promised.
    pub posture: bool,
}

impl Detached {
    /// Starts one of `image`; `flags` are those of `ctr run`.
    pub fn start(
        ctr: &Ctr,
        runtime: &str,
        flags: &[&str],
        image: &str,
        id: &str,
        args: &[&str],
    ) -> Result<Self> {
        let mut all = vec!["run", "-d", "--runtime", runtime];
        all.extend(flags);
        all.extend([image, id]);
        all.extend(args);
        // Output goes nowhere: with -d, ctr's own fifos end with it.
        let done = ctr
            .command(&all)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map_err(file("run", Path::new("ctr")))?;
        if !done.success() {
            return Err(Failure::Unexpected(format!("ctr run -d {id}: {done}")));
        }
        Ok(Self {
            ctr: ctr.clone(),
            id: id.to_owned(),
            posture: runtime.contains("casemate"),
        })
    }

    /// Runs `ctr task …args`.
    pub fn task(&self, args: &[&str]) -> Result<Output> {
        self.ctr.run(&[&["task"], args].concat(), LONG)
    }

    /// Its line of `ctr task ls`: id, pid, state; empty if there is none.
    pub fn line(&self) -> Result<Vec<String>> {
        let text = self.task(&["ls"])?.ok()?.out();
        let line = text.lines().find(|line| line.starts_with(&self.id));
        let words = line.unwrap_or_default().split_whitespace();
        Ok(words.map(str::to_owned).collect())
    }

    /// Removes the task, whose pod must be as promised until then, and its container;
    /// nothing of it may be left on the host.
    pub fn remove(self) -> Result<()> {
        if self.posture {
            operator::expect_pod_as_promised(&self.id)?;
        }
        let _ = self.task(&["kill", "-s", "SIGKILL", &self.id])?;
        until("the task to stop", LONG, || {
            self.line()
                .is_ok_and(|line| line.last().is_none_or(|state| state == "STOPPED"))
        })?;
        // Its exit code is init's.
        let _ = self.task(&["delete", &self.id])?;
        self.ctr
            .run(&["container", "delete", &self.id], LONG)?
            .ok()?;
        leaks::expect_none(&self.id, Duration::from_secs(5))
    }
}
